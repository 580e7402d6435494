"""The figures of each data set of a mixture are those of its rows alone."""

import pytest

from temper.config.schema import Eval
from temper.evaluation import metrics
from temper.evaluation.judge import evidence_of, figures_of_sources, groups_of, judge

SOURCES = ("films", "books", "films", "books", "books", "films")


def lines(right: str) -> list[dict]:
    """Lines of predictions.jsonl; `right`: y or n for each row."""
    return [
        {
            "id": number,
            "source": source,
            "group": f"user {number % 3}",
            "reference": "positive" if number % 2 else "negative",
            "prediction": ("positive" if number % 2 else "negative") if letter == "y" else "neither",
            "finished": True,
            "loss_sum": float(number + 1),
            "tokens": 2 + number % 2,
            "bytes": 8,
        }
        for number, (source, letter) in enumerate(zip(SOURCES, right, strict=True))
    ]


def test_each_data_set_has_the_figures_of_its_rows():
    settings = Eval(task="text").model_dump(mode="json")
    rows, metric = lines("yynyny"), metrics.check_metric(settings)
    judged = judge(metric, evidence_of(settings, rows), None)
    found = figures_of_sources(metric, ["films", "films", "books"], rows, judged, None)
    assert {source: (part.rows, part.train_rows) for source, part in found.items()} == {
        "films": (3, 2),
        "books": (3, 1),
    }
    for source, part in found.items():
        mine = [row for row in rows if row["source"] == source]
        alone = judge(metric, evidence_of(settings, mine), None)
        assert part.values == pytest.approx(alone.scores.values)
        assert part.interval == pytest.approx(alone.intervals[metric])
        assert part.base is None
    assert found["films"].values["loss"] != found["books"].values["loss"]


def test_rows_of_one_data_set_have_no_parts():
    settings = Eval(task="text").model_dump(mode="json")
    rows = [{name: value for name, value in row.items() if name not in ("source", "group")} for row in lines("yyyyyn")]
    judged = judge(metrics.check_metric(settings), evidence_of(settings, rows), None)
    assert figures_of_sources("rouge_l", [], rows, judged, None) == {}
    assert groups_of(rows) is None and groups_of(lines("yyyyyn"))[:4] == ["user 0", "user 1", "user 2", "user 0"]
