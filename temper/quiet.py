"""A line for each job on the terminal, where Snakemake writes a block. Its log in .snakemake/log/ has the blocks."""

import logging
import time
from pathlib import Path

from temper.errors import visible

BEGINS, ENDS_BADLY = "begins", "failed"
OF_JOBS = ("job_started", "job_finished", "resources_info")  # events that say nothing else than the lines of jobs
# Beginnings and ends of other noise: the shell command of a failed job, which has a line of its own; that Snakemake
# looks for jobs; that it has no copy of an output, which steps replace by themselves.
BEGINNINGS = ("RuleException:\nCalledProcessError in file", "Select jobs to execute")
ENDS = (": no backup found.",)


def a_line_for_each_job(settings) -> None:
    """Shorten what Snakemake says of jobs to this terminal, unless it was asked for more, less, or a logger plugin.

    Args:
        settings: Snakemake's output settings.
    """
    if settings.quiet or settings.verbose or settings.printshellcmds or settings.debug_dag:
        return
    for handler in logging.getLogger("snakemake.logging").handlers:
        if handler.name == "DefaultStreamHandler" and handler.formatter:
            handler.setFormatter(_Short(handler.formatter))
            handler.addFilter(_is_shown)


def _event(record: logging.LogRecord) -> str:
    return str(getattr(record, "event", None))


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether a record is shown. Jobs without a log only gather others."""
    event, message = _event(record), str(record.msg)
    if event in ("job_info", "job_error"):
        return bool(record.log)  # type: ignore[attr-defined]
    return event not in OF_JOBS and not message.startswith(BEGINNINGS) and not message.endswith(ENDS)


class _Short(logging.Formatter):
    """Jobs in a line each, by rule and run; all else as `whole` has it."""

    def __init__(self, whole: logging.Formatter):
        super().__init__()
        self.whole = whole

    def format(self, record: logging.LogRecord) -> str:
        what = {"job_info": BEGINS, "job_error": ENDS_BADLY}.get(_event(record))
        if what is None:
            return self.whole.format(record)
        log = Path(record.log[0])  # type: ignore[attr-defined]
        said = f" (log: {log})" if what == ENDS_BADLY else ""
        return visible(f"{time.strftime('%H:%M:%S')} {record.rule_name} {log.stem} {what}{said}")  # type: ignore[attr-defined]
