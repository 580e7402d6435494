"""Asking a model the rows of a split, and judging what it answers."""

from __future__ import annotations

import collections
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from temper.data.batches import count_learned
from temper.data.columns import IGNORED, answer_start
from temper.evaluation import intervals, metrics, own_metrics
from temper.evaluation.choices import Choices, likeliest
from temper.evaluation.figures import Delta, Figures, SourceFigures, Start
from temper.provenance import peak_memory

if TYPE_CHECKING:
    from datasets import DatasetDict

    from temper.evaluation.forgetting import Probed
    from temper.evaluation.generation import Answers
    from temper.evaluation.likelihoods import RowLosses
    from temper.model.merging import Source


@dataclasses.dataclass
class Asked:
    """What a model said of the rows.

    `pair_logps`: log-probability of each preference pair's chosen and of its rejected answer. `probed`: how likely
    general text is.
    """

    losses: RowLosses
    loss_seconds: float
    answers: Answers
    choices: Choices | None
    pair_logps: list[tuple[float, float]] | None
    probed: Probed | None = None

    def evidence(self, settings: dict, asked: list[dict]) -> metrics.Evidence:
        """All there is to judge this model by, but for what preference optimization changed."""
        return metrics.Evidence(
            settings,
            gold=[row["reference"] for row in asked],
            predictions=self.answers.texts,
            choices=self.choices.chosen if self.choices else None,
            loss_sums=self.losses.sums,
            loss_tokens=self.losses.tokens,
            answer_bytes=_answer_bytes(asked),
            pair_logps=self.pair_logps,
            pair_tokens=pair_tokens(asked),
            finished=None if settings["task"] == metrics.DOCUMENTS else self.answers.finished,
            groups=groups_of(asked),
        )

    def answered(self, asked: list[dict]) -> list[dict]:
        """The rows with their answers, as metrics of your own get them."""
        choice = {"choice": self.choices.chosen} if self.choices else {}
        return own_metrics.answered(asked, prediction=self.answers.texts, finished=self.answers.finished, **choice)


@dataclasses.dataclass
class BaseReport:
    """The untouched model's report: its figures, its lines of predictions.jsonl, and their scores, computed again."""

    figures: Figures
    rows: list[dict]
    scores: metrics.Scores


@dataclasses.dataclass
class Judgement:
    """How good a model is on a split.

    `intervals`: of the metrics that the page's head shows. `gain`: interval of the gain over the base model.
    """

    evidence: metrics.Evidence
    scores: metrics.Scores
    intervals: dict[str, list[float]]
    gain: list[float] | None


def pair_tokens(rows: list[dict]) -> list[tuple[int, int]] | None:
    """How many tokens of each preference pair's chosen and rejected answer count; None without pairs."""
    if "rejected_input_ids" not in rows[0]:
        return None
    return [
        (_tokens_of(row, "input_ids", "labels"), _tokens_of(row, "rejected_input_ids", "rejected_labels"))
        for row in rows
    ]


def _tokens_of(row: dict, ids: str, labels: str) -> int:
    return count_learned(row[labels][answer_start(row[ids], row["prompt_length"]) :])


def _answer_bytes(rows: list[dict]) -> list[int] | None:
    """Bytes of each gold answer; None where the loss counts more than that (loss_on=all, earlier turns, reasoning)."""
    if "reasoning_end" in rows[0]:
        return None
    starts = [answer_start(row["input_ids"], row["prompt_length"]) for row in rows]
    more = any(label != IGNORED for row, at in zip(rows, starts, strict=True) for label in row["labels"][:at])
    return None if more else [len(row["reference"].encode()) for row in rows]


# --- what the model says -------------------------------------------------------------------------


def ask(source: Source, config: dict, rows: DatasetDict, tokenizer, passages: list[str] | None = None) -> Asked:
    """Loss of each row of a split, an answer to each prompt and, for labels, how likely the model finds each of them.

    Args:
        source: the model.
        rows: all splits, of which ``eval.split`` names the one to ask.
        passages: of general text, to be scored as well.

    Raises:
        UserError: a loss that is not finite.
    """
    from temper.evaluation import forgetting, generation, likelihoods
    from temper.model import limits, loading

    settings = config["eval"]
    asked = list(rows[settings["split"]])
    model = source.network(config["model"]["load"])
    size = settings["batch_size"], tokenizer.pad_token_id

    started, choices, whose = time.perf_counter(), None, (source.name, settings["split"])
    if settings["task"] == "labels":  # what the right one costs is the loss
        choices = likeliest(model, rows, asked, settings["labels"], tokenizer, size, whose)
        losses = choices.losses
    else:
        losses = likelihoods.row_losses(model, asked, *size)
        likelihoods.check_finite(*whose, asked, losses.sums)
    loss_seconds = time.perf_counter() - started

    if settings["task"] == metrics.DOCUMENTS:
        answers = generation.no_answers(len(asked))
    else:
        stop_ids = loading.stop_token_ids(source.folder, tokenizer)
        known = generation.greedy_gold(asked, losses.matched, settings, stop_ids)
        answers = generation.generate_answers(model, tokenizer, asked, settings, stop_ids, known)

    pairs = likelihoods.pair_logps(model, asked, *size) if "rejected_input_ids" in asked[0] else None
    if pairs:
        for answer, logps in zip(("chosen", "rejected"), zip(*pairs, strict=True), strict=True):
            likelihoods.check_finite(*whose, asked, logps, f"log-probability of the {answer} answer in")
    context = limits.limits_of(source.folder, source.virtual_tokens).context
    probed = forgetting.probe(model, tokenizer, passages, context) if passages else None
    return Asked(losses, loss_seconds, answers, choices, pairs, probed)


# --- how good that is ----------------------------------------------------------------------------


def evidence_of(settings: dict, rows: list[dict]) -> metrics.Evidence:
    """The evidence that lines of predictions.jsonl are."""

    def column(name: str) -> list | None:
        return [row[name] for row in rows] if name in rows[0] else None

    pairs = [(row["chosen_logp"], row["rejected_logp"]) for row in rows] if "chosen_logp" in rows[0] else None
    tokens = [(row["chosen_tokens"], row["rejected_tokens"]) for row in rows] if "chosen_tokens" in rows[0] else None
    return metrics.Evidence(
        settings,
        gold=[row["reference"] for row in rows],
        predictions=[""] * len(rows) if settings["task"] == metrics.DOCUMENTS else [row["prediction"] for row in rows],
        choices=column("choice"),
        loss_sums=column("loss_sum"),
        loss_tokens=column("tokens"),
        answer_bytes=column("bytes"),
        pair_logps=pairs,
        pair_tokens=tokens,
        finished=column("finished"),
        own={name: [row["metrics"][name] for row in rows] for name in rows[0].get("metrics", ())},
        groups=groups_of(rows),
    )


def groups_of(rows: list[dict]) -> list[str] | None:
    """The group of each row, where the data has groups."""
    return [row["group"] for row in rows] if "group" in rows[0] else None


def judge(metric: str, evidence: metrics.Evidence, base: BaseReport | None) -> Judgement:
    """Scores, the intervals of the figures that the page's head shows, and the interval of the gain by tuning.

    Args:
        metric: the one that ranks runs.
    """
    scores = metrics.score(evidence)
    shown = dict.fromkeys([metric, *(entry["metric"] for entry in evidence.settings["published"])])
    shown |= dict.fromkeys(name for name in metrics.OF_PREFERENCE if name in scores.statistics)
    of_rows = len(evidence), evidence.groups
    found = {name: intervals.interval(scores.statistics[name], *of_rows) for name in shown}
    gain = None
    if base:
        both = scores.statistics[metric], base.scores.statistics[metric]
        gain = intervals.delta_interval(*both, *of_rows)
    return Judgement(evidence, scores, found, gain)


def figures_of_sources(
    metric: str, trained: list[str], rows: list[dict], judged: Judgement, base: BaseReport | None
) -> dict[str, SourceFigures]:
    """The figures on the rows of each data set of a mixture; none where the rows are of one.

    Args:
        trained: the data set of each training row.
        rows: those judged on.
    """
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if "source" in row:
            places.setdefault(row["source"], []).append(place)
    found, counts = {}, collections.Counter(trained)
    for source, mine in places.items():
        part = judged.evidence.part(mine)
        scores = metrics.score(part)
        before = {name: statistic(mine) for name, statistic in base.scores.statistics.items()} if base else None
        interval = intervals.interval(scores.statistics[metric], len(mine), part.groups)
        found[source] = SourceFigures(
            rows=len(mine), train_rows=counts[source], values=scores.values, interval=interval, base=before
        )
    return found


def figures_of(
    metric: str,
    learned: list[dict],
    rows: list[dict],
    asked: Asked,
    judged: Judgement,
    base: BaseReport | None,
    *,
    train: dict[str, Any] | None,
    start: Start | None,
    left_out: dict,
) -> Figures:
    """The content of metrics.json.

    Args:
        learned, rows: of the training split and of the one judged on (`prompt`, `reference`), for the baselines.
        train, start, left_out: see `Figures`.
    """
    evidence, settings, answers = judged.evidence, judged.evidence.settings, asked.answers
    values, delta = judged.scores.values, None
    if base and judged.gain:
        delta = Delta(value=values[metric] - base.scores.values[metric], interval=judged.gain)
    return Figures(
        task=settings["task"],
        metric=metric,
        split=settings["split"],
        rows=len(evidence),
        values=values,
        base=base.figures.values if base else None,
        interval=judged.intervals[metric],
        intervals=judged.intervals,
        base_intervals=base.figures.intervals if base else None,
        delta=delta,
        baselines=metrics.baselines(settings, learned, rows),
        published=settings["published"],
        loss_seconds=round(asked.loss_seconds, 3),
        generate_seconds=round(answers.seconds, 3),
        generated_tokens=sum(answers.tokens),
        tokens_per_second=round(sum(answers.tokens) / answers.seconds, 1) if answers.seconds else 0.0,
        peak_memory_bytes=peak_memory(),
        train=train,
        start=start,
        left_out=left_out,
        **(_of_labels(asked.choices, evidence, base) if asked.choices else {}),
    )


def _of_labels(choices: Choices, evidence: metrics.Evidence, base: BaseReport | None) -> dict[str, Any]:
    """What is confused with what."""
    return {
        "accuracy_of": choices.chosen_by,
        "classes": metrics.per_class(evidence),
        "confusion": metrics.confusion(evidence),
        "base_confusion": base.figures.confusion if base else None,
    }


def prediction_rows(rows: list[dict], asked: Asked, judged: Judgement, base: BaseReport | None) -> list[dict]:
    """The lines of predictions.jsonl, in the order of the split."""
    return [_prediction_row(index, row, asked, judged, base) for index, row in enumerate(rows)]


OF_ANSWERS = ("prediction", "reasoning", "choice", "finished")  # what a line has of the untouched model's answer


def _prediction_row(index: int, row: dict, asked: Asked, judged: Judgement, base: BaseReport | None) -> dict:
    answers, choices = asked.answers, asked.choices
    line = {name: row[name] for name in ("id", "group", "source", "prompt", "reference") if name in row}
    line |= {"score": judged.scores.rows[index]}
    if judged.evidence.finished is not None:
        line |= {"prediction": answers.texts[index], "finished": answers.finished[index]}
    if "reasoning_end" in row:
        line["reasoning"] = answers.said[index].removesuffix(answers.texts[index]).strip()
    if choices:
        line |= {"label": judged.evidence.readings[index], "choice": choices.chosen[index]}

    if base:
        line["base_score"] = base.scores.rows[index]
        line |= {f"base_{name}": base.rows[index][name] for name in OF_ANSWERS if name in base.rows[index]}

    line |= {"loss_sum": asked.losses.sums[index], "tokens": asked.losses.tokens[index]}
    if judged.evidence.answer_bytes:
        line["bytes"] = judged.evidence.answer_bytes[index]
    if choices:
        line["label_logps"] = [round(logp, 5) for logp in choices.logps[index]]
    if own := judged.evidence.own:
        line["metrics"] = {name: figures[index] for name, figures in own.items()}
    if asked.pair_logps and judged.evidence.pair_tokens:
        line["chosen_logp"], line["rejected_logp"] = asked.pair_logps[index]
        line["chosen_tokens"], line["rejected_tokens"] = judged.evidence.pair_tokens[index]
    if "rejected" in row:
        line["rejected"] = row["rejected"]
    return line
