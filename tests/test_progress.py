"""What a log says of long work."""

import logging

import pytest

from temper import progress, units


@pytest.fixture
def lines(monkeypatch, caplog):
    """The lines of a log that gets one at each update."""
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", -1.0)
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    caplog.set_level(logging.INFO, "temper")
    return caplog


def test_how_far_how_fast_and_how_long_yet(lines):
    with progress.Progress(310, "train", "steps", initial=10) as steps:
        steps.update(2, "loss 0.1234")
    assert lines.messages == [
        "train: 12/310 steps (4%), 1.00 steps/s, 04:58 left, loss 0.1234",
        "train: 12 steps in 3.0 s",
    ]


def test_bytes_and_work_whose_end_is_not_known(lines):
    with progress.Progress(None, "download", "B") as download:
        download.update(3 * 2**20)
    with progress.Progress(None, "tokenize", "rows") as rows:
        rows.update(1_200_000)
    assert lines.messages[0] == "download: 3.00MB, 1.57MB/s"
    assert lines.messages[2] == "tokenize: 1200000 rows, 600000.00 rows/s"


def test_amounts():
    assert [units.size(amount) for amount in (None, 0, 512 * 2**20, 3.3e9)] == ["–", "0 bytes", "512 MiB", "3.07 GiB"]
    assert [units.seconds(each) for each in (None, 0.42, 47, 200, 7500)] == [
        "–",
        "0.4 s",
        "47 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
