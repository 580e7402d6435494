"""What MLflow's own pages show of a sweep: the view that its link opens, and the notes of its runs.

A link can choose runs and their order, but no columns: MLflow's UI keeps those in a saved view, a tag of the experiment
that the link names. The names of tags, of the parameters of addresses and of a view's fields are those that MLflow's UI
reads; it documents none of them, so tests/browser/ opens the pages in a real browser.
"""

import dataclasses
import json
from urllib.parse import quote, urlsplit, urlunsplit

from temper.evaluation.metrics import check_metric, lower_is_better

KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
NOTE_TAG = "mlflow.note.content"
VIEW_TAG = "mlflow.sharedViewState."  # and the view's name in addresses
OWN_SERVER = "http://127.0.0.1:5000"  # that of `make ui`
MODEL_TRAINING = "workflowType=machine_learning"  # else MLflow's UI opens as it was last, at first for applications
LEFT = {"attributes.`Run Name`": 230, "runDateAndNestInfo": 160}  # columns that are always there -> width in pixels
LONGEST_VIEW = 5000  # characters, of an experiment's tag in MLflow's stores


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the table of a sweep's runs shows.

    swept: the parameters; figure: the metric that ranks; others: metrics beside it; lower: whether less is better.
    """

    swept: list[str]
    figure: str
    others: list[str]
    lower: bool


def shown_of(plan) -> Shown:
    """What is to be shown of a plan's runs.

    Args:
        plan: a `temper.planning.plan.Plan`, with a run at least.
    """
    settings = plan.runs[0].config["eval"]
    metric, split = check_metric(settings), settings["split"]
    swept = list(dict.fromkeys(key for run in plan.runs for key in run.point))
    others = [f"base_{split}_{metric}", *([] if metric == "loss" else [f"{split}_loss"]), f"test_{metric}"]
    others = [name for name in dict.fromkeys(others) if name != f"{split}_{metric}"]
    return Shown(swept, f"{split}_{metric}", [*others, "train_seconds"], lower_is_better(metric))


def view(title: str, runs: str, shown: Shown, now: int) -> str:
    """The value of a view's tag: the runs that a filter finds, best first, with the swept values and the figures.

    Args:
        title: the view's name in MLflow's list of them.
        runs: the filter, in MLflow's language.
        now: milliseconds since 1970.
    """
    order = f"metrics.`{shown.figure}`"
    columns = [*(f"params.`{name}`" for name in shown.swept), order]
    columns += [f"metrics.`{name}`" for name in shown.others] + ["attributes.`Models`", "attributes.`Duration`"]
    while True:
        state = {
            "searchFilter": runs,
            "orderByKey": order,
            "orderByAsc": shown.lower,
            "selectedColumns": columns,
            "columnOrder": [*LEFT, *columns],
            "columnWidths": LEFT | {column: _width(column) for column in columns},
        }
        text = json.dumps({"name": title, "createdAt": now, "state": json.dumps(state)})
        if len(text) <= LONGEST_VIEW or not columns:
            return text
        columns = columns[:-1]


def _width(column: str) -> int:
    """Pixels in which a column's name can be read."""
    return 56 + 7 * len(column.split("`")[1])


def same_view(one: str | None, other: str) -> bool:
    """Whether two values of a view's tag show the same."""
    return one is not None and _less_times(one) == _less_times(other)


def _less_times(value: str) -> dict | None:
    try:
        return {name: part for name, part in json.loads(value).items() if name not in ("createdAt", "updatedAt")}
    except (ValueError, AttributeError):
        return None


def runs_page(experiment: str, name: str) -> str:
    """The page of a view's runs, from any page of the same server."""
    return f"#/experiments/{experiment}/runs?{MODEL_TRAINING}&viewStateShareKey={quote(name)}"


def run_page(experiment: str, run_id: str, file: str = "") -> str:
    """The page of a run, or of a file among its artifacts."""
    return f"#/experiments/{experiment}/runs/{run_id}{f'/artifacts/{quote(file)}' if file else ''}?{MODEL_TRAINING}"


def model_page(name: str) -> str:
    """The page of a registered model, with its versions."""
    return f"#/models/{quote(name, safe='')}?{MODEL_TRAINING}"


def server_of(uri: str) -> str | None:
    """The address under which a browser finds a server's pages, without a login; None: it is a database's."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        return None
    return urlunsplit((address.scheme, address.netloc.rpartition("@")[2], address.path.rstrip("/"), "", ""))


def sweep_note(plan, board, links: dict[str, str]) -> str:
    """The note of a sweep's run: how good its best is, and where to look.

    Args:
        board: the `temper.reports.leaderboard.Board`; None: there is none.
        links: text -> address, or a path of this machine.
    """
    head = [f"Sweep of {len(plan.runs)} run(s)" + (f" over {', '.join(plan.axes)}" if plan.axes else "")]
    if board:
        best = board.chosen_row
        run = next((run for run in plan.runs if run.name == best["run"]), None)
        head = [_judged(board.metric, board.split, best, board.base)]
        if best.get(f"test_{board.metric}") is not None:
            head.append(_judged(board.metric, "test", best, board.base_test))
        head.append(f"The best of {len(board.rows)} run(s)" + (f": {run.title}" if run and run.point else ""))
        if board.missing:
            head.append(f"{len(board.missing)} run(s) have no figures yet")
    return _note(head, links)


def _judged(metric: str, split: str, figures: dict, base: dict | None) -> str:
    return sentence(metric, split, figures.get(f"{split}_{metric}"), (base or {}).get(metric))


def sentence(metric: str, split: str, value: float | None, base: float | None) -> str:
    """The figure of a run beside that of the untouched model, for people."""
    if value is None:
        return "Diverged: the loss was not a number any more"
    beside = f" (untouched model: {base:.3f})" if base is not None else ""
    return f"**{metric.replace('_', ' ')} {value:.3f}** on {split} rows{beside}"


def run_note(metric: str, split: str, value: float | None, base: float | None, links: dict[str, str]) -> str:
    """The note of a sweep point's run."""
    return _note([sentence(metric, split, value, base)], links)


def _note(head: list[str], links: dict[str, str]) -> str:
    """MLflow shows the first lines alone until it is asked for more, so links share a line."""
    places = {text: at for text, at in links.items() if not at.startswith("#")}
    linked = " · ".join(f"[{text}]({at})" for text, at in links.items() if text not in places)
    return "\n\n".join([". ".join(head) + ".", linked, *(f"{text}: `{at}`" for text, at in places.items())])
