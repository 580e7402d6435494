"""Compose, override, expand and validate the config. The only place that touches Hydra."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import logging
import typing
from pathlib import Path

from steps.lib.errors import UserError, suggest
from steps.lib.keys import PACKAGE_ROOT, canonical_json, digest
from steps.lib.schema import SOURCE_KINDS, STAGE_SECTIONS, Config, DataView, Section

CONF = PACKAGE_ROOT / "conf"
CHECKED = Path("results/.state/checked-configs")  # library sections that were found valid, by hash

# Fields of TrainingArguments that Temper decides itself, and where the user's choice goes instead.
RESERVED_TRAIN = {
    "output_dir": "the workflow names all folders",
    "seed": "use the top-level 'seed'",
    "data_seed": "use the top-level 'seed'",
    "resume_from_checkpoint": "training resumes by itself from results/.state",
    "report_to": "use 'tracking'",
    "run_name": "runs are named by the plan",
    "push_to_hub": "publishing is a step of its own, never part of training",
}

# Renamed or removed in transformers 5: what to write instead.
RENAMED_TRAIN = {
    "warmup_ratio": "transformers 5 has no warmup_ratio: write train.warmup_steps=0.1 (below 1: a share of all steps)",
    "evaluation_strategy": "it is called eval_strategy now",
    "group_by_length": "write train.train_sampling_strategy=group_by_length",
    "no_cuda": "write train.use_cpu=true",
}


# --- composing -----------------------------------------------------------------------------------


def groups() -> dict[str, list[str]]:
    """Config groups and their choices: ``{"data": ["english_quotes", ...], ...}``."""
    found = {}
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        found[folder.name] = sorted(path.stem for path in folder.glob("*.yaml"))
    return found


def split_overrides(text: str) -> list[str]:
    """Split ``a=1 b="x y" c=[1, 2]`` at blanks outside quotes and brackets."""
    parts, part, depth, quote = [], "", 0, None
    for char in text:
        if quote:
            quote = None if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char.isspace() and depth == 0:
            parts.append(part)
            part = ""
            continue
        part += char
    if quote or depth:
        what = f"quote {quote}" if quote else "bracket"
        raise UserError(f"overrides: unbalanced {what} in: {text}")
    return [part for part in [*parts, part] if part]


@dataclasses.dataclass
class Overrides:
    """Command-line overrides, sorted by what they do."""

    groups: list[str]  # data=english_quotes: for Hydra's defaults list
    values: list  # parsed `key=value`, applied after composing
    axes: dict[str, list[str]]  # swept `key=a,b`: its expanded values, each as Hydra text


def parse_overrides(overrides: list[str]) -> Overrides:
    """Sort overrides into group choices, values and sweep axes; refuse what Hydra cannot parse."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    sorted_out = Overrides([], [], {})
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"override '{text}': {reason} (write key=value)") from None
        if override.is_sweep_override():
            sorted_out.axes[override.key_or_group] = list(override.sweep_string_iterator())
        elif override.key_or_group in groups():
            sorted_out.groups.append(_known_choice(override.key_or_group, str(override.value()), text))
        else:
            sorted_out.values.append(override)
    return sorted_out


def _known_choice(group: str, choice: str, text: str) -> str:
    if choice not in groups()[group]:
        raise UserError(f"'{text}': conf/{group}/{choice}.yaml does not exist; {suggest(choice, groups()[group])}")
    return f"{group}={choice}"


@functools.lru_cache(maxsize=256)
def _compose(group_overrides: tuple[str, ...]):
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides=list(group_overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError("conf/: " + " ".join(str(error).split())) from None
    except Exception as error:  # a YAML syntax error: Hydra lets the parser's own exception through
        if type(error).__module__.startswith("yaml"):
            raise UserError("conf/: " + " ".join(str(error).split())) from None
        raise


def chosen_experiment(overrides: Overrides) -> str:
    """The experiment that was asked for, or the default of conf/config.yaml."""
    from omegaconf import OmegaConf

    asked = [choice.partition("=")[2] for choice in overrides.groups if choice.startswith("experiment=")]
    defaults = OmegaConf.load(CONF / "config.yaml").defaults
    return (asked or [entry["experiment"] for entry in defaults if "experiment" in entry])[-1]


def composed(overrides: Overrides):
    """The unresolved OmegaConf config for these overrides (sweep axes left out)."""
    from omegaconf import OmegaConf, open_dict

    config = _compose(tuple(overrides.groups)).copy()
    OmegaConf.set_struct(config, False)
    for override in overrides.values:
        key = override.key_or_group
        with open_dict(config):
            if override.is_delete():
                _delete(config, key)
            else:
                OmegaConf.update(config, key, override.value(), merge=True)
    return config


def _delete(config, key: str) -> None:
    parent, _, name = key.rpartition(".")
    from omegaconf import OmegaConf

    node = OmegaConf.select(config, parent) if parent else config
    if node is None or name not in node:
        raise UserError(f"override '~{key}': there is no such key")
    del node[name]


def expand(overrides: Overrides) -> tuple[dict, list[dict]]:
    """The sweep's axes and one validated config per grid point.

    A swept value on the command line replaces that axis of the sweep file, a fixed one collapses it.

    Returns:
        (axes: key -> list of values as text, configs in the axes' order, last axis fastest)
    """
    from omegaconf import OmegaConf

    base = composed(overrides)
    axes = _axes(base, overrides)
    group_axes = [key for key in axes if key in groups()]
    configs = []
    for point in itertools.product(*axes.values()):
        chosen = [f"{key}={value}" for key, value in zip(axes, point, strict=True)]
        picked = parse_overrides(chosen)
        if group_axes:
            picked_base = composed(Overrides(overrides.groups + picked.groups, overrides.values, {}))
        else:
            picked_base = base.copy()
        for override in picked.values:
            OmegaConf.update(picked_base, override.key_or_group, override.value(), merge=True)
        configs.append(validated(to_container(picked_base)))
    return axes, configs


def _axes(config, overrides: Overrides) -> dict[str, list[str]]:
    """key -> values as Hydra text, from the sweep file and the command line."""
    from omegaconf import OmegaConf

    in_file = OmegaConf.to_container(config).get("sweep", {}).get("axes") or {}
    fixed = {override.key_or_group for override in overrides.values}
    fixed |= {choice.partition("=")[0] for choice in overrides.groups}
    axes = {}
    for key, value in in_file.items():
        if isinstance(value, list):
            value = ",".join(str(item) for item in value)
        parsed = parse_overrides([f"{key}={value}"])
        one_value = [_value_text(item) for item in parsed.values] + [item.partition("=")[2] for item in parsed.groups]
        if key not in fixed:
            axes[key] = parsed.axes.get(key) or one_value
    axes.update(overrides.axes)
    return axes


def _value_text(override) -> str:
    return override.get_value_element_as_str()


def to_container(config) -> dict:
    """Resolve interpolations and give plain Python containers."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError("config: " + " ".join(str(error).split())) from None


# --- validating ----------------------------------------------------------------------------------


def validated(config: dict) -> dict:
    """Check a whole config and fill in defaults. Raises UserError for the first fault found."""
    config = _normalised(config)
    filled = _model_dump(Config, config, "")
    check_library_sections(filled["train"], filled["adapter"])
    return filled


def _normalised(config: dict) -> dict:
    """Keep of a source only what its kind knows.

    ``data.source.kind=files data.source.path=x`` over a hub source leaves ``repository`` behind,
    which is no fault of the user. A key that no kind knows stays, and is refused.
    """
    known_anywhere = set().union(*(kind.model_fields for kind in SOURCE_KINDS.values()))
    for name in ("data", "model"):
        section = config.get(name)
        source = section.get("source") if isinstance(section, dict) else None
        if isinstance(source, dict) and source.get("kind") in SOURCE_KINDS:
            mine = SOURCE_KINDS[source["kind"]].model_fields
            section["source"] = {
                key: value for key, value in source.items() if key in mine or key not in known_anywhere
            }
    return config


def _model_dump(model, values: dict, prefix: str) -> dict:
    from pydantic import ValidationError

    try:
        return model.model_validate(values).model_dump(mode="json")
    except ValidationError as error:
        raise UserError(explain(error, model, prefix)) from None


def explain(error, model, prefix: str = "") -> str:
    """One line for pydantic's first complaint: key, value found, what is allowed."""
    fault = error.errors(include_url=False)[0]
    path = [str(part) for part in fault["loc"] if part not in SOURCE_KINDS]  # the union's tag is no key of ours
    key = ".".join([prefix, *path] if prefix else path)
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, fault["loc"][:-1])
        return f"config: unknown key '{key}'; {suggest(path[-1], known)}"
    if fault["type"] == "missing":
        return f"config: '{key}' is missing; add it to the YAML file or as an override {key}=..."
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message[:2] != message[:2].upper() else message
    found = fault["input"]
    shown = f" (found {json.dumps(found, default=str)})" if not isinstance(found, dict) else ""
    return f"config: '{key}': {message}{shown}"


def _fields_at(model, location) -> list[str]:
    """Field names of the section that a pydantic error location points into."""
    for part in location:
        if part in SOURCE_KINDS:
            model = SOURCE_KINDS[part]
        elif not isinstance(part, int):
            annotation = model.model_fields[part].annotation
            if hasattr(annotation, "model_fields"):
                model = annotation
            elif part == "published":
                model = annotation.__args__[0]
    return list(model.model_fields)


def check_library_sections(train: dict, adapter: dict) -> None:
    """Check `train` against TrainingArguments and `adapter` against its PEFT class.

    Importing transformers takes seconds, so a pair that was found valid is remembered by hash.
    """
    for key, reason in RESERVED_TRAIN.items():
        if key in train:
            raise UserError(f"config: 'train.{key}' cannot be set: {reason}")
    versions = [importlib.metadata.version(name) for name in ("transformers", "peft")]
    stamp = CHECKED / digest([train, adapter, versions])
    if stamp.exists():
        return
    for library in ("transformers", "bitsandbytes"):  # their remarks at import are not about this config
        logging.getLogger(library).setLevel(logging.ERROR)
    _check_train(train)
    _check_adapter(adapter)
    with contextlib.suppress(OSError):  # a read-only results/ only costs the next check its time
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()


def _check_train(train: dict) -> None:
    from transformers import TrainingArguments

    fields = _field_types(TrainingArguments)
    for key, value in train.items():
        if key in RENAMED_TRAIN:
            raise UserError(f"config: unknown key 'train.{key}': {RENAMED_TRAIN[key]}")
        if key not in fields:
            raise UserError(f"config: unknown key 'train.{key}'; {suggest(key, fields)}")
        _check_type(f"train.{key}", value, fields[key])
    _check_ranges(train)
    try:
        TrainingArguments(output_dir="unused", **{**train, "report_to": "none"})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError("config: train: " + " ".join(str(error).split())[:300]) from None


def _check_ranges(train: dict) -> None:
    """What TrainingArguments lets through and the training loop then trips over."""
    positive = ("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size")
    for key in (*positive, "gradient_accumulation_steps", "learning_rate"):
        value = train.get(key)
        if value is not None and not value > 0:
            raise UserError(f"config: 'train.{key}' must be above 0 (found {value})")


def _field_types(cls) -> dict[str, object]:
    """Field name -> type of a library's config dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _check_type(key: str, value, annotation) -> None:
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(strict=False, arbitrary_types_allowed=True))
    except PydanticUserError:
        return  # an annotation that pydantic cannot check: the class's own check has to do
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        raise UserError(
            f"config: '{key}': {message[0].lower()}{message[1:]} (found {json.dumps(value, default=str)})"
        ) from None


def _check_adapter(adapter: dict) -> None:
    if "peft_type" not in adapter:
        raise UserError("config: 'adapter.peft_type' is missing; choose adapter=lora or adapter=full")
    if adapter["peft_type"] is None:
        extra = sorted(set(adapter) - {"peft_type"})
        if extra:
            raise UserError(
                f"config: unknown key 'adapter.{extra[0]}': full-parameter training takes no adapter fields"
            )
        return
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    known = {kind.value: PEFT_TYPE_TO_CONFIG_MAPPING[kind] for kind in PeftType if kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    if adapter["peft_type"] not in known:
        raise UserError(
            f"config: 'adapter.peft_type': {adapter['peft_type']!r}; {suggest(str(adapter['peft_type']), known)}"
        )
    cls = known[adapter["peft_type"]]
    fields = _field_types(cls)
    for key, value in adapter.items():
        if key not in fields:
            raise UserError(f"config: unknown key 'adapter.{key}'; {suggest(key, fields)}")
        if key != "peft_type":
            _check_type(f"adapter.{key}", value, fields[key])
    if not adapter.get("r", 1) > 0:
        raise UserError(f"config: 'adapter.r' must be above 0 (found {adapter['r']})")
    try:
        cls(**{key: value for key, value in adapter.items() if key != "peft_type"})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError("config: adapter: " + " ".join(str(error).split())[:300]) from None


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


@functools.cache
def _stage_model(stage: str):
    """A pydantic model of what the stage may see. Other keys at the top are facts the planner adds (identities)."""
    from pydantic import create_model

    fields: dict = {}
    for path in STAGE_SECTIONS[stage]:
        section, _, name = path.partition(".")
        annotation = Config.model_fields[section].annotation
        if name:
            annotation = create_model(
                section, __base__=Section, **{name: (annotation.model_fields[name].annotation, ...)}
            )
        fields[section] = (DataView if path == "data" else annotation, ...)
    return create_model(stage, __config__={"extra": "allow"}, **fields)


def validated_stage(stage: str, view: dict) -> dict:
    """Check the config of one stage and fill in defaults."""
    filled = _model_dump(_stage_model(stage), view, "")
    if "train" in filled:
        check_library_sections(filled["train"], filled["adapter"])
    return filled


def load_stage_config(stage: str, given: str | None, overrides: list[str]) -> dict:
    """A step's config: JSON text or a file from ``--config``, or composed from Hydra overrides."""
    if given and overrides:
        raise UserError(f"--config and overrides ({overrides[0]} ...) exclude each other: leave one out")
    if given:
        return validated_stage(stage, _config_text(given) if given.lstrip().startswith("{") else _config_file(given))
    parsed = parse_overrides(["sweep=none", *overrides])
    axes, configs = expand(parsed)
    if len(configs) != 1:
        raise UserError(
            f"a step makes one run, but {', '.join(axes)} is swept: give one value each, e.g. {_first(axes)}"
        )
    return stage_config(stage, configs[0])


def _config_text(text: str) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--config: not JSON: {error}; give a file, or JSON text as the workflow does") from None


def _first(axes: dict[str, list[str]]) -> str:
    return " ".join(f"{key}={values[0]}" for key, values in axes.items())


def _config_file(path: str) -> dict:
    from omegaconf import OmegaConf

    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        return to_container(OmegaConf.load(path))
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"--config {path}: " + " ".join(str(error).split())) from None
        raise
