"""What a model must be served with to answer as it was trained: serving.json, in every folder from splits to hub.

It holds sha256 sums: of the chat template, the special tokens, the generation config and the tokenizer, which decide
the tokens that a model reads and where its answers end; of an adapter, or what was merged from it, also of the weights
it was trained on. They are of what the files mean, not of their bytes, so that saving a model again, in other shards or
by another version of transformers, changes none.
"""

import hashlib
import json
import logging
from pathlib import Path

from temper.errors import UserError
from temper.files import json_text, read_json
from temper.hashing import canonical_json
from temper.model.loading import BUNDLED, load_tokenizer, weight_files
from temper.model.reading import reading

FILE = "serving.json"
GENERATION = "generation_config.json"
BASE = "base_weights"
WORDS = {
    BASE: "weights",
    "tokenizer": "tokenizer",
    "special_tokens": "special tokens",
    "chat_template": "chat template",
    "generation_config": "generation config",
}
FATAL = ("tokenizer", "special_tokens")  # with another one the same token ids mean something else

log = logging.getLogger("temper")

# --- what a folder holds ---------------------------------------------------------------------------


def of_folder(folder: Path, tokenizer=None) -> dict[str, str]:
    """The sums of a model's folder, or of its generation config and a given tokenizer."""
    tokenizer = tokenizer or load_tokenizer(folder)
    return {
        "tokenizer": _sum(_vocabulary(tokenizer)),
        "special_tokens": _sum({name: str(token) for name, token in tokenizer.special_tokens_map.items()}),
        "chat_template": _sum(tokenizer.chat_template),
        "generation_config": _sum(_generation(folder)),
    }


def of_base(folder: Path) -> dict[str, str]:
    """The sums of a model that is trained, or was, with those of its weights."""
    return {**of_folder(folder), BASE: weights(folder)}


def _sum(value) -> str:
    return hashlib.sha256(canonical_json(value).encode(errors="surrogatepass")).hexdigest()


def _vocabulary(tokenizer):
    """How a text becomes tokens."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return [type(tokenizer).__name__, tokenizer.get_vocab()]
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: part for name, part in whole.items() if name not in ("padding", "truncation")}  # of its last call


def _generation(folder: Path) -> dict:
    """The generation config, without what has no effect; nothing when there is none."""
    from transformers import GenerationConfig

    if not (folder / GENERATION).is_file():
        return {}
    with reading(folder / GENERATION):
        whole = GenerationConfig.from_pretrained(folder, local_files_only=True).to_dict()
    return {name: value for name, value in whole.items() if value and name != "transformers_version" and name[0] != "_"}


def weights(folder: Path) -> str:
    """sha256 of all tensors, in the order of their names: 1 s a gigabyte, or less."""
    import torch
    from safetensors import safe_open

    found = hashlib.sha256()

    def add(name: str, tensor) -> None:
        found.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    bundled = folder / BUNDLED / "adapter_model.safetensors"
    places: dict[str, tuple] = {}
    for file in [*weight_files(folder), *([bundled] if bundled.is_file() else [])]:
        with reading(file):
            if file.suffix == ".safetensors":
                tensors = safe_open(file, framework="pt", backend="pread")  # mapped, all of it would count as memory
                places |= {f"{file.parent == bundled.parent:d} {name}": (tensors, name) for name in tensors.keys()}  # noqa: SIM118
            else:
                loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                places |= {f"0 {name}": (loaded, name) for name in loaded}
    for place in sorted(places):
        tensors, name = places[place]
        add(place, tensors[name] if isinstance(tensors, dict) else tensors.get_tensor(name))
    return found.hexdigest()


# --- what was recorded -------------------------------------------------------------------------------


def write(folder: Path, sums: dict[str, str]) -> None:
    (folder / FILE).write_text(json_text(sums), encoding="utf-8")


def read(folder: Path) -> dict[str, str]:
    """What a folder's serving.json says; {}, and a line about it, when there is none."""
    if (folder / FILE).is_file():
        return read_json(folder / FILE, dict[str, str])
    log.warning("warning: %s has no %s, so nothing tells with which model and template it belongs", folder, FILE)
    return {}


def differences(recorded: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names of what is known of both and not the same."""
    return [name for name in WORDS if name in recorded and name in found and recorded[name] != found[name]]


# --- checks ------------------------------------------------------------------------------------------


def refuse_other_base(adapter: Path, model: Path) -> dict[str, str]:
    """The sums of `model`, which must be what the adapter (or fully trained model) in a folder was trained on.

    Raises:
        UserError: its weights, tokenizer, template or generation config are others.
    """
    found = of_base(model)
    wrong = differences(read(adapter), found)
    if wrong:
        raise UserError(f"{model}: {_other(wrong)} with which {adapter} was trained; {_origin(adapter)}")
    return found


def refuse_other_weights(adapter: Path, model: Path) -> None:
    """Refuse to put an adapter on a model with other weights than it was trained on."""
    recorded = read(adapter)
    if BASE in recorded and recorded[BASE] != weights(model):
        raise UserError(f"{model}: {_other([BASE])} with which {adapter} was trained; {_origin(adapter)}")


def refuse_other_splits(splits: Path, model: Path) -> dict[str, str]:
    """The sums of `model` without its weights, which must read text as the model that splits were tokenized with.

    Raises:
        UserError: its tokenizer, template or generation config are others.
    """
    found = of_folder(model)
    wrong = differences(read(splits), found)
    if wrong:
        raise UserError(
            f"{model}: {_other(wrong)} with which {splits} was tokenized, so it would learn other prompts than it is "
            "asked later; run tokenize_splits with this model, or put its files back as they were"
        )
    return found


def check(recorded_in: Path, folder: Path, leaves: bool = False) -> None:
    """Check that a folder's tokenizer and template are those of training, as another folder (or itself) recorded.

    Args:
        leaves: whether others get it, who see no warning of ours: then any difference is refused.

    Raises:
        UserError: tokenizer or special tokens are others. Another template or generation config is said in a line.
    """
    wrong = differences(read(recorded_in), of_folder(folder))
    if not wrong:
        return
    said = f"{folder}: {_other(wrong)} of training (edited since?)"
    if leaves or set(wrong) & set(FATAL):
        raise UserError(f"{said}; put the files back as they were, or delete the folder and make it again")
    log.warning("warning: %s, so its answers are not those that were evaluated", said)


def _other(wrong: list[str]) -> str:
    names = " and ".join(WORDS[name] for name in wrong)
    plural = len(wrong) > 1 or names.endswith("s")
    return f"its {names} {'are not those' if plural else 'is not the one'}"


def _origin(adapter: Path) -> str:
    """What to do instead: use the model that the adapter's provenance names."""
    provenance = adapter / "provenance.json"
    model = read_json(provenance).get("inputs", {}).get("model") if provenance.is_file() else None
    return f"use the model it was trained on ({model or 'nothing says which'}) as it was then, or train again"
