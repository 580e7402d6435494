"""The one error class of Temper, and how it reaches the user."""

import difflib


class UserError(Exception):
    """Something a person can fix: bad config, bad data, a missing file, no network.

    The message is one line that says what was found, where, and what to do. Commands print it
    as ``error: <message>`` and exit with code 2, without a traceback.
    """


def suggest(word: str, choices) -> str:
    """``"did you mean 'x'?"`` when one of `choices` is close to `word`, else the whole list."""
    choices = sorted(str(choice) for choice in choices)
    close = difflib.get_close_matches(word, choices, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return "allowed: " + ", ".join(choices)
