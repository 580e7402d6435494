"""Which label a text is: a module of its own, so that the training does not depend on how answers are judged.

A text is compared as it stands first, and with less of it only where the labels stay apart: without case, without the
punctuation around it, as words alone. Letters, digits, the marks that some scripts write vowels and tones with, and
signs such as ``+``, ``-``, ``<`` all count while they tell labels apart: ``C`` and ``C++``, ``-1`` and ``1``.
"""

import functools
import re
import unicodedata

from temper.errors import UserError

AROUND = " \t\n\r.,;:!?…。，！？、।\"'`“”‘’«»„()[]{}*_"  # what people put around an answer without meaning it
UNPARSED = "unparsed"  # the reading of an answer that names no label
HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
VARIATION = str.maketrans("", "", "\ufe0e\ufe0f")  # whether an emoji is drawn in colour


def check_class_names(class_names: list[str]) -> None:
    """Refuse labels that no answer could tell apart.

    Raises:
        UserError: an empty label, or two that differ in nothing but blanks and how characters are composed.
    """
    seen: dict[str, str] = {}
    for label in class_names:
        if _without_case(label) == UNPARSED:
            raise UserError(f"config: 'eval.labels': '{label}' is what an answer without a label is called: rename it")
        if not _as_it_is(label):
            raise UserError("config: 'eval.labels': an empty label could not be told from no answer")
        if _as_it_is(label) in seen:
            raise UserError(f"config: 'eval.labels': '{seen[_as_it_is(label)]}' and '{label}' are one: leave one out")
        seen[_as_it_is(label)] = label


def gold_class(text: str, class_names: list[str], place: str) -> str:
    """The label that a gold answer is.

    Args:
        place: where the answer stands, for the message.

    Raises:
        UserError: it is none of them, or could be several.
    """
    found = _equal(text, tuple(class_names))
    if found is not None:
        return found
    near = [label for label in class_names if _words(label) == _words(text)]
    why = f"could be {' or '.join(near)}: write it as the label" if near else "is not a label"
    raise UserError(
        f"{place}: the answer '{text[:60]}' {why} of eval.labels ({', '.join(class_names)[:200]}); correct the row, "
        "data.completion or eval.labels"
    )


def read_class(text: str, class_names: list[str]) -> str | None:
    """The label that a free answer gives, or None.

    The whole answer when it is a label (``Positive.``); else the label that occurs first as whole words (``It is a
    positive review``), the longest one where several start at the same place. So ``not positive`` reads as positive:
    the rule looks for words, it does not understand. A label of one letter is looked for in its own case.
    """
    found = _equal(text, tuple(class_names))
    return found if found is not None else _mentioned(text, tuple(class_names))


# --- comparing -----------------------------------------------------------------------------------


def _as_it_is(text: str) -> str:
    """The text in composed characters, with single blanks."""
    return " ".join(unicodedata.normalize("NFC", text).translate(VARIATION).split())


def _without_case(text: str) -> str:
    return unicodedata.normalize("NFC", _as_it_is(text).casefold())


def _bare(text: str) -> str:
    """Without case, and without what is around it."""
    return _without_case(text).strip(AROUND)


def _words(text: str) -> str:
    """The same, with a blank for ``_`` and for ``-`` between letters. Other signs stay: ``-1`` is not ``1``."""
    return " ".join(HYPHEN.sub(" ", _bare(text).replace("_", " ")).split())


def _in_word(char: str) -> bool:
    return unicodedata.category(char)[0] in "LNM"


COMPARED = (_as_it_is, _without_case, _bare, _words)


@functools.lru_cache(maxsize=64)
def _apart(class_names: tuple[str, ...]) -> list[tuple]:
    """Ways to compare, each with {what it makes of a label: the label} for those that it leaves apart."""
    found = []
    for way in COMPARED:
        made = [way(label) for label in class_names]
        found.append(
            (way, {text: label for text, label in zip(made, class_names, strict=True) if made.count(text) == 1})
        )
    return found


def _equal(text: str, class_names: tuple[str, ...]) -> str | None:
    for way, known in _apart(class_names):
        made = way(text)
        if made and made in known:
            return known[made]
    return None


# --- finding -------------------------------------------------------------------------------------


def _mentioned(text: str, class_names: tuple[str, ...]) -> str | None:
    """The label that occurs first as whole words."""
    ways = dict(_apart(class_names))
    for way, known in (
        (_as_it_is, ways[_as_it_is]),
        (_without_case, {made: label for made, label in ways[_without_case].items() if len(label) > 1}),
        (_words, {made: label for made, label in ways[_words].items() if len(made) > 1}),
    ):
        places = [(at, -len(made), label) for made, label in known.items() if (at := _place(made, way(text))) >= 0]
        if places:
            return min(places)[2]
    return None


def _of_another_sign(label: str, before: str, after: str) -> bool:
    """Whether a sign beside a number or a letter makes another one of it: ``-1``, ``4.5``, ``C++``."""
    if label[0].isdigit() and before and before in "+-<>=~":
        return True
    if label[-1].isdigit() and (after[:1] == "%" or (after[:1] in (".", ",") and after[1:].isdigit())):
        return True
    return len(label) == 1 and label.isalpha() and after[:1] in ("+", "#", "-")


def _place(label: str, text: str) -> int:
    """Where a label first stands in a text, not within a word; -1: nowhere."""
    at = text.find(label) if label else -1
    while at >= 0:
        end = at + len(label)
        inside = at > 0 and _in_word(label[0]) and _in_word(text[at - 1])
        inside = inside or (end < len(text) and _in_word(label[-1]) and _in_word(text[end]))
        if not inside and not _of_another_sign(label, text[max(0, at - 1) : at], text[end : end + 2]):
            return at
        at = text.find(label, at + 1)
    return -1
