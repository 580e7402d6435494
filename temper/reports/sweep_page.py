"""The page of a sweep."""

import json
import os
import re
import shlex
from pathlib import Path
from urllib.parse import quote

from temper import energy
from temper.config.compose import groups, hydra_text
from temper.config.search import SEARCHES
from temper.errors import visible
from temper.evaluation.comparison import ComparedRun, RankedRun, Ranking, Recipe
from temper.files import read_json_lines
from temper.reports import html, plots, suspects
from temper.reports.forgetting import forgetting_sentence, gains_and_forgetting
from temper.reports.leaderboard import Board, cell_text, short_names, swept_keys, tie_sentence

RENEWED = 20  # seconds after which the page of a sweep at work loads itself anew


# --- the page ------------------------------------------------------------------------------------


def write_page(
    output: Path, config: dict, names: list[str], ranking: Ranking, board: Board, growing: bool = False
) -> None:
    """Write report.html.

    Args:
        names: of the figures that the table shows.
        growing: whether the sweep still runs: the page then loads itself anew every `RENEWED` seconds.
    """
    keys, runs, bounds = swept_keys(board.rows), ranking.runs, config["eval"].get("gate")
    searched = config["sweep"].get("strategy") in SEARCHES
    html.render(
        "sweep.html",
        output / "report.html",
        sweep=config["sweep"]["name"],
        metric=ranking.metric,
        keys=short_names(keys),
        runs=[
            _shown(run, output, recipe, place) for place, recipe in enumerate(ranking.recipes, 1) for run in recipe.runs
        ],
        recipes=ranking.recipes,
        split=ranking.split,
        tested=[run for run in runs if run.test],
        noise=ranking.noise,
        best=ranking.best,
        tie_sentence=tie_sentence(ranking),
        chosen=_shown(ranking.chosen, output),
        cheapest=_shown(ranking.cheapest, output),
        choose=ranking.choose,
        gate=board.gate,
        bounded=bool(bounds),
        probed="forgetting" in board.rows[0],
        forgetting_sentence=forgetting_sentence(ranking, _label),
        forgetting_plot=gains_and_forgetting(ranking, bounds),
        names=names,
        missing=ranking.missing,
        diverged=[_shown(run, output) for run in ranking.diverged],
        planned=len(config["runs"]),
        published=config["eval"]["published"],
        harness=board.harness,
        effects=_effects(runs, keys, ranking.metric, mean=not searched),
        searched=searched,
        curves=plots.sweep_curves([(_label(run), curves_of(run)) for run in runs[: plots.MOST_CURVES]]),
        most_curves=plots.MOST_CURVES,
        other_losses=any(key.partition(".")[0] == "method" for key in keys),
        command=_command_for(ranking.chosen.point, config),
        energy=energy.spent(run["report"] for run in config["runs"]),
        renewed=RENEWED if growing else None,
        suspects=suspects.read(ranking.chosen.suspects),
        suspects_csv=_link(ranking.chosen.suspects or "", suspects.CSV, output),
    )


def _shown(run: ComparedRun, output: Path, recipe: Recipe | None = None, place: int | None = None) -> dict:
    """What the table shows of a run."""
    known = {"recipe": recipe, "place": place, "label": _label(run), "page": _page(run.report, output)}
    if run.test_report:
        known["test_page"] = _page(run.test_report, output)
    return {**vars(run), **known}


def _page(report: str, output: Path) -> str:
    """The link to a report."""
    return _link(report, "report.html", output)


def _link(folder: str, file: str, output: Path) -> str:
    """A link, relative, so that results/ can be moved or sent as a whole."""
    return quote(Path(os.path.relpath(Path(folder) / file, output)).as_posix())


def curves_of(run: ComparedRun) -> list[dict]:
    path = Path(run.report) / "curves.jsonl"
    return read_json_lines(path) if path.is_file() else []


def _label(run: ComparedRun) -> str:
    """A run's swept values, or its name when nothing is swept."""
    names = short_names(list(run.point))
    return ", ".join(f"{names[key]}={cell_text(value)}" for key, value in run.point.items()) or run.name


def _effects(runs: list[RankedRun], keys: list[str], metric: str, mean: bool) -> list[str]:
    """One plot per swept key that takes more than one value."""
    effects = []
    for key in keys:
        points = [
            {
                "x": _plain(run.point[key]),
                "y": run.figures.values[metric],
                "interval": run.figures.interval,
                "others": json.dumps({other: run.point[other] for other in keys if other != key}, default=str),
                "best": run is runs[0],
            }
            for run in runs
        ]
        if len({point["x"] for point in points}) > 1:
            effects.append(plots.axis_effect(points, key, html.metric_name(metric), mean))
    return effects


def _plain(value):
    """A swept value that a plot can place: lists, nulls and booleans go by their text."""
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else json.dumps(value)


def _command_for(point: dict, config: dict) -> str:
    """The command that makes the run at this point alone, for a shell: fixed values collapse the sweep's axes."""
    # sweep=none: alone, the run gets a page of its own, and this one stays.
    given = {"conf_dir": config.get("conf_dir"), "experiment": config.get("experiment"), "sweep": "none"}
    given["overrides"] = _overrides(point, config)
    words = [f"{name}={_shell_text(text)}" for name, text in given.items() if text]
    return " ".join(["snakemake --cores all --config", *words])


def _overrides(point: dict, config: dict) -> str:
    """What was given beside the sweep, then the swept values; of a config group the point has the choice's name."""
    given = [text for text in config.get("overrides", []) if not re.match(r"[+~]*sweep\b", text)]
    swept = [f"{key}={value if key in groups() else hydra_text(value, literal=True)}" for key, value in point.items()]
    return " ".join([*given, *swept])


def _shell_text(text: str) -> str:
    """A text quoted for a shell; control characters, which a terminal would act upon, as escapes."""
    if visible(text) == text:
        plain = shlex.quote(text) != text and not set(text) & set('$`"\\!')
        return f'"{text}"' if plain else shlex.quote(text)
    written = (_shell_escape(char) if visible(char) != char or char in "\\'" else char for char in text)
    return "$'" + "".join(written) + "'"


def _shell_escape(char: str) -> str:
    if visible(char) != char:
        return f"\\x{ord(char):02x}" if ord(char) < 128 else f"\\U{ord(char):08x}"
    return f"\\{char}"
