"""Compose, override, expand and validate the config. The only place that touches Hydra."""

import dataclasses
import functools
import itertools
import json
import math
import re
import typing
from pathlib import Path

from steps.lib import yaml_files
from steps.lib.errors import UserError, suggest
from steps.lib.errors import found as _found
from steps.lib.errors import short as _short
from steps.lib.files import read_yaml
from steps.lib.keys import PACKAGE_ROOT, canonical_json, flat
from steps.lib.library_checks import check_library_sections, refuse_without_validation
from steps.lib.schema import (
    METHODS,
    PREFERENCE,
    SOURCE_KINDS,
    STAGE_SECTIONS,
    Config,
    Data,
    DataView,
    Section,
)
from steps.lib.secrets import has_login, secret_variables

CONF = PACKAGE_ROOT / "conf"
UNIONS = {"source": SOURCE_KINDS, "method": METHODS}  # sections that are one of several models, by their tag
MOST_POINTS = 10_000  # of one sweep: planning them takes a minute
MOST_DEPTH = 40  # brackets within brackets in an override


# --- composing -----------------------------------------------------------------------------------


def groups() -> dict[str, list[str]]:
    """Config groups and their choices: ``{"data": ["english_quotes", ...], ...}``."""
    found = {}
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        found[folder.name] = sorted(path.stem for path in folder.glob("*.yaml"))
    return found


def split_overrides(text: str) -> list[str]:
    r"""Split ``a=1 b="x y" c=[1, 2]`` at blanks outside quotes and brackets. A backslash escapes, as in Hydra."""
    parts, part, depth, quote, escaped = [], "", 0, None, False
    for char in text:
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif quote:
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
        raise UserError(f"overrides: unbalanced {what} in: {_short(text)}")
    return [part for part in [*parts, part] if part]


@dataclasses.dataclass
class Overrides:
    """Command-line overrides, sorted by what they do."""

    groups: list[str]  # data=english_quotes: for Hydra's defaults list
    values: list  # parsed `key=value`, applied after composing
    axes: dict[str, list[str]]  # swept `key=a,b`: its expanded values, each as Hydra text


def parse_overrides(overrides: list[str]) -> Overrides:
    """Sort overrides into group choices, values and sweep axes; refuse what Hydra cannot parse."""
    sorted_out = Overrides([], [], {})
    for text in map(str.strip, overrides):
        override = _parsed(text)
        key, is_group = override.key_or_group, override.key_or_group in groups()
        _check_override(override, is_group, _short(text))
        if override.is_sweep_override():
            sorted_out.axes[key] = _swept(override, _short(text))
        elif is_group:
            sorted_out.groups.append(_known_choice(key, str(override.value()), _short(text)))
        else:
            sorted_out.values.append(override)
    return sorted_out


def _parsed(text: str):
    """One override, by Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if _depth(text) > MOST_DEPTH:
        raise UserError(f"override '{_short(text)}': has more than {MOST_DEPTH} brackets within brackets")
    loader = _config_loader() if "glob(" in text else None
    try:
        return OverridesParser.create(config_loader=loader).parse_overrides([text])[0]
    except (HydraException, ValueError) as error:
        reason = " ".join(str(error).split()).partition(" expecting {")[0][:200]
        hint = "write key=value; put a value with blanks or other special characters in quotes, and all "
        hint += "in others for the shell: \"key='a b'\""
        raise UserError(f"override '{_short(text)}': {reason} ({hint})") from None


def _depth(text: str) -> int:
    """How deep brackets stand within brackets, at most."""
    depth = deepest = 0
    for char in text:
        depth += (char in "[{(") - (char in "]})")
        deepest = max(deepest, depth)
    return deepest


@functools.cache
def _config_loader():
    """Hydra's view of conf/, for ``adapter=glob(*lora)``."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return GlobalHydra.instance().config_loader()


def _check_override(override, is_group: bool, text: str) -> None:
    """Refuse what parses and still says nothing that can be done."""
    if override.package is not None:
        raise UserError(f"override '{text}': packages (@...) are not supported: write group=choice or key=value")
    if not override.key_or_group:
        raise UserError(f"override '{text}': has no key; write key=value")
    if override.is_delete() and is_group:
        choices = suggest("", groups()[override.key_or_group])
        raise UserError(f"override '{text}': a config group cannot be left out; choose another file of it ({choices})")
    if override.is_delete() and override.is_sweep_override():
        raise UserError(f"override '{text}': ~ takes a key out and gives it no values; leave out ~ or the values")


def _swept(override, text: str) -> list[str]:
    """The values of an axis, each as Hydra text; refuse an axis whose runs cannot be made or ranked together."""
    from hydra.core.override_parser.types import RangeSweep
    from hydra.errors import HydraException

    key, sweep = override.key_or_group, override.value()
    if key.split(".")[0] in ("experiment", "sweep", "tracking") or key == "eval.metric":
        raise UserError(f"sweep '{text}': {key} cannot be an axis: it does not change what a run is; give one value")
    if getattr(sweep, "shuffle", False):
        raise UserError(f"sweep '{text}': all values of an axis are run, and shuffle would only rename the sweep")
    too_many = f"sweep '{text}': has more than {MOST_POINTS:,} values; a plan takes so many: narrow it"
    if isinstance(sweep, RangeSweep) and abs((sweep.stop - sweep.start) / (sweep.step or 1)) > MOST_POINTS:
        raise UserError(too_many)
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), MOST_POINTS + 1))
    except (HydraException, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"sweep '{text}': {reason} (name the values: {key}=1,2 or range(1,4))") from None
    if len(values) > MOST_POINTS:
        raise UserError(too_many)
    if not values:
        raise UserError(f"sweep '{text}': the axis has no values")
    return values


def _known_choice(group: str, choice: str, text: str) -> str:
    if choice not in groups()[group]:
        raise UserError(f"'{text}': conf/{group}/{choice}.yaml does not exist; {suggest(choice, groups()[group])}")
    return f"{group}={choice}"


@functools.lru_cache(maxsize=256)
def _compose(group_overrides: tuple[str, ...]):
    from hydra import compose, initialize_config_dir

    for path in sorted(CONF.rglob("*.yaml")):
        yaml_files.check_size(path, _shown(path))
    try:
        _check_package_lines(group_overrides)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides=list(group_overrides))
    except UserError:
        raise
    except Exception as error:  # YAML's, OmegaConf's, the system's: Hydra lets them all through
        raise UserError(_why_not(error, group_overrides)) from None


def _shown(path: Path) -> str:
    """A file of conf/ for a message."""
    return str(path.relative_to(CONF.parent))


def _why_not(error: Exception, group_overrides: tuple[str, ...]) -> str:
    """Why composing failed: the fault of a file where one is to blame, those that were chosen first."""
    chosen = [CONF / choice.partition("=")[0] / f"{choice.partition('=')[2]}.yaml" for choice in group_overrides]
    for path in dict.fromkeys([*chosen, *sorted(CONF.rglob("*.yaml"))]):
        try:
            yaml_files.load(path, _shown(path))
        except UserError as fault:
            return str(fault)
    if isinstance(error, RecursionError):
        return f"conf/: the defaults lists of {', '.join(group_overrides)} name each other in a circle"
    return f"conf/: {yaml_files.reason(error)}"


def chosen_experiment(overrides: Overrides) -> str:
    """The experiment that was asked for, or the default of conf/config.yaml."""
    from omegaconf import OmegaConf

    asked = [choice.partition("=")[2] for choice in overrides.groups if choice.startswith("experiment=")]
    defaults = OmegaConf.load(CONF / "config.yaml").defaults
    return (asked or [entry["experiment"] for entry in defaults if "experiment" in entry])[-1]


def _check_package_lines(group_overrides: tuple[str, ...]) -> None:
    """Hydra reads ``# @package`` on the first line only, and says something else entirely when it stands lower."""
    for choice in group_overrides:
        group, _, name = choice.partition("=")
        path = CONF / group / f"{name}.yaml"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if any(line.startswith("# @package") for line in lines[1:]):
            raise UserError(f"conf/{group}/{name}.yaml: the line '# @package _global_' must be the first of the file")


def composed(overrides: Overrides):
    """The unresolved OmegaConf config for these overrides (sweep axes left out)."""
    from omegaconf import OmegaConf

    config = _compose(tuple(overrides.groups)).copy()
    OmegaConf.set_struct(config, False)
    for override in overrides.values:
        if override.is_delete():
            _delete(config, override.key_or_group)
        else:
            _update(config, override)
    return config


def _update(config, override) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        line = _short(override.input_line)
        raise UserError(f"override '{line}': does not fit what is there: {yaml_files.reason(error)}") from None


def _delete(config, key: str) -> None:
    parent, _, name = key.rpartition(".")
    from omegaconf import OmegaConf

    node = OmegaConf.select(config, parent) if parent else config
    if node is None or name not in node:
        raise UserError(f"override '~{key}': there is no such key")
    del node[name]


def expand(overrides: Overrides) -> tuple[dict, list[tuple[dict, dict]]]:
    """The sweep's axes and one validated config per grid point.

    A swept value on the command line replaces that axis of the sweep file, a fixed one collapses it.

    Returns:
        (axes: key -> list of values as text; per grid point, last axis fastest, its values by key and its config)
    """
    base = composed(overrides)
    axes = _axes(base, overrides)
    _refuse_idle_axes(base, axes)
    number = math.prod(map(len, axes.values()))
    if number > MOST_POINTS:
        raise UserError(f"sweep: {', '.join(axes)} make {number:,} runs; a plan takes {MOST_POINTS:,}: narrow the axes")
    group_axes = [key for key in axes if key in groups()]
    points = []
    for point in itertools.product(*axes.values()):
        chosen = [f"{key}={value}" for key, value in zip(axes, point, strict=True)]
        picked = parse_overrides(chosen)
        # Every point sets the same keys, so one config serves all; but a mapping would merge with the point before.
        if group_axes:
            picked_base = composed(Overrides(overrides.groups + picked.groups, overrides.values, {}))
        elif any(isinstance(override.value(), dict) for override in picked.values):
            picked_base = composed(overrides)
        else:
            picked_base = base
        for override in picked.values:
            _update(picked_base, override)
        config = validated(to_container(picked_base))
        texts = dict(zip(axes, point, strict=True))
        points.append(({key: text if key in groups() else _at(config, key) for key, text in texts.items()}, config))
    return axes, points


def _refuse_idle_axes(config, axes: dict[str, list[str]]) -> None:
    """Refuse an axis whose values all make the same run."""
    from omegaconf import OmegaConf

    steps = OmegaConf.select(config, "train.max_steps")
    if "train.num_train_epochs" in axes and isinstance(steps, int) and steps > 0:
        raise UserError(f"sweep: train.max_steps={steps} ends each run, whatever train.num_train_epochs: leave one out")


def _at(config: dict, key: str):
    """The value at a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def _axes(config, overrides: Overrides) -> dict[str, list[str]]:
    """key -> values as Hydra text, from the sweep file and the command line."""
    from omegaconf import OmegaConf

    in_file = OmegaConf.to_container(config)["sweep"].get("axes") or {}
    if not isinstance(in_file, dict):
        raise UserError("config: 'sweep.axes' must map config keys to values, e.g. {train.learning_rate: '1e-4,3e-4'}")
    fixed = {override.key_or_group for override in overrides.values}
    fixed |= {choice.partition("=")[0] for choice in overrides.groups}
    axes = {}
    for key, value in in_file.items():
        if isinstance(value, list):
            value = ",".join(hydra_text(item) for item in value)
        elif not isinstance(value, str):
            value = hydra_text(value)
        parsed = parse_overrides([f"{key}={value}"])
        one_value = [_value_text(item) for item in parsed.values] + [item.partition("=")[2] for item in parsed.groups]
        if key not in fixed:
            axes[key] = parsed.axes.get(key) or one_value
    axes.update(overrides.axes)
    return axes


def hydra_text(value, literal: bool = False) -> str:
    """A value in Hydra's grammar: what it was in a YAML file, it is as an override.

    Args:
        value: None, a bool, a number or a text, or a list or a dict of these. Hydra takes no quote in a dict's key.
        literal: ``${...}`` in a text refers to nothing: it is part of the text.
    """
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.core.override_parser.types import escape_special_characters as escaped

    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if literal else value
        return QuotedString(text, Quote.single).with_quotes()
    if isinstance(value, list):
        return "[" + ",".join(hydra_text(item, literal) for item in value) + "]"
    if isinstance(value, dict):
        items = (f"{escaped(str(key))}:{hydra_text(item, literal)}" for key, item in value.items())
        return "{" + ",".join(items) + "}"
    return str(value)


def _value_text(override) -> str:
    return override.get_value_element_as_str()


def to_container(config) -> dict:
    """Resolve interpolations and give plain Python containers."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = f"'{error.full_key}': " if error.full_key else ""
        raise UserError(f"config: {key}{yaml_files.reason(error)}") from None


# --- validating ----------------------------------------------------------------------------------


def validated(config: dict) -> dict:
    """Check a whole config and fill in defaults. Raises UserError for the first fault found."""
    config = _normalised(config)
    filled = _model_dump(Config, config, "")
    check_library_sections(filled["train"], filled["adapter"], filled["method"]["name"])
    _check_together(filled)
    _check_method(filled)
    _check_secrets(filled)
    return filled


def _check_secrets(config: dict) -> None:
    """A config is stored and shown, so it holds no login. The message must not, either."""
    uri = config["tracking"]["tracking_uri"]
    if uri is not None and has_login(uri):
        raise UserError(
            "config: 'tracking.tracking_uri' holds a login or a query (not shown here), and a config is stored and "
            "shown: write the bare address, and give the login by MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; or put the whole address into the environment "
            "variable MLFLOW_TRACKING_URI and set tracking.tracking_uri=env"
        )
    secrets = secret_variables()
    for key, value in flat(config).items() if secrets else ():
        found = [name for name, secret in secrets.items() if secret in value]
        if found:
            raise UserError(
                f"config: '{key}' holds the value of the environment variable {found[0]} (not shown here), and a "
                "config is stored and shown: leave it out; what needs the variable reads it from the environment"
            )


def _check_method(config: dict) -> None:
    """What the method needs of the other sections."""
    method, has_pairs = config["method"], Data.model_validate(config["data"]).has_pairs
    refuse_without_pairs(config["eval"], has_pairs)
    if method["name"] != "dpo":
        return
    if not has_pairs and not method["own_answers"]:
        raise UserError(
            "config: method=dpo needs preference pairs: choose data.layout=preference, or say what the rejected answer "
            "is with data.rejected (layout template), data.rejected_from (a list of labels) or method.own_answers"
        )
    if config["prompt"]["loss_on"] == "all" and not method["sft"]:
        raise UserError("config: 'prompt.loss_on': all is for method=sft; method=dpo compares answers: leave it out")
    if config["train"].get("label_smoothing_factor"):
        raise UserError("config: 'train.label_smoothing_factor' is for method=sft; see method.label_smoothing")
    if method["sft"]:
        first = sft_config(config)
        try:
            check_library_sections(first["train"], first["adapter"], "sft")
            _check_validation(first)
        except UserError as error:
            raise UserError(f"config: 'method.sft': {str(error).removeprefix('config: ')}") from None


def refuse_without_pairs(evaluation: dict, has_pairs: bool) -> None:
    """Raises: UserError: a figure of preference pairs is asked for, and there are none."""
    asked = [("eval.metric", evaluation["metric"])]
    asked += [("eval.published", figure["metric"]) for figure in evaluation["published"]]
    for key, metric in asked:
        if metric == PREFERENCE and not has_pairs:
            raise UserError(f"config: '{key}': {PREFERENCE} needs preference pairs, see data.layout=preference")


def sft_config(config: dict) -> dict:
    """The config of the supervised fine-tuning that `method.sft` asks for: this config, with its differences."""
    first = config["method"]["sft"]
    adapter = first["adapter"] if "peft_type" in first["adapter"] else {**config["adapter"], **first["adapter"]}
    return {**config, "method": {"name": "sft"}, "train": {**config["train"], **first["train"]}, "adapter": adapter}


def _check_validation(config: dict) -> None:
    if config["data"]["splits"]["validation"] == 0:
        refuse_without_validation(config["train"])


def _check_together(config: dict) -> None:
    """Sections that do not go together."""
    _check_validation(config)
    quantized = config["quantization"]["load_in_4bit"] or config["quantization"]["load_in_8bit"]
    if quantized and config["adapter"]["peft_type"] is None:
        raise UserError("config: a quantized base cannot be trained itself: set adapter=qlora, or quantization=none")
    if config["merge"]["dequantized_base"] and not quantized:
        raise UserError(
            "config: 'merge.dequantized_base' is for a quantized base: set quantization=4bit, or leave it out"
        )


def _normalised(config: dict) -> dict:
    """The config as its sections' models take it."""
    train = config.get("train")
    if isinstance(train, dict) and "warmup_ratio" in train:  # transformers 5 takes it as warmup_steps below 1
        ratio = train.pop("warmup_ratio")
        if not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise UserError(f"config: 'train.warmup_ratio' must be from 0 to below 1 (found {ratio!r})")
        train["warmup_steps"] = ratio
    return _without_other_kinds(config)


def _without_other_kinds(config: dict) -> dict:
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
        return model.model_validate(values).model_dump()
    except ValidationError as error:
        raise UserError(explain(error, model, prefix)) from None


def explain(error, model, prefix: str = "") -> str:
    """One line for pydantic's first complaint: key, value found, what is allowed."""
    faults = error.errors(include_url=False)
    unknown = [fault for fault in faults if fault["type"] == "extra_forbidden"]
    fault = (unknown or faults)[0]  # a misspelt key is the reason why another one is missing
    path = [str(part) for part in _without_tags(fault["loc"])]
    key = ".".join([prefix, *path] if prefix else path)
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, fault["loc"][:-1])
        return f"config: unknown key '{key}'; {suggest(path[-1], known)}"
    if fault["type"] == "missing":
        return f"config: '{key}' is missing; add it to the YAML file or as an override {key}=..."
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message[:2] != message[:2].upper() else message
    found = fault["input"]
    of_another_type = fault["type"].endswith("_type")  # else it is a whole section, and the message says what of it
    if isinstance(found, dict) and not of_another_type:
        return f"config: '{key}': {message}"
    return f"config: '{key}': {message} (found {_found(found, text_wanted=fault['type'] == 'string_type')})"


def _without_tags(location) -> list:
    """A pydantic location without the tags of unions (``source.hub``, ``method.dpo``), which are no keys of ours."""
    before = [None, *location]
    return [part for last, part in zip(before, location, strict=False) if part not in UNIONS.get(last, ())]


def _fields_at(model, location) -> list[str]:
    """Field names of the section that a pydantic error location points into."""
    for last, part in zip([None, *location], location, strict=False):
        if part in UNIONS.get(last, ()):
            model = UNIONS[last][part]
        elif not isinstance(part, int):
            annotation = model.model_fields[part].annotation
            if hasattr(annotation, "model_fields"):
                model = annotation
            elif part in ("published", "sft", "own_answers"):
                model = annotation.__args__[0]  # list[Published], SftFirst | None, ...
    return list(model.model_fields)


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
    filled = _model_dump(_stage_model(stage), view, "")
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
