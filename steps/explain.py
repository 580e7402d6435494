"""Say what the next `snakemake` will do, why, and how long that may take.

    python -m steps.explain --experiment demo
    python -m steps.explain --experiment demo train.learning_rate=1e-4,3e-4
    make explain ARGS="--experiment demo"

For each artefact that is missing: which run needs it, and the change that a person made (a config value, a raw row,
a module), found by comparing with the most similar artefact that is there. Time and disk are those of that artefact.
Reads conf/, data/raw/ and results/; makes nothing.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from steps.lib import plan as planning
from steps.lib.config import stored_config
from steps.lib.errors import one_line_errors
from steps.lib.keys import changed_keys, code_hashes, flat

MOST_ROWS = 5  # changed rows that are named


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m steps.explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", help="a file of conf/experiment")
    parser.add_argument("--sweep", help="a file of conf/sweep; default: the experiment's own")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for snakemake")
    arguments = parser.parse_intermixed_args(argv)
    with one_line_errors():
        print(explain(planning.build(arguments.experiment, arguments.sweep, arguments.overrides)))


def explain(plan: planning.Plan) -> str:
    """The explanation as text: a line per artefact to make, grouped by stage, and the forecast."""
    missing = [job for job in plan.jobs.values() if job.stage != "compare_runs" and not Path(job.path).exists()]
    if not missing:
        return f"sweep {plan.sweep}: all {len(plan.runs)} run(s) are there; at most the comparison runs"
    lines = [f"sweep {plan.sweep}: {len(missing)} job(s) to run, and the comparison"]
    forecast = Forecast()
    for job in missing:
        like = most_similar(job)
        lines.append(f"  {job.stage:16} {Path(job.path).name}")
        lines.append(f"  {'':16}   {'; '.join(reasons(job, like, {job.path for job in missing}))}")
        forecast.add(like if _comparable(job, like) else None)
    return "\n".join([*lines, forecast.text()])


# --- reasons -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Made:
    """An artefact that is there: its config, as flat keys and texts, and its provenance."""

    path: Path
    config: dict[str, str]
    provenance: dict


def most_similar(job: planning.Job) -> Made | None:
    """Of the stage's artefacts that are there, the one whose inputs and config differ least from the job's."""
    folder = Path(job.path).parent
    made = [found for path in folder.glob("*/provenance.json") if (found := _read(path.parent)) is not None]
    made = [found for found in made if set(job.inputs) - {"previous"} == set(found.provenance["inputs"])]
    return min(made, key=lambda found: (_distance(job, found), -found.path.stat().st_mtime), default=None)


def _read(folder: Path) -> Made | None:
    if not (folder / "config.yaml").is_file():
        return None
    return Made(folder, stored_config(folder), json.loads((folder / "provenance.json").read_text()))


def _distance(job: planning.Job, made: Made) -> int:
    inputs = sum(made.provenance["inputs"].get(name) != path for name, path in job.inputs.items())
    return inputs + len(_changed_keys(job, made))


def _changed_keys(job: planning.Job, made: Made) -> list[str]:
    return changed_keys(made.config, flat(job.config))


def reasons(job: planning.Job, like: Made | None, missing: set[str]) -> list[str]:
    """What a person changed since `like` was made; upstream changes only by name, they have lines of their own."""
    if like is None:
        return ["nothing like it was made yet"]
    found = []
    now = flat(job.config)
    for key in _changed_keys(job, like):
        if key.startswith("raw"):
            continue
        found.append(f"{key} {like.config.get(key, '(not set)')} -> {now.get(key, '(not set)')}")
    if job.stage == "format_prompts" and any(key.startswith("raw") for key in _changed_keys(job, like)):
        found.append(changed_rows(job, like.path))
    found += [f"code of {name} changed" for name in _changed_modules(job, like)]
    found += [f"new {name}" for name, path in job.inputs.items() if path in missing and name != "previous"]
    if not found:
        others = [name for name, path in job.inputs.items() if like.provenance["inputs"].get(name) != path]
        found = [f"other {name}" for name in others] or ["its folder was deleted, or never finished"]
    return found


def _changed_modules(job: planning.Job, like: Made) -> list[str]:
    before, now = like.provenance.get("code", {}), code_hashes(f"steps.{job.stage}")
    return [name for name in sorted({*before, *now}) if before and before.get(name) != now.get(name)]


def changed_rows(job: planning.Job, prompts: Path) -> str:
    """Which raw rows differ from those that `prompts` was made from."""
    from steps.format_prompts import SPLITS, conversations

    raw = Path(job.inputs["raw"])
    if not raw.is_file():
        return f"{raw.parent}: still to be fetched"
    before = {}
    for split in SPLITS:
        for line in (prompts / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            before[record["id"]] = record["messages"]
    now = dict(conversations(raw, job.config["data"], job.config["prompt"]["system"]))
    rows = json.loads((prompts / "stats.json").read_text())["rows"]
    if len(now) != rows:
        return f"{raw.parent}: {rows} -> {len(now)} rows"
    changed = [number for number, messages in before.items() if now.get(number) != messages]
    if not changed:
        return f"{raw.parent}: a row that no split uses changed"
    named = ", ".join(str(number) for number in sorted(changed)[:MOST_ROWS])
    more = f" and {len(changed) - MOST_ROWS} more" if len(changed) > MOST_ROWS else ""
    return f"{raw.parent}: row{'s' if len(changed) > 1 else ''} {named}{more} changed"


def _comparable(job: planning.Job, like: Made | None) -> bool:
    """Whether `like` did the same amount of work: on the same splits, or a stage whose work hardly varies."""
    return like is not None and job.inputs.get("splits") == like.provenance["inputs"].get("splits")


# --- forecast ------------------------------------------------------------------------------------


class Forecast:
    """Adds up the time and disk that similar artefacts took."""

    def __init__(self):
        self.seconds, self.bytes, self.known, self.unknown = 0.0, 0, 0, 0

    def add(self, like: Made | None) -> None:
        if like is None:
            self.unknown += 1
            return
        self.known += 1
        self.seconds += like.provenance["seconds"]
        self.bytes += sum(path.stat().st_size for path in like.path.rglob("*") if path.is_file())

    def text(self) -> str:
        unknown = f"; nothing to go by for {self.unknown} job(s)" if self.unknown else ""
        if not self.known:
            return "forecast: nothing to go by yet"
        return (
            f"forecast: {self.seconds:.0f} s of jobs (less where they run side by side), "
            f"{self.bytes / 2**20:.0f} MiB of disk, as {self.known} similar job(s) took{unknown}"
        )


if __name__ == "__main__":
    main()
