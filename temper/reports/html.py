"""Pages: Jinja templates, names of metrics, and texts cut to fit."""

import functools
import re
from pathlib import Path

from temper.errors import visible
from temper.files import write_whole
from temper.units import count, figure, seconds, signed, size

TEMPLATES = Path(__file__).resolve().parent / "templates"
METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "exact_match": "exact match",
    "precision": "precision",
    "recall": "recall",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "loss": "loss",
    "perplexity": "perplexity",
    "generated_accuracy": "accuracy of free answers",
    "preference_accuracy": "preference accuracy",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward, chosen answers",
    "rewards/rejected": "reward, rejected answers",
    "unparsed": "no label found",
    "unfinished": "cut off",
}
METRIC_NOTES = {
    "accuracy": "share of rows whose label the model finds the likeliest of all",
    "f1": "labels: mean of the F1 of all labels that occur (macro); tags: mean F1 of each row's sets",
    "exact_match": "share of answers equal to the reference",
    "precision": "tags: mean share of given tags that are wanted",
    "recall": "tags: mean share of wanted tags that are given",
    "rouge_l": "longest common subsequence with the reference, F-measure with stemming, mean over rows",
    "chrf": "character n-gram F-score over the whole split, 0 to 1",
    "loss": "cross entropy in nats per supervised token of the reference answers",
    "perplexity": "exp(loss)",
    "generated_accuracy": "share of generated answers that name the right label; one that names none counts as wrong",
    "preference_accuracy": "share of pairs whose chosen answer the model finds likelier than the rejected one",
    "rewards/accuracies": "share of pairs in which training raised the chosen answer more than the rejected one",
    "rewards/margins": "reward of the chosen less that of the rejected answer, mean over pairs",
    "rewards/chosen": "beta times the change of the chosen answer's log-probability by training",
    "rewards/rejected": "beta times the change of the rejected answer's log-probability by training",
    "unparsed": "share of generated answers with none of the labels in them",
    "unfinished": "share of answers that did not end within eval.max_new_tokens",
}
# What no page and no terminal shows: controls but the ends of lines and tabs, halves of characters.
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(value):
    """A text with its control characters as Python writes them; any other value, and HTML of our own, as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], value)


def render(template: str, output: Path, **context) -> None:
    """Write `output` from a template, whole or not at all."""
    write_whole(output, _environment().get_template(template).render(**context))


@functools.cache
def _environment():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "signed": signed,
        "metric": metric_name,
        "seconds": seconds,
        "size": size,
        "count": count,
        "cell": cell,
    }
    environment.globals["METRIC_NOTES"] = METRIC_NOTES
    return environment


# --- how figures read ----------------------------------------------------------------------------


def metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric)


def short(text: str, longest: int) -> str:
    """A text on one line, with its middle left out where it is too long."""
    line = visible(" ".join(text.split()) if "\n" in text else text) or "''"
    if len(line) <= longest:
        return line
    head = longest * 2 // 3
    return f"{line[:head]}…{line[len(line) - (longest - head - 1) :]}"


def distinct(texts: list[str], longest: int) -> list[str]:
    """As `short`, with a number where two would look the same."""
    lines = [short(text, longest) for text in texts]
    return [f"{line} ({index})" if lines.count(line) > 1 else line for index, line in enumerate(lines, 1)]


def cell(value) -> str:
    """A value of anybody's in a table, which may have a thousand rows."""
    return short(str(value), 300)
