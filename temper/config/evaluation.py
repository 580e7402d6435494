"""Check what an evaluation needs of rows and tokenizer: before the training that it will judge, and at its own start.

In no key, because this code only refuses or reports and changes no artefact.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from temper.data.columns import IGNORED
from temper.errors import UserError
from temper.evaluation import own_metrics
from temper.evaluation.class_names import gold_class
from temper.evaluation.class_tokens import class_answers
from temper.evaluation.forgetting import refuse_encoder_decoder
from temper.evaluation.metrics import MOST_UNSEEN, check_metric, refuse_without_pairs, rouge_unseen
from temper.model.loading import is_encoder_decoder

log = logging.getLogger("temper")


def splits_judged(settings: dict) -> list[str]:
    """The splits on which runs may be judged: the one that ranks them, and the test split for those chosen."""
    return list(dict.fromkeys([settings["split"], *(["test"] if settings["test"] != "none" else [])]))


def check(settings: dict, splits: Path, rows, tokenizer, judged: Iterable[str]) -> None:
    """Check splits, as tokenize_splits makes them, against the config section `eval`.

    Args:
        settings: with `probed`, where the workflow planned, whether general text is scored as well.
        judged: names of the splits on which a model is evaluated.

    Raises:
        UserError: no rows in one of them, or nothing supervised; a metric that the task or the rows do not support; an
            answer that is not a label; labels with equal or no tokens; text that ROUGE cannot see; a metric of your own
            that fails on a row's reference.
    """
    metric = check_metric(settings)
    if settings.get("probed"):
        refuse_encoder_decoder(is_encoder_decoder(Path(tokenizer.name_or_path)))  # the model's folder
    for split in judged:
        _check_split(settings, metric, splits, rows, split)
    if settings["task"] == "labels":
        if "reasoning_end" in rows["train"].column_names:
            raise UserError(
                f"{splits}: the rows have reasoning, and eval.task=labels compares labels right behind the prompt: "
                "use eval=text, or drop the reasoning (data.ignore_fields=[reasoning_content])"
            )
        _check_gold(rows, settings["labels"])
        class_answers(settings["labels"], rows, tokenizer)


def _check_split(settings: dict, metric: str, splits: Path, rows, split: str) -> None:
    if split not in rows:
        instead = ", or rank the runs by the test split itself (eval.split=test)" if split == "validation" else ""
        raise UserError(
            f"{splits}: no rows in the {split} split; raise data.splits.{split}, or see which rows audit.json left out"
            + instead
        )
    if all(label == IGNORED for row in rows[split] for label in row["labels"]):
        raise UserError(f"{splits}: no supervised token in the {split} split; see audit.json there, and prompt.loss_on")
    refuse_without_pairs(settings, "rejected" in rows[split].column_names)
    if settings["task"] == "text":
        _check_rouge(settings, metric, split, list(rows[split]["reference"]))
    own_metrics.try_out(settings, rows[split][0])


def _check_gold(rows, class_names: list[str]) -> None:
    """Every answer of a labelling task must be one of its labels."""
    for split, part in rows.items():
        known = set()
        for number, gold in zip(part["id"], part["reference"], strict=True):
            if gold not in known:
                gold_class(gold, class_names, f"{split} split, row {number} of the raw data")
                known.add(gold)


def _check_rouge(settings: dict, metric: str, split: str, gold: list[str]) -> None:
    unseen = rouge_unseen(gold)
    what = f"ROUGE-L sees the letters a to z and digits only, and {unseen:.1%} of the {split} references is other"
    if unseen > MOST_UNSEEN:
        if metric == "rouge_l":
            raise UserError(f"config: 'eval.metric': {what}: set eval.metric=chrf")
        for figure in settings["published"]:
            if figure["metric"] == "rouge_l":
                name = f"'{figure['name']}' has metric 'rouge_l'"
                raise UserError(f"config: 'eval.published': {name}, but {what}: leave it out")
        log.info("no ROUGE-L: it %s", what.removeprefix("ROUGE-L "))
    elif unseen:
        log.info("note: %s: eval.metric=chrf sees all", what)
