"""Energy of trainings, by codecarbon itself, without a network."""

import json
import time
from pathlib import Path

import pytest

from temper import energy, tracking
from temper.errors import UserError
from tests.test_tracking import SETTINGS


def settings(country):
    return {"follow": {"tracking": {"energy": country}, "sweep": "s", "run": "r", "title": "r"}}


def test_a_country_that_is_none_is_refused_before_any_job():
    pytest.importorskip("codecarbon")
    with pytest.raises(UserError, match="tracking.energy: unknown country 'XYZ'"):
        tracking.check({**SETTINGS, "energy": "XYZ"})
    tracking.check({**SETTINGS, "energy": "DEU"})


def test_a_training_is_estimated_and_other_work_is_not():
    pytest.importorskip("codecarbon")
    with energy.measured(settings("DEU")) as facts:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            sum(range(10_000))
    assert facts["energy"]["kwh"] > 0 and facts["energy"]["co2_grams"] > 0 and facts["energy"]["country"] == "DEU"
    for none in ({}, {"follow": None}, settings(None)):
        with energy.measured(none) as facts:
            pass
        assert facts == {}


def test_a_part_that_runs_share_counts_once(workspace):
    one = {"kwh": 0.5, "co2_grams": 100.0, "country": "DEU"}
    for folder, inputs, spent in (
        ("trunk", {}, one),
        ("short", {"previous": "trunk"}, None),
        ("long", {"previous": "trunk"}, one),
        ("report-short", {"adapter": "short"}, None),
        ("report-long", {"adapter": "long"}, None),
    ):
        Path(folder).mkdir()
        facts = {"inputs": inputs} | ({"energy": spent} if spent else {})
        Path(folder, "provenance.json").write_text(json.dumps(facts))
    found = energy.spent(["report-short", "report-long", "missing"])
    assert found == {"kwh": 1.0, "co2_grams": 200.0, "country": "DEU", "trainings": 2, "of": 3}
    assert energy.spent(["missing"]) is None
