"""Which pages `snakemake --report` shows, and what its tables say of each."""

from pathlib import Path

from temper.planning.plan import Plan, PlannedRun
from temper.units import figure

# stage -> category of its pages, and their caption, a file of report/ (beside the Snakefile)
PAGES = {
    "format_prompts": ("Data", "data"),
    "mix_prompts": ("Data", "data"),
    "tokenize_splits": ("Data", "audit"),
    "evaluate_model": ("Runs", "run"),
    "compare_runs": ("Sweep", "sweep"),
}
DATA = {"format_prompts": "rows", "mix_prompts": "rows of the mixture", "tokenize_splits": "what is learned"}


def page(plan: Plan, stage: str, output: str):
    """An output of a rule, marked as one that a step replaces by itself, and whose page is in Snakemake's report.

    Args:
        output: a page or a table, or `directory(...)` with pages in it.
    """
    from snakemake.io import is_flagged, report
    from snakemake.ioflags import update

    category, caption = PAGES[stage]
    caption = "leaderboard" if output.endswith(".csv") else caption
    inside = {"patterns": ["{page}.html"]} if is_flagged(output, "directory") else {}
    labels = _labels_of(plan, stage, Path(output).name)
    return report(update(output), caption=f"report/{caption}.rst", category=category, labels=labels, **inside)


def _labels_of(plan: Plan, stage: str, name: str):
    """Labels function of a page: wildcards -> column -> text. `name`: of the output, with its wildcards."""

    def labels(wildcards) -> dict[str, str]:
        if stage == "compare_runs":
            found = {"sweep": plan.sweep, "what": "all runs" if name.endswith(".html") else "table"}
        elif stage == "evaluate_model":
            found = _of_report(plan, Path(plan.job(stage, wildcards.name).path))
        else:
            found = {"data": wildcards.name.rpartition("-")[0], "what": DATA[stage]}
        return {column: text.replace("{", "(").replace("}", ")") for column, text in found.items()}  # not wildcards

    return labels


def _of_report(plan: Plan, report: Path) -> dict[str, str]:
    """What is judged, on which split, with which figure."""
    from temper.evaluation.figures import Figures, read_figures  # for this alone, which no job asks for

    run, found = _run_of(plan, report), read_figures(report)
    split, value = "", "diverged"
    if isinstance(found, Figures):
        split, value = found.split, figure(found.values[found.metric])
    title, key = run.title if run else "untouched model", report.name.rpartition("-")[2]
    return {"run": title, "split": split, found.metric: value, "key": key}


def _run_of(plan: Plan, report: Path) -> PlannedRun | None:
    wanted = ("evaluate_model", "test_report")
    return next((run for run in plan.runs if str(report) in (run.artefacts.get(name) for name in wanted)), None)
