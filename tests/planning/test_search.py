"""A plan that grows: what a search runs next, by the rankings that are made."""

import json
from pathlib import Path

import pytest

from temper.commands.explain import explain
from temper.commands.plan import describe
from temper.errors import UserError
from temper.folders import PROVENANCE
from temper.planning import planner
from temper.planning.plan import RANKING
from tests.support.trainings import assert_equal, train

RATES = "train.learning_rate=1e-4,2e-4,3e-4,4e-4"
SFT_FIRST = ("experiment=sft_dpo", "~method.sft.train.num_train_epochs")
HALVING = ["sweep.strategy=halving", RATES, "train.num_train_epochs=2"]


def growing(*overrides: str, sweep: str | None = "none") -> planner.Growing:
    return planner.growing("smoke", sweep, list(overrides))


def rate(run) -> float:
    return run.config["train"]["learning_rate"]


def rank(plan, value=rate, loss=rate, gained=lambda run: True) -> None:  # noqa: ARG005
    """Write the ranking that a plan waits for."""
    folder = Path(plan.ranking.path)
    folder.mkdir(parents=True)
    of_runs = {"values": value, "losses": loss}
    content = {name: {run.name: figure(run) for run in plan.runs} for name, figure in of_runs.items()}
    content |= {"metric": "accuracy", "gained": [run.name for run in plan.runs if gained(run)]}
    best = max(plan.runs, key=lambda run: content["values"][run.name] or 0).name
    (folder / RANKING).write_text(json.dumps({**content, "chosen": best, "tested": [best]}))
    (folder / PROVENANCE).write_text("{}")


def points(plan) -> list[tuple]:
    return [tuple(run.point.values()) for run in plan.runs]


def grown(found: planner.Growing, **how) -> planner.Growing:
    """Ranked until nothing follows."""
    rank(found.plan, **how)
    while found.goes_on():
        rank(found.plan, **how)
    return found


def test_halving_trains_the_better_half_on(workspace):
    found = growing(*HALVING)
    assert points(found.plan) == [(1e-4, 0.5), (2e-4, 0.5), (3e-4, 0.5), (4e-4, 0.5)]
    assert found.plan.coming == [
        {"runs": 2, "train.num_train_epochs": "1"},
        {"runs": 1, "train.num_train_epochs": "2"},
    ]
    assert "then, by the ranking 2 of num_train_epochs=1, 1 of num_train_epochs=2" in describe(found.plan)
    assert "the search goes on, and then" in explain(found.plan)
    likely = found.likely()
    assert points(likely)[4:] == [(1e-4, 1), (2e-4, 1), (1e-4, 2)], "as if the first were the best"
    assert explain(found.plan, 2, likely).endswith("the forecast is with these\nforecast: nothing to go by yet")
    assert len(found.plan.runs) == 4
    assert not found.goes_on(), "nothing is ranked yet"
    rank(found.plan)
    assert found.goes_on() and points(found.plan)[4:] == [(4e-4, 1), (3e-4, 1)]
    rank(found.plan)
    assert found.goes_on() and points(found.plan)[6:] == [(4e-4, 2)] and not found.plan.coming
    rank(found.plan)
    assert not found.goes_on()
    assert found.plan.axes["train.num_train_epochs"] == ["0.5", "1", "2"]


def test_halving_goes_by_the_loss_where_no_gain_is_seen(workspace):
    """The best by accuracy are those that have changed least, as long as none has learned the task."""
    found = growing(*HALVING)
    rank(found.plan, loss=lambda run: -rate(run) if rate(run) < 4e-4 else 1, gained=lambda run: False)  # noqa: ARG005
    assert found.goes_on() and points(found.plan)[4:] == [(3e-4, 1), (2e-4, 1)]
    found = growing(*HALVING, "sweep.name=one")
    rank(found.plan, gained=lambda run: rate(run) == 2e-4, loss=rate)
    assert found.goes_on() and points(found.plan)[4:] == [(2e-4, 1), (1e-4, 1)], "the one that gained is before all"
    assert not found.search.told.keys() - found.names.keys() and min(found.search.told.values()) == -4e-4, "the metric"


def test_a_survivor_goes_on_from_its_rung(workspace):
    plan = grown(growing(*HALVING)).plan
    last = plan.runs[-1]
    ends = [plan.jobs[path].config["train"]["num_train_epochs"] for path in last.segments]
    assert ends == [0.5, 1, 2]
    assert [plan.jobs[path].inputs.get("previous") for path in last.segments] == [None, *last.segments[:-1]]
    assert len({plan.jobs[path].settings["trunk"] for path in last.segments}) == 1
    assert len([job for job in plan.jobs.values() if job.stage == "train_adapter"]) == 4 + 2 + 1
    alone = growing("train.learning_rate=4e-4", "train.num_train_epochs=2").plan.runs[0]
    assert (alone.name, alone.segments[-1]) == (last.name, last.segments[-1]), "the run that it is without a search"


def test_a_new_command_finds_where_the_search_was(workspace):
    found = growing(*HALVING)
    rank(found.plan)
    found.goes_on()
    again = growing(*HALVING).plan
    assert again.runs == found.plan.runs and again.jobs == found.plan.jobs and again.coming == found.plan.coming
    assert planner.build("smoke", "none", HALVING).runs == again.runs


def test_an_extended_search_and_another_eta_repeat_nothing(workspace):
    space = ["sweep.strategy=halving", "train.learning_rate=tag(log,interval(1e-5,1e-2))", "sweep.rungs=[1,2,4]"]
    before = {run.name for run in grown(growing(*space, "sweep.n=8")).plan.runs}
    for more, new in ((["sweep.n=16"], 8), (["sweep.n=8", "sweep.eta=4"], 0)):
        first = {run.name for run in growing(*space, *more).plan.runs}
        assert len(first - before) == new
    other = {run.name for run in grown(growing(*space, "sweep.n=8", "sweep.eta=4")).plan.runs}
    assert other < before, "the best of 8 at rung 2 and none at rung 4 are among those of eta=2"


def test_points_are_ranked_by_the_mean_of_their_seeds(workspace):
    values = {(1e-4, 42): 0.9, (1e-4, 43): 0.1, (2e-4, 42): 0.6, (2e-4, 43): 0.6}
    found = growing("sweep.strategy=halving", "train.learning_rate=1e-4,2e-4", "sweep.seeds=2", "sweep.rungs=[1,2]")
    rank(found.plan, lambda run: values[run.config["train"]["learning_rate"], run.config["seed"]])
    assert found.goes_on() and points(found.plan)[4:] == [(2e-4, 2, 42), (2e-4, 2, 43)]


def test_a_diverged_run_is_the_worst(workspace):
    found = growing(*HALVING)
    rank(found.plan, lambda run: None if run.config["train"]["learning_rate"] > 2e-4 else 0.5)
    assert found.goes_on() and points(found.plan)[4:] == [(1e-4, 1), (2e-4, 1)]


def test_tpe_asks_by_what_is_known(workspace):
    space = ["sweep.strategy=tpe", "sweep.n=6", "sweep.points_per_round=2", "train.learning_rate=interval(1e-4,1e-2)"]
    found = growing(*space)
    assert len(found.plan.runs) == 4 and found.plan.coming == [{"runs": 2}]
    assert "then, by the ranking 2 more" in describe(found.plan)
    grown(found)
    assert len(found.plan.runs) == 6
    assert growing(*space).plan.runs == found.plan.runs
    found.write_study(Path("study.db"))
    assert Path("study.db").is_file()


def test_a_decay_branches_off_at_each_rung(workspace):
    plan = growing("sweep.strategy=halving", "train=warmup_stable_decay", RATES, "sweep.rungs=[0.5,1]").plan
    parts = [plan.jobs[path].settings.get("part") for path in plan.runs[0].segments]
    assert parts == ["plateau", None]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.lr_scheduler_type=cosine",), "lr_scheduler_type=cosine depends on the total: choose constant_with"),
        (("train.lr_scheduler_type=constant,cosine",), "lr_scheduler_type=cosine depends on the total"),
        (("train.warmup_steps=0.1",), "train.warmup_steps=0.1 is a share of the total: give a number of steps"),
        (("sweep.rungs=[1,2]",), "sweep.rungs and an axis"),
        (("eval.split=test",), "round after round, which flatters what it chooses: rank by eval.split=validation"),
        (SFT_FIRST, "which method.sft would take over, .* set method.sft.train.num_train_epochs"),
        (("sweep.strategy=grid", "sweep.rungs=[1]"), "'rungs' is for strategy 'halving' and 'tpe'"),
    ],
)
def test_what_cannot_be_cut_is_refused(workspace, overrides, message):
    experiment = [text.partition("=")[2] for text in overrides if text.startswith("experiment=")] or ["smoke"]
    given = [text for text in overrides if not text.startswith("experiment=")]
    with pytest.raises(UserError, match=message):
        planner.build(experiment[0], "none", ["sweep.strategy=halving", RATES, "train.num_train_epochs=1,2", *given])


def test_what_a_message_proposes_is_taken(workspace):
    growing(*HALVING, "train=warmup_stable_decay")
    growing(*HALVING, "train.lr_scheduler_type=constant_with_warmup")
    rungs = ["sweep.strategy=halving", "sweep.rungs=[1,2]"]
    with pytest.raises(UserError, match=r"a fixed value, train.num_train_epochs=2, takes the axis out"):
        planner.build("demo", None, rungs)
    planner.build("demo", None, [*rungs, "train.num_train_epochs=2"])
    planner.build("sft_dpo", "none", ["sweep.strategy=halving", RATES, "method.sft.train.num_train_epochs=2"])


@pytest.mark.parametrize("ends", [("num_train_epochs", 0.3, 1, 1.5), ("max_steps", 2, 7, 9)])
def test_a_training_that_went_from_rung_to_rung_equals_one_that_did_not(workspace, tiny_splits, tiny_model, ends):
    field, *rungs = ends
    for rung in rungs:
        on = train(tiny_splits, tiny_model, f"to-{rung}", f"train.{field}={rung}", trunk="shared")
    assert json.loads(Path(f"to-{rungs[-1]}", PROVENANCE).read_text())["trained_steps"] in (2, 3), "the last part alone"
    assert_equal(on, train(tiny_splits, tiny_model, "alone", f"train.{field}={rungs[-1]}", trunk="alone"))
