"""Keys: equal things have equal keys, and every difference that matters makes another."""

import ast
import hashlib
import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper import hashing, keys
from temper.config.stages import STAGES
from tests.conftest import ROOT

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def reordered(value):
    """The same value with the keys of every dict the other way round."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@settings(deadline=None)
@given(json_values)
def test_canonical_json_is_json_and_blind_to_the_order_of_keys(value):
    assert json.loads(hashing.canonical_json(value)) == value
    assert hashing.canonical_json(reordered(value)) == hashing.canonical_json(value)


@settings(deadline=None)
@given(json_values, json_values)
def test_different_values_have_different_digests(first, second):
    same_text = hashing.canonical_json(first) == hashing.canonical_json(second)
    assert (hashing.digest(first) == hashing.digest(second)) == same_text


def test_canonical_json_refuses_what_json_cannot_say():
    with pytest.raises(ValueError):
        hashing.canonical_json({"learning_rate": float("nan")})


def test_stage_key_depends_on_stage_config_and_upstream():
    base = keys.stage_key("fetch_model", {"a": 1}, {"model": "x"})
    assert len(base) == hashing.KEY_LENGTH
    others = [
        keys.stage_key("fetch_data", {"a": 1}, {"model": "x"}),
        keys.stage_key("fetch_model", {"a": 2}, {"model": "x"}),
        keys.stage_key("fetch_model", {"a": 1}, {"model": "y"}),
        keys.stage_key("fetch_model", {"a": 1}, {"other": "x"}),
    ]
    assert len({base, *others}) == 5


# --- the code key --------------------------------------------------------------------------------

CODE = '''"""Docstring."""
from temper.model import helper
from temper.progress import Progress


def run(x):
    """What it does."""
    return helper.double(x) + 1
'''
WORK, MODEL, DATA = "steps/work", "temper/model/helper", "temper/data/deep"
HELPER = "from temper.data.deep import FACTOR\n\n\ndef double(x):\n    return FACTOR * x\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of three modules; `package(name, text)` edits one and gives the key of steps.work."""
    files = {WORK: CODE, MODEL: HELPER, DATA: "FACTOR = 2\n", "temper/progress": "Progress = 1\n"}
    monkeypatch.setattr(keys, "PACKAGE_ROOT", tmp_path)
    for name, text in files.items():
        (tmp_path / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)

    def edited(name: str | None = None, text: str = "") -> str:
        if name:
            (tmp_path / f"{name}.py").write_text(text)
        forget()
        return keys.code_key("steps.work")

    yield edited
    forget()


def forget():
    keys.code_key.cache_clear()
    keys._tree.cache_clear()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (WORK, "# a comment\n" + CODE),
        (WORK, CODE.replace("Docstring.", "Other words.").replace("What it does.", "Other words.")),
        (WORK, CODE.replace('    """What it does."""\n', "")),
        (WORK, CODE.replace("helper.double(x) + 1", "(helper.double( x )\n            + 1)")),
        (MODEL, HELPER.replace("return FACTOR", "return FACTOR  ")),
        ("temper/progress", "Progress = 2\n"),  # only shows what the steps do
    ],
)
def test_code_key_ignores_comments_docstrings_formatting_and_display(package, name, text):
    before = package()
    assert package(name, text) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (WORK, CODE.replace("+ 1", "+ 2")),
        (WORK, CODE.replace("+ 1", "+ 1.0")),
        (WORK, CODE.replace("return helper", 'x = "a string, no docstring"\n    return helper')),
        (MODEL, HELPER.replace("FACTOR * x", "x * FACTOR")),
        (DATA, "FACTOR = 3\n"),  # two imports away
    ],
)
def test_code_key_sees_every_real_edit(package, name, text):
    before = package()
    assert package(name, text) != before
    assert package(name, {WORK: CODE, MODEL: HELPER, DATA: "FACTOR = 2\n"}[name]) == before


ROOMS = sorted(folder.name for folder in (ROOT / "temper").iterdir() if (folder / "__init__.py").is_file())
COMPUTING = ["data", "evaluation", "model", "sources", "training"]


def test_keys_hash_the_step_and_the_computing_rooms_and_nothing_else():
    assert {room.split(".")[1] for room in keys.COMPUTING} == set(COMPUTING) < set(ROOMS)
    for stage in STAGES:
        hashed = set(keys.code_hashes(f"steps.{stage}")) - {f"steps.{stage}"}
        assert {name.split(".")[1] for name in hashed} <= set(COMPUTING)
    assert "temper.training.trainers" in keys.code_hashes("steps.train_adapter")
    assert "temper.training.trainers" not in keys.code_hashes("steps.merge_adapter")


@pytest.mark.parametrize("room", COMPUTING)
def test_no_import_runs_from_a_computing_room_to_wiring(room):
    """What computes knows no config, plan, page, command or tracking: none of them comes into a key by a back door."""
    wiring = {*ROOMS, "api", "keys", "step", "tracking", "workflow"} - set(COMPUTING)
    for path in (ROOT / "temper" / room).glob("*.py"):
        for name in keys.imports_of(ast.parse(path.read_text())):
            package, _, rest = name.partition(".")
            assert package != "steps", f"{path.name} imports {name}"
            assert package != "temper" or rest.split(".")[0] not in wiring, f"{path.name} imports {name}"


# --- hashes of files -----------------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch):
    """A file system whose clock has so many ticks that no two changes have one time."""
    monkeypatch.setattr(hashing, "SETTLED", -1.0)


@pytest.mark.usefixtures("settled")
def test_hash_cache_reads_a_file_again_only_when_it_changed(tmp_path):
    file, cache = tmp_path / "rows.csv", tmp_path / "state/hashes.json"
    file.write_text("a,b\n")
    first = hashing.HashCache(cache)
    assert first.sha256(file) == hashing.file_sha256(file)
    first.save()
    second = hashing.HashCache(cache)
    assert second.sha256(file) == hashing.file_sha256(file)
    assert not second.changed
    file.write_text("a,c\n\n")
    assert second.sha256(file) == hashing.file_sha256(file)
    assert second.changed


@pytest.mark.usefixtures("settled")
def test_a_link_and_its_file_are_one(tmp_path):
    file, link = tmp_path / "rows.csv", tmp_path / "link.csv"
    file.write_text("a,b\n")
    link.symlink_to(file)
    hashes = hashing.HashCache()
    assert hashes.sha256(link) == hashes.sha256(file) == hashing.file_sha256(file)
    assert [*hashes.known] == [str(file)]


def test_the_hash_of_a_file_that_changed_just_now_is_not_kept(tmp_path, monkeypatch):
    """Where a clock has slow ticks, the next edit may leave the file's times as they are."""
    monkeypatch.setattr(hashing, "_stamp", lambda stat: [stat.st_size])
    file, hashes = tmp_path / "rows.csv", hashing.HashCache()
    for text in ("a,b\n", "a,c\n"):
        file.write_text(text)
        assert hashes.sha256(file) == hashing.file_sha256(file)
    assert not hashes.known
    later = time.time() + 10
    monkeypatch.setattr(hashing.time, "time", lambda: later)
    assert hashes.sha256(file) == hashing.file_sha256(file) and hashes.known


@pytest.mark.usefixtures("settled")
def test_the_hash_of_a_file_that_changed_while_it_was_read_is_not_kept(tmp_path, monkeypatch):
    file, hashes = tmp_path / "rows.csv", hashing.HashCache()
    file.write_text("a,b\n")
    digest = hashlib.file_digest

    def slow_digest(opened, kind):
        made = digest(opened, kind)
        with file.open("a") as edited:
            edited.write("c,d\n")
        return made

    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", slow_digest)
        hashes.sha256(file)
    assert not hashes.known
    assert hashes.sha256(file) == hashing.file_sha256(file)


@pytest.mark.usefixtures("settled")
def test_hash_cache_sees_an_edit_that_keeps_size_and_time(tmp_path):
    """As rsync --times --inplace makes it."""
    file = tmp_path / "rows.csv"
    file.write_text("a,b\n")
    hashes, before = hashing.HashCache(tmp_path / "hashes.json"), file.stat()
    first = hashes.sha256(file)
    time.sleep(0.02)  # the clock of the file system has ticks
    with file.open("r+") as edited:
        edited.write("x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert hashes.sha256(file) == hashing.file_sha256(file) != first


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": [[], 1]}', "[" * 100_000, "\udcff"])
def test_a_damaged_hash_cache_is_only_lost_time(tmp_path, content):
    file, cache = tmp_path / "rows.csv", tmp_path / "hashes.json"
    file.write_text("a,b\n")
    cache.write_bytes(content.encode(errors="surrogateescape"))
    hashes = hashing.HashCache(cache)
    assert hashes.sha256(file) == hashing.file_sha256(file)
    hashes.save()
    assert not hashing.HashCache(cache).changed
