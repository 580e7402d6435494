"""What `temper prune` deletes and spares, and what `temper keep` and `temper merge` do."""

import json
import shutil
from pathlib import Path

import pytest

from temper import folders
from temper.training import checkpoints
from tests.support import finished
from tests.support.asking import command, complaint

OTHER = {"results/adapters/other-00000000c4", "results/merged/other-00000000c5", "results/reports/other-00000000c6"}


@pytest.fixture
def two_runs(finished_run, workspace) -> Path:
    """The finished run, which its sweep chose, and a copy of it that no sweep has."""
    shutil.copytree(finished_run, workspace, dirs_exist_ok=True)
    made_by = ("train_adapter", "merge_adapter", "evaluate_model")
    places = dict(zip((finished.PARTS[name] for name in made_by), sorted(OTHER), strict=True))
    for made, folder in places.items():
        shutil.copytree(made, folder)
        facts = json.loads(Path(folder, "provenance.json").read_text())
        facts["inputs"] = {name: places.get(path, path) for name, path in facts["inputs"].items()}
        Path(folder, "provenance.json").write_text(json.dumps(facts))
    shutil.rmtree("results/.state")
    Path("results/.state/of-a-training/checkpoint-3").mkdir(parents=True)
    Path("results/.state/of-a-training/checkpoint-3/optimizer.pt").write_bytes(b"12345")
    return workspace


def folders_there() -> set[str]:
    return {str(path) for stage in ("adapters", "merged", "reports") for path in Path("results", stage).glob("*-*")}


def test_a_dry_run_says_what_there_is_and_deletes_nothing(two_runs, capsys):
    before = folders_there()
    command("prune")(["--dry-run"])
    said = capsys.readouterr().out
    assert said.endswith("nothing was deleted\n")
    for folder in OTHER:
        assert f"{folder}: to make it again takes " in said
    for folder in ("train_adapter", "merge_adapter", "evaluate_model", "base_report"):
        assert finished.PARTS[folder] not in said, "the run that a sweep chose, and what it is compared with"
    assert "checkpoints: 1 folder(s), 5 bytes\n" in said
    assert folders_there() == before


def test_what_is_named_is_deleted_and_nothing_else(two_runs, capsys):
    before = folders_there()
    command("prune")(["merged", "checkpoints"])
    assert "deleted 2 of 2 folder(s)" in capsys.readouterr().out
    assert before - folders_there() == {"results/merged/other-00000000c5"}
    assert not Path("results/.state/of-a-training").exists()
    assert not list(Path("results").rglob(".tmp-*"))


def test_what_it_would_need_first_is_said(two_runs, capsys):
    command("prune")(["adapters"])
    capsys.readouterr()
    command("prune")(["--dry-run", "merged"])
    assert ", and first results/adapters/other-00000000c4, which is not there" in capsys.readouterr().out


def test_a_run_that_is_kept_stays_until_it_is_released(two_runs, capsys):
    before = folders_there()
    command("keep")(["other-00000000c6"])
    command("prune")(["merged", "adapters", "reports"])
    assert folders_there() == before
    command("keep")(["--release", "other-00000000c6"])
    command("prune")(["merged", "adapters", "reports"])
    assert before - folders_there() == OTHER


def test_nothing_is_deleted_while_a_step_is_at_work(two_runs, capsys):
    before = folders_there()
    with folders.locked(Path("results/reports/new")):
        command("prune")(["merged"])
    said = capsys.readouterr().out
    assert "stopped: results/reports/new is being made" in said
    assert "deleted 0 of 1 folder(s)" in said
    assert folders_there() == before


def test_what_is_not_named_is_refused(two_runs, capsys):
    assert complaint(capsys, command("prune")).startswith("name what to delete (merged, ")
    assert complaint(capsys, command("prune"), "models").startswith("temper prune models: no such kind: ")


def test_a_merged_model_is_written_when_it_is_asked_for(two_runs, capsys):
    """In the same place, with the same weights."""
    folder = Path(finished.PARTS["merge_adapter"])
    weights = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    command("merge")(["--run", "best", "--sweep", "tiny"])
    assert capsys.readouterr().out == f"{folder}\n"
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(("keep", "left"), [("last", {"checkpoint-4", "checkpoint-12"}), ("none", set())])
def test_checkpoints_of_a_complete_training(tmp_path, keep, left):
    """The best one is what the last one would be replaced by."""
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    state = {"best_model_checkpoint": "results/.state/x/checkpoint-4"}
    (tmp_path / "checkpoint-12/trainer_state.json").write_text(json.dumps(state))
    checkpoints.cut(tmp_path, keep)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == left
