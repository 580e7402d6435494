"""The workflow itself, on the real embedded model: from nothing to a leaderboard, and again, and after edits."""

import json
import re
import shutil
from pathlib import Path

import pytest

from temper.commands import explain
from temper.planning import planner
from tests.conftest import ROOT, SHARED
from tests.support.workflow_tools import JOBS_OF_TWO, PLANNED_OF_TWO, executed, leaderboard, snakemake

DOWNLOADS = ROOT / "results" / ".state" / "downloads"  # of `make demo`, if it ran: the same wheel need not come again


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder in which experiment=smoke ran once, and what that printed."""
    folder = tmp_path_factory.mktemp("smoke")
    if DOWNLOADS.is_dir():
        shutil.copytree(DOWNLOADS, folder / "results" / ".state" / "downloads")
    return folder, snakemake(folder, "--config", "experiment=smoke")


def test_smoke_goes_from_nothing_to_a_leaderboard(smoke):
    folder, done = smoke
    assert executed(done) == JOBS_OF_TWO
    rows = leaderboard(folder, "smoke")
    assert len(rows) == 2
    needed = {
        "run",
        "train.learning_rate",
        "validation_accuracy",
        "validation_loss",
        "base_validation_accuracy",
        "base_validation_loss",
        "train_seconds",
    }
    assert needed <= set(rows[0])
    assert float(rows[0]["validation_accuracy"]) >= float(rows[1]["validation_accuracy"]), "best first"
    assert float(rows[0]["validation_loss"]) < float(rows[0]["base_validation_loss"]), (
        "64 rows teach the form of an answer"
    )
    assert f"{rows[0]['run'].rpartition('-')[2]}\n" in done.stdout, "the leaderboard is printed"
    assert "page: results/sweeps/smoke/report.html" in done.stdout
    assert (folder / "results" / "mlflow.db").is_file()
    page = (folder / "results" / "sweeps" / "smoke" / "report.html").read_text()
    assert rows[0]["run"] in page
    assert "VADER" in page


def test_a_second_run_has_nothing_to_do(smoke):
    folder, _ = smoke
    done = snakemake(folder, "--config", "experiment=smoke")
    assert executed(done) == {}
    assert "Nothing to be done" in done.stdout + done.stderr


def test_tracking_and_logging_keys_rerun_nothing(smoke):
    folder, _ = smoke
    done = snakemake(folder, "--config", "experiment=smoke", "overrides=train.logging_steps=7 tracking.flush_seconds=9")
    assert executed(done) == {}


def test_touching_the_raw_file_reruns_nothing(smoke):
    folder, _ = smoke
    raw = next((folder / "data" / "raw" / "movie_reviews").glob("*.txt"))
    raw.touch()
    assert executed(snakemake(folder, "--config", "experiment=smoke")) == {}


@pytest.mark.slow  # test_reruns.py executes the same on a tiny model
def test_a_changed_eval_section_reruns_evaluation_and_comparison_only(smoke):
    folder, _ = smoke
    done = snakemake(folder, "--config", "experiment=smoke", "overrides=eval.max_new_tokens=4")
    assert executed(done) == {"evaluate_base": 2, "evaluate_model": 3, "rank_runs": 1, "compare_runs": 1}
    back = snakemake(folder, "--config", "experiment=smoke")
    assert executed(back) == {"compare_runs": 1}, "taking the edit back makes nothing again but the comparison"


def test_an_edited_row_reruns_format_and_below(smoke, monkeypatch):
    folder, _ = smoke
    raw = next((folder / "data" / "raw" / "movie_reviews").glob("*.txt"))
    original = raw.read_bytes()
    used = next((folder / "results" / "prompts").glob("*/train.jsonl")).read_text().splitlines()[0]
    row = json.loads(used)
    raw.write_bytes(original.replace(row["messages"][-2]["content"].encode(), b"Quite another review.", 1))
    assert raw.read_bytes() != original
    done = snakemake(folder, "-n", "--config", "experiment=smoke")
    monkeypatch.chdir(folder)
    explained = explain.explain(planner.build("smoke"))
    raw.write_bytes(original)
    assert f"data/raw/movie_reviews: row {row['id']} changed" in explained
    assert "forecast: " in explained
    assert "(not set)" not in explained
    fetched = ("fetch_data", "fetch_model")
    assert executed(done) == {rule: count for rule, count in PLANNED_OF_TWO.items() if rule not in fetched}


def test_explain_names_what_a_person_changed(smoke, monkeypatch):
    folder, _ = smoke
    monkeypatch.chdir(folder)
    assert "all 2 run(s) are there" in explain.explain(planner.build("smoke"))
    changed = explain.explain(planner.build("smoke", "none", ["train.learning_rate=5e-4"]))
    assert re.search(r"train\.learning_rate 0\.(0003|001) -> 0\.0005", changed)
    assert "new adapter" in changed
    assert "tokenize_splits" not in changed


def test_one_failed_run_is_named_and_leaves_nothing_half_written(smoke):
    folder, _ = smoke
    done = snakemake(
        folder, "--config", "experiment=smoke", "overrides=sweep=none adapter.target_modules=[nonsense]", check=False
    )
    assert done.returncode != 0
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed: train_adapter")]
    assert len(failed) == 1
    assert "its linear layers are called" in failed[0]
    assert not list((folder / "results").glob("*/.tmp-*"))


@pytest.mark.parametrize("name", ["english_quotes", "lamini_docs"])
@pytest.mark.slow
def test_own_files_in_place_of_the_hub(smoke, name):
    """The two hub data sets, from local files: the whole chain on a few rows."""
    path = SHARED / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here: ../shared/data is only beside the developers' checkouts")
    folder, _ = smoke
    overrides = (
        f"data.source.kind=files data.source.path={path} "
        "data.limit.train=64 data.limit.validation=16 data.limit.test=16 "
        "train.num_train_epochs=1 train.per_device_train_batch_size=8 eval.max_new_tokens=16"
    )
    snakemake(folder, "--config", f"experiment={name}", f"overrides={overrides}")
    rows = leaderboard(folder, name)
    assert len(rows) == 1
    assert float(rows[0]["validation_loss"]) < float(rows[0]["base_validation_loss"])


FEW = "data.limit={train:64,validation:16,test:32} train.per_device_train_batch_size=8 train.warmup_steps=2"


@pytest.mark.slow
def test_fine_tuning_then_preferences_in_one_pipeline(smoke):
    folder, _ = smoke
    done = snakemake(folder, "--config", "experiment=sft_dpo", f"overrides={FEW} method.beta=0.1,0.5")
    ran = executed(done)
    assert (ran["reference_logprobs"], ran["train_adapter"], ran["merge_adapter"]) == (1, 3, 2)
    for row in leaderboard(folder, "sft_dpo"):
        assert float(row["validation_accuracy"]) > float(row["base_validation_accuracy"])
        assert float(row["validation_rewards/margins"]) > 0
    board = json.loads((folder / "results" / "sweeps" / "sft_dpo" / "leaderboard.json").read_text())
    page = Path(folder, board["rows"][0]["report"], "report.html").read_text()
    assert "after fine-tuning" in page
    again = snakemake(folder, "--config", "experiment=sft_dpo", f"overrides={FEW} method.beta=0.1,0.5,0.2")
    ran = executed(again)
    assert ran.pop("evaluate_model") in (1, 2), "on the test split as well, if the ranking chooses it"
    assert ran.pop("merge_adapter", 0) in (0, 1), "if it is chosen"
    assert ran == {"train_adapter": 1, "rank_runs": 1, "compare_runs": 1}


@pytest.mark.slow
def test_a_file_of_preference_pairs(smoke):
    path = SHARED / "preference_demo.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here: ../shared/data is only beside the developers' checkouts")
    folder, _ = smoke
    overrides = (
        f"~data.prompt ~data.completion data.rejected_from=null ~data.csv data.format=json "
        f"data.source.kind=files data.source.path={path} data.name=pairs data.layout=preference "
        "data.columns={prompt:conversations} data.limit={train:32,validation:8,test:16} "
        "eval=text eval.max_new_tokens=8 eval.metric=preference_accuracy sweep.name=pairs "
        "tokenize.max_length=384 tokenize.max_length_policy=truncate train.per_device_train_batch_size=4"
    )
    snakemake(folder, "--config", "experiment=dpo", f"overrides={overrides}")
    (row,) = leaderboard(folder, "pairs")
    assert float(row["validation_rewards/accuracies"]) > 0
    assert float(row["train_seconds"]) > 0
