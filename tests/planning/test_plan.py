"""Plan: which runs and artefacts a sweep has, and what an edit changes in their keys."""

import json
import re
import shutil
from pathlib import Path

import pytest

from steps import tokenize_splits
from temper.config import compose
from temper.errors import UserError
from temper.planning import plan as planning
from temper.planning import planner
from tests.support import finished


def build(*overrides, experiment="demo", sweep=None):
    return planner.build(experiment, sweep, list(overrides))


def keys(plan):
    """stage -> set of paths, for comparing two plans."""
    found = {}
    for job in plan.jobs.values():
        found.setdefault(job.stage, set()).add(job.path)
    return found


def changed(before, after):
    """Stages that would make something new."""
    old, new = keys(before), keys(after)
    return {stage for stage in new if new[stage] - old.get(stage, set())}


def test_the_demo_is_eight_runs_over_four_trunks(workspace):
    plan = build()
    assert len(plan.runs) == 8
    assert len({run.name for run in plan.runs}) == 8
    counts = {stage: len(paths) for stage, paths in keys(plan).items()}
    assert counts == {
        "fetch_data": 2,  # and the probe's text
        "fetch_model": 1,
        "format_prompts": 1,
        "tokenize_splits": 1,
        "train_adapter": 8,  # 4 trunks x 2 epochs, each epoch once
        "merge_adapter": 8,
        "evaluate_model": 18,  # and the untouched model, on validation and on the test split
        "rank_runs": 1,
        "score_rows": 8,  # of which the chosen run's is made
        "compare_runs": 1,
    }


OF_A_MODEL = {"merge_adapter", "evaluate_model", "rank_runs", "score_rows"}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("train.learning_rate=5e-4", {"train_adapter", *OF_A_MODEL}),
        ("seed=7", {"train_adapter", *OF_A_MODEL}),
        ("eval.max_new_tokens=9", {"evaluate_model", "rank_runs"}),
        (
            "tokenize.max_length=99",
            {"tokenize_splits", "train_adapter", *OF_A_MODEL},
        ),
        ("tokenize.max_share.dropped=0.5", set()),
        ("merge.dtype=float32", OF_A_MODEL),
        ("eval.suspects=9", {"score_rows", "rank_runs"}),
        ("tracking.experiment_name=other", set()),
        ("tracking=none", set()),
        ("train.logging_steps=3", set()),
        ("train.save_total_limit=9", set()),
        (
            "prompt.system=Other",
            {"format_prompts", "tokenize_splits", "train_adapter", *OF_A_MODEL},
        ),
        (
            "data.splits.test=0.3",
            {"format_prompts", "tokenize_splits", "train_adapter", *OF_A_MODEL},
        ),
    ],
)
def test_an_edit_changes_just_the_stages_that_see_it(workspace, override, stages):
    fixed = ["sweep=none", "train.num_train_epochs=1"]
    assert changed(build(*fixed), build(*fixed, override)) - {"compare_runs"} == stages


def test_rows_that_were_tokenized_under_other_limits_are_judged_by_those_of_the_plan(workspace, finished_run):
    """Without tokenizing or training again."""
    audit = json.loads((finished_run / finished.PARTS["tokenize_splits"] / "audit.json").read_text())
    options = ["sweep=none", f"tokenize.max_length={audit['splits']['train']['quantiles']['0.9'] - 1}"]
    made = build(*options, experiment="smoke").runs[0].artefacts
    prompts, model, splits = (made[stage] for stage in ("format_prompts", "fetch_model", "tokenize_splits"))
    finished.put(finished_run, {"format_prompts": prompts, "fetch_model": model})
    shutil.copy(finished_run / "reviews.jsonl", "reviews.jsonl")
    inputs = ["--prompts", prompts, "--model", model, "--output", splits, "experiment=smoke", *options]
    tokenize_splits.main([*inputs, "tokenize.max_share.dropped=null"])
    loose = build(*options, "tokenize.max_share.dropped=0.9", experiment="smoke")
    assert loose.runs[0].artefacts == made
    with pytest.raises(UserError, match=r"rows of train .*max_share\.dropped=0\.1; the first: reviews\.jsonl:\d+, "):
        build(*options, experiment="smoke")


def test_a_training_knows_all_evaluations_of_what_it_makes(workspace):
    """To refuse before it what they would refuse after it."""
    plan = build("sweep=none", "train.num_train_epochs=1", "eval.max_new_tokens=4,8", experiment="sft_dpo")
    trainings = [job for job in plan.jobs.values() if job.stage == "train_adapter"]
    assert len(trainings) == 2
    for job in trainings:
        assert [one["max_new_tokens"] for one in job.settings["evaluations"]] == [4, 8]
        assert job.settings["max_new_tokens"] == 8
        assert job.settings["evaluations"][0]["labels"] == ["negative", "positive"]


def test_preference_optimization_adds_one_stage_that_a_sweep_shares(workspace):
    plan = build("method.beta=0.1,0.3", "adapter.r=4,8", "train.learning_rate=1e-4,2e-4", experiment="dpo")
    counts = {stage: len(paths) for stage, paths in keys(plan).items()}
    assert (len(plan.runs), counts["train_adapter"], counts["reference_logprobs"]) == (8, 8, 1)
    reference = next(job for job in plan.jobs.values() if job.stage == "reference_logprobs")
    for job in plan.jobs.values():
        if job.stage == "train_adapter":
            assert job.inputs["references"] == reference.path
    assert "reference_logprobs" not in keys(build())


def test_only_methods_with_a_reference_compute_one(workspace):
    for method in ("orpo", "simpo"):
        plan = build("method.beta=0.1,0.3", experiment=method)
        assert "reference_logprobs" not in keys(plan)
        assert not any("references" in job.inputs for job in plan.jobs.values())
    plan = build("method.beta=0.1,0.3", "train.per_device_train_batch_size=4,8", experiment="kto")
    [reference] = [job for job in plan.jobs.values() if job.stage == "reference_logprobs"]
    assert {job.inputs["references"] for job in plan.jobs.values() if job.stage == "train_adapter"} == {reference.path}
    assert reference.path not in build(experiment="dpo").jobs
    labelled = build("data.rejected_from=null", "data.label=rating", experiment="kto")
    asking = {job.stage for job in labelled.jobs.values() if "references" in job.inputs}
    assert asking == {"train_adapter"}, "single answers have no pair to judge"


def test_all_parameters_are_compared_with_a_reference_in_their_own_precision(workspace):
    def precision(*overrides):
        jobs = build(*overrides, experiment="dpo").jobs.values()
        return next(job.config["model"]["load"]["dtype"] for job in jobs if job.stage == "reference_logprobs")

    assert precision() == "fastest"
    assert precision("adapter=full") == "float32"


def test_fine_tuning_comes_first_and_is_the_plain_one(workspace):
    plan = build(experiment="sft_dpo")
    alone = build(
        "method=sft", "~method.sft", "train.learning_rate=1e-3", "train.num_train_epochs=1", experiment="sft_dpo"
    )
    (run,), (first,) = plan.runs, alone.runs
    training = plan.jobs[run.artefacts["train_adapter"]]
    assert training.inputs["model"] == first.artefacts["merge_adapter"], "it starts from the merged model"
    assert plan.jobs[training.inputs["references"]].inputs["model"] == first.artefacts["merge_adapter"]
    assert plan.jobs[run.artefacts["merge_adapter"]].inputs["model"] == first.artefacts["merge_adapter"]
    assert run.artefacts["start_report"] == first.artefacts["evaluate_model"]
    assert keys(alone)["train_adapter"] < keys(plan)["train_adapter"], "the fine-tuning alone is the same artefact"


def test_documents_come_first(workspace):
    """Trained on by themselves; what that gives is judged on both, and is what fine-tuning starts from."""
    plan = build(experiment="documents_sft")
    alone = build(
        "data=editorials",
        "~data.limit",
        "eval=documents",
        "prompt.system=null",
        "tokenize.max_length=256",
        "~method.first",
        "train.learning_rate=5e-4",
        experiment="documents_sft",
    )
    (run,), (first,) = plan.runs, alone.runs
    training, report = plan.jobs[run.artefacts["train_adapter"]], plan.jobs[run.artefacts["evaluate_model"]]
    assert training.inputs["model"] == first.artefacts["merge_adapter"]
    assert keys(alone)["train_adapter"] < keys(plan)["train_adapter"], "the documents alone are the same artefact"
    assert keys(alone)["tokenize_splits"] < keys(plan)["tokenize_splits"]
    documents, start = plan.jobs[report.inputs["first_report"]], plan.jobs[report.inputs["start_report"]]
    assert documents.inputs["splits"] == first.artefacts["tokenize_splits"] != run.artefacts["tokenize_splits"]
    assert start.inputs["splits"] == run.artefacts["tokenize_splits"]
    assert start.inputs["model"] == documents.inputs["model"] == first.artefacts["merge_adapter"]
    assert documents.config["eval"]["task"] == "documents"


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("method.first.train.learning_rate=2e-3", {"train_adapter": 2, "tokenize_splits": 0}),
        ("method.first.tokenize.max_length=99", {"train_adapter": 2, "tokenize_splits": 1}),
        ("method.first.limit=50", {"train_adapter": 2, "tokenize_splits": 1}),
        ("train.learning_rate=2e-4", {"train_adapter": 1, "tokenize_splits": 0}),
        ("method.first.train.logging_steps=7", {"train_adapter": 0, "tokenize_splits": 0}),
    ],
)
def test_an_edit_to_documents_that_come_first(workspace, override, again):
    before, after = (build(*more, experiment="documents_sft") for more in ((), (override,)))
    found = {stage: len(keys(after)[stage] - keys(before)[stage]) for stage in again}
    assert found == again


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("method.sft.train.learning_rate=2e-3", 2),  # both trainings
        ("method.sft.adapter={r:4}", 2),
        ("method.beta=0.3", 1),
        ("train.learning_rate=2e-4", 1),
        ("method.sft.train.logging_steps=7", 0),
    ],
)
def test_an_edit_to_one_of_two_trainings(workspace, override, again):
    before, after = build(experiment="sft_dpo"), build(override, experiment="sft_dpo")
    assert len(keys(after)["train_adapter"] - keys(before)["train_adapter"]) == again


def test_equal_values_are_one_run(workspace):
    assert len(build("sweep=none", "train.learning_rate=1e-4,0.0001").runs) == 1


def test_an_added_value_plans_only_new_runs(workspace):
    before, after = build("sweep=none", "adapter.r=4,8"), build("sweep=none", "adapter.r=4,8,16")
    assert keys(before)["train_adapter"] < keys(after)["train_adapter"]
    assert len(keys(after)["train_adapter"] - keys(before)["train_adapter"]) == 2  # two epochs of one run


def test_two_sweeps_share_what_they_have_in_common(workspace):
    one = build(sweep="demo")
    other = build("train.num_train_epochs=2", "adapter.r=16", sweep="learning_rate")
    assert keys(one)["train_adapter"] & keys(other)["train_adapter"]


def test_a_decaying_schedule_shares_nothing(workspace):
    plan = build("sweep=none", "train.lr_scheduler_type=cosine", "train.num_train_epochs=1,2")
    assert [len(run.segments) for run in plan.runs] == [1, 1]
    trunks = {job.settings["trunk"] for job in plan.jobs.values() if job.stage == "train_adapter"}
    assert len(trunks) == 2


def test_epochs_of_one_trunk_are_chained(workspace):
    plan = build("sweep=none", "train.num_train_epochs=1,3")
    first, last = plan.runs
    assert last.segments[0] == first.segments[0]
    assert [plan.jobs[path].inputs.get("previous") for path in last.segments] == [None, *last.segments[:-1]]


def test_a_decay_at_the_end_branches_off_a_shared_plateau(workspace):
    plan = build("sweep=none", "train=warmup_stable_decay", "train.num_train_epochs=1,3")
    one, three = plan.runs
    assert len(one.segments) == 2, "a plateau and its decay"
    assert len(three.segments) == 4, "three plateaus and a decay"
    assert one.segments[0] == three.segments[0]
    assert len({path for run in plan.runs for path in run.segments}) == 5
    jobs = [plan.jobs[path] for path in three.segments]
    assert [job.settings.get("part") for job in jobs] == ["plateau", "plateau", "plateau", None]
    assert jobs[3].settings["plateau"] == three.segments[2]
    assert jobs[3].settings["trunk"] != jobs[0].settings["trunk"] == jobs[2].settings["trunk"]


def test_with_a_fixed_plateau_nothing_is_shared(workspace):
    kwargs = "train.lr_scheduler_kwargs={num_decay_steps:2,num_stable_steps:5}"
    plan = build("sweep=none", "train=warmup_stable_decay", kwargs, "train.num_train_epochs=1,3")
    assert [len(run.segments) for run in plan.runs] == [1, 1]


def test_axes_over_groups_are_told_apart_by_the_choice(workspace):
    plan = build("sweep=none", "adapter=lora,lora_all_linear")
    assert [run.point for run in plan.runs] == [{"adapter": "lora"}, {"adapter": "lora_all_linear"}]


def test_a_damaged_cache_or_plan_heals(workspace):
    path = build().freeze()
    path.write_text("{")
    (workspace / "results" / ".state" / "hashes.json").write_text("garbage")
    assert planning.load(build().freeze()).runs


def test_swapped_values_are_other_runs(workspace):
    one = build("sweep=none", "train.adam_beta1=0.9", "train.adam_beta2=0.95")
    other = build("sweep=none", "train.adam_beta1=0.95", "train.adam_beta2=0.9")
    assert not keys(one)["train_adapter"] & keys(other)["train_adapter"]


def test_a_frozen_plan_reads_back_as_it_was(workspace):
    plan = build()
    path = plan.freeze()
    again = planning.load(path)
    assert (again.runs, again.jobs, again.axes) == (plan.runs, plan.jobs, plan.axes)
    assert plan.freeze() == path, "equal plans are one file"
    assert {name: planning.job_in(path, name) for name in plan.jobs} == {
        name: vars(job) for name, job in again.jobs.items()
    }
    assert planning.job_in(path, plan.runs[0].name) is None


def test_a_job_finds_its_own_entry_without_reading_the_others(workspace, monkeypatch):
    plan = build()
    path = plan.freeze()
    read = []
    monkeypatch.setattr(planning, "read_json", lambda *_: read.append(1))
    assert planning.job_in(path, plan.runs[-1].artefacts["evaluate_model"])["stage"] == "evaluate_model"
    assert not read


def test_a_plan_that_was_cut_within_the_entry_asked_for_is_refused(workspace):
    path = build().freeze()
    last = list(planning.load(path).jobs)[-1]
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match=r"damaged .*; run snakemake again"):
        planning.job_in(path, last)


def test_editing_a_file_of_ones_own_changes_its_key(workspace):
    mine = workspace / "mine.jsonl"
    mine.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    source = ["data.source.kind=files", f"data.source.path={mine}", "data.layout=prompt_completion"]
    overrides = ["sweep=none", *source, "~data.prompt", "~data.completion", "~data.csv", "~data.format"]
    before = build(*overrides)
    mine.write_text(json.dumps({"prompt": "a", "completion": "c"}) + "\n")
    assert "format_prompts" in changed(before, build(*overrides))
    mine.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert changed(before, build(*overrides)) == set()


def test_a_missing_file_is_named_before_anything_runs(workspace):
    with pytest.raises(UserError, match="data.source.path: nowhere.jsonl: no such file"):
        build("data.source.kind=files", "data.source.path=nowhere.jsonl")


def test_explain_before_anything_was_fetched(workspace):
    from temper.commands import explain

    text = explain.explain(build())
    assert "sweep demo: 34 job(s) to run, and the comparison" in text
    assert "nothing like it was made yet" in text
    assert "forecast: nothing to go by yet" in text


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("stage", ["tokenize_splits", "evaluate_model"])
def test_what_is_in_no_key_is_no_reason_to_make_something_again(stage):
    from temper.commands import explain
    from temper.config.stages import FOLDERS
    from temper.planning.forecast import Archive

    job = next(job for job in build().jobs.values() if job.stage == stage)
    shown = {"tokenize_splits": ("tokenize", "max_share"), "evaluate_model": ("eval", "suspects")}
    section, name = shown[stage]
    assert name not in job.config[section]
    stored = {**job.config, section: {**job.config[section], name: {"dropped": 0.5}}}
    folder = Path("results") / FOLDERS[stage] / "earlier"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(stored))
    (folder / "provenance.json").write_text(json.dumps({"stage": stage, "inputs": job.inputs, "seconds": 1.0}))
    like = Archive().most_similar(job)
    assert explain.reasons(job, like, {}) == ["its folder was deleted, or never finished"]


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_models_are_not_ranked_by_a_figure_per_token(workspace, metric):
    models = "model=smollm2_135m,llama3.2_1b"
    with pytest.raises(UserError, match=f"'{metric}' is per token.*eval.metric=bits_per_byte"):
        build(models, f"eval.metric={metric}", experiment="smoke")
    assert build(models, "eval.metric=bits_per_byte", experiment="smoke").runs


# --- mixtures ------------------------------------------------------------------------------------

MIXED = {
    "data/one.yaml": "name: one\nsource: {kind: files, path: one.jsonl}\nlayout: question_answer\n",
    "data/other.yaml": "name: other\nsource: {kind: files, path: other.jsonl}\nlayout: question_answer\n",
    "data/both.yaml": "name: both\nmix: [{data: one, weight: 2}, {data: other, limit: 5}]\n",
}


@pytest.fixture
def mixture(workspace, monkeypatch):
    """Two data sets of your own and their mixture."""
    compose._compose.cache_clear()
    monkeypatch.setenv("TEMPER_CONF", str(workspace / "conf"))
    for name, text in MIXED.items():
        path = workspace / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("one", "other"):
        (workspace / f"{name}.jsonl").write_text('{"question": "?", "answer": "!"}\n')
    return workspace


def on_both(*overrides):
    return build("data=both", "sweep=none", *overrides, experiment="lamini_docs")


def test_a_mixture_formats_each_data_set_by_itself(mixture):
    plan = on_both()
    [job] = [job for job in plan.jobs.values() if job.stage == "mix_prompts"]
    assert job.path.startswith("results/mixtures/both-")
    assert job.config == {
        "data": {"mix": [{"source": "one", "weight": 2.0}, {"source": "other", "weight": 1.0}], "on_overlap": "warn"}
    }
    parts = [plan.jobs[path] for path in job.inputs.values()]
    assert [part.path.split("/")[-1].partition("-")[0] for part in parts] == ["one", "other"]
    assert [part.config["data"]["limit"]["train"] for part in parts] == [None, 5]
    [alone] = [job.path for job in on_both("data=one").jobs.values() if job.stage == "format_prompts"]
    assert alone == parts[0].path, "which a run on it alone shares"


@pytest.mark.parametrize(
    ("file", "text", "formats", "mixes"),
    [
        ("other.jsonl", '{"question": "?", "answer": "?"}\n', ["other"], 1),
        ("conf/data/one.yaml", MIXED["data/one.yaml"] + "where: answer\n", ["one"], 1),
        ("conf/data/both.yaml", MIXED["data/both.yaml"].replace("weight: 2", "weight: 3"), [], 1),
        ("conf/data/both.yaml", MIXED["data/both.yaml"].replace("limit: 5", "limit: 6"), ["other"], 1),
        ("conf/data/both.yaml", "# a remark\n" + MIXED["data/both.yaml"], [], 0),
    ],
)
def test_an_edit_in_one_data_set_formats_that_one_again(mixture, file, text, formats, mixes):
    before = set(on_both().jobs)
    (mixture / file).write_text(text)
    compose._compose.cache_clear()  # a process reads the files of conf/ once
    new = [job for path, job in on_both().jobs.items() if path not in before]
    assert [
        job.config["data"] and job.path.split("/")[-1].partition("-")[0] for job in new if job.stage == "format_prompts"
    ] == formats
    assert sum(job.stage == "mix_prompts" for job in new) == mixes
    assert any(job.stage == "train_adapter" for job in new) == bool(mixes)


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ("[{data: gone}]", "'data.mix: gone': conf/data/gone.yaml does not exist; did you mean 'one'?"),
        ("[{data: both}]", "config: 'data.mix': both is a mixture itself: name the data sets in it"),
        ("[{data: one}, {data: one}]", "config: 'data': 'mix' has 'one' twice: give it once, with a weight"),
        ("[{data: one, limit: -1}]", "config: 'data.mix.0.limit.train': input should be greater than 0 (found -1)"),
        ("[{data: one, weigt: 2}]", "config: unknown key 'data.mix.0.weigt'; did you mean 'weight'?"),
        ("[{data: one, weight: 0}]", "config: 'data.mix.0.weight': input should be greater than 0 (found 0)"),
        ("[]", "config: 'data.mix': list should have at least 1 item"),
    ],
)
def test_what_is_no_mixture_is_refused(mixture, mix, said):
    (mixture / "conf/data/both.yaml").write_text(f"name: both\nmix: {mix}\n")
    with pytest.raises(UserError) as caught:
        on_both()
    assert str(caught.value).startswith(said)


@pytest.mark.usefixtures("mixture")
def test_what_an_experiment_says_of_one_data_set_is_refused_for_a_mixture_and_what_is_proposed_works():
    both = ("data=both", "sweep=none")
    with pytest.raises(UserError) as caught:
        build(*both, experiment="demo")
    assert str(caught.value).startswith(
        "config: 'data.limit' is of one data set, and this is a mixture: the file of each"
    )
    [way] = re.findall(r"leave it out here \((.*)\)", str(caught.value))
    assert way == "~data.limit"
    assert build(*both, way, experiment="demo").runs
    with pytest.raises(UserError, match=r"'data.(limit|rejected_from)' and .* are of one data set.*them out here"):
        build(*both, experiment="orpo")
    with pytest.raises(UserError, match="unknown key 'data.on_overlp'; did you mean 'on_overlap'"):
        build(*both, "+data.on_overlp=drop", experiment="lamini_docs")
