"""The figure without the rows that stand in train is that of the other rows alone."""

import json
from pathlib import Path

import pytest

from temper.config.schema import Eval
from temper.data import in_train
from temper.data.in_train import InTrain
from temper.evaluation import metrics
from temper.evaluation.contamination import figures_without
from temper.evaluation.judge import evidence_of, judge
from tests.evaluation.test_sources import lines

SETTINGS = Eval(task="text").model_dump(mode="json")


def without(ids: dict[str, list[int]]):
    rows, metric = lines("yynyny"), metrics.check_metric(SETTINGS)
    found = InTrain({"test": ids, "validation": {"prompt": [1]}}, "report.html")
    return figures_without(metric, "test", rows, evidence_of(SETTINGS, rows), found)


def test_rows_that_stand_in_train_are_left_out_of_the_figure():
    found = without({"prompt": [0, 77], "near": [2, 3]})
    rows, metric = [row for row in lines("yynyny") if row["id"] in (1, 4, 5)], metrics.check_metric(SETTINGS)
    alone = judge(metric, evidence_of(SETTINGS, rows), None)
    assert found.in_train == {"prompt": 1, "near": 2} and found.rows == 3
    assert found.value == pytest.approx(alone.scores.values[metric])
    assert found.interval == pytest.approx(alone.intervals[metric])


def test_no_row_or_every_row_in_train_gives_no_figure():
    assert without({}) is None and without({"near": [77]}) is None
    every = without({"near": list(range(6))})
    assert every.rows == 0 and every.value is None
    rows = lines("yyyyyy")
    assert figures_without("loss", "test", rows, evidence_of(SETTINGS, rows), None) is None


@pytest.mark.parametrize("dropped", [0, 1])
def test_the_splits_carry_which_rows_stand_in_train(tmp_path, dropped):
    prompts, splits, other = (tmp_path / name for name in ("prompts", "splits", "other"))
    for folder in (prompts, splits, other):
        folder.mkdir()
    in_train.write(prompts, splits)
    assert in_train.read(splits) is None
    found = [
        {"split": "test", "id": 3, "other": "train", "other_id": 1, "kind": "prompt"},
        {"split": "test", "id": 4, "other": "train", "other_id": 1, "kind": "near"},
        {"split": "test", "id": 5, "other": "train", "other_id": 1, "kind": "group"},
        {"split": "test", "id": 6, "other": "validation", "other_id": 8, "kind": "near"},
        {"split": "validation", "id": 8, "other": "train", "other_id": 2, "kind": "near"},
    ]
    (prompts / "overlap.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    (prompts / "stats.json").write_text(json.dumps({"splits": {"train": {"left_out_by_overlap": dropped}}}))
    in_train.write(prompts, splits)
    in_train.copy(splits, other)
    rows = {"validation": {"near": [8]}, "test": {"prompt": [3], "near": [4]}}
    assert in_train.read(other) == InTrain(
        {"validation": {}, "test": {}} if dropped else rows, str(Path(prompts, "report.html"))
    )
