"""A sweep of four runs as their evaluations leave it, to be compared."""

import json

import pytest

from temper.config.schema import Eval
from temper.reports.leaderboard import Board

FIGURES = {
    "f1": 0.8,
    "generated_accuracy": 0.75,
    "exact_match": 0.7,
    "perplexity": 1.5,
    "unparsed": 0.0,
    "unfinished": 0.0,
}


def report_figures(accuracy: float, loss: float, base: float | None = 0.5) -> dict:
    """A metrics.json as evaluate_model leaves it."""
    delta = {"value": accuracy - (base or 0), "interval": [0.1, 0.2]}
    return {
        "task": "labels",
        "metric": "accuracy",
        "split": "validation",
        "rows": 100,
        "values": {"accuracy": accuracy, "loss": loss, **FIGURES},
        "base": None if base is None else {"accuracy": base, "loss": 3.0, **FIGURES},
        "interval": [accuracy - 0.02, accuracy + 0.02],
        "intervals": {"accuracy": [accuracy - 0.02, accuracy + 0.02], "loss": [loss - 0.1, loss + 0.1]},
        "base_intervals": None,
        "delta": None if base is None else delta,
        "train": {
            "train_seconds": 90.0,
            "tokens_per_second": 1400.0,
            "peak_memory_bytes": 2**31,
            "trainable_parameters": 4096,
            "flops_per_step": 10**9,
            "global_step": 100,
        },
        "baselines": [],
        "published": [],
        "start": None,
        "left_out": {},
        "loss_seconds": 1.0,
        "generate_seconds": 2.0,
        "generated_tokens": 200,
        "tokens_per_second": 100.0,
        "peak_memory_bytes": 2**30,
    }


def write_report(folder, accuracy: float, loss: float, base: float | None = 0.5) -> str:
    """A report folder as evaluate_model leaves it."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(report_figures(accuracy, loss, base)))
    answers = ["positive"] * round(accuracy * 100) + ["negative"] * round(100 - accuracy * 100)
    rows = [
        {"id": number, "reference": "positive", "prediction": answer, "choice": answer}
        | {"score": float(answer == "positive"), "loss_sum": loss * (0.5 + number / 99), "tokens": 1}
        for number, answer in enumerate(answers)
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = [
        {"step": 1, "epoch": 0.5, "loss": 2.0},
        {"step": 2, "epoch": 1.0, "loss": loss},
        {"step": 2, "epoch": 1.0, "eval_loss": loss},
    ]
    (folder / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curves))
    return str(folder)


def board_of(sweep: str, rows: list[dict]) -> Board:
    """A leaderboard by accuracy on validation, whose first row is the chosen run."""
    judged = {"metric": "accuracy", "split": "validation", "base": None, "base_test": None}
    return Board(sweep=sweep, rows=rows, chosen=rows[0]["run"], missing=[], **judged)


@pytest.fixture
def sweep(tmp_path):
    """(config of a 2 x 2 sweep, its folder). c and d share their accuracy, d has the lower loss; a has the lowest."""
    reports = tmp_path / "results" / "reports"
    figures = {"a": (0.8, 0.2), "b": (0.95, 0.3), "c": (0.9, 0.45), "d": (0.9, 0.4)}
    points = [(1e-4, 4), (1e-4, 16), (1e-3, 4), (1e-3, 16)]
    runs = [
        {
            "name": name,
            "point": {"train.learning_rate": rate, "adapter.r": rank},
            "report": write_report(reports / name, *figures[name]),
        }
        for name, (rate, rank) in zip(figures, points, strict=True)
    ]
    settings = Eval(task="labels", labels=["negative", "positive"]).model_dump(mode="json")
    axes = {"train.learning_rate": ["1e-4", "1e-3"], "adapter.r": ["4", "16"]}
    config = {"experiment": "demo", "eval": settings, "sweep": {"name": "rates", "axes": axes}, "runs": runs}
    return config, tmp_path / "results" / "sweeps" / "rates"
