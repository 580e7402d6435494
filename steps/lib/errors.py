"""The one error class of Temper, and how it reaches the user."""

import contextlib
import difflib
import errno
import os
import sys
from pathlib import Path

from steps.lib.secrets import redacted

MOST_SHOWN = 15  # longer lists of choices drown the message


class UserError(Exception):
    """Something a person can fix: bad config, bad data, a missing file, no network.

    The message is one line that says what was found, where, and what to do. Commands print it
    as ``error: <message>`` and exit with code 2, without a traceback. It never shows a password or a token.
    """

    def __init__(self, message: str):
        super().__init__(redacted(message))


@contextlib.contextmanager
def one_line_errors():
    """End the process with one line and exit code 2 when the user can fix what is wrong."""
    try:
        yield
    except Exception as error:
        known = explained(error, Path(sys.argv[0]).stem)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr, flush=True)
        sys.exit(2)


def explained(error: Exception, what: str) -> UserError | None:
    """What the user can do about `error`, met in making `what`; None: it is a fault of the code."""
    return error if isinstance(error, UserError) else lack(error, what)


# Libraries wrap what the system says (safetensors in its own error, torch in a RuntimeError), but they all quote it.
# "inline_container" is torch.save whose file was cut short.
FULL = [os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "disk is full", "inline_container.cc"]
READ_ONLY = [os.strerror(errno.EROFS)]
# The last two are what is said of a library that could not be loaded for lack of memory: by the loader, by Python.
NO_MEMORY = [
    "MemoryError",
    "out of memory",
    "can't allocate memory",
    "Unable to allocate",
    os.strerror(errno.ENOMEM),
    "failed to map segment from shared object",
    "SystemError: error return without exception set",
]
# Said alike by Python and by OpenMP's and Arrow's pools; too little address space says the same as too many processes.
NO_THREAD = ["can't start new thread", os.strerror(errno.EAGAIN)]


def lack(error: BaseException, output: str) -> UserError | None:
    """What the machine lacks, when `error` or one it came from says so: room or rights on disk, memory, threads."""
    said = ""
    while error is not None:
        said += f"{type(error).__name__}: {error}\n"
        error = error.__cause__ or error.__context__
    again = "then run the same command again: it goes on where this one stopped"
    if any(text in said for text in FULL):
        return UserError(f"{output}: the disk is full; free some space (results/merged/ can go first), {again}")
    if any(text in said for text in READ_ONLY):
        return UserError(f"{output}: the disk is read-only; make it writable, {again}")
    if any(text in said for text in NO_MEMORY):
        return UserError(
            f"{output}: out of memory; lower train.per_device_train_batch_size (and raise gradient_accumulation_steps "
            "by as much), or eval.batch_size (--batch-size), or tokenize.max_length, or set "
            "train.gradient_checkpointing=true"
        )
    if any(text in said for text in NO_THREAD):
        return UserError(
            f"{output}: no more threads can be started; the limit of processes (ulimit -u) or of memory (ulimit -v, "
            f"the job's request) is used up: raise it, {again}"
        )
    return None


def suggest(word: str, choices) -> str:
    """``"did you mean 'x'?"`` when a choice is close to `word` or has it as initials (lr), else what is allowed."""
    choices = sorted(str(choice) for choice in choices)
    initials = [choice for choice in choices if "".join(part[:1] for part in choice.split("_")) == word]
    same = [choice for choice in choices if choice.casefold() == word.casefold()]
    close = same or initials or difflib.get_close_matches(word, choices, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = ", ".join(choices[:MOST_SHOWN])
    return f"allowed: {shown}" + (f" and {len(choices) - MOST_SHOWN} more" if len(choices) > MOST_SHOWN else "")
