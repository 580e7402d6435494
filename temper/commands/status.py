"""Show how a sweep stands: which run is in which stage, progress, what failed or waits, the best run so far.

temper status               # the sweep at work in this folder, or the last one
temper status demo
temper status --watch       # in a second terminal, until the sweep is complete or its command ends

Reads results/ and changes nothing. Without a terminal, --watch prints a line for each job that begins, ends or fails.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from temper.errors import visible
from temper.planning.forecast import Archive
from temper.reports import status
from temper.reports.status import AT_WORK, DONE, FAILED, Standing

EVERY = 2.0  # seconds between two looks
ARCHIVE_EVERY = 60.0  # seconds after which what jobs took is read again, which takes longest
COLOURS = {AT_WORK: "cyan", FAILED: "bold red", DONE: "green"}


def arguments(parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("sweep", nargs="?", help="a sweep's name or folder; default: those at work, or the last one")
    parser.add_argument("--watch", action="store_true", help="keep it up to date, until the sweep is complete or ends")
    parser.add_argument("--json", action="store_true", help="print it as JSON, a list of sweeps")


def run(arguments) -> None:
    """Print how the sweeps stand."""
    if arguments.watch:
        (_draw if sys.stdout.isatty() else _tell)(_looks(arguments.sweep))
        return
    found = [status.standing(plan, Archive()) for plan in status.plans(arguments.sweep)]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(now) for now in found], indent=2, ensure_ascii=False))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(_text(found))
    else:
        print("\n\n".join("\n".join(line for _, line in status.lines(now)) for now in found))


def _looks(sweep: str | None) -> Iterator[list[Standing]]:
    """The sweeps again and again. Ends when none is at work any more; before one begins, it is waited for."""
    seen, archive, read = False, Archive(), time.monotonic()
    while True:
        if time.monotonic() - read > ARCHIVE_EVERY:
            archive, read = Archive(), time.monotonic()
        found = [status.standing(plan, archive) for plan in status.plans(sweep)]
        yield found
        at_work = any(now.begun is not None for now in found)
        if all(now.complete for now in found) or (seen and not at_work):
            return
        seen = seen or at_work
        time.sleep(EVERY)


def _draw(looks: Iterator[list[Standing]]) -> None:
    """On a terminal: in place."""
    from rich.live import Live

    with Live(auto_refresh=False, vertical_overflow="crop") as live:
        for found in looks:
            live.update(_text(found), refresh=True)


def _text(found: list[Standing]):
    """The sweeps as lines with colours; one that is longer than the terminal is cut."""
    from rich.console import Group
    from rich.text import Text

    shown = [line for now in found for line in [*status.lines(now), ("", "")]]
    texts = [Text(line, COLOURS.get(state, ""), no_wrap=True, overflow="ellipsis") for state, line in shown[:-1]]
    return Group(*texts)


def _tell(looks: Iterator[list[Standing]]) -> None:
    """Without a terminal: a line for what changed, each with the time, and at last the whole."""
    before: dict[str, Standing] = {}
    for found in looks:
        for now in found:
            for line in _changes(before.get(now.sweep), now):
                print(time.strftime("%H:%M:%S"), visible(line), flush=True)
        before = {now.sweep: now for now in found}
    print("\n\n".join("\n".join(line for _, line in status.lines(now)) for now in before.values()), flush=True)


def _changes(before: Standing | None, now: Standing) -> list[str]:
    """What a sweep did between two looks; at the first look, how it stands."""
    known = {job.path: job.state for job in before.jobs} if before else {}
    there = {job.path for job in now.jobs}
    said = [] if before else [status.headline(now)]
    said += [f"{DONE}: {_named(path)}" for path in known if path not in there]
    for job in now.jobs:
        if job.state in (AT_WORK, FAILED) and known.get(job.path) != job.state:
            said.append(f"{job.state}: {_named(job.path)}" + (f": {job.said}" if job.state == FAILED else ""))
    result = status.first_result(now)
    if result and (before is None or result != status.first_result(before)):
        said.append(result)
    return said


def _named(path: str) -> str:
    """A job by the end of its folder: `adapters/<run>-<key>`."""
    return "/".join(Path(path).parts[-2:])
