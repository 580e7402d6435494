"""The language that texts are in, as py3langid tells it: 139 languages, offline, from a model in its package."""

import collections
import functools
from collections.abc import Iterable

LONGEST = 300  # characters of a text that are looked at
SURE = 0.5  # probability from which a language is believed
UNKNOWN = "und"  # ISO 639: undetermined. Short texts, names and code are often so
NO_LANGUAGE = "zxx"  # ISO 639: numbers, markup, identifiers


def count_languages(texts: Iterable[str]) -> dict[str, int]:
    """ISO 639 code -> how many texts are in that language, the most frequent first; `UNKNOWN` where it is not sure."""
    classify = _identifier().classify
    counts = collections.Counter(classify(text[:LONGEST])[0] if text.strip() else UNKNOWN for text in texts)
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=SURE)
