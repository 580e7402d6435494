"""Composes Hydra's groups, an experiment and overrides into one config, or into the points of a sweep."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from temper import yaml_files
from temper.config.schema import Sweep
from temper.config.search import EPOCHS, MOST_POINTS, RANDOM, Axes, Point, guessed, refuse_more, rounds, rungs_of
from temper.config.space import Interval, interval
from temper.config.validate import checked, validated
from temper.errors import UserError, suggest, words
from temper.errors import short as _short
from temper.keys import PACKAGE_ROOT
from temper.sources.own_code import OWN_CONF, own_folder

CONF = PACKAGE_ROOT / "conf"
MOST_DEPTH = 40  # brackets within brackets in an override


# --- composing -----------------------------------------------------------------------------------


def use_folder(path: str) -> None:
    """Search this folder before conf/, here and in all that this process starts.

    Raises:
        UserError: there is no such folder.
    """
    if not Path(path).is_dir():
        raise UserError(f"conf_dir: {path}: no such folder; name one with data/, experiment/, ... as in {CONF}")
    os.environ[OWN_CONF] = str(Path(path).absolute())


def folders() -> list[Path]:
    """The folders that are searched for configs, in this order."""
    own = own_folder()
    return [own.absolute(), CONF] if own else [CONF]


def file_of(group: str, choice: str) -> Path:
    """The file of a choice: the first that exists, else where it would be in conf/."""
    paths = [folder / group / f"{choice}.yaml" for folder in folders()]
    return next((path for path in paths if path.is_file()), paths[-1])


def groups() -> dict[str, list[str]]:
    """Config groups and their choices: ``{"data": ["english_quotes", ...], ...}``."""
    known = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    files = {group: [path for folder in folders() for path in (folder / group).glob("*.yaml")] for group in known}
    return {group: sorted({path.stem for path in found}) for group, found in files.items()}


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
    """Command-line overrides, grouped by what they do."""

    groups: list[str]  # data=english_quotes: for Hydra's defaults list
    values: list  # parsed `key=value`, applied after composing
    axes: Axes  # swept `key=a,b`: its expanded values, each as Hydra text; or the interval that they are drawn from


def parse_overrides(overrides: list[str]) -> Overrides:
    """Sort overrides into group choices, values and sweep axes; refuse what Hydra cannot parse."""
    sorted_out, known = Overrides([], [], {}), groups()
    for text in map(str.strip, overrides):
        override = _parsed(text)
        key, is_group = override.key_or_group, override.key_or_group in known
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
    loader = _config_loader(tuple(folders())) if "glob(" in text else None
    try:
        return OverridesParser.create(config_loader=loader).parse_overrides([text])[0]
    except (HydraException, ValueError) as error:
        reason = " ".join(str(error).split()).partition(" expecting {")[0][:200]
        hint = "write key=value; put a value with blanks or other special characters in quotes, and all "
        hint += "in others for the shell: \"key='a b'\""
        raise UserError(f"override '{_short(text)}': {reason} ({hint})") from None


def _depth(text: str) -> int:
    """The deepest nesting of brackets."""
    depth = deepest = 0
    for char in text:
        depth += (char in "[{(") - (char in "]})")
        deepest = max(deepest, depth)
    return deepest


@functools.cache
def _search_own_folder_first() -> None:
    """Register the folder that Hydra searches before conf/, once."""
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class OwnFolder(SearchPathPlugin):
        def manipulate_search_path(self, search_path):
            if own := own_folder():
                search_path.prepend("temper", own.absolute().as_uri())

    Plugins.instance().register(OwnFolder)


def _hydra():
    """Hydra over `folders`, as a context."""
    from hydra import initialize_config_dir

    _search_own_folder_first()
    return initialize_config_dir(str(CONF), version_base="1.3")


@functools.lru_cache(maxsize=8)
def _config_loader(_searched: tuple[Path, ...]):
    """Hydra's view of the folders, for ``adapter=glob(*lora)``."""
    from hydra.core.global_hydra import GlobalHydra

    with _hydra():
        return GlobalHydra.instance().config_loader()


def _check_override(override, is_group: bool, text: str) -> None:
    """Refuse overrides that parse but cannot be applied."""
    if override.package is not None:
        raise UserError(f"override '{text}': packages (@...) are not supported: write group=choice or key=value")
    if not override.key_or_group:
        raise UserError(f"override '{text}': has no key; write key=value")
    if override.is_delete() and is_group:
        choices = suggest("", groups()[override.key_or_group])
        raise UserError(f"override '{text}': a config group cannot be left out; choose another file of it ({choices})")
    if override.is_delete() and override.is_sweep_override():
        raise UserError(f"override '{text}': ~ takes a key out and gives it no values; leave out ~ or the values")


def _swept(override, text: str) -> list[str] | Interval:
    """The values of an axis as Hydra texts. Refuses an axis whose runs cannot be made or ranked together."""
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    key, sweep = override.key_or_group, override.value()
    if key.split(".")[0] in ("experiment", "sweep", "tracking", "notify", "probe") or key == "eval.metric":
        raise UserError(f"sweep '{text}': {key} cannot be an axis: it does not change what a run is; give one value")
    if isinstance(sweep, IntervalSweep):
        return interval(sweep, text)
    if getattr(sweep, "shuffle", False):
        raise UserError(f"sweep '{text}': all values of an axis are run, and shuffle would only rename the sweep")
    too_many = f"sweep '{text}': has more than {MOST_POINTS:,} values; a plan takes so many: narrow it"
    if isinstance(sweep, RangeSweep) and _length(sweep) > MOST_POINTS:
        raise UserError(too_many)
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), MOST_POINTS + 1))
    except (HydraException, ValueError) as error:
        raise UserError(f"sweep '{text}': {words(error)} (name the values: {key}=1,2 or range(1,4))") from None
    if len(values) > MOST_POINTS:
        raise UserError(too_many)
    if not values:
        raise UserError(f"sweep '{text}': the axis has no values")
    return values


def _length(sweep) -> float:
    """How many values Hydra's range() has, roughly."""
    return abs((sweep.stop - sweep.start) / (sweep.step or 1))


def _known_choice(group: str, choice: str, text: str) -> str:
    if choice not in groups()[group]:
        raise UserError(f"'{text}': conf/{group}/{choice}.yaml does not exist; {suggest(choice, groups()[group])}")
    return f"{group}={choice}"


@functools.lru_cache(maxsize=256)
def _compose(group_overrides: tuple[str, ...], searched: tuple[Path, ...], name: str = "config"):
    """`name`: the file to begin with, and with these choices. Of another than config.yaml no experiment has a say."""
    from hydra import compose

    for path in (path for folder in searched for path in sorted(folder.rglob("*.yaml"))):
        yaml_files.check_size(path, _shown(path))
    try:
        _check_package_lines(group_overrides)
        with _hydra():
            return _with_sweeper(compose(name, overrides=list(group_overrides), return_hydra_config=True))
    except UserError:
        raise
    except Exception as error:  # from YAML, OmegaConf or the system: Hydra lets them all through
        raise UserError(_why_not(error, group_overrides)) from None


def _with_sweeper(config):
    """The config without Hydra's own, of which `hydra.sweeper.params` is another name of `sweep.axes`."""
    from omegaconf import OmegaConf, open_dict

    with open_dict(config):
        sweeper = config.pop("hydra").sweeper
        if params := sweeper.get("params"):
            given: Any = OmegaConf.to_container(params)
            listed: Any = OmegaConf.to_container(config.sweep)
            config.sweep.axes = {**(listed.get("axes") or {}), **given}
    return config


def _shown(path: Path) -> str:
    """A file of conf/ for a message."""
    return str(path.relative_to(CONF.parent)) if path.is_relative_to(CONF.parent) else str(path)


def _why_not(error: Exception, group_overrides: tuple[str, ...]) -> str:
    """Why composing failed. If a file is at fault, names it; looks at the chosen ones first."""
    chosen = [file_of(*choice.split("=", 1)) for choice in group_overrides]
    others = [path for folder in folders() for path in sorted(folder.rglob("*.yaml"))]
    for path in dict.fromkeys([*chosen, *others]):
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
    """Hydra reads ``# @package`` on the first line only, and if it is lower, complains about something else."""
    for choice in group_overrides:
        group, _, name = choice.partition("=")
        path = file_of(group, name)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if any(line.startswith("# @package") for line in lines[1:]):
            raise UserError(f"{_shown(path)}: the line '# @package _global_' must be the first of the file")


def composed(overrides: Overrides):
    """The unresolved OmegaConf config for these overrides (sweep axes left out)."""
    from omegaconf import OmegaConf

    config = _compose(tuple(overrides.groups), tuple(folders())).copy()
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
    """The sweep's axes and one validated config per point; of a search those of its first round.

    A swept value on the command line replaces that axis of the sweep file, a fixed one removes it.

    Returns:
        (axes: key -> values as text; one pair per point, of a grid the last axis fastest: its values by key, its
        config)
    """
    search = Search(overrides)
    return search.axes, [pair for _, pair in search.runs]


class Search:
    """A sweep, round by round: which runs its strategy asks for next.

    `points`: of the round that is asked for now. `runs`: the same as (point, (values by key, validated config)), each
    as often as there are seeds.

    Raises:
        UserError: the sweep or a config of it is not valid.
    """

    def __init__(self, overrides: Overrides):
        self._overrides = overrides
        self._base = composed(overrides)
        asked = _axes(self._base, overrides)
        _refuse_idle_axes(self._base, asked)
        self._seeds = _seeds(self._base, asked)
        self.sweep = checked(Sweep, to_container(self._base.sweep), "sweep")
        self.rungs, self.asked = rungs_of(self.sweep, asked, lambda: to_container(self._base.train))
        self._rounds = rounds(self.sweep, self.asked, self.rungs)
        self.told: dict[Point, float] = {}
        self._order: dict[Point, float] = {}
        self.points = next(self._rounds)
        self._all = list(self.points)
        self.runs = self._expanded()

    def tell(self, losses: dict[Point, float], order: dict[Point, float] | None = None) -> bool:
        """Go on to the next round, if there is one.

        Args:
            losses: what came of each point of this round.
            order: what halving goes by instead; lower is better.
        """
        order = losses if order is None else order
        self.told |= losses
        self._order |= order
        try:
            self.points = self._rounds.send(order)
        except StopIteration:
            return False
        self._all += self.points
        self.runs = self._expanded()
        return True

    @property
    def keys(self) -> list[str]:
        """The config keys that a point has values of."""
        return [*self.asked, *([self.rungs.key] if self.rungs.key else [])]

    @property
    def axes(self) -> dict[str, list[str]]:
        """key -> values as text: those of the config, or of an interval those that were drawn."""
        of_points = dict(zip(self.keys, zip(*self._all, strict=True), strict=True)) if self._all[0] else {}
        drawn = self.sweep.strategy == RANDOM
        found = {
            key: sorted(set(of_points[key]), key=_order) if drawn or isinstance(values, Interval) else values
            for key, values in self.asked.items()
        }
        return found | ({self.rungs.key: list(self.rungs.values)} if self.rungs.key else {}) | self._seeds

    def coming(self) -> list[dict]:
        """What is known of the rounds after this one: how many runs each has (`runs`), and their rung, under its key.

        It goes as if the first points of each round were the best.
        """
        again, known, found = rounds(self.sweep, self.asked, self.rungs), set(self._all), []
        points = next(again)
        with contextlib.suppress(StopIteration):
            while True:
                points = again.send(guessed(points, self._order))
                if not known.issuperset(points):
                    rung = {self.rungs.key: points[0][-1]} if self.rungs.key else {}
                    found.append({"runs": len(points) * self._repeats, **rung})
        return found

    @property
    def _repeats(self) -> int:
        """How often each point is trained."""
        return math.prod(map(len, self._seeds.values()))

    def _expanded(self) -> list[tuple[Point, tuple[dict, dict]]]:
        """The runs of this round's points."""
        axes = [*self.keys, *self._seeds]
        refuse_more(len(self._all) * self._repeats, axes)
        with_seeds = [
            (point, (*point, *rest)) for point in self.points for rest in itertools.product(*self._seeds.values())
        ]
        made = _configs(self._overrides, self._base, axes, [texts for _, texts in with_seeds])
        return [(point, pair) for (point, _), pair in zip(with_seeds, made, strict=True)]


def _configs(overrides: Overrides, base, axes: list[str], points: list[Point]) -> list[tuple[dict, dict]]:
    """(values by key, validated config) of each point."""
    known_groups, values, plain = groups(), _AxisValues(), _PlainConfig(base)
    group_axes = [key for key in axes if key in known_groups]
    found = []
    for point in points:
        picked = values.of(axes, point)

        # Composing is slow. Every point sets the same keys, so points can reuse one config, except with two kinds of
        # values: a group choice brings other keys, and a mapping would merge with that of the point before.
        if group_axes:
            picked_base = composed(Overrides(overrides.groups + picked.groups, overrides.values, {}))
        elif any(isinstance(override.value(), dict) for override in picked.values):
            picked_base = composed(overrides)
        else:
            picked_base = base

        for override in picked.values:
            _update(picked_base, override)
        config = validated(with_parts(plain.of(picked_base, axes, point)))
        texts = zip(axes, point, strict=True)
        found.append(({key: text if key in known_groups else _at(config, key, text) for key, text in texts}, config))
    return found


class _AxisValues:
    """Values of axes as overrides, each read once; Hydra's parser, which takes a millisecond, reads no plain numbers
    but the first of each axis."""

    def __init__(self):
        self._known: dict[str, Overrides] = {}
        self._numbers: dict[str, Any] = {}  # key -> one that is a number

    def of(self, axes: list[str], point: Point) -> Overrides:
        """`parse_overrides` of a point."""
        together = Overrides([], [], {})
        for key, text in zip(axes, point, strict=True):
            found = self._one(key, text)
            together.groups += found.groups
            together.values += found.values
        return together

    def _one(self, key: str, text: str) -> Overrides:
        chosen = f"{key}={text}"
        if chosen not in self._known:
            number = plain_number(text)
            if number is not None and key in self._numbers:
                override = dataclasses.replace(self._numbers[key], _value=number, input_line=chosen)
                self._known[chosen] = Overrides([], [override], {})
            else:
                self._known[chosen] = parse_overrides([chosen])
                if number is not None and self._known[chosen].values:  # else it is the choice of a group
                    self._numbers[key] = self._known[chosen].values[0]
        return self._known[chosen]


def plain_number(text: str) -> int | float | None:
    """The number that Hydra's grammar reads in a text; None: it is none, or written in another way than usual."""
    found = re.fullmatch(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", text)
    if found is None:
        return None
    return float(text) if found[1] or found[2] else int(text)


class _PlainConfig:
    """A config as plain values, point after point of a sweep: only the sections with an axis are converted again."""

    def __init__(self, base):
        from omegaconf import OmegaConf

        self._base, self._others = base, {}
        self._refers = "${" in json.dumps(OmegaConf.to_container(base), default=str)  # any section to any other

    def of(self, config, axes: list[str], point: Point) -> dict:
        """`to_container(config)`.

        Args:
            config: the same object as `base`, with the values of a point, or another one.
        """
        if config is not self._base or self._refers or any("${" in text for text in point):
            return to_container(config)
        if not self._others:
            self._others = to_container(config)
            return self._others
        swept = {name: config[name] for name in {re.split(r"[.\[]", key)[0] for key in axes}}
        return {**self._others, **{name: _plain_section(section) for name, section in swept.items()}}


def _plain_section(section):
    from omegaconf import OmegaConf

    return to_container(section) if OmegaConf.is_config(section) else section


def _order(text: str):
    """Numbers by their value, and before all other values."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


def with_parts(config: dict) -> dict:
    """The config with each data set of a mixture, and of `method.first`, that is the name of a file of conf/data, as
    that file has it."""
    method = config.get("method")
    if isinstance(method, dict) and isinstance(method.get("first"), dict):
        config = {**config, "method": {**method, "first": _with_part(method["first"], "method.first.data")}}
    data = config.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("mix"), list):
        return config
    return {**config, "data": {**data, "mix": [_with_part(part, "data.mix") for part in data["mix"]]}}


def _with_part(part, key: str) -> Any:
    if not isinstance(part, dict) or not isinstance(part.get("data"), str):
        return part
    _known_choice("data", part["data"], f"{key}: {part['data']}")
    data = to_container(_compose((), tuple(folders()), f"data/{part['data']}"))["data"]
    if "mix" in data:
        what = "name the data sets in it" if key == "data.mix" else "name a single data set"
        raise UserError(f"config: '{key}': {part['data']} is a mixture itself: {what}")
    return {**part, "data": data}


def _refuse_idle_axes(config, axes: Axes) -> None:
    """Refuse an axis whose values all give the same run."""
    from omegaconf import OmegaConf

    steps = OmegaConf.select(config, "train.max_steps")
    if EPOCHS in axes and isinstance(steps, int) and steps > 0:
        raise UserError(f"sweep: train.max_steps={steps} ends each run, whatever {EPOCHS}: leave one out")


def _at(config: dict, key: str, text: str):
    """The value at a dotted key; of a key that became another (train.warmup_ratio) what was written."""
    found: Any = config
    for part in key.split("."):
        if isinstance(found, dict) and part not in found:
            return text
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def _axes(config, overrides: Overrides) -> Axes:
    """key -> values as Hydra text, from the sweep file and the command line.

    The file's axes go through the same parser as overrides, so that a value means the same in both places. Values stay
    text until a point is composed: Hydra converts them there, and group choices (adapter=lora,dora) have no other form.
    """
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config)
    in_file = plain["sweep"].get("axes") or {}
    if not isinstance(in_file, dict):
        raise UserError("config: 'sweep.axes' must map config keys to values, e.g. {train.learning_rate: '1e-4,3e-4'}")

    # A fixed value on the command line removes the file's axis of that key.
    fixed = {override.key_or_group for override in overrides.values}
    fixed |= {choice.partition("=")[0] for choice in overrides.groups}

    axes: Axes = {}
    for key, value in in_file.items():
        if isinstance(value, list):
            value = ",".join(hydra_text(item) for item in value)
        elif not isinstance(value, str):
            value = hydra_text(value)
        parsed = parse_overrides([f"{key}={value}"])  # also of a fixed key: a fault in the file is told in any case

        # An axis of one value is no sweep to Hydra: it parses it as a plain value or a group choice.
        alone = [_value_text(item) for item in parsed.values] + [item.partition("=")[2] for item in parsed.groups]
        if key not in fixed:
            axes[key] = parsed.axes.get(key) or alone

    axes.update(overrides.axes)  # a swept one replaces it, at its place in the order
    return axes


def _seeds(base, axes: Axes) -> dict[str, list[str]]:
    """The axis that `sweep.seeds` stands for."""
    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(base)
    number, first = config["sweep"].get("seeds"), config.get("seed")
    if not isinstance(number, int) or not isinstance(first, int) or number < 2:  # what is wrong is said by the schema
        return {}
    if "seed" in axes:
        raise UserError(f"sweep: sweep.seeds={number} and an axis 'seed' are two ways to say one thing: leave one out")
    return {"seed": [str(first + index) for index in range(number)]}


def hydra_text(value, literal: bool = False) -> str:
    """A value in Hydra's grammar, so that as an override it is what it was in the YAML file.

    Args:
        value: None, a bool, a number or a text, or a list or a dict of these. Hydra takes no quote in a dict's key.
        literal: ``${...}`` in a text is text, not an interpolation.
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
    """Resolve interpolations and return plain Python containers."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        return resolved
    except OmegaConfBaseException as error:
        key = f"'{error.full_key}': " if error.full_key else ""
        raise UserError(f"config: {key}{yaml_files.reason(error)}") from None
