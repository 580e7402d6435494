"""Several processes: results in order, and nothing of them is left, however it ends."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from temper.data.workers import THREADS, WORTH, in_order, worth
from temper.errors import UserError
from tests.conftest import ROOT

HERE = Path("prompts/train.jsonl")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_their_items(workers):
    def slow_if_even(number):
        time.sleep(0.02 * (number % 2 == 0))
        return number, os.getpid()

    made = list(in_order(slow_if_even, range(12), workers, HERE))
    assert [number for number, _ in made] == list(range(12))
    assert (os.getpid() in {pid for _, pid in made}) == (workers == 1)
    assert not multiprocessing.active_children()


def test_items_are_read_as_they_are_needed():
    read = itertools.count()
    made = in_order(str, (next(read) for _ in range(1000)), 2, HERE)
    assert next(made) == "0"
    made.close()
    assert next(read) < 10
    assert not multiprocessing.active_children()


def test_the_first_error_in_order_is_raised():
    def refuse(number):
        if number == 3:
            time.sleep(0.2)
        if number >= 3:
            raise UserError(f"row {number}")
        return number

    made = in_order(refuse, range(9), 3, HERE)
    assert [next(made) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="^row 3$"):
        next(made)
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_one_line():
    def killed(number):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match=r"^prompts/train.jsonl: one of the 2 processes that read it was killed"):
        list(in_order(killed, range(9), 2, HERE))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("cores", "size", "workers"), [(4, 0, 1), (4, 3 * WORTH, 3), (4, 9 * WORTH, 4), (1, 9 * WORTH, 1)]
)
def test_a_small_text_is_not_worth_a_process(monkeypatch, cores, size, workers):
    monkeypatch.setenv(THREADS, str(cores))
    assert worth(size) == workers


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_the_main_one(tmp_path, number):
    """Its whole group gets SIGINT, as by Ctrl-C; the others come to the main process alone, as from the workflow."""
    script = """
        import os, sys, time
        from pathlib import Path
        from temper.data.workers import in_order
        from temper.errors import one_line_errors

        def work(item):
            Path(str(os.getpid())).touch()
            time.sleep(0.5)

        with one_line_errors("splits", "tokenize_splits"):
            list(in_order(work, range(1000), 2, Path("train.jsonl")))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    main = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _until(lambda: len(list(tmp_path.iterdir())) == 2)
    (os.killpg if number == signal.SIGINT else os.kill)(main.pid, number)
    said = main.communicate(timeout=60)[1]  # at the end of the last process that has standard error
    if number == signal.SIGKILL:
        assert (main.returncode, said) == (-9, "")
    else:
        again = "run the same command again, and it goes on from what is whole"
        assert (main.returncode, said) == (128 + number, f"interrupted ({number.name}): {again}\n")
    _until(lambda: not any(Path("/proc", path.name).exists() for path in tmp_path.iterdir()))


def _until(true) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
