"""Shared fixtures: every test runs in a folder of its own, on tiny models that are made once."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub is a mistake: fail at once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes run side by side

from tests.support import tiny  # noqa: E402
from tests.support.sweeps import sweep  # noqa: E402, F401

# A suite in the background (nohup, `&` in a script) inherits signals as ignored, and its children would leave them so.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the proofs that take minutes")
    parser.addoption("--run-browser", action="store_true", help="also run what opens pages in a real browser")
    parser.addoption("--run-slurm", action="store_true", help="also run what needs a Slurm of its own on this machine")


LONGEST = ("test_workflow.py", "test_reruns.py")  # minutes each: begun last, they would leave a core without work


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for mark in ("slow", "slurm", "browser"):
        for item in items if not config.getoption(f"--run-{mark}") else ():
            if item.get_closest_marker(mark):  # keywords have folder names, too
                item.add_marker(pytest.mark.skip(reason=f"{mark}: `make test-{mark}` runs it"))


def rarely(names, rare):
    """The names as parameters of a test, those in `rare` for the slow suite only."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in rare else name for name in names]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty folder as the current one: data/ and results/ of the test go there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return tiny.make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory, tiny_model) -> Path:
    return tiny.make_tiny_splits(tmp_path_factory.mktemp("splits") / "pairs", tiny_model, pairs=True)


@pytest.fixture(scope="session")
def tiny_splits(tmp_path_factory, tiny_model) -> Path:
    return tiny.make_tiny_splits(tmp_path_factory.mktemp("splits") / "tiny", tiny_model)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny_model) -> Path:
    """A project folder whose results/ hold one finished run (tests/support/finished.py). Do not write into it."""
    from tests.support import finished

    return finished.make(tmp_path_factory.mktemp("finished"), tiny_model)


@pytest.fixture
def project(finished_run, monkeypatch) -> Path:
    """The same, as the current folder."""
    monkeypatch.chdir(finished_run)
    return finished_run


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An SQLite file with MLflow's tables, which take seconds to make. Copy it to results/mlflow.db."""
    from temper import tracking

    with contextlib.chdir(tmp_path_factory.mktemp("store")):
        tracking.open_own_store()
        return Path("results/mlflow.db").resolve()
