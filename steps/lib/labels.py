"""When an answer is a label: a module of its own, so that the training does not depend on how answers are judged."""

import unicodedata


def normalised(text: str) -> str:
    """Text without case, punctuation and repeated blanks; a text of nothing else (an emoji, ``+``) is only stripped."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(char if char.isalnum() else " " for char in text).split()
    return " ".join(words) or text.strip()
