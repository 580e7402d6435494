"""The one error class of Temper, and how it reaches the user."""

import difflib

MOST_SHOWN = 15  # longer lists of choices drown the message


class UserError(Exception):
    """Something a person can fix: bad config, bad data, a missing file, no network.

    The message is one line that says what was found, where, and what to do. Commands print it
    as ``error: <message>`` and exit with code 2, without a traceback.
    """


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
