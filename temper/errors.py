"""Temper's only error class, and how errors reach the user."""

import contextlib
import difflib
import errno
import json
import os
import select
import signal
import sys
import unicodedata
from pathlib import Path

from temper import signals
from temper.secrets import redacted

JOINERS = "\u200c\u200d"
MOST_SHOWN = 15  # longer lists of choices would hide the message


class UserError(Exception):
    """Something a person can fix: bad config, bad data, a missing file, no network.

    The message is one line that says what was found, where, and what to do. Commands print it
    as ``error: <message>`` and exit with code 2, without a traceback. It never shows a password or a token.
    """

    def __init__(self, message: str):
        super().__init__(redacted(message))


class NetworkError(UserError):
    """No server answered, or a download broke off, which is nobody's mistake: the same again may succeed by itself."""


@contextlib.contextmanager
def one_line_errors(
    what: str | None = None, stage: str | None = None, log: str | None = None, command: str | None = None
):
    """End the process with one line if the user can fix the error (exit code 2), or asked it to end.

    If the reader of a pipe closes it (``| head``), the process ends silently, like other commands.

    Args:
        what: what is being made, for the line; default: the command's name.
        stage: the running step.
        log: a file that gets the line as well.
        command: the command's name; default: that of the program.
    """
    command = command or Path(sys.argv[0]).stem
    _print_any_text()
    with signals.as_interrupts():
        try:
            yield
            sys.stdout.flush()
        except KeyboardInterrupt as error:
            again = ": run the same command again, and it goes on from what is whole" if stage else ""
            _end(f"interrupted ({error or 'SIGINT'}){again}", getattr(error, "code", 130), log)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                sys.exit(128 + signal.SIGPIPE)
            known = explained(error, what or command, stage or command)
            if known is None:
                raise
            _end(f"error: {visible(str(known))}", 2, log)


def _print_any_text() -> None:
    """Escape what the terminal's encoding cannot show, rather than end the command."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a test's stream, or a closed one
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _nobody_reads() -> bool:
    """Whether standard output is a closed pipe. Redirects it then, or Python would complain again at exit."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def _end(line: str, code: int, log: str | None) -> None:
    print(line, file=sys.stderr, flush=True)
    if log:
        with contextlib.suppress(OSError), Path(log).open("a", encoding="utf-8") as file:
            print(line, file=file)
    sys.exit(code)


def visible(text: str) -> str:
    """A text on one line; line breaks and characters that control a terminal are escaped as in Python."""
    return "".join(repr(char)[1:-1] if _steers(char) else char for char in text)


def _steers(char: str) -> bool:
    """Control characters, surrogates, line and paragraph separators, and invisible ones that reorder or hide text.

    Joiners are allowed: they move nothing, and words of Indic scripts and Persian, and many emoji, need them.
    """
    kind = unicodedata.category(char)
    seen = char in JOINERS or unicodedata.bidirectional(char) == "AN"  # AN: signs of Arabic numbers
    return kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and not seen)


def explained(error: Exception, what: str, stage: str | None = None) -> UserError | None:
    """`error`, met while making `what`, as a UserError; None if it is a bug."""
    return error if isinstance(error, UserError) else lack(error, what, stage)


# Libraries wrap the system's errors (safetensors in its own class, torch in a RuntimeError), but they all quote them.
# "inline_container" is torch.save with a truncated file, "11360 requested and 2896 written" is NumPy.
FULL = [os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "disk is full", "inline_container.cc", "requested and"]
READ_ONLY = [os.strerror(errno.EROFS)]
# The last two mean that a library could not be loaded for lack of memory, in the words of the loader and of Python.
NO_MEMORY = [
    "MemoryError",
    "out of memory",
    "can't allocate memory",
    "Unable to allocate",
    os.strerror(errno.ENOMEM),
    "failed to map segment from shared object",
    "SystemError: error return without exception set",
]
# From Python and the pools of OpenMP and Arrow. Too little address space gives the same message as too many processes.
NO_THREAD = ["can't start new thread", os.strerror(errno.EAGAIN)]
# Faults of a path that no retry will fix; the system's message and the path explain them.
PATHS = {
    errno.EACCES: "make it readable and writable",
    errno.EPERM: "make it readable and writable",
    errno.ENOTDIR: "there is a file where a folder should be: move it away",
    errno.EEXIST: "move it away",
    errno.EISDIR: "there is a folder where a file should be: move it away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle: name the file itself",
    errno.EIO: "the disk or the network drive fails",
    errno.ESTALE: "the disk or the network drive fails",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
}
# How to use less memory, by stage or command. The others can only use a larger machine.
TRAIN_SMALLER = (
    "lower train.per_device_train_batch_size (and raise gradient_accumulation_steps by as much), or "
    "tokenize.max_length, or set train.gradient_checkpointing=true"
)
SMALLER = {
    None: TRAIN_SMALLER + "; in evaluation lower eval.batch_size (--batch-size)",
    "train_adapter": TRAIN_SMALLER,
    "evaluate_model": "lower eval.batch_size",
    "sample_answers": "lower method.own_answers.batch_size",
    "reference_logprobs": "lower tokenize.max_length",
    "run_harness": "lower eval.harness.batch_size",
    "predict": "lower --batch-size",
}
RESUMED = ("train_adapter", "reference_logprobs", "snakemake")  # others start from the beginning
LARGER = "close other programs, run with fewer --cores, or use a machine with more memory"


def lack(error: BaseException, output: str, stage: str | None = None) -> UserError | None:
    """What the machine lacks, if `error` or one of its causes says so: disk space, permissions, memory, threads.

    Args:
        output: what was being made, for the line.
        stage: the running step or command, which decides how to use less memory; None: unknown.
    """
    said, wrong = "", None
    cause: BaseException | None = error
    while cause is not None:
        said += f"{type(cause).__name__}: {cause}\n"
        wrong = wrong or _wrong_path(cause)
        cause = cause.__cause__ or cause.__context__
    again = "then run the same command again"
    if stage is None or stage in RESUMED:
        again += ": it goes on where this one stopped"
    if any(text in said for text in FULL):
        return UserError(
            f"{output}: the disk is full; free some space (temper prune --dry-run says what there is), {again}"
        )
    if any(text in said for text in READ_ONLY):
        return UserError(f"{output}: the disk is read-only; make it writable, {again}")
    if any(text in said for text in NO_MEMORY):
        return UserError(f"{output}: out of memory; {SMALLER.get(stage, LARGER)}")
    if any(text in said for text in NO_THREAD):
        return UserError(
            f"{output}: no more threads can be started; the limit of processes (ulimit -u) or of memory (ulimit -v, "
            f"the job's request) is used up: raise it, {again}"
        )
    return wrong


def _wrong_path(error: BaseException) -> UserError | None:
    """What is wrong with a path that the system refused, in one line."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in PATHS:
        return None
    name = str(error.filename)
    shown = f"{name[:60]}..." if error.errno == errno.ENAMETOOLONG else name
    return UserError(f"{shown}: {error.strerror}; {PATHS[error.errno]}")


def suggest(word: str, choices) -> str:
    """``"did you mean 'x'?"`` if a choice is close to `word` or has these initials (lr), else the allowed ones."""
    choices = sorted(str(choice) for choice in choices)
    initials = [choice for choice in choices if "".join(part[:1] for part in choice.split("_")) == word]
    same = [choice for choice in choices if choice.casefold() == word.casefold()]
    close = same or initials or difflib.get_close_matches(word, choices, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = ", ".join(choices[:MOST_SHOWN])
    return f"allowed: {shown}" + (f" and {len(choices) - MOST_SHOWN} more" if len(choices) > MOST_SHOWN else "")


@contextlib.contextmanager
def told_by_library(section: str):
    """Turn a library's error about a config section into one line, in the library's words.

    Only for constructing objects, before anything runs: then any error is about the config, except a lack of resources.

    Raises:
        UserError: instead of any other exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if lack(error, section) is not None:
            raise
        said = " ".join(str(error).split())[:300] or "no reason given"
        kind = "" if isinstance(error, ValueError | ImportError | NotImplementedError) else f"{type(error).__name__}: "
        raise UserError(f"config: {section}: {kind}{said}") from error


def words(error: BaseException | str, most: int = 200) -> str:
    """What an error says, on one line that fits a message; its kind, when it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def short(text: str) -> str:
    """A text, shortened for a message."""
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-30:]}"


def found(value, text_wanted: bool = False) -> str:
    """A value for a message, as JSON, with a hint if YAML may have misread an unquoted text."""
    shown = short(json.dumps(value, default=str, ensure_ascii=False))
    if isinstance(value, bool):
        return f"{shown}; YAML reads yes, no, on and off as true and false: put them in quotes where they are texts"
    if text_wanted and isinstance(value, int | float):
        return f"{shown}; put it in quotes to make it a text"
    return shown
