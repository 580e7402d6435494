"""Check what tokenizing did to the rows against `tokenize.max_share`: before training, and whenever a run is planned.

In no key, because this code only refuses and changes no artefact: another share neither tokenizes nor trains again.
"""

import math
from pathlib import Path

from temper.data.audit import DROPPED, LENGTHS, TOLD
from temper.data.places import named_place, of_mixture, parts_of
from temper.errors import UserError

WORDS = {**LENGTHS, **{name: f"are left out: {what}" for name, what in DROPPED.items()}}
WORDS |= {name: f"are kept, but {what}" for name, what in TOLD.items()}


def check(audit: dict, tokenize: dict, prompts: Path) -> None:
    """Check an audit.

    Args:
        audit: as in audit.json.
        tokenize: the config section.
        prompts: the folder of format_prompts or mix_prompts that was tokenized.

    Raises:
        UserError: something was found in more rows of a split than its share in `tokenize.max_share` allows.
    """
    for name, most in tokenize["max_share"].items():
        for split, found in audit["splits"].items():
            if most is not None and _share(found, name) > most:
                raise UserError(_refusal(audit, name, split, most, prompts))


def _share(found: dict, name: str) -> float:
    return found[name] / max(found["read"], 1)


def _refusal(audit: dict, name: str, split: str, most: float, prompts: Path) -> str:
    found = audit["splits"][split]
    reasons = "; ".join(f"{found[reason]:,}: {words}" for reason, words in _reasons(name).items() if found[reason])
    largest = max(_share(other, name) for other in audit["splits"].values())
    raised = f"tokenize.max_share.{name}={math.ceil(largest * 100) / 100:g}"
    return (
        f"{prompts}: {found[name]:,} of {found['read']:,} rows of {split} ({_share(found, name):.1%}) {WORDS[name]}"
        f"{f' ({reasons})' if reasons else ''}, more than tokenize.max_share.{name}={most:g}; the first: "
        f"{_places(found, name, prompts)}: {_way_on(audit, name)}, or, if that is as it should be, set {raised}"
    )


def _reasons(name: str) -> dict[str, str]:
    """Why rows are left out, as audit.json counts it."""
    return {"longer_than_max_length": "longer than tokenize.max_length", **DROPPED} if name == "dropped" else {}


def _places(found: dict, name: str, prompts: Path) -> str:
    """The first rows, by file and line; by their ids if the raw data is gone."""
    ids = found["first"][name]
    try:
        where = of_mixture(parts_of(prompts), ids)
    except (UserError, OSError):
        where = {}
    first = ", ".join(named_place(where, number) for number in ids)
    return first if found[name] <= len(ids) else f"{first}, ..."


def _way_on(audit: dict, name: str) -> str:
    """What to do about the rows."""
    needed = max(found["suggested_max_length"] or 0 for found in audit["splits"].values())
    lengths = any(found["longer_than_max_length"] for found in audit["splits"].values())
    if name in ("dropped", *LENGTHS) and lengths and needed > audit["max_length"]:
        if needed <= (audit["context"] or needed):
            return f"tokenize.max_length={needed} would keep 99% of each split"
        return (
            f"shorten the rows (99% of each split have up to {needed} tokens, and the model reads {audit['context']})"
        )
    ways = dict.fromkeys(("doubled_begin", "doubled_end"), "take one of them out of the template, if it is from there")
    ways["end_spelled"] = "take it off the answers, for the chat template or Temper writes the token itself"
    return ways.get(name, "correct the rows, or leave them out with data.where")
