"""Locks that only one node sees are noticed; those of a command that was killed are not taken for such."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from temper import shared_disk
from temper.errors import UserError
from temper.files import write_whole


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(shared_disk, "BEAT", 0.05)
    monkeypatch.delenv(shared_disk.HELD, raising=False)


def checked() -> str:
    """What `check` says in another process."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_check)


def _check() -> str:
    try:
        shared_disk.check()
    except UserError as error:
        return str(error)
    return ""


def test_a_lock_that_is_seen_is_as_it_should_be(tmp_path):
    with shared_disk.held(tmp_path):
        started = time.monotonic()
        assert checked() == "" and time.monotonic() - started < 2
    assert not list(tmp_path.iterdir()) and shared_disk.HELD not in os.environ


def test_a_lock_that_is_not_seen_ends_the_job(tmp_path, monkeypatch):
    """Another file in its place is what a node sees that has locks of its own."""
    with shared_disk.held(tmp_path):
        path = Path(os.environ[shared_disk.HELD])
        elsewhere = path.rename(tmp_path / "elsewhere")
        path.touch()
        said = checked()
        elsewhere.rename(path)
    assert said.startswith(f"{tmp_path}: a lock that is held on another node is not seen on this one")


def test_a_killed_command_holds_nothing(tmp_path, monkeypatch):
    (tmp_path / "killed.lock").touch()
    (tmp_path / "killed.count").write_text("7")
    monkeypatch.setenv(shared_disk.HELD, str(tmp_path / "killed.lock"))
    assert checked() == ""
    ended = threading.Event()

    def count() -> None:
        for number in range(10_000):
            if not ended.wait(0.01):
                write_whole(tmp_path / "killed.count", str(number))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        assert checked() != "", "the same, but it goes on"
    finally:
        ended.set()
        thread.join()


def test_without_a_cluster_nothing_is_looked_at():
    assert checked() == ""
