"""The part of a config that one stage sees: what is hashed into its key and what it is run with."""

import functools
import json
import typing
from pathlib import Path

from temper import yaml_files
from temper.config.compose import expand, parse_overrides, to_container
from temper.config.libraries import check_library_sections
from temper.config.schema import Config, Data, Section, Source
from temper.config.validate import model_dump
from temper.errors import UserError
from temper.files import read_yaml
from temper.hashing import canonical_json
from temper.keys import flat

# --- what a stage sees ---------------------------------------------------------------------------


def stage_config(stage: str, config: dict) -> dict:
    """The part of a whole config that a stage may see, nested as in the whole."""
    view: dict = {}
    for path in STAGE_SECTIONS[stage]:
        source, target = config, view
        *parents, name = path.split(".")
        for parent in parents:
            source, target = source[parent], target.setdefault(parent, {})
        target[name] = source[name]
    return json.loads(canonical_json(view))


def _annotation(model, name: str):
    """The type of a field; of a union with its tag, without which a fault would be told of all its members."""
    from pydantic import Field

    field = model.model_fields[name]
    if field.discriminator:
        return typing.Annotated[field.annotation, Field(discriminator=field.discriminator)]
    return typing.Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


@functools.cache
def _stage_model(stage: str):
    """A pydantic model of what the stage may see. Other keys at the top are facts the planner adds (identities)."""
    from pydantic import create_model

    fields: dict = {}
    for path in STAGE_SECTIONS[stage]:
        section, _, name = path.partition(".")
        annotation = _annotation(Config, section)
        if name:
            annotation = create_model(section, __base__=Section, **{name: (_annotation(annotation, name), ...)})
        fields[section] = (DataView if path == "data" else annotation, Config.model_fields[section].default)
    return create_model(stage, __config__={"extra": "allow"}, **fields)


def validated_stage(stage: str, view: dict) -> dict:
    """Check the config of one stage and fill in defaults."""
    filled = model_dump(_stage_model(stage), view, "")
    if "train" in filled:
        check_library_sections(filled["train"], filled["adapter"], filled["method"]["name"])
    return filled


def stored_config(folder: Path) -> dict[str, str]:
    """The `config.yaml` of an artefact as flat keys and texts."""
    return flat(read_yaml(folder / "config.yaml"))


def load_stage_config(stage: str, given: str | None, overrides: list[str]) -> dict:
    """A step's config: JSON text or a file from ``--config``, or composed from Hydra overrides."""
    if given and overrides:
        raise UserError(f"--config and overrides ({overrides[0]} ...) exclude each other: leave one out")
    if given:
        return validated_stage(stage, _config_text(given) if given.lstrip().startswith("{") else _config_file(given))
    parsed = parse_overrides(["sweep=none", *overrides])
    axes, points = expand(parsed)
    if len(points) != 1:
        raise UserError(
            f"a step makes one run, but {', '.join(axes)} is swept: give one value each, e.g. {_first(axes)}"
        )
    return stage_config(stage, points[0][1])


def _config_text(text: str) -> dict:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config: not JSON: {error}; give a file, or JSON text as the workflow does") from None


def _first(axes: dict[str, list[str]]) -> str:
    return " ".join(f"{key}={values[0]}" for key, values in axes.items())


def _config_file(path: str) -> dict:
    """The mapping in a YAML (or JSON) file."""
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file")
    found = to_container(yaml_files.load(Path(path), f"--config {path}"))
    if not isinstance(found, dict):
        raise UserError(f"--config {path}: holds no config, which is keys and values")
    return found


class DataView(Data):
    """`data` as format_prompts gets it from the workflow: the raw files' identity stands for name and source."""

    name: str | None = None
    source: Source | None = None


# What each stage may see, dotted paths into Config. A stage's key hashes just these, so a key that is
# not listed for a stage can never rerun it.
STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    "fetch_data": ("data.source",),
    "fetch_model": ("model.source",),
    "format_prompts": ("data", "prompt.system"),
    "tokenize_splits": ("prompt", "tokenize"),
    "sample_answers": ("method", "model.load", "num_threads"),
    "reference_logprobs": ("model.load", "quantization", "num_threads"),
    "train_adapter": ("method", "quantization", "adapter", "train", "seed", "model.load", "num_threads"),
    "merge_adapter": ("merge", "quantization"),
    "evaluate_model": ("eval", "model.load", "num_threads"),
    "compare_runs": ("eval", "sweep"),
}
# Fields of a section that a stage needs to know but that make no difference to what it writes.
NOT_IN_KEY: dict[str, frozenset[str]] = {
    "data": frozenset({"name", "source"}),  # the raw files' identity stands for the source
    "method": frozenset({"sft"}),  # the model that comes of it stands for it
    "train": frozenset(
        [
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "logging_nan_inf_filter",
            "log_level",
            "disable_tqdm",
            "report_to",
            "run_name",
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
        ]
    ),
}
