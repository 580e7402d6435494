"""Which files of a repository or folder belong to the model."""

import re

from temper.errors import UserError
from temper.folders import PROVENANCE
from temper.model.loading import refuse_loose_adapter

# --- what a model folder is made of --------------------------------------------------------------


def model_files(names: list[str], where: str) -> list[str]:
    """The files needed to use the model: weights in one format, config, tokenizer, licence.

    Raises:
        UserError: there are no weights, or there is an adapter beside them; the message starts with `where`.
    """
    weights = _matching(r"model(-\d+-of-\d+)?\.safetensors", names) or _matching(
        r"pytorch_model(-\d+-of-\d+)?\.bin", names
    )
    if not weights:
        found = ", ".join(sorted(names)[:8]) or "nothing"
        raise UserError(f"{where}: no model.safetensors or pytorch_model.bin in it; found: {found}")
    refuse_loose_adapter(names, where)
    other = "pytorch_model.bin" if weights[0].endswith(".safetensors") else "model.safetensors"
    rest = _matching(r"[^/]*\.(json|txt|model|jinja|tiktoken)|(LICEN[CS]E|NOTICE)[^/]*", names)
    return sorted({*weights, *rest} - {f"{other}.index.json", PROVENANCE})  # a copy gets its own provenance


def _matching(pattern: str, names: list[str]) -> list[str]:
    return [name for name in names if re.fullmatch(pattern, name)]
