"""The figures of an evaluation, as a report's metrics.json has them."""

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from temper.files import json_text, read_json, write_whole

FILE = "metrics.json"
OF_LABELS = ("accuracy_of", "classes", "confusion", "base_confusion")


def finite(value):
    """The same with None for nan and inf, which JSON and MLflow do not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A figure; one that is null in the file is nan.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
Interval = list[Number]  # its two ends


class _Content(BaseModel):
    """Content of a file. What a later version adds to it is ignored."""

    # Built when first used: every command imports this, and few read a report.
    model_config = ConfigDict(strict=True, extra="ignore", defer_build=True)


class Delta(_Content):
    """The gain over the base model in the ranking metric."""

    value: Number
    interval: Interval


class ProbeFigures(_Content):
    """How well a model predicts general text (see temper/evaluation/forgetting.py)."""

    passages: int
    bytes: int
    tokens: int
    bits_per_byte: Number
    interval: Interval
    base: Number | None
    """Bits per byte of the untouched model."""
    forgetting: Delta | None
    """This model's bits per byte less those of the untouched one."""
    seconds: float


class SourceFigures(_Content):
    """The figures of a model on the rows of one data set of a mixture."""

    rows: int
    train_rows: int
    """How many it was trained on, those that a weight repeats as often as they come."""
    values: dict[str, Number]
    interval: Interval
    """95% interval of the ranking metric."""
    base: dict[str, Number] | None
    """The values of the untouched model."""


class WithoutTrain(_Content):
    """The ranking metric without the rows that also stand in the training split."""

    in_train: dict[str, int]
    """How many of those judged on: with the same prompt as a training row (`prompt`), or nearly the same (`near`)."""
    rows: int
    """How many are left."""
    value: Number | None
    interval: Interval | None
    """95% interval."""


class Start(_Content):
    """Figures of the model that a training started from, when that was trained itself."""

    name: str
    values: dict[str, Number]
    intervals: dict[str, Interval]
    metric: str


class First(_Content):
    """What a training on documents changed, which came before this one, on the documents of the same split."""

    report: str
    """The name of its folder in results/reports."""
    metric: str
    rows: int
    value: Number
    base: Number
    """The same of the untouched model."""


class Figures(_Content):
    """The figures of a model on one split."""

    task: str
    metric: str
    """The one that ranks runs."""
    split: str
    rows: int
    values: dict[str, Number]
    """Metric -> figure of this model."""
    base: dict[str, Number] | None
    """The same of the untouched model."""
    interval: Interval
    """95% interval of the ranking metric."""
    intervals: dict[str, Interval]
    """Of every metric that has one."""
    base_intervals: dict[str, Interval] | None
    delta: Delta | None
    baselines: list[dict[str, Any]]
    """What needs no model: name, answer, metric -> figure."""
    published: list[dict[str, Any]]
    loss_seconds: float
    generate_seconds: float
    generated_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    accuracy_of: str | None = None
    """Task labels: by what the likeliest label was found."""
    classes: dict[str, dict[str, float | int]] | None = None
    confusion: dict[str, Any] | None = None
    base_confusion: dict[str, Any] | None = None
    train: dict[str, Any] | None
    """The adapter's training.json."""
    start: Start | None
    first: First | None = None
    left_out: dict[str, dict[str, int | None]]
    """Split -> how many of its rows tokenizing left out, and of how many; splits that kept all are not in it."""
    probe: ProbeFigures | None = None
    sources: dict[str, SourceFigures] = {}
    """Of a mixture, by data set."""
    without_train: WithoutTrain | None = None
    """None where no row stands in train, or where that is not known."""
    data_report: str | None = None
    """The page about the rows."""

    @property
    def are_finite(self) -> bool:
        """Whether the figures that rank runs are numbers."""
        return all(map(math.isfinite, (self.values[self.metric], self.values["loss"], *self.interval)))


class Diverged(_Content):
    """What there is to say of a model whose training diverged: when that was, and no figures."""

    task: str
    metric: str
    diverged_at_step: int
    train: dict[str, Any] | None


def write_figures(folder: Path, figures: Figures | Diverged) -> None:
    """Write metrics.json."""
    content = finite(figures.model_dump())
    if figures.task != "labels":
        content = {name: value for name, value in content.items() if name not in OF_LABELS}
    write_whole(folder / FILE, json_text(content))


def read_figures(folder: Path) -> Figures | Diverged:
    """Read the metrics.json of a report.

    Raises:
        UserError: it is not there, or damaged.
    """
    content = read_json(folder / FILE)
    return read_json(folder / FILE, Figures if content.get("diverged_at_step") is None else Diverged)
