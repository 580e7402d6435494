"""Judge a model on one split: its loss, its answers, and a page to read.

By hand::

    python -m steps.evaluate_model --model results/models/Y --splits results/splits/X \\
        --output results/reports/base eval=sentiment
    python -m steps.evaluate_model --model results/models/Y --splits results/splits/X --adapter results/adapters/Z \\
        --base-report results/reports/base --output results/reports/Z eval=sentiment

Reads   the split that `eval.split` names (and, for the baselines, the training split); an untouched model, or one and
        what was trained on it, which are merged in memory as merge_adapter merges them: the figures are those of the
        merged folder, to the bit, which --model may name as well; the training's curves; the untouched model's report,
        to compare with; after preference optimization the reference's log-probabilities, and the report of the model
        that it started from; the report of a training on documents that came first; the probe, a general text.
Writes  metrics.json (all figures, see `figures_of`); predictions.jsonl (one answer a line); curves.jsonl (the
        training's, if there was one); probe.jsonl (one passage of the probe a line); report.html (one page, nothing
        fetched from elsewhere).
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from temper.config import evaluation as checks
from temper.config.stages import NOT_PLANNED, EvaluateModel, Planned
from temper.data import in_train
from temper.data.columns import with_right_answers
from temper.errors import UserError
from temper.evaluation import forgetting, metrics, own_metrics
from temper.evaluation.class_names import UNPARSED
from temper.evaluation.contamination import figures_without, sentence
from temper.evaluation.figures import Diverged, Figures, First, Start, read_figures, write_figures
from temper.evaluation.judge import (
    Asked,
    BaseReport,
    ask,
    evidence_of,
    figures_of,
    figures_of_sources,
    judge,
    prediction_rows,
)
from temper.files import json_lines, load_rows, read_json, read_json_lines, write_whole
from temper.model import limits
from temper.model.loading import load_tokenizer
from temper.model.merging import Source, source_of
from temper.model.threads import computing_threads
from temper.progress import quiet_libraries
from temper.reports import html, plots
from temper.reports.run_page import configs_shown, write_page
from temper.sources import pins as raw_data
from temper.sources.own_code import refuse_changed
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
    first_report: Path | None = None,
    probe: Path | None = None,
    planned: Planned = NOT_PLANNED,
) -> dict:
    """Evaluate `model` and write its report.

    Args:
        planned: its `probe_text`, the identity of the probe when the workflow planned, is compared with what is there.

    Raises:
        UserError: rows that cannot be judged so (see temper/config/evaluation.py), an unknown metric, a base report or
            references of other rows, or a probe that cannot be read.
    """
    quiet_libraries()
    settings = config.eval.model_dump()
    metric = metrics.check_metric(settings)
    refuse_changed(planned.own_code, own_metrics.code(settings))
    if references:
        _needed(adapter, "--references")
    source = source_of(config, model, adapter, splits)
    if source.diverged_at is not None:
        training = _needed(adapter, f"{model}: a training that diverged")
        facts = _report_divergence(source.diverged_at, settings, metric, training, output)
        return facts | _merged(source)

    tokenizer = load_tokenizer(model)
    rows = _rows(source, splits, settings, tokenizer)
    judged_on = list(rows[config.eval.split])
    passages = _passages(probe, config, planned) if probe else None
    base = _base(base_report, settings, judged_on) if base_report else None
    with computing_threads(config.num_threads):
        asked = ask(source, config.model_dump(), rows, tokenizer, passages)

    train = read_json(adapter / "training.json") if adapter else None
    judged = judge(metric, _evidence(asked, settings, judged_on, train, references), base)
    start, left_out = _start(start_report, metric, bool(first_report)), _left_out(splits)
    learned = _learned(rows, settings)
    found = figures_of(metric, learned, judged_on, asked, judged, base, train=train, start=start, left_out=left_out)
    trained = list(rows["train"]["source"]) if "source" in rows["train"].column_names else []
    found.sources = figures_of_sources(metric, trained, judged_on, judged, base)
    known = in_train.read(splits)
    found.without_train = figures_without(metric, config.eval.split, judged_on, judged.evidence, known)
    found.data_report = known and known.report
    found.first = _first(first_report) if first_report else None
    if asked.probed:
        found.probe = forgetting.figures_of_probe(asked.probed, base_report)
        write_whole(output / forgetting.FILE, json_lines(asked.probed.lines))

    curves = read_json_lines(adapter / "metrics.jsonl") if adapter else []
    predictions = prediction_rows(judged_on, asked, judged, base)
    _write_files(output, found, predictions, curves)
    write_page(output, found, predictions, curves, settings, configs_shown(config.model_dump(), model, splits, adapter))
    log.info("%s", headline(found))
    return {"metric": metric, "value": found.values[metric], "rows": len(judged_on)} | _merged(source)


def _merged(source: Source) -> dict:
    """What provenance.json says of a merge in memory; nothing for a model that was asked as it is."""
    return {"merged": source.facts} if source.merging else {}


def _needed(adapter: Path | None, why: str) -> Path:
    """The folder of the training, without which there is nothing to compare with, or to show."""
    if adapter is None:
        raise UserError(f"--adapter is missing: {why} goes with the folder of its training")
    return adapter


def _evidence(
    asked: Asked, settings: dict, judged_on: list[dict], train: dict | None, references: Path | None
) -> metrics.Evidence:
    """What the model said, with the figures of your own metrics and, after preference optimization, where it began."""
    evidence = asked.evidence(settings, judged_on)
    evidence.own = own_metrics.values(settings, asked.answered(judged_on))
    if train and references:
        evidence.start_logps, evidence.beta = _start_logps(references, settings["split"], judged_on), train["beta"]
    return evidence


def _write_files(output: Path, found: Figures | Diverged, predictions: list[dict], curves: list[dict]) -> None:
    write_figures(output, found)
    write_whole(output / "predictions.jsonl", json_lines(predictions))
    if curves:
        write_whole(output / "curves.jsonl", json_lines(curves))


def _report_divergence(step: int, settings: dict, metric: str, adapter: Path, output: Path) -> dict:
    """The report of a training that diverged: its curve, and no figures."""
    curves = read_json_lines(adapter / "metrics.jsonl")
    train = read_json(adapter / "training.json")
    found = Diverged(task=settings["task"], metric=metric, diverged_at_step=step, train=train)
    _write_files(output, found, [], curves)
    loss_curves = plots.loss_curves(curves)
    html.render("diverged.html", output / "report.html", name=output.name, step=step, loss_curves=loss_curves)
    log.info("the training diverged at step %d: no model to evaluate", step)
    return {"diverged_at_step": step}


# --- what goes in --------------------------------------------------------------------------------


def _rows(source: Source, splits: Path, settings: dict, tokenizer) -> DatasetDict:
    """All splits, checked."""
    loaded, split = with_right_answers(load_rows(splits)), settings["split"]
    checks.check(settings, splits, loaded, tokenizer, [split])
    asked = {split: loaded[split]}
    limits.check(source.folder, asked, [split], settings["max_new_tokens"], virtual_tokens=source.virtual_tokens)
    return loaded


def _passages(probe: Path, config: EvaluateModel, planned: Planned) -> list[str]:
    """The passages of the probe, unless they are others than when the workflow was planned."""
    raw_data.refuse_other_identity(probe, raw_data.identity_on_disk(probe), planned.probe_text, "the probe")
    return forgetting.read_passages(probe, config.probe.model_dump())


def _learned(rows: DatasetDict, settings: dict) -> list[dict]:
    """What the baselines know of the training split."""
    wanted = settings["task"] in ("labels", "tags") and "train" in rows
    return list(rows["train"].select_columns(["prompt", "reference"])) if wanted else []


def _left_out(splits: Path) -> dict:
    """Split -> how many of its rows tokenizing left out, and of how many; splits that kept all are not in it."""
    audits = read_json(splits / "audit.json", {"splits": dict[str, dict]})["splits"]
    return {
        name: {key: one.get(key) for key in ("dropped", "read")} for name, one in audits.items() if one.get("dropped")
    }


def _base(folder: Path, settings: dict, judged_on: list[dict]) -> BaseReport:
    """The untouched model's figures and answers, scored again so that differences can be judged row by row."""
    found = read_figures(folder)
    rows = read_json_lines(folder / "predictions.jsonl", dict)
    same = found.task == settings["task"] and [row["id"] for row in rows] == [row["id"] for row in judged_on]
    if isinstance(found, Diverged) or not same:
        raise UserError(
            f"--base-report {folder}: other rows or another task; evaluate the base model on these splits, with "
            f"eval.split={settings['split']}"
        )
    scores = metrics.score(evidence_of(settings, rows))
    for name in [metrics.check_metric(settings), *(figure["metric"] for figure in settings["published"])]:
        if name not in scores.values and own_metrics.is_own(settings, name):
            raise UserError(f"--base-report {folder}: has no '{name}': evaluate the base model with these eval.metrics")
    return BaseReport(found, rows, scores)


def _start_logps(folder: Path, split: str, judged_on: list[dict]) -> list[tuple[float, float]]:
    """Log-probabilities of the pairs, by the model that preference optimization started from."""
    found = load_rows(folder)
    ids, chosen, rejected = _reference_columns(found[split]) if split in found else ([], [], [])
    if ids != [row["id"] for row in judged_on]:
        raise UserError(f"--references {folder}: of other {split} rows; run reference_logprobs on these splits")
    return list(zip(chosen, rejected, strict=True))


def _reference_columns(figures) -> tuple[list, list, list]:
    """(id, log-probability of the chosen answer, of the rejected one) of each pair that reference_logprobs wrote."""
    if "ref_logps" in figures.column_names:  # of method=kto: a line an answer, the chosen one first
        ids, logps = figures["id"][:], figures["ref_logps"][:]
        return ids[::2], logps[::2], logps[1::2]
    return figures["id"][:], figures["ref_chosen_logps"][:], figures["ref_rejected_logps"][:]


def _start(folder: Path | None, metric: str, documents: bool) -> Start | None:
    """Figures of the model that this training started from, when that was trained itself.

    Args:
        documents: whether on documents.
    """
    if folder is None:
        return None
    found = read_figures(folder)
    if isinstance(found, Diverged):
        raise UserError(f"--start-report {folder}: its training diverged, so nothing could have started from it")
    name = "after the documents" if documents else "after fine-tuning"
    return Start(name=name, values=found.values, intervals=found.intervals, metric=metric)


def _first(folder: Path) -> First:
    """What the training on documents changed, which came before."""
    found = read_figures(folder)
    if isinstance(found, Diverged) or found.base is None:
        raise UserError(f"--first-report {folder}: has no figures, or none of the untouched model to compare with")
    metric = found.metric
    return First(
        report=folder.name, metric=metric, rows=found.rows, value=found.values[metric], base=found.base[metric]
    )


def headline(found: Figures) -> str:
    """One line: the ranking figure, how sure it is, and what tuning changed."""
    metric, value = found.metric, found.values[found.metric]
    low, high = found.interval
    of = " of the likeliest label" if found.task == "labels" and metric in ("accuracy", "f1") else ""
    text = f"{found.split} {html.metric_name(metric)}{of} {value:.3f} [{low:.3f}, {high:.3f}] on {found.rows} rows"
    if found.delta and found.base:
        gain, (low, high) = found.delta.value, found.delta.interval
        text += f"; base model {found.base[metric]:.3f}, tuning {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
    if unparsed := found.values.get(UNPARSED):
        text += f"; {unparsed:.1%} of the free answers name no label"
    if found.train and found.without_train:
        text += f"; {sentence(found, html.metric_name(metric))}"
    if found.probe:
        text += f"; {forgetting.sentence(found.probe)}"
    return text


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
