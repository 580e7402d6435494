"""Show the runs that a sweep would make, without making them.

    temper plan --experiment smoke
    temper plan --experiment demo --sweep demo train.learning_rate=1e-4,3e-4
    temper plan --experiment demo --json

Reads conf/ and the raw data's identity; writes nothing but the cache of file hashes.
"""

import collections
import dataclasses
import json
from pathlib import Path

from temper.commands import flags
from temper.config.compose import own_folder
from temper.errors import visible
from temper.planning import plan as planning
from temper.planning import planner


def arguments(parser) -> None:
    """Add the arguments of this command."""
    flags.of_a_sweep(parser)
    parser.add_argument("--json", action="store_true", help="print the whole plan as JSON")


def run(arguments) -> None:
    """Print the plan."""
    plan = planner.build(arguments.experiment, arguments.sweep, arguments.overrides, arguments.config_dir)
    if (own := own_folder()) and not arguments.json:
        print(f"configs: {own}, then conf/")
    print(json.dumps(dataclasses.asdict(plan), indent=2, ensure_ascii=False) if arguments.json else describe(plan))


def describe(plan: planning.Plan) -> str:
    """The plan as text: one line per run with its swept values, and what is still to be made."""
    lines = [f"sweep {plan.sweep}: {len(plan.runs)} run(s), swept: {', '.join(plan.axes) or 'nothing'}"]
    missing = plan.missing()
    paths = {job.path for job in missing}
    for run in plan.runs:
        point = " ".join(f"{key}={value}" for key, value in run.point.items())
        state = "to do" if run.artefacts["evaluate_model"] in paths else "done"
        lines.append(visible(f"  {state:5}  {run.name}  {point}".rstrip()))
    if plan.coming:
        lines.append(f"  then, by the ranking {plan.later}")
    lines += [f"not whole, and made again: {path} ({wrong})" for path, wrong in plan.damaged().items()]
    lines.append(jobs_to_do(plan, missing))
    lines.append(f"results: {Path(plan.leaderboard).parent}/")
    return "\n".join(lines)


def jobs_to_do(plan: planning.Plan, missing: list[planning.Job] | None = None) -> str:
    """What is still to be made, in a line or two. `missing`: those jobs, if they are known."""
    counts = collections.Counter(job.stage for job in (plan.missing() if missing is None else missing))
    todo = ", ".join(f"{stage} {count}" for stage, count in counts.items())
    said = f"jobs to do: {todo}" if todo else "jobs to do: none but the comparison, if its inputs changed"
    if counts["rank_runs"] and plan.comparison.config["eval"]["test"] in ("chosen", "tied"):
        return f"test split: opened for the run that the ranking will choose (the jobs count one)\n{said}"
    return said
