"""The page of one run."""

from __future__ import annotations

from pathlib import Path

from temper.evaluation import contamination
from temper.evaluation.figures import Figures
from temper.evaluation.metrics import DOCUMENTS, lower_is_better, with_own
from temper.files import read_json, read_yaml
from temper.keys import flat
from temper.reports import html, plots

PER_TOKEN = ("orpo", "simpo")  # methods without a reference: an answer's reward is of its likelihood itself

# --- the page ------------------------------------------------------------------------------------


def write_page(output: Path, figures: Figures, predictions: list, curves: list, settings: dict, configs: dict) -> None:
    """Write report.html. `configs`: heading -> table of dotted keys and values."""
    groups = sample_groups(predictions, settings["task"])
    html.render(
        "report.html",
        output / "report.html",
        name=output.name,
        figures=figures,
        metric=figures.metric,
        metrics=with_own(figures.task, figures.values),
        lower_is_better=lower_is_better,
        panels=plots.comparison(_panels(figures)),
        loss_curves=plots.loss_curves(curves),
        reward_curves=plots.reward_curves(curves),
        validated=any("eval_loss" in line for line in curves),
        per_token=any(table.get("method.name") in PER_TOKEN for table in configs.values()),
        of_pairs=any("rewards/accuracies" in line for line in curves),
        confusions=_confusions(figures),
        groups=choose_samples(groups, settings["samples"]),
        counts={name: len(rows) for name, rows in groups.items()},
        reasons=any("reasoning" in row for row in predictions),
        settings=settings,
        configs=configs,
        without_train=contamination.sentence(figures, html.metric_name(figures.metric)) if figures.train else "",
    )


def _panels(figures: Figures) -> list[dict]:
    """What the dot plots show: per metric this model, the base model, baselines and published figures."""
    return [
        {"title": html.metric_name(metric), "entries": _panel_entries(figures, metric)} for metric in figures.intervals
    ]


def _panel_entries(figures: Figures, metric: str) -> list[dict]:
    def entry(name: str, values: dict, intervals: dict | None, kind: str) -> dict:
        return {"name": name, "value": values[metric], "interval": (intervals or {}).get(metric), "kind": kind}

    ours = "tuned" if figures.base or figures.train else "this model"
    entries = [entry(ours, figures.values, figures.intervals, "tuned")]
    if figures.base:
        entries.append(entry("base model", figures.base, figures.base_intervals, "base"))
    if figures.start:
        entries.append(entry(figures.start.name, figures.start.values, figures.start.intervals, "other"))

    others = [(baseline["name"], baseline.get(metric)) for baseline in figures.baselines]
    others += [
        (published["name"], published["value"]) for published in figures.published if published["metric"] == metric
    ]
    return entries + [_without_interval(name, value) for name, value in others if value is not None]


def _without_interval(name: str, value: float) -> dict:
    return {"name": name, "value": value, "interval": None, "kind": "other"}


def _confusions(figures: Figures) -> list[tuple[str, dict]]:
    tables = [("tuned" if figures.base else "this model", figures.confusion), ("base model", figures.base_confusion)]
    return [(title, table) for title, table in tables if table]


# (what a score is, is there a base model?) -> (the groups, worth reading first; which of them a row belongs to)
GROUPS = {
    ("labels", True): (
        ("fixed by tuning", "broken by tuning", "wrong before and after", "right before and after"),
        lambda row: {(1, 0): 0, (0, 1): 1, (0, 0): 2, (1, 1): 3}[int(row["score"]), int(row["base_score"])],
    ),
    ("labels", False): (("right", "wrong"), lambda row: int(row["score"] < 1)),
    (DOCUMENTS, True): (
        ("likelier than to the base model", "less likely than to the base model", "as likely as to the base model"),
        lambda row: 0 if row["score"] < row["base_score"] else 1 if row["score"] > row["base_score"] else 2,
    ),
    (DOCUMENTS, False): (("documents",), lambda _row: 0),
    ("graded", True): (
        ("better than the base model's", "worse than the base model's", "as good as the base model's"),
        lambda row: 0 if row["score"] > row["base_score"] else 1 if row["score"] < row["base_score"] else 2,
    ),
    ("graded", False): (("scored 0.5 or above", "scored below 0.5"), lambda row: int(row["score"] < 0.5)),
}


def sample_groups(predictions: list[dict], task: str) -> dict[str, list[dict]]:
    """All answers, sorted by what tuning did to them, in the order in which they are worth reading."""
    compared = bool(predictions) and "base_score" in predictions[0]
    names, kind = GROUPS[task if task in ("labels", DOCUMENTS) else "graded", compared]
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


def configs_shown(config: dict, model: Path, splits: Path, adapter: Path | None) -> dict[str, dict[str, str]]:
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
