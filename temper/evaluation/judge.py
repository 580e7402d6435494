"""Asking a model the test rows, and judging what it answers."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from temper.errors import UserError
from temper.evaluation import metrics
from temper.evaluation.class_tokens import label_answers
from temper.provenance import peak_memory

# --- what the model says -------------------------------------------------------------------------

if TYPE_CHECKING:
    from datasets import DatasetDict


def ask(folder: Path, config: dict, rows: DatasetDict, test: list[dict], tokenizer) -> dict:
    """Loss of each row, an answer to each prompt and, for labels, how likely the model finds each of them.

    Raises:
        UserError: a loss that is not finite.
    """
    from temper.evaluation import generation, likelihoods
    from temper.model import loading

    settings = config["eval"]
    model = loading.load_model(folder, config["model"]["load"]).eval()
    size = settings["batch_size"], tokenizer.pad_token_id
    started = time.perf_counter()
    losses = likelihoods.row_losses(model, test, *size)
    loss_seconds = time.perf_counter() - started
    _check_finite(folder, test, losses.sums)
    asked: list[dict] = [
        {"loss_sum": total, "tokens": count} for total, count in zip(losses.sums, losses.tokens, strict=True)
    ]
    choices = chosen_by = None
    if settings["task"] == "labels":
        choices, chosen_by, logps = _likeliest(model, rows, test, settings["labels"], tokenizer, size)
        for row, of_labels in zip(asked, logps, strict=True):
            row["label_logps"] = [round(logp, 5) for logp in of_labels]
    stop_ids = loading.stop_token_ids(folder, tokenizer)
    known = generation.greedy_references(test, losses.matched, settings, stop_ids)
    answers = generation.generate_answers(model, tokenizer, test, settings, stop_ids, known)
    if "rejected_input_ids" in test[0]:
        for row, both in zip(asked, likelihoods.pair_logps(model, test, *size), strict=True):
            row["chosen_logp"], row["rejected_logp"] = both
    return {"rows": asked, "loss_seconds": loss_seconds, "choices": choices, "answers": answers, "chosen_by": chosen_by}


# How the likeliest label is found; the second way where a label is the beginning of another one.
ALONE = "the log-probability of its tokens"
WITH_END = "the log-probability of its tokens and of the one that ends an answer"


def _likeliest(model, rows: DatasetDict, test: list[dict], labels: list[str], tokenizer, size: tuple[int, int]):
    """(the label that the model finds the likeliest, row by row; by what; the log-probabilities of all).

    As lm-eval compares the choices of a question: by their own tokens. Where a label is the beginning of another one
    (``C``, ``C++``), the shorter would always be the likelier: there the end of each counts as well. Elsewhere it does
    not, for how readily a model ends its answer says nothing about the label.
    """
    from temper.evaluation import likelihoods

    ended = label_answers(labels, rows, tokenizer)
    alone = [answer[:-1] for answer in ended]
    with_end = _one_begins_another(alone)
    logps = likelihoods.label_logps(model, test, ended if with_end else alone, *size)
    choices = [labels[max(range(len(labels)), key=of_row.__getitem__)] for of_row in logps]
    return choices, WITH_END if with_end else ALONE, logps


def _one_begins_another(labels: list[list[int]]) -> bool:
    ordered = sorted(labels)  # a label stands right before those that begin with it
    return any(after[: len(label)] == label for label, after in itertools.pairwise(ordered))


def _check_finite(folder: Path, test: list[dict], sums: list[float]) -> None:
    for row, total in zip(test, sums, strict=True):
        if not math.isfinite(total):
            raise UserError(
                f"{folder}: the loss of test row {row['id']} is {total}, so no figure would mean anything: the weights "
                "are not finite, or model.load.dtype is too narrow for them (try float32)"
            )


# --- how good that is ----------------------------------------------------------------------------


def score_answers(
    settings: dict, rows: list[dict], answers: list[str], losses, choices: list[str] | None
) -> metrics.Scores:
    """All figures of the task, loss and preferences included.

    `losses`: rows with `loss_sum` and `tokens` and, of preference pairs, `chosen_logp` and `rejected_logp`.
    """
    scores = metrics.score(settings, [row["reference"] for row in rows], answers, choices)
    sums, tokens = [row["loss_sum"] for row in losses], [row["tokens"] for row in losses]
    scores.statistics |= metrics.loss_statistics(sums, tokens)
    if "chosen_logp" in losses[0]:
        chosen, rejected = ([row[name] for row in losses] for name in ("chosen_logp", "rejected_logp"))
        scores.statistics[metrics.PREFERENCE] = metrics.preference_statistic(chosen, rejected)
    for name in scores.statistics.keys() - scores.values.keys():
        scores.values[name] = scores.statistics[name](range(len(rows)))
    return scores


def judge(settings: dict, metric: str, test: list[dict], asked: dict, base: dict | None) -> dict:
    """Scores, the intervals of the figures that the page's head shows, and the interval of the gain by tuning."""
    scores = score_answers(settings, test, asked["answers"].texts, asked["rows"], asked["choices"])
    finished = asked["answers"].finished
    scores.values["unfinished"] = finished.count(False) / len(finished)
    shown = dict.fromkeys([metric, *(entry["metric"] for entry in settings["published"])])
    shown |= dict.fromkeys(name for name in [metrics.PREFERENCE] if name in scores.statistics)
    intervals = {name: metrics.interval(scores.statistics[name], len(test)) for name in shown}
    gain = None
    if base:
        gain = metrics.delta_interval(scores.statistics[metric], base["scores"].statistics[metric], len(test))
    return {"scores": scores, "intervals": intervals, "gain": gain}


def figures_of(settings, metric, train_references, test, asked, judged, base) -> dict:
    """The content of metrics.json.

    `test`: metric -> figure of this model, `base`: the same of the untouched one, or None. `interval`: 95% bootstrap
    interval of the ranking metric; `intervals`: of every metric that has one; `delta`: the gain over the base model in
    the ranking metric, and its interval. `baselines`: what needs no model. Added by `run`: `train`, the adapter's
    training.json; `start`, the figures of the model it started from; `left_out`, rows that tokenizing left out.
    """
    scores, answers = judged["scores"], asked["answers"]
    references = [row["reference"] for row in test]
    facts = {
        "task": settings["task"],
        "metric": metric,
        "rows": len(test),
        "test": _in_order(scores.values, settings["task"]),
        "base": base["facts"]["test"] if base else None,
        "interval": judged["intervals"][metric],
        "intervals": judged["intervals"],
        "base_intervals": base["facts"]["intervals"] if base else None,
        "delta": None,
        "baselines": [],
        "published": settings["published"],
        "loss_seconds": round(asked["loss_seconds"], 3),
        "generate_seconds": round(answers.seconds, 3),
        "generated_tokens": sum(answers.tokens),
        "tokens_per_second": round(sum(answers.tokens) / answers.seconds, 1),
        "peak_memory_bytes": peak_memory(),
    }
    if base:
        facts["delta"] = {"value": scores.values[metric] - base["scores"].values[metric], "interval": judged["gain"]}
    if settings["task"] in ("labels", "tags"):
        facts["baselines"] = [metrics.majority_baseline(settings, train_references, references)]
    if settings["task"] == "labels":
        labels = settings["labels"]
        facts["accuracy_of"] = asked["chosen_by"]
        facts["classes"] = metrics.per_class(labels, references, scores.readings)
        facts["confusion"] = metrics.confusion(labels, references, scores.readings)
        facts["base_confusion"] = base["facts"].get("confusion") if base else None
    return facts


def _in_order(values: dict, task: str) -> dict:
    order = (*metrics.METRICS[task], *metrics.LOSS_METRICS, metrics.PREFERENCE, *metrics.REWARDS, metrics.UNPARSED)
    order = (*order, "unfinished")
    return {name: values[name] for name in order if name in values}


def prediction_rows(test: list[dict], asked: dict, judged: dict, base: dict | None) -> list[dict]:
    """The lines of predictions.jsonl, in the order of the test split."""
    answers, scores = asked["answers"], judged["scores"]
    lines = []
    for index, row in enumerate(test):
        line = {name: row[name] for name in ("id", "prompt", "reference")}
        line |= {"prediction": answers.texts[index], "score": scores.rows[index]}
        if scores.readings:
            line["label"] = scores.readings[index]
        if asked["choices"]:
            line["choice"] = asked["choices"][index]
        if base:
            line["base_prediction"] = base["rows"][index]["prediction"]
            line["base_score"] = base["scores"].rows[index]
            if "choice" in base["rows"][index]:
                line["base_choice"] = base["rows"][index]["choice"]
        line |= {"finished": answers.finished[index], **asked["rows"][index]}
        if "rejected" in row:
            line["rejected"] = row["rejected"]
        lines.append(line)
    return lines
