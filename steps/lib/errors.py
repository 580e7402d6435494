"""The one error class of Temper, and how it reaches the user."""

import contextlib
import difflib
import sys

MOST_SHOWN = 15  # longer lists of choices drown the message


class UserError(Exception):
    """Something a person can fix: bad config, bad data, a missing file, no network.

    The message is one line that says what was found, where, and what to do. Commands print it
    as ``error: <message>`` and exit with code 2, without a traceback.
    """


@contextlib.contextmanager
def one_line_errors():
    """End the process with one line and exit code 2 when the user can fix what is wrong."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


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
