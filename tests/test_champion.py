"""The champion: MLflow loads and serves it, and it answers as `temper predict` does."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
from packaging.requirements import Requirement

from steps import evaluate_model, merge_adapter, train_adapter
from temper import tracking
from temper.config.schema import Eval
from temper.runs import champion
from temper.runs import find as runs
from tests.support import finished
from tests.support.asking import command, lines_of
from tests.support.sweeps import board_of

PROMPTS = ["The plot falls flat.", "A joy from the first minute to the last."]
CHAT = [{"role": "user", "content": PROMPTS[0]}]
SPLITS = finished.PARTS["tokenize_splits"]


# --- a sweep of one run --------------------------------------------------------------------------


def trained(adapter: str) -> dict[str, str]:
    """Train, merge and evaluate one more run in the current project; returns its folders."""
    parts = finished.PARTS | {
        stage: f"{Path(finished.PARTS[stage]).parent}/{adapter}-{number:010}"
        for number, stage in enumerate(("train_adapter", "merge_adapter", "evaluate_model"))
    }
    model, splits, config = parts["fetch_model"], parts["tokenize_splits"], [*finished.CONFIG, f"adapter={adapter}"]
    config = [override for override in config if not override.startswith("adapter.r=")]
    train_adapter.main(["--splits", splits, "--model", model, "--output", parts["train_adapter"], *config])
    paths = ["--model", model, "--adapter", parts["train_adapter"], "--output", parts["merge_adapter"]]
    merge_adapter.main([*paths, *config])
    inputs = ["--model", parts["merge_adapter"], "--splits", splits, "--adapter", parts["train_adapter"]]
    inputs += ["--base-report", parts["base_report"], "--output", parts["evaluate_model"]]
    evaluate_model.main([*inputs, *config])
    return parts


def sweep_of(parts: dict[str, str], accuracy: float = 0.8, uri: str | None = None):
    """(plan, leaderboard) of a sweep with this run alone."""
    name = Path(parts["evaluate_model"]).name
    settings = {"enabled": True, "tracking_uri": uri, "experiment_name": "test", "registered_model_name": None}
    data = {"name": "reviews", "source": {"kind": "files"}}
    config = {"data": data, "model": {"name": "tiny"}, "method": {"name": "sft"}}
    config["eval"] = Eval(task="labels", labels=["negative", "positive"]).model_dump(mode="json")
    run = SimpleNamespace(name=name, title=name, key=name[-10:], config=config, artefacts=parts, point={})
    board = Path("results/sweeps/tiny/leaderboard.csv")
    plan = SimpleNamespace(tracking=settings, sweep="tiny", runs=[run], jobs={}, axes={}, leaderboard=str(board))
    rows = [{"run": name, "validation_accuracy": accuracy}]
    return plan, board_of("tiny", rows)


def mirrored(*sweep, **options) -> str:
    done, said = tracking.mirror(*sweep_of(*sweep, **options))
    assert done, said
    return said


@pytest.fixture
def copied(finished_run, empty_store, workspace, monkeypatch) -> Path:
    """A copy of the finished project, with an empty store, as the current folder."""
    shutil.copytree(finished_run / "results", "results")
    shutil.copy(empty_store, "results/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace}/results/mlflow.db")
    return workspace


def predicted(run: str, tmp_path, *flags: str) -> list[tuple[str, bool]]:
    """What `temper predict` answers."""
    rows, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [*({"prompt": prompt} for prompt in PROMPTS), {"messages": CHAT}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers.unlink(missing_ok=True)
    command("predict")(["--run", run, "--input", str(rows), "--output", str(answers), *flags])
    return [(line["prediction"], line["finished"]) for line in lines_of(answers)]


def answers_of(table) -> list[tuple[str, bool]]:
    return list(zip(table["prediction"], table["finished"], strict=True))


def asked(model, **params) -> list[tuple[str, bool]]:
    """What a model of MLflow answers to the same rows."""
    rows = pandas.DataFrame({"prompt": [*PROMPTS, None], "messages": [None, None, CHAT]})
    return answers_of(model.predict(rows, params=params))


# --- it loads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "full", "prompt_tuning", "prefix_tuning"])
def test_the_champion_answers_as_predict_does(copied, tmp_path, tmp_path_factory, monkeypatch, adapter):
    import mlflow

    parts = finished.PARTS if adapter == "lora" else trained(adapter)
    assert "champion of 'reviews' is version 1" in mirrored(parts)
    expected = predicted(parts["evaluate_model"], tmp_path)
    sampled = predicted(parts["evaluate_model"], tmp_path, "--do-sample", "--seed", "3", "--max-new-tokens", "5")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    model = mlflow.pyfunc.load_model("models:/reviews@champion")
    assert asked(model) == expected
    assert asked(model, do_sample=True, seed=3, max_new_tokens=5) == sampled != expected
    size = sum(path.stat().st_size for path in Path(tracking_folder()).rglob("*") if "code" not in path.parts)
    assert size < 50_000, "no weights are copied to where results/ can be reached"


def tracking_folder() -> str:
    import mlflow

    return mlflow.artifacts.download_artifacts("models:/reviews@champion")


@pytest.mark.parametrize("adapter", ["lora", "prefix_tuning"])
def test_a_store_that_does_not_reach_results_gets_all_that_is_needed(copied, tmp_path, monkeypatch, adapter):
    import mlflow

    parts = finished.PARTS if adapter == "lora" else trained(adapter)
    uri = f"sqlite:///{copied}/store.db"
    shutil.move("results/mlflow.db", "store.db")
    mirrored(parts, uri=uri)
    expected = predicted(parts["evaluate_model"], tmp_path)
    shutil.move("results", "gone")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert asked(mlflow.pyfunc.load_model("models:/reviews@champion")) == expected


def test_it_loads_after_the_project_was_moved_and_without_the_merged_model(
    copied, tmp_path_factory, tmp_path, monkeypatch
):
    import mlflow

    mirrored(finished.PARTS)
    moved = tmp_path_factory.mktemp("moved") / "here"
    shutil.copytree("results", moved / "results")
    shutil.rmtree("results/reports")
    with contextlib.chdir(moved):
        tracking.open_own_store()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{moved}/results/mlflow.db")
        shutil.rmtree(finished.PARTS["merge_adapter"])
        assert asked(mlflow.pyfunc.load_model("models:/reviews@champion")) == predicted(finished.RUN, tmp_path)
        assert "is still version 1" in mirrored(finished.PARTS), "base and adapter are there"
        shutil.rmtree(finished.PARTS["fetch_model"])
        with pytest.raises(Exception, match="is not there, and it holds the base model"):
            mlflow.pyfunc.load_model("models:/reviews@champion")


IN_ANOTHER_PROCESS = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model("models:/reviews@champion")
answers = model.predict(json.loads(sys.argv[1])).to_dict("records")
import temper
print(json.dumps({"answers": answers, "temper": temper.__file__, "modules": sorted(sys.modules)}))
"""


def test_another_program_needs_only_what_the_model_brings_and_requires(copied, tmp_path, tmp_path_factory):
    mirrored(finished.PARTS)
    rows = json.dumps([{"prompt": prompt} for prompt in PROMPTS])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, rows],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert [(made["prediction"], made["finished"]) for made in told["answers"]] == predicted(finished.RUN, tmp_path)[:2]
    folder = Path(tracking_folder())
    assert Path(told["temper"]) == folder / "code/temper/__init__.py"
    assert "steps" not in told["modules"] and "snakemake" not in told["modules"]
    required = [Requirement(line) for line in (folder / "requirements.txt").read_text().splitlines()]
    assert all(str(requirement.specifier).startswith("==") for requirement in required)
    allowed = closure({requirement.name for requirement in required})
    providers = importlib.metadata.packages_distributions()
    imported = {module: providers.get(module, []) for module in told["modules"] if "." not in module}
    optional = {"dill", "colorama", "setuptools", "temper-pipeline"}  # torch and MLflow use them where they are there
    missing = {module for module, by in imported.items() if by and not {plain(name) for name in by} & allowed}
    assert {plain(name) for module in missing for name in imported[module]} <= optional, missing


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


def closure(names: set[str]) -> set[str]:
    """These distributions and all that they require."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = plain(todo.pop())
        if name in found:
            continue
        found.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            needed = map(Requirement, importlib.metadata.requires(name) or [])
            todo += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


# --- it is asked ---------------------------------------------------------------------------------


def test_bad_rows_and_parameters_are_refused_in_one_line(copied):
    import mlflow
    from mlflow.exceptions import MlflowException

    mirrored(finished.PARTS)
    model = mlflow.pyfunc.load_model("models:/reviews@champion")
    fine = [{"prompt": PROMPTS[0]}]
    for rows, params, message in (
        ([{"text": "a"}], {}, "there is no prompt in the input: a row has a column 'prompt' or 'messages'"),
        ([], {}, "there is no prompt in the input"),
        ([*fine, {"prompt": " "}], {}, "row 2: prompt[0]: the user's message is empty"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], {}, "row 1: column 'messages' ends with the assist"),
        ([{"prompt": "a " * 5000}], {}, "row 1: the prompt"),
        (fine, {"temperature": 0.5}, "temperature and top_p have no effect without do_sample"),
        (fine, {"max_new_tokens": 0}, "max_new_tokens must be at least 1 (found 0)"),
        (fine, {"batch_size": 0}, "batch_size must be at least 1 (found 0)"),
    ):
        with pytest.raises(MlflowException) as refused:
            model.predict(rows, params=params)
        assert refused.value.message.startswith(message) and "\n" not in refused.value.message
        assert refused.value.get_http_status_code() == 400


def test_signature_example_card_and_figures_are_with_it(copied):
    import mlflow

    mirrored(finished.PARTS)
    model = mlflow.pyfunc.load_model("models:/reviews@champion")
    signature = model.metadata.signature
    assert signature.inputs.input_names() == ["prompt", "messages"]
    assert signature.outputs.input_names() == ["prediction", "finished"]
    defaults = {spec.name: spec.default for spec in signature.params}
    evaluated = runs.read_config(Path(finished.PARTS["evaluate_model"]))["eval"]
    assert defaults == {"seed": 0} | {name: evaluated[name] for name in defaults if name != "seed"}
    assert {"max_new_tokens", "do_sample", "temperature", "top_p", "batch_size"} < set(defaults)
    [example] = model.input_example["prompt"]
    assert example == lines_of(Path(finished.PARTS["evaluate_model"], "predictions.jsonl"))[0]["prompt"]
    assert len(model.predict(model.input_example)) == 1

    api = mlflow.MlflowClient()
    version = api.get_model_version_by_alias("reviews", "champion")
    assert version.description.startswith(f"# {finished.RUN}\n") and "## Results" in version.description
    assert len(version.description) <= champion.LONGEST_DESCRIPTION
    assert "README.md among the model's files" in version.description
    assert "## How it was made" in Path(tracking_folder(), "README.md").read_text()
    [code] = version.description.split("```python\n")[1:]
    scope: dict = {}
    exec(code.partition("```")[0].replace("print(", "said = ("), scope)
    assert list(scope["said"]["finished"]), "the card's code runs"
    [logged] = api.search_logged_models([api.get_experiment_by_name("test").experiment_id])
    assert (str(logged.status), logged.source_run_id) == ("READY", version.run_id)
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "reviews", "version": 1}]
    [output] = api.get_run(version.run_id).outputs.model_outputs
    assert output.model_id == logged.model_id == model.metadata.model_id


@pytest.mark.slow
def test_mlflow_models_serve_answers_as_predict_does(copied, tmp_path, tmp_path_factory):
    mirrored(finished.PARTS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/reviews@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path_factory.mktemp("elsewhere"), env=environment)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                break
            time.sleep(0.2)
        served = posted(port, {"dataframe_records": [{"prompt": prompt} for prompt in PROMPTS]})["predictions"]
        expected = predicted(finished.RUN, tmp_path)
        assert [(made["prediction"], made["finished"]) for made in served] == expected[:2]
        [chat] = posted(port, {"messages": CHAT})
        assert (chat["prediction"], chat["finished"]) == expected[2]
    finally:
        server.terminate()
        server.wait()


def posted(port: int, body: dict):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


# --- who it is -----------------------------------------------------------------------------------


def another(name: str, rows=None) -> dict[str, str]:
    """The folders of one more run in the current project; `rows`: changes the lines that it was judged on."""
    parts = {**finished.PARTS, "evaluate_model": f"results/reports/{name}"}
    finished.put(Path.cwd(), {"evaluate_model": parts["evaluate_model"]})
    if rows:
        file = Path(parts["evaluate_model"], "predictions.jsonl")
        file.write_text("".join(json.dumps(line) + "\n" for line in rows(lines_of(file))))
    return parts


def holder(alias: str):
    import mlflow

    return mlflow.MlflowClient().get_model_version_by_alias("reviews", alias)


def test_only_a_better_run_on_the_same_rows_takes_the_title(copied):
    assert "champion of 'reviews' is version 1" in mirrored(finished.PARTS, 0.8)
    worse, better = another("worse-0000000001"), another("better-0000000002", lambda rows: rows[::-1])
    assert mirrored(worse, 0.7).endswith("champion of 'reviews' is still version 1")
    assert mirrored(better, 0.9).endswith("champion of 'reviews' is version 2"), "in another order they are the same"
    assert mirrored(better, 0.9).endswith("champion of 'reviews' is still version 2")
    shutil.rmtree(better["evaluate_model"])
    again = mirrored(worse, 0.7)
    assert again.endswith("champion of 'reviews' is version 3, in place of version 2, which does not load any more")
    assert holder("champion").tags[champion.WHY_TAG] == "in place of version 2, which does not load any more"


def test_figures_on_other_rows_do_not_take_the_title_but_are_said(copied):
    import mlflow

    mirrored(finished.PARTS, 0.8)
    edited = another("edited-0000000003", lambda rows: [{**rows[0], "reference": "negative"}, *rows[1:]])
    said = mirrored(edited, 0.9)
    number = len(Path(finished.PARTS["evaluate_model"], "predictions.jsonl").read_text().splitlines())
    held = f"validation_accuracy 0.800 on {number} rows of {SPLITS}"
    stays = f"champion is still version 1 ({held}): the two were measured on other"
    assert f"challenger of 'reviews' is version 2; {stays}" in said
    assert f"(this one: validation_accuracy 0.900 on {number} rows of {SPLITS})" in said
    assert (holder("champion").version, holder("challenger").version) == (1, 2)
    assert stays in holder("challenger").tags[champion.WHY_TAG]
    assert f"challenger of 'reviews' is still version 2; {stays}" in mirrored(edited, 0.9)
    mlflow.MlflowClient().set_registered_model_alias("reviews", "champion", "2")
    assert mirrored(edited, 0.9).endswith("champion of 'reviews' is still version 2")
    fewer = another("fewer-0000000004", lambda rows: rows[:5])
    assert "on 5 rows of" in mirrored(fewer, 0.99) and holder("champion").version == 2


def test_a_command_killed_while_it_registers_leaves_nothing_behind(copied, monkeypatch):
    import mlflow

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            mirrored(finished.PARTS)
    assert mirrored(finished.PARTS).endswith("champion of 'reviews' is version 1"), "it is not registered twice"
    other = another("other-0000000005")
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "finalize_logged_model", killed)
        with pytest.raises(KeyboardInterrupt):
            mirrored(other, 0.9)
    assert mirrored(other, 0.9).endswith("champion of 'reviews' is version 2")
    api = mlflow.MlflowClient()
    models = api.search_logged_models([api.get_experiment_by_name("test").experiment_id])
    assert [str(model.status) for model in models] == ["READY", "READY"]


def killed(*_arguments, **_options):
    raise KeyboardInterrupt


def test_a_long_card_loses_whole_sections_and_says_so():
    card = "# a\n\ntext\n\n## Results\n\n1\n\n## Use\n\ncode\n\n## Training\n\n" + "x" * 3000
    assert champion.description(card) == card
    cut = champion.description(f"{card}\n\n## How it was made\n\n{'y' * 3000}\n\n## Limits\n\nlast\n")
    assert cut.startswith(card) and "yyy" not in cut
    assert "## How it was made" not in cut and "## Limits\n\nlast" in cut and "README.md" in cut
