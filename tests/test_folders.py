"""A stage's folder: whole or made again, and nobody's own files are ever deleted for it."""

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from steps import fetch_model, merge_adapter
from temper import folders
from temper.errors import UserError
from tests.conftest import ROOT
from tests.support.finished import ADAPTER, CONFIG, MERGED

INPUTS = ["--model", "results/models/tiny-00000000a0", "--adapter", f"results/adapters/{ADAPTER}"]
OUTPUT = f"results/merged/{MERGED}"


@pytest.fixture
def own(finished_run, workspace):
    """A finished project that a test may spoil, as the current folder."""
    shutil.copytree(finished_run / "results", workspace / "results")
    return workspace


def merge(output: str = OUTPUT) -> None:
    merge_adapter.main([*INPUTS, "--output", output, *CONFIG])


def content(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_finished_folder_is_whole_and_its_provenance_names_its_files(project):
    files = json.loads(Path(OUTPUT, "provenance.json").read_text())["files"]
    assert {"config.yaml", "model.safetensors", "tokenizer.json"} <= set(files)
    made = {path.parent for path in Path("results").glob("*/*/provenance.json")}
    assert [folders.fault(path) for path in made] == [None] * 7


def test_a_merged_model_as_the_next_base_is_whole_as_well(project, tmp_path):
    """Its provenance is not that of the copy, which once made every later step refuse it."""
    source = {"model": {"source": {"kind": "files", "path": OUTPUT}}}
    fetch_model.main(["--output", str(tmp_path / "model"), "--config", json.dumps(source)])
    assert folders.fault(tmp_path / "model") is None
    assert json.loads((tmp_path / "model" / "provenance.json").read_text())["stage"] == "fetch_model"


@pytest.mark.parametrize("lost", ["model.safetensors", "provenance.json", "tokenizer.json"])
def test_a_folder_that_lost_a_file_is_made_again_and_what_was_left_is_kept(own, lost):
    before = content(OUTPUT)
    Path(OUTPUT, lost).unlink()
    Path(OUTPUT, "notes.txt").write_text("mine")
    if lost == "provenance.json":  # then nothing says that a step wrote it
        shutil.copy(Path(OUTPUT, "config.yaml"), "config.yaml")
        with pytest.raises(SystemExit):
            merge()
        assert Path(OUTPUT, "notes.txt").read_text() == "mine"
        return
    merge()
    after = content(OUTPUT)
    assert after["model.safetensors"] == before["model.safetensors"]
    assert after.keys() == before.keys()
    (aside,) = Path("results/merged/.damaged").iterdir()
    assert (aside / "notes.txt").read_text() == "mine"
    assert not (aside / lost).exists()
    Path(OUTPUT, lost).unlink()
    merge()
    assert list(Path("results/merged/.damaged").iterdir()) == [aside], "the last one is kept"
    assert not (aside / "notes.txt").exists()


def test_an_emptied_folder_is_made_again(own):
    shutil.rmtree(OUTPUT)
    Path(OUTPUT).mkdir()
    Path(OUTPUT, ".snakemake_timestamp").touch()
    merge()
    assert folders.is_complete(Path(OUTPUT))
    assert not Path("results/merged/.damaged").exists()


def test_somebodys_folder_that_is_called_like_a_temporary_one_stays(own):
    Path("results/merged/.tmp-new").mkdir()
    Path("results/merged/.tmp-new/notes.txt").write_text("mine")
    merge("results/merged/new")
    assert Path("results/merged/.tmp-new/notes.txt").read_text() == "mine"
    assert [path.name for path in Path("results/merged").glob(".tmp-*")] == [".tmp-new"]


def test_what_a_killed_process_left_goes_and_what_is_at_work_stays(workspace):
    parent = workspace / "made"
    code = (
        "import sys, time; from pathlib import Path; from temper.folders import temporary_folder\n"
        "with temporary_folder(Path(sys.argv[1]) / 'one'): print(flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", code, str(parent)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        with folders.temporary_folder(parent / "two"):
            assert len(list(parent.glob(".tmp-*"))) == 2, "of the other process and ours"
        process.kill()
        process.wait()
        assert len(list(parent.glob(".tmp-*"))) == 1
    folders.remove_leftovers(parent)
    assert not list(parent.glob(".tmp-*"))
    assert (parent / "two").is_dir()


def test_a_folder_that_fails_leaves_nothing_and_its_mode_is_the_users(workspace):
    with pytest.raises(ValueError, match="fails"), folders.temporary_folder(Path("one")):
        raise ValueError("fails")
    assert [path.name for path in workspace.iterdir()] == [".locks"]
    with folders.temporary_folder(Path("one")):
        pass
    Path("other").mkdir()
    assert stat.S_IMODE(Path("one").stat().st_mode) == stat.S_IMODE(Path("other").stat().st_mode)


def test_a_name_has_at_most_240_bytes(workspace):
    folders.check_name(Path("a" * 240), "it")
    with pytest.raises(UserError, match="the name ü+... has 242 bytes"):
        folders.check_name(Path("ü" * 121), "it")
    with folders.locked(Path("a" * 240)), folders.temporary_folder(Path("a" * 240)) as folder:
        (folder / "file").touch()
    assert Path("a" * 240, "file").is_file()


def test_provenance_names_the_commit_of_the_code(tmp_path):
    """Also where Temper is used from a project that is a git repository of its own, or none."""
    from temper.provenance import git_commit

    if not (ROOT / ".git").exists():
        pytest.skip("not in a git repository")
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert (git_commit() or "").startswith(head.strip())


def test_a_disk_without_locks_is_refused(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    expected = pytest.raises(UserError, match="cannot be locked .No locks available.: the disk has no locks")
    with expected, folders.locked(tmp_path / "adapter"):
        pass
