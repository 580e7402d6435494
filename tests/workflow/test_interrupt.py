"""Ctrl-C, SIGTERM, SIGHUP, a closed pipe, another locale: one line or none, nothing left, and it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from temper.config.stages import load_stage_config
from tests.conftest import ROOT
from tests.support.finished import RUN
from tests.support.trainings import OPTIONS, start

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_training_that_is_asked_to_end_says_so_and_goes_on(workspace, tiny_splits, tiny_model, number):
    # Long enough to be still at it when the signal comes, however busy the machine is.
    config = load_stage_config("train_adapter", None, [*OPTIONS, "train.num_train_epochs=40"]) | {"trunk": "asked"}
    state = Path("results/.state/asked")
    training = start(tiny_splits, tiny_model, "adapter", config)
    while not list(state.glob("checkpoint-*/complete.json")) and training.poll() is None:
        time.sleep(0.01)
    training.send_signal(number)
    assert training.wait(timeout=60) == 128 + number
    last = training.stderr.read().splitlines()[-1]
    assert last == f"interrupted ({number.name}): run the same command again, and it goes on from what is whole"
    assert not list(workspace.glob(".tmp-*"))
    assert not Path("adapter").exists()
    if number == signal.SIGHUP:
        again = start(tiny_splits, tiny_model, "adapter", config)
        assert any("continuing from" in line for line in again.stderr)  # to the end: see test_kill.py
        again.kill()
        again.wait()


SLEEPER = """
import sys, time
from temper.errors import one_line_errors
with one_line_errors("it", "merge_adapter"):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep({after})
"""


def sleeper(after: float) -> subprocess.Popen:
    command = [sys.executable, "-c", SLEEPER.format(after=after)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    process.stdout.readline()
    return process


def test_who_asks_twice_need_not_wait():
    process = sleeper(after=60)
    process.send_signal(signal.SIGINT)
    time.sleep(3)  # later than one wish, on a busy machine too
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert "Traceback" not in process.stderr.read()


def test_two_signals_at_once_are_one_wish():
    process = sleeper(after=1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) in (130, 143)
    assert process.stderr.read().startswith("interrupted (SIG"), "it left everything in order"


def test_an_interrupt_that_python_drops_is_raised_anew():
    code = """
import os, signal, time, weakref
from temper.errors import one_line_errors
class Thing: pass
def tidy(_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
with one_line_errors("it", "merge_adapter"):
    thing = Thing()
    reference = weakref.ref(thing, tidy)
    del thing
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=50)
    assert done.returncode == 143
    assert done.stderr.splitlines() == [
        "interrupted (SIGTERM): run the same command again, and it goes on from what is whole"
    ]


def test_nohup_and_background_jobs_go_on():
    code = "import os, signal; from temper.errors import one_line_errors\n"
    code += "with one_line_errors(): os.kill(os.getpid(), signal.SIGHUP)\nprint('done')"
    ignoring = f"trap '' HUP; exec {sys.executable} -c \"$0\""
    done = subprocess.run(["bash", "-c", ignoring, code], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "--experiment", "demo", "--json"],
        ["leaderboard", "tiny"],
        ["predict", "--run", RUN, "--input", "prompts.txt", "--output", "-", "--max-new-tokens", "1"],
    ],
    ids=lambda command: command[0],
)
def test_a_reader_that_goes_away_ends_a_command_without_a_word(finished_run, workspace, command):
    (workspace / "results").symlink_to(finished_run / "results")
    (workspace / "prompts.txt").write_text("Well?\n" * 3)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "temper", *command]
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert done.returncode == 128 + signal.SIGPIPE, done.stderr
    assert "Error" not in done.stderr


def latin_1() -> dict[str, str]:
    """An environment whose encoding is not UTF-8, of the kind that this machine has."""
    names = subprocess.run(["locale", "-a"], capture_output=True, text=True).stdout.split()
    found = next((name for name in names if "8859" in name or name in ("en_US", "de_DE")), None)
    # Without such a locale: plain ASCII, without Python's own mending of it.
    locale = {"LC_ALL": found} if found else {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}
    return {**ENVIRONMENT, **locale, "PYTHONUTF8": "0"}


def test_a_locale_that_is_not_utf8_makes_no_difference(workspace):
    (workspace / "rows.jsonl").write_text(
        "".join(json.dumps({"question": f"Wie heißt {n}? 你好", "answer": "Straße"}) + "\n" for n in range(60)),
        encoding="utf-8",
    )
    options = ["experiment=smoke", "sweep=none", "tracking=none", "data.layout=question_answer", "data.prompt=null"]
    options += ["data.completion=null", "~data.csv", "data.format=null", "prompt.system='Grüße 你好'"]
    Path("config.json").write_text(json.dumps(load_stage_config("format_prompts", None, options)))  # in ASCII
    for encoding, environment in (("utf-8", ENVIRONMENT), ("other", latin_1())):
        command = [sys.executable, "-m", "steps.format_prompts", "--raw", "rows.jsonl", "--output", encoding]
        done = subprocess.run([*command, "--config", "config.json"], capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
    for name in ("train.jsonl", "config.yaml", "stats.json"):
        assert Path("other", name).read_bytes() == Path("utf-8", name).read_bytes(), name
    assert "Grüße 你好" in Path("other", "config.yaml").read_text(encoding="utf-8")


def test_every_file_is_read_and_written_in_a_named_encoding():
    command = [sys.executable, "-m", "ruff", "check", "--preview", "--select", "PLW1514", "steps"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
