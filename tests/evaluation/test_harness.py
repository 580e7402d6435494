"""eval.harness: its figures are lm-eval's own, its key has all they depend on, and what cannot be asked is said."""

import importlib.util
import json
import shutil
import tomllib
from pathlib import Path

import pytest

from steps import compare_runs, merge_adapter, run_harness, train_adapter
from temper import tracking
from temper.config import harness as checks
from temper.config.schema import Harness
from temper.errors import UserError
from temper.evaluation.harness import compare, read_harness
from temper.files import read_json_lines, read_yaml
from temper.planning import planner
from temper.reports import model_card
from temper.reports.leaderboard import read_board
from temper.runs import find
from tests.conftest import ROOT
from tests.support.asking import command
from tests.support.finished import PARTS
from tests.support.networks import network_of, tokenizer_of
from tests.support.tasks import NAMES, write_tasks
from tests.support.workflow_tools import JOBS_OF_TWO, PLANNED_OF_TWO, executed, own_sources, snakemake
from tests.test_champion import sweep_of

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install -e .[harness]")
SETTINGS = "{tasks: [own_choice, own_answer], include_path: tasks, batch_size: 4}"


@pytest.fixture
def tasks(workspace):
    return write_tasks(Path("tasks"))


def measured(model, output: str, *overrides: str, settings=SETTINGS):
    """What the step finds."""
    arguments = ["--model", str(model), "--output", output, f"eval.harness={settings}", "model.load.dtype=float32"]
    run_harness.main([*arguments, *overrides])
    return read_harness(Path(output))


def direct(chat: bool, model, **arguments) -> dict:
    """What lm-eval finds when it loads the model itself: {task: {metric: (figure, standard error)}}."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    load = {"pretrained": str(model), "dtype": "float32", "attn_implementation": "eager", **arguments}
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=load,
        tasks=list(NAMES),
        task_manager=TaskManager(include_path="tasks", include_defaults=False),
        batch_size=4,
        device="cpu",
        apply_chat_template=chat,
    )
    results, names = found["results"], {"own_choice": ["acc", "acc_norm"], "own_answer": ["letters"]}
    return {
        task: {name: (results[task][f"{name},none"], results[task][f"{name}_stderr,none"]) for name in names[task]}
        for task in NAMES
    }


def figures(found) -> dict:
    return {
        task: {name: (metric.value, metric.stderr) for name, metric in result.metrics.items()}
        for task, result in found.tasks.items()
    }


# --- the figures ---------------------------------------------------------------------------------


@installed
@pytest.mark.parametrize("chat", [True, False])
def test_figures_equal_those_of_lm_eval_itself(tasks, tiny_model, chat):
    found = measured(tiny_model, "out", *([] if chat else ["prompt=plain"]))
    assert figures(found) == direct(chat, tiny_model)
    rows = read_json_lines(Path("out/samples.jsonl"))
    assert ("<|im_start|>" in rows[0]["prompt"]) is chat
    assert found.apply_chat_template is chat
    assert {name: (task.rows, task.version) for name, task in found.tasks.items()} == {
        "own_choice": (7, 1.0),
        "own_answer": (7, 2.0),
    }
    assert len({row["figures"]["letters"] for row in rows if row["task"] == "own_answer"}) > 1, "answers differ"


@installed
def test_options_are_those_of_lm_eval(tasks, tiny_model):
    found = measured(
        tiny_model,
        "out",
        settings="{tasks: [own_choice, own_answer], include_path: tasks, limit: 3, num_fewshot: 2, batch_size: 4}",
    )
    assert {name: (task.rows, task.num_fewshot) for name, task in found.tasks.items()} == dict.fromkeys(NAMES, (3, 2))
    first = read_json_lines(Path("out/samples.jsonl"))[0]["prompt"]
    assert first.count("<|im_start|>user") == 3, "two examples before the question"


@installed
def test_an_encoder_decoder_equals_lm_eval_itself(tasks, tmp_path):
    tokenizer = tokenizer_of("t5")
    network_of("t5", tokenizer).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    found = measured(tmp_path / "t5", "out", "prompt=plain")
    assert figures(found) == direct(False, tmp_path / "t5", backend="seq2seq")


@installed
@pytest.mark.parametrize("adapter", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_are_asked_with_the_base_model(tasks, tiny_model, tiny_splits, adapter):
    options = ["experiment=smoke", f"adapter={adapter}", "model.load.dtype=float32", "train.learning_rate=0.5"]
    inputs = ["--model", str(tiny_model), "--splits", str(tiny_splits)]
    train_adapter.main([*inputs, "--output", "adapter", *options])
    merge_adapter.main(["--model", str(tiny_model), "--adapter", "adapter", "--output", "merged", *options])
    found = measured("merged", "out")
    assert figures(found) == direct(True, tiny_model, peft="merged/adapter")
    assert figures(found) != figures(measured(tiny_model, "base")), "the tokens matter"


@installed
def test_the_untouched_model_is_beside_it(tasks, tiny_model, tmp_path):
    from tests.support.tiny import make_tiny_model

    other = make_tiny_model(tmp_path / "other", seed=1)
    base = measured(tiny_model, "base")
    found = measured(other, "tuned", "--base-harness", "base")
    rows = {name: read_json_lines(Path(name) / "samples.jsonl") for name in ("base", "tuned")}
    metric = found.tasks["own_answer"].metrics["letters"]
    assert metric.base == base.tasks["own_answer"].metrics["letters"].value != metric.value
    assert metric.difference == metric.value - metric.base
    letters = [[row["figures"]["letters"] for row in rows[name] if "letters" in row["figures"]] for name in rows]
    gaps = [after - before for before, after in zip(*letters, strict=True)]
    mean = sum(gaps) / 7
    expected = (sum((gap - mean) ** 2 for gap in gaps) / 6 / 7) ** 0.5
    assert metric.difference_stderr == pytest.approx(expected)

    lines = Path("tasks/answer.jsonl").read_text().splitlines()
    Path("tasks/answer.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    again = measured(other, "again")
    compare(again, read_json_lines(Path("again/samples.jsonl")), Path("base"))
    assert again.tasks["own_answer"].metrics["letters"].difference is None, "of other rows than the base model's"
    assert again.tasks["own_choice"].metrics["acc"].difference is not None
    with pytest.raises(UserError, match="has no task 'own_answer'"):
        one = measured(tiny_model, "one", settings="{tasks: [own_choice], include_path: tasks}")
        assert list(one.tasks) == ["own_choice"]
        compare(again, [], Path("one"))


# --- the plan ------------------------------------------------------------------------------------


def build(**settings):
    text = json.dumps({"tasks": NAMES, "include_path": "tasks", **settings}).replace('"', "")
    return planner.build("smoke", None, [f"eval.harness={text}"])


def paths(plan) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for job in plan.jobs.values():
        found.setdefault(job.stage, set()).add(job.path)
    return found


def new_stages(before, after) -> set[str]:
    old, new = paths(before), paths(after)
    return {stage for stage in new if new[stage] - old.get(stage, set())} - {"compare_runs", "rank_runs"}


@installed
def test_the_key_has_all_that_the_figures_depend_on_and_no_other_has_it(tasks):
    without, plan = planner.build("smoke"), build()
    assert new_stages(without, plan) == {"run_harness"}
    assert len(paths(plan)["run_harness"]) == 3, "of each run, and of the untouched model"
    assert new_stages(plan, build()) == set()
    for option in ({"limit": 2}, {"num_fewshot": 1}, {"batch_size": 2}, {"tasks": NAMES[:1]}):
        assert new_stages(plan, build(**option)) == {"run_harness"}
    for file, text in (("own.py", "X = 1\n"), ("choice.yaml", "description: Go\n"), ("answer.jsonl", "\n")):
        with Path("tasks", file).open("a") as opened:
            opened.write(text)
        edited = build()
        assert new_stages(plan, edited) == {"run_harness"}, file
        plan = edited


@installed
def test_rows_elsewhere_are_in_the_key_and_must_be_there(tasks):
    Path("tasks/answer.jsonl").rename("answer.jsonl")
    with pytest.raises(UserError, match=r"tasks/answer.yaml: tasks/answer.jsonl: no such file"):
        build()
    task = Path("tasks/answer.yaml")
    task.write_text(task.read_text().replace("tasks/answer.jsonl", "answer.jsonl"))
    before = build()
    with Path("answer.jsonl").open("a") as file:
        file.write('{"question": "And?", "answer": "no"}\n')
    assert new_stages(before, build()) == {"run_harness"}


@installed
def test_what_cannot_be_asked_is_said_before_any_job(tasks, monkeypatch):
    Path("results/.state").mkdir(parents=True)
    known = {"tasks": ["arc_easy", "hellaswag"]}  # as the plan leaves it; reading it anew takes half a minute
    Path(f"results/.state/lm_eval-{checks.version()}.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match="no task 'arc_esy'; did you mean 'arc_easy'"):
        build(tasks=["arc_esy"])
    with pytest.raises(UserError, match="include_path: task: no such folder"):
        build(include_path="task")
    assert new_stages(planner.build("smoke"), build(tasks=["arc_easy", "own_choice"])) == {"run_harness"}


def test_without_lm_eval_the_plan_says_how_to_install_it(workspace, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    with pytest.raises(
        UserError, match="needs EleutherAI's lm-eval: .+ -m pip install lm-eval==0.4.13 'python-dateutil>=4'$"
    ):
        build(include_path=None, tasks=["arc_easy"])


def test_the_requirements_are_those_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["harness"] == checks.REQUIREMENTS


@pytest.mark.parametrize("wrong", [{"tasks": []}, {"limit": 0}, {"limit": 1.5}, {"num_fewshot": -1}, {"shots": 1}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError):
        Harness(**{"tasks": ["a"], **wrong})


# --- what fails in the step ----------------------------------------------------------------------


@installed
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("", "task 'from_hub' cannot be loaded: its rows are on the hub, which cannot be reached"),
        ("unsafe_code: true\n", "task 'own_choice' runs code that the model writes, which Temper never does"),
    ],
)
def test_a_task_that_cannot_be_asked_is_one_line(tasks, tiny_model, capsys, edit, message):
    with Path("tasks/choice.yaml").open("a") as file:
        file.write(edit)
    name = "own_choice" if edit else "from_hub"
    with pytest.raises(SystemExit) as ended:
        measured(tiny_model, "out", settings=f"{{tasks: [{name}], include_path: tasks}}")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@installed
def test_no_tasks_and_no_chat_template_are_one_line(tasks, tmp_path, capsys):
    tokenizer = tokenizer_of("t5")
    network_of("t5", tokenizer).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    for settings, said in (("null", "'eval.harness' is null: give the tasks"), (SETTINGS, "has no chat template")):
        with pytest.raises(SystemExit):
            measured(tmp_path / "t5", "out", settings=settings)
        assert said in capsys.readouterr().err.splitlines()[-1]


# --- what is shown of it -------------------------------------------------------------------------


@installed
def test_it_is_on_the_page_in_the_card_and_in_mlflow(finished_run, empty_store, tasks):
    for name in ("models", "merged", "reports", "adapters", "splits", "prompts", "sweeps"):
        shutil.copytree(finished_run / "results" / name, f"results/{name}")
    shutil.copy(empty_store, "results/mlflow.db")
    base, tuned = "results/harness/base-tiny-00000000b0", "results/harness/tuned-00000000b1"
    measured(PARTS["fetch_model"], base)
    found = measured(PARTS["merge_adapter"], tuned, "--base-harness", base)

    config = read_yaml(Path("results/sweeps/tiny/config.yaml"))
    config["runs"][0]["harness"] = tuned
    board = compare_runs.compare(config, Path("results/sweeps/tiny"))
    assert board.harness == found == read_board(Path("results/sweeps/tiny")).harness
    page = Path("results/sweeps/tiny/report.html").read_text()
    metric = found.tasks["own_answer"].metrics["letters"]
    assert "letters (lower is better)" in page
    assert f"{metric.base:.3f}" in page

    run = find.find("best")
    assert (run.parts["run_harness"], run.parts["base_harness"]) == (Path(tuned), Path(base))
    text = model_card.model_card(run, model_card.Card("me/tuned", model_card.base_origin(run, None), merged=True))
    assert f"| {metric.value:.3f} ± {metric.stderr:.3f} | {metric.base:.3f} ± {metric.base_stderr:.3f} |" in text

    assert logged(board) == found.figures()
    found.tasks["own_answer"].metrics["letters"].value += 1
    board.harness = found
    assert logged(board) == found.figures(), "other tasks or rows are no other run"


def logged(board) -> dict[str, float]:
    """The figures of lm-eval in MLflow after a comparison."""
    import mlflow

    plan = sweep_of(PARTS)[0]
    assert tracking.mirror(plan, board)[0], tracking.mirror(plan, board)[1]
    client = mlflow.MlflowClient("sqlite:///results/mlflow.db")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    return {name: value for run in runs for name, value in run.data.metrics.items() if "harness_" in name}


# --- the workflow --------------------------------------------------------------------------------


@installed
def test_the_untouched_model_is_asked_whichever_run_is_chosen(tasks):
    plan = build()
    todo = [Path(job.path) for job in plan.missing() if job.stage == "run_harness"]
    assert sorted(path.name.startswith("base-") for path in todo) == [False, True], "and one run stands for the chosen"
    assert plan.base_harness == [str(path) for path in todo if path.name.startswith("base-")]
    asked = json.dumps({"tasks": NAMES, "include_path": "tasks"}).replace('"', "").replace(" ", "")
    done = snakemake(Path.cwd(), "-n", "--config", "experiment=smoke", f"overrides=eval.harness={asked}")
    assert executed(done) == {**PLANNED_OF_TWO, "run_harness": 1}, "the ranking will say which run is asked"


@installed
@pytest.mark.slow
def test_the_workflow_asks_the_chosen_run_and_the_untouched_model(workspace, tiny_model):
    from tests.support.tiny import tiny_rows

    write_tasks(workspace / "tasks")
    sources = own_sources(workspace, tiny_model, tiny_rows(180))
    asked = SETTINGS.replace(" ", "")
    arguments = ["--config", "experiment=smoke", f"overrides={sources} eval.harness={asked}"]
    assert executed(snakemake(workspace, *arguments)) == {**JOBS_OF_TWO, "run_harness": 2}
    assert executed(snakemake(workspace, *arguments)) == {}

    board = read_board(Path("results/sweeps/smoke"))
    metric = board.harness.tasks["own_choice"].metrics["acc"]
    assert metric.base is not None
    page = Path("results/sweeps/smoke/report.html").read_text()
    assert "Tasks of lm-eval" in page
    assert "own_answer" in page

    run = find.find("best", "smoke") if board.chosen == board.rows[0]["run"] else find.find(board.chosen)
    assert read_yaml(run.parts["run_harness"] / "config.yaml")["lm_eval"] == checks.version()
    assert run.has("base_harness")
    import mlflow

    client = mlflow.MlflowClient("sqlite:///results/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    logged = [one.data.metrics for one in runs if "harness_own_choice_acc" in one.data.metrics]
    assert [(one["harness_own_choice_acc"], one["base_harness_own_choice_acc"]) for one in logged] == [
        (metric.value, metric.base)
    ]
    [version] = client.search_model_versions()
    assert "Tasks of lm-eval" in version.description

    # Other tasks make just that part again, and MLflow shows the new figures.
    fewer = [*arguments[:-1], arguments[-1].replace("batch_size:4", "limit:5,batch_size:4")]
    assert executed(snakemake(workspace, *fewer)) == {"rank_runs": 1, "run_harness": 2, "compare_runs": 1}
    command("verify")(["--sweep", "smoke", "--stages", "run_harness"])
