"""Say what the next `snakemake` will do, why, and how long that may take.

    temper explain --experiment demo
    temper explain --experiment demo train.learning_rate=1e-4,3e-4
    make explain ARGS="--experiment demo"

For each missing artefact it names the change behind it (a config value, a raw row, a module), found by comparing with
the most similar existing artefact. Time and disk are scaled from that artefact by rows and epochs.
Reads conf/, data/raw/ and results/; makes nothing.
"""

import functools
import os
from pathlib import Path

from temper.commands import flags
from temper.config.stages import STAGES
from temper.errors import visible
from temper.files import read_json, read_json_lines
from temper.keys import changed_keys, code_hashes, flat
from temper.planning import plan as planning
from temper.planning import planner
from temper.planning.forecast import Archive, Forecast, Made, same_part
from temper.workflow import idle_cores

MOST_ROWS = 5  # changed rows that are named
MOST_JOBS = 8  # jobs with the same reason that are named


def arguments(parser) -> None:
    """Add the arguments of this command."""
    flags.of_a_sweep(parser)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="as for snakemake; default: all")


def run(arguments) -> None:
    """Print what would be made."""
    found = planner.growing(arguments.experiment, arguments.sweep, arguments.overrides, arguments.config_dir)
    likely = found.likely() if found.plan.coming else None
    print("\n".join(map(visible, explain(found.plan, arguments.cores, likely).split("\n"))))


def explain(plan: planning.Plan, cores: int = 1, likely: planning.Plan | None = None) -> str:
    """The explanation as text: what is to be made and why, grouped by stage and reason, and the forecast.

    Args:
        likely: of a search, the plan with the rounds that are to come, for the forecast.
    """
    missing, damaged = {job.path: job for job in plan.missing()}, plan.damaged()
    if not missing:
        return f"sweep {plan.sweep}: all {len(plan.runs)} run(s) are there; at most the comparison runs"
    archive, forecast = Archive(), Forecast(likely or plan, cores)
    for job in likely.missing() if likely else missing.values():
        forecast.add(job, archive.most_similar(job))
    groups: dict[tuple[str, str], list[str]] = {}
    for job in missing.values():
        like = archive.most_similar(job)
        wrong = [f"not whole: {damaged[job.path]}"] if job.path in damaged else reasons(job, like, missing)
        groups.setdefault((job.stage, "; ".join(wrong)), []).append(Path(job.path).name)
    lines = [f"sweep {plan.sweep}: {len(missing)} job(s) to run, and the comparison"]
    for (stage, reason), names in sorted(groups.items(), key=lambda group: list(STAGES).index(group[0][0])):
        lines.append(f"  {stage}: {reason}")
        lines += [f"      {name}" for name in names[:MOST_JOBS]]
        if len(names) > MOST_JOBS:
            lines.append(f"      and {len(names) - MOST_JOBS} more")
    if plan.coming:
        having = "with" if likely else "without"
        lines.append(f"the search goes on, and then by their ranking {plan.later}: the forecast is {having} these")
    return "\n".join([*lines, forecast.text(), *filter(None, [idle_cores(plan, cores)])])


def reasons(job: planning.Job, like: Made | None, missing: dict) -> list[str]:
    """What changed since `like` was made. Upstream artefacts are only named; they have their own lines."""
    if like is None:
        return ["nothing like it was made yet"]
    now = flat(job.config)
    changed = changed_keys(like.config, now)
    found = [
        f"{key} {like.config.get(key, '(not set)')} -> {now.get(key, '(not set)')}"
        for key in changed
        if not key.startswith("raw")
    ]
    if job.stage == "format_prompts" and any(key.startswith("raw") for key in changed):
        found.append(changed_rows(job, like.path))
    found += [f"code of {name} changed" for name in _changed_modules(job, like)]
    found += [f"new {name}" for name, path in job.inputs.items() if path in missing and name != "previous"]
    if not found and not same_part(job, like):
        return ["nothing like it was made yet"]
    if not found:
        others = [name for name, path in job.inputs.items() if like.provenance["inputs"].get(name, path) != path]
        found = [f"other {name}" for name in others] or ["its folder was deleted, or never finished"]
    return found


def _changed_modules(job: planning.Job, like: Made) -> list[str]:
    before, now = like.provenance.get("code", {}), _code_now(job.stage)
    return [name for name in sorted({*before, *now}) if before and before.get(name) != now.get(name)]


@functools.cache
def _code_now(stage: str) -> dict[str, str]:
    return code_hashes(f"steps.{stage}")


def changed_rows(job: planning.Job, prompts: Path) -> str:
    """Which raw rows differ from those that `prompts` was made from."""
    from temper.data.layouts import Tie
    from temper.data.rejected import Rejected
    from temper.data.splitting import SPLITS, examples, record

    raw = Path(job.inputs["raw"])
    if not raw.is_file():
        return f"{raw.parent}: still to be fetched"
    before: dict = {}
    for split in SPLITS:
        before |= {made.get("id"): made for made in read_json_lines(prompts / f"{split}.jsonl")}
    rejected = Rejected.by_policy(job.config["data"])
    rows_now = examples(raw, job.config["data"], job.config["prompt"]["system"], rejected)
    made_now = [(number, example) for number, example in rows_now if not isinstance(example, Tie)]
    now = {number: example and record(number, example) for number, example in made_now}
    rows = read_json(prompts / "stats.json", {"rows": int})["rows"]
    rows_now_all = len(made_now) + (rejected.rows if rejected else 0)
    if rows_now_all != rows:
        return f"{raw.parent}: {rows} -> {rows_now_all} rows"
    changed = [number for number, made in before.items() if now.get(number) != made]
    if not changed:
        return f"{raw.parent}: a row that no split uses changed"
    named = ", ".join(str(number) for number in sorted(changed)[:MOST_ROWS])
    more = f" and {len(changed) - MOST_ROWS} more" if len(changed) > MOST_ROWS else ""
    return f"{raw.parent}: row{'s' if len(changed) > 1 else ''} {named}{more} changed"
