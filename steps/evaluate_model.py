"""Judge a model on the test split: its loss, its answers, and a page to read.

By hand::

    python -m steps.evaluate_model --model results/models/Y --splits results/splits/X \\
        --output results/reports/base eval=sentiment
    python -m steps.evaluate_model --model results/merged/Z --splits results/splits/X --adapter results/adapters/Z \\
        --base-report results/reports/base --output results/reports/Z eval=sentiment

Reads   the test split (and, for the majority baseline, the training split's references); a merged or an untouched
        model; of the adapter only its curves and its config; the untouched model's report, to compare with; after
        preference optimization the reference's log-probabilities, and the report of the model that it started from.
Writes  metrics.json (all figures, see `figures_of`); predictions.jsonl (one answer a line); curves.jsonl (the
        training's, if there was one); report.html (one page, nothing fetched from elsewhere).
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from temper.config import evaluation as checks
from temper.config.stages import EvaluateModel
from temper.errors import UserError
from temper.evaluation import metrics
from temper.evaluation.judge import ask, figures_of, judge, prediction_rows, score_answers
from temper.files import json_lines, load_rows, read_json, read_json_lines, write_whole
from temper.model import limits
from temper.model.adapters import DIVERGED
from temper.model.loading import load_tokenizer
from temper.model.threads import computing_threads
from temper.progress import quiet_libraries
from temper.reports import html, plots
from temper.reports.run_page import configs_shown, write_page
from temper.step import run_command

if TYPE_CHECKING:
    from datasets import DatasetDict
STAGE = "evaluate_model"
log = logging.getLogger("temper")


def run(
    config: EvaluateModel,
    model: Path,
    splits: Path,
    output: Path,
    adapter: Path | None = None,
    base_report: Path | None = None,
    references: Path | None = None,
    start_report: Path | None = None,
) -> dict:
    """Evaluate `model` and write its report.

    Raises:
        UserError: rows that cannot be judged so (see temper/config/evaluation.py), an unknown metric, or a base
            report or references of other rows.
    """
    quiet_libraries()
    settings = config.eval.model_dump()
    metric = metrics.check_metric(settings)
    if references:
        _needed(adapter, "--references")
    if (model / DIVERGED).is_file():
        training = _needed(adapter, f"{model}: a training that diverged")
        return _report_divergence(model, settings, metric, training, output)
    tokenizer = load_tokenizer(model)
    rows, test = _rows(model, splits, settings, tokenizer)
    base = _base(base_report, settings, test) if base_report else None
    with computing_threads(config.num_threads):
        asked = ask(model, config.model_dump(), rows, test, tokenizer)
    judged = judge(settings, metric, test, asked, base)
    train = read_json(adapter / "training.json") if adapter else None
    if train and references:
        judged["scores"].values |= metrics.rewards(train["beta"], asked["rows"], _references(references, test))
    facts = figures_of(settings, metric, _train_references(rows, settings), test, asked, judged, base)
    facts |= {"train": train, "start": _start(start_report, metric), "left_out": _left_out(splits)}
    curves = read_json_lines(adapter / "metrics.jsonl") if adapter else []
    predictions = prediction_rows(test, asked, judged, base)
    _write_figures(output, facts, predictions)
    if curves:
        write_whole(output / "curves.jsonl", json_lines(curves))
    write_page(output, facts, predictions, curves, settings, configs_shown(config.model_dump(), model, splits, adapter))
    log.info("%s", headline(facts))
    return {"metric": metric, "value": facts["test"][metric], "rows": len(test)}


def _needed(adapter: Path | None, why: str) -> Path:
    """The folder of the training, without which there is nothing to compare with, or to show."""
    if adapter is None:
        raise UserError(f"--adapter is missing: {why} goes with the folder of its training")
    return adapter


def _write_figures(output: Path, facts: dict, predictions: list[dict]) -> None:
    write_whole(output / "metrics.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_whole(output / "predictions.jsonl", json_lines(predictions))


def _report_divergence(model: Path, settings: dict, metric: str, adapter: Path, output: Path) -> dict:
    """The report of a training that diverged: its curve, and no figures."""
    step = read_json(model / DIVERGED, {"step": int})["step"]
    curves = read_json_lines(adapter / "metrics.jsonl")
    facts = {
        "task": settings["task"],
        "metric": metric,
        "diverged_at_step": step,
        "train": read_json(adapter / "training.json"),
    }
    _write_figures(output, facts, [])
    write_whole(output / "curves.jsonl", json_lines(curves))
    loss_curves = plots.loss_curves(curves)
    html.render("diverged.html", output / "report.html", name=output.name, step=step, loss_curves=loss_curves)
    log.info("the training diverged at step %d: no model to evaluate", step)
    return {"diverged_at_step": step}


# --- what goes in --------------------------------------------------------------------------------


def _rows(model: Path, splits: Path, settings: dict, tokenizer) -> tuple[DatasetDict, list[dict]]:
    """(all splits, the test rows)."""
    loaded = load_rows(splits)
    checks.check(settings, splits, loaded, tokenizer)
    limits.check(model, {"test": loaded["test"]}, ["test"], settings["max_new_tokens"])
    return loaded, list(loaded["test"])


def _train_references(rows: DatasetDict, settings: dict) -> list[str]:
    """The training split's references, where a baseline needs them."""
    wanted = settings["task"] in ("labels", "tags") and "train" in rows
    return list(rows["train"]["reference"]) if wanted else []


def _left_out(splits: Path) -> dict:
    """Split -> how many of its rows tokenizing left out, and of how many; splits that kept all are not in it."""
    audits = read_json(splits / "audit.json", {"splits": dict[str, dict]})["splits"]
    return {
        name: {key: one.get(key) for key in ("dropped", "read")} for name, one in audits.items() if one.get("dropped")
    }


def _base(folder: Path, settings: dict, test: list[dict]) -> dict:
    """The untouched model's figures and answers, scored again so that differences can be judged row by row."""
    facts = read_json(folder / "metrics.json", {"task": str, "test": dict, "intervals": dict})
    rows = read_json_lines(folder / "predictions.jsonl", dict)
    if facts["task"] != settings["task"] or [row["id"] for row in rows] != [row["id"] for row in test]:
        raise UserError(
            f"--base-report {folder}: other test rows or another task; evaluate the base model on these splits"
        )
    answers = [row["prediction"] for row in rows]
    choices = [row["choice"] for row in rows] if "choice" in rows[0] else None
    return {"facts": facts, "rows": rows, "scores": score_answers(settings, rows, answers, rows, choices)}


def _references(folder: Path, test: list[dict]) -> list[dict]:
    """The test split's figures of the model that preference optimization started from."""
    figures = load_rows(folder)
    rows = list(figures["test"]) if "test" in figures else []
    if [row["id"] for row in rows] != [row["id"] for row in test]:
        raise UserError(f"--references {folder}: of other test rows; run reference_logprobs on these splits")
    return rows


def _start(folder: Path | None, metric: str) -> dict | None:
    """Figures of the model that this training started from, when that was trained itself."""
    if folder is None:
        return None
    facts = read_json(folder / "metrics.json", {"test": dict, "intervals": dict})
    return {"name": "after fine-tuning", "test": facts["test"], "intervals": facts["intervals"], "metric": metric}


def headline(facts: dict) -> str:
    """One line: the ranking figure, how sure it is, and what tuning changed."""
    metric = facts["metric"]
    low, high = facts["interval"]
    name, value = html.metric_name(metric), facts["test"][metric]
    of = " of the likeliest label" if facts["task"] == "labels" and metric in ("accuracy", "f1") else ""
    text = f"test {name}{of} {value:.3f} [{low:.3f}, {high:.3f}] on {facts['rows']} rows"
    if facts["delta"]:
        gain, (low, high) = facts["delta"]["value"], facts["delta"]["interval"]
        text += f"; base model {facts['base'][metric]:.3f}, tuning {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
    if facts["test"].get(metrics.UNPARSED):
        text += f"; {facts['test'][metrics.UNPARSED]:.1%} of the free answers name no label"
    return text


def main(argv=None) -> None:
    inputs = {
        "model": "folder of merge_adapter, or of fetch_model for the untouched model",
        "splits": "folder of tokenize_splits",
        "adapter?": "folder of train_adapter, for the training's curves and times",
        "base_report?": "report of the untouched model on the same splits, to compare with",
        "references?": "folder of reference_logprobs, after preference optimization",
        "start_report?": "report of the model that the training started from, when that was trained itself",
    }
    run_command(sys.modules[__name__], inputs, argv)


if __name__ == "__main__":
    main()
