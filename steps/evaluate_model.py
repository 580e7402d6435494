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

import itertools
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from steps.lib import evaluation_checks, figures, limits, metrics, pages
from steps.lib.adapters import DIVERGED
from steps.lib.errors import UserError
from steps.lib.files import load_rows, read_json, read_json_lines, read_yaml
from steps.lib.keys import flat
from steps.lib.label_tokens import label_answers
from steps.lib.models import load_tokenizer
from steps.lib.progress import quiet_libraries
from steps.lib.step import computing_threads, peak_memory, run_command

if TYPE_CHECKING:
    from datasets import DatasetDict

STAGE = "evaluate_model"

log = logging.getLogger("temper")


def run(
    config: dict,
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
        UserError: rows that cannot be judged so (see steps/lib/evaluation_checks.py), an unknown metric, or a base
            report or references of other rows.
    """
    quiet_libraries()
    settings = config["eval"]
    metric = metrics.check_metric(settings)
    if (model / DIVERGED).is_file():
        return _report_divergence(read_json(model / DIVERGED, {"step": int})["step"], settings, metric, adapter, output)
    tokenizer = load_tokenizer(model)
    rows, test = _rows(model, splits, settings, tokenizer)
    base = _base(base_report, settings, test) if base_report else None
    with computing_threads(config["num_threads"]):
        asked = _ask(model, config, rows, test, tokenizer)
    judged = _judge(settings, metric, test, asked, base)
    train = read_json(adapter / "training.json") if adapter else None
    if references:
        judged["scores"].values |= metrics.rewards(train["beta"], asked["rows"], _references(references, test))
    facts = figures_of(settings, metric, _train_references(rows, settings), test, asked, judged, base)
    facts |= {"train": train, "start": _start(start_report, metric), "left_out": _left_out(splits)}
    curves = read_json_lines(adapter / "metrics.jsonl") if adapter else []
    predictions = _predictions(test, asked, judged, base)
    pages.write_whole(output / "metrics.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    pages.write_whole(output / "predictions.jsonl", pages.json_lines(predictions))
    if curves:
        pages.write_whole(output / "curves.jsonl", pages.json_lines(curves))
    write_page(output, facts, predictions, curves, settings, _configs(config, model, splits, adapter))
    log.info("%s", headline(facts))
    return {"metric": metric, "value": facts["test"][metric], "rows": len(test)}


def _report_divergence(step: int, settings: dict, metric: str, adapter: Path, output: Path) -> dict:
    """The report of a training that diverged: its curve, and no figures."""
    curves = read_json_lines(adapter / "metrics.jsonl")
    facts = {
        "task": settings["task"],
        "metric": metric,
        "diverged_at_step": step,
        "train": read_json(adapter / "training.json"),
    }
    pages.write_whole(output / "metrics.json", json.dumps(facts, indent=2) + "\n")
    pages.write_whole(output / "predictions.jsonl", "")
    pages.write_whole(output / "curves.jsonl", pages.json_lines(curves))
    name = output.name
    loss_curves = figures.loss_curves(curves)
    pages.render("diverged.html", output / "report.html", name=name, step=step, loss_curves=loss_curves)
    log.info("the training diverged at step %d: no model to evaluate", step)
    return {"diverged_at_step": step}


# --- what goes in --------------------------------------------------------------------------------


def _rows(model: Path, splits: Path, settings: dict, tokenizer) -> tuple[DatasetDict, list[dict]]:
    """(all splits, the test rows)."""
    loaded = load_rows(splits)
    evaluation_checks.check(settings, splits, loaded, tokenizer)
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
    return {"facts": facts, "rows": rows, "scores": _scores(settings, rows, answers, rows, choices)}


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


# --- what the model says -------------------------------------------------------------------------


def _ask(folder: Path, config: dict, rows: DatasetDict, test: list[dict], tokenizer) -> dict:
    """Loss of each row, an answer to each prompt and, for labels, how likely the model finds each of them.

    Raises:
        UserError: a loss that is no finite number.
    """
    from steps.lib import generation, models, scoring

    settings = config["eval"]
    model = models.load_model(folder, config["model"]["load"]).eval()
    size = settings["batch_size"], tokenizer.pad_token_id
    started = time.perf_counter()
    losses = scoring.row_losses(model, test, *size)
    loss_seconds = time.perf_counter() - started
    _check_finite(folder, test, losses.sums)
    asked = [{"loss_sum": total, "tokens": count} for total, count in zip(losses.sums, losses.tokens, strict=True)]
    choices = chosen_by = None
    if settings["task"] == "labels":
        choices, chosen_by, logps = _likeliest(model, rows, test, settings["labels"], tokenizer, size)
        for row, of_labels in zip(asked, logps, strict=True):
            row["label_logps"] = [round(logp, 5) for logp in of_labels]
    stop_ids = models.stop_token_ids(folder, tokenizer)
    known = generation.greedy_references(test, losses.matched, settings, stop_ids)
    answers = generation.generate_answers(model, tokenizer, test, settings, stop_ids, known)
    if "rejected_input_ids" in test[0]:
        for row, both in zip(asked, scoring.pair_logps(model, test, *size), strict=True):
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
    from steps.lib import scoring

    ended = label_answers(labels, rows, tokenizer)
    alone = [answer[:-1] for answer in ended]
    with_end = _one_begins_another(alone)
    logps = scoring.label_logps(model, test, ended if with_end else alone, *size)
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


def _scores(settings: dict, rows: list[dict], answers: list[str], losses, choices: list[str] | None) -> metrics.Scores:
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


def _judge(settings: dict, metric: str, test: list[dict], asked: dict, base: dict | None) -> dict:
    """Scores, the intervals of the figures that the page's head shows, and the interval of the gain by tuning."""
    scores = _scores(settings, test, asked["answers"].texts, asked["rows"], asked["choices"])
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


def _predictions(test: list[dict], asked: dict, judged: dict, base: dict | None) -> list[dict]:
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


def headline(facts: dict) -> str:
    """One line: the ranking figure, how sure it is, and what tuning changed."""
    metric, low, high = facts["metric"], *facts["interval"]
    name, value = pages.metric_name(metric), facts["test"][metric]
    of = " of the likeliest label" if facts["task"] == "labels" and metric in ("accuracy", "f1") else ""
    text = f"test {name}{of} {value:.3f} [{low:.3f}, {high:.3f}] on {facts['rows']} rows"
    if facts["delta"]:
        gain, (low, high) = facts["delta"]["value"], facts["delta"]["interval"]
        text += f"; base model {facts['base'][metric]:.3f}, tuning {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
    if facts["test"].get(metrics.UNPARSED):
        text += f"; {facts['test'][metrics.UNPARSED]:.1%} of the free answers name no label"
    return text


# --- the page ------------------------------------------------------------------------------------


def write_page(output: Path, facts: dict, predictions: list, curves: list, settings: dict, configs: dict) -> None:
    """Write report.html. `configs`: heading -> table of dotted keys and values."""
    groups = sample_groups(predictions, settings["task"])
    pages.render(
        "report.html",
        output / "report.html",
        name=output.name,
        facts=facts,
        metric=facts["metric"],
        lower_is_better=metrics.LOWER_IS_BETTER,
        panels=figures.comparison(_panels(facts)),
        loss_curves=figures.loss_curves(curves),
        reward_curves=figures.reward_curves(curves),
        confusions=_confusions(facts),
        groups=choose_samples(groups, settings["samples"]),
        counts={name: len(rows) for name, rows in groups.items()},
        settings=settings,
        configs=configs,
    )


def _panels(facts: dict) -> list[dict]:
    """What the dot plots show: per metric this model, the base model, baselines and published figures."""
    panels = []
    for metric, interval in facts["intervals"].items():
        ours = "tuned" if facts["base"] or facts["train"] else "this model"
        entries = [{"name": ours, "value": facts["test"][metric], "interval": interval, "kind": "tuned"}]
        if facts["base"]:
            low_high = facts["base_intervals"].get(metric)
            entries.append({"name": "base model", "value": facts["base"][metric], "interval": low_high, "kind": "base"})
        if facts["start"]:
            start = facts["start"]
            low_high = start["intervals"].get(metric)
            entries.append(
                {"name": start["name"], "value": start["test"][metric], "interval": low_high, "kind": "other"}
            )
        others = [(entry["name"], entry.get(metric)) for entry in facts["baselines"]]
        others += [(entry["name"], entry["value"]) for entry in facts["published"] if entry["metric"] == metric]
        entries += [_without_interval(name, value) for name, value in others if value is not None]
        panels.append({"title": pages.metric_name(metric), "entries": entries})
    return panels


def _without_interval(name: str, value: float) -> dict:
    return {"name": name, "value": value, "interval": None, "kind": "other"}


def _confusions(facts: dict) -> list[tuple[str, dict]]:
    if "confusion" not in facts:
        return []
    tables = [("tuned" if facts["base"] else "this model", facts["confusion"])]
    return tables + ([("base model", facts["base_confusion"])] if facts["base_confusion"] else [])


# (what a score is, is there a base model?) -> (the groups, worth reading first; which of them a row belongs to)
GROUPS = {
    ("labels", True): (
        ("fixed by tuning", "broken by tuning", "wrong before and after", "right before and after"),
        lambda row: {(1, 0): 0, (0, 1): 1, (0, 0): 2, (1, 1): 3}[int(row["score"]), int(row["base_score"])],
    ),
    ("labels", False): (("right", "wrong"), lambda row: int(row["score"] < 1)),
    ("graded", True): (
        ("better than the base model's", "worse than the base model's", "as good as the base model's"),
        lambda row: 0 if row["score"] > row["base_score"] else 1 if row["score"] < row["base_score"] else 2,
    ),
    ("graded", False): (("scored 0.5 or above", "scored below 0.5"), lambda row: int(row["score"] < 0.5)),
}


def sample_groups(predictions: list[dict], task: str) -> dict[str, list[dict]]:
    """All answers, sorted by what tuning did to them, in the order in which they are worth reading."""
    compared = bool(predictions) and "base_score" in predictions[0]
    names, kind = GROUPS["labels" if task == "labels" else "graded", compared]
    groups: dict[str, list[dict]] = {name: [] for name in names}
    for row in predictions:
        groups[names[kind(row)]].append(row)
    return groups


def choose_samples(groups: dict[str, list[dict]], total: int) -> dict[str, list[dict]]:
    """`total` rows, the groups taking turns while they last; within a group spread evenly over the split."""
    shares = dict.fromkeys(groups, 0)
    while sum(shares.values()) < total:
        open_groups = [name for name, rows in groups.items() if shares[name] < len(rows)]
        if not open_groups:
            break
        for name in open_groups[: total - sum(shares.values())]:
            shares[name] += 1
    return {name: _spread(rows, shares[name]) for name, rows in groups.items() if shares[name]}


def _spread(rows: list[dict], number: int) -> list[dict]:
    return [rows[index * len(rows) // number] for index in range(number)]


def _configs(config: dict, model: Path, splits: Path, adapter: Path | None) -> dict[str, dict[str, str]]:
    """The config of this stage and of those before it, as they left it in their folders."""
    inputs = {"model": model, "splits": splits, "adapter": adapter}
    tables = {"evaluate_model": flat(config)}
    for name, folder in inputs.items():
        if folder and (folder / "config.yaml").is_file():
            made = (folder / "provenance.json").is_file()
            stage = read_json(folder / "provenance.json", {"stage": str})["stage"] if made else name
            tables[stage] = flat(read_yaml(folder / "config.yaml"))
    tables["inputs"] = {name: str(folder) for name, folder in inputs.items() if folder}
    return tables


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
