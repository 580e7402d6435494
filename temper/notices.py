"""A notice when a sweep ends: `notify.command` is run with what became of it.

The shell runs it once, in the project's folder, when the command that makes the sweep ends: well, with failed jobs, or
by a signal; not where there was nothing to do. It gets a line of text in $TEMPER_TEXT, `finished`, `failed` or
`interrupted` in $TEMPER_STATUS, and JSON on its input. A command that fails, or takes longer than a minute, is said and
changes nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from temper.secrets import redacted

if TYPE_CHECKING:
    from temper.reports.leaderboard import Board

LONGEST = 60.0  # seconds that the command may take
FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"


def tell(plan, status: str, board: "Board | None", link: str | None = None, failed: int = 0) -> None:
    """Run the command of a plan, if it has one.

    Args:
        plan: a `temper.planning.plan.Plan`.
        board: the leaderboard; None: there is none.
        link: of the sweep's runs in MLflow.
        failed: how many jobs failed.
    """
    command = plan.runs[0].config.get("notify", {}).get("command")
    if not command:
        return
    facts = notice(plan, status, board, link, failed)
    told = {"TEMPER_TEXT": facts["text"], "TEMPER_STATUS": status}
    try:
        done = subprocess.run(
            command,
            shell=True,
            input=json.dumps(facts) + "\n",
            env={**os.environ, **told},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        wrong = f"was ended after {LONGEST:.0f} seconds" if isinstance(error, subprocess.TimeoutExpired) else str(error)
    else:
        last = done.stdout.strip().rpartition("\n")[2][:200]
        wrong = f"ended with exit code {done.returncode}{f': {last}' if last else ''}" if done.returncode else ""
    if wrong:
        print(f"note: notify.command {redacted(wrong)}; the results are as they are", file=sys.stderr)


def notice(plan, status: str, board: "Board | None", link: str | None, failed: int) -> dict:
    """What a command is told. Arguments are those of `tell`."""
    facts: dict = {"sweep": plan.sweep, "status": status, "runs": len(plan.runs), "failed_jobs": failed, "mlflow": link}
    parts = [f"sweep {plan.sweep} {status}"]
    if failed:
        parts.append(f"{failed} job(s) failed")
    if board:
        best, figure = board.chosen_row, f"{board.split}_{board.metric}"
        base = (board.base or {}).get(board.metric)
        facts |= {"best": board.chosen, "metric": board.metric, "split": board.split}
        facts |= {"value": best.get(figure), "base": base, "test": best.get(f"test_{board.metric}")}
        facts |= {"page": str(Path(plan.leaderboard).with_name("report.html")), "gate": board.gate}
        if facts["value"] is not None:
            beside = f", untouched model {base:.3f}" if base is not None else ""
            parts.append(
                f"best of {len(board.rows)} run(s): {board.metric} {facts['value']:.3f} on {board.split}{beside}"
            )
        parts += [f"{len(board.gate)} bound(s) of eval.gate are not kept"] if board.gate else []
        parts.append(facts["page"])
    return facts | {"text": "; ".join(parts)}
