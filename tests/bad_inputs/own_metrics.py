"""Metrics of one's own that cannot be used: told by the plan, or at the latest before training."""

import json

from tests.bad_inputs import Bad, World
from tests.bad_inputs.labels import OPTIONS, _planned

GOOD = "def f(prediction, reference, row):\n    return 1\n"


def _plan(name: str, says: str, *metrics, files: dict[str, str] | None = None, more: tuple[str, ...] = ()) -> Bad:
    """Metrics that the plan refuses, with these files beside them."""

    def arguments(world: World) -> list[str]:
        for file, text in (files or {}).items():
            world.write(file, text)
        return ["--experiment", "smoke", f"eval.metrics={_hydra(list(metrics))}", *more]

    return Bad(name, says, "plan", arguments)


def _hydra(value) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return json.dumps(value)


def _before_training(name: str, says: str, source: str, *more: str) -> list[Bad]:
    """A function that fails on the reference of a row: before training, and in an evaluation by hand."""

    def arguments(world: World, command: str) -> list[str]:
        world.write("mine.py", source)
        inputs = ["--splits", str(world.splits), "--model", str(world.model), "--output", "out"]
        overrides = ["eval.metrics=[mine:f]", *more]
        return [*inputs, *(_planned(*overrides) if command == "train_adapter" else [*OPTIONS, *overrides])]

    return [
        Bad(f"{name}, {when}", says, command, lambda world, command=command: arguments(world, command))
        for when, command in (("before training", "train_adapter"), ("by hand", "evaluate_model"))
    ]


def _schema(name: str, says: str, schema: str | dict) -> Bad:
    """A JSON schema, as the text of a file, or in the config itself."""
    inline = isinstance(schema, dict)
    metric = {"name": "v", "json_schema": schema if inline else "s.json"}
    return _plan(name, rf"'eval\.metrics': 'v'.*{says}", metric, files={} if inline else {"s.json": schema})


CASES = [
    _plan("no module", r"'eval\.metrics': 'f': no module 'mine' \(mine\.py\) in ", "mine:f"),
    _plan("no function", r"'g': mine\.py has no function 'g'; allowed: f", "mine:g", files={"mine.py": GOOD}),
    _plan("no Python", r"'f': mine\.py, line 1: ", "mine:f", files={"mine.py": "def f(:\n"}),
    _plan("null bytes", r"'f': mine\.py.*(null|not Python)", "mine:f", files={"mine.py": "def f(): pass\0\n"}),
    _plan(
        "a library's name",
        r"mine.*'f': numpy\.py: 'numpy' is also|'f': numpy\.py: 'numpy' is also the name of an "
        "installed module: rename the file",
        "numpy:f",
        files={"numpy.py": GOOD},
    ),
    _plan(
        "a library's name for what it imports",
        r"'f': json\.py: 'json' is also the name of an installed module",
        "mine:f",
        files={"mine.py": f"import json\n{GOOD}", "json.py": ""},
    ),
    _plan("no function but a module", r"'eval\.metrics\.0\.function': string should match pattern", "mine"),
    _plan(
        "no kind",
        r"'eval\.metrics\.0': needs one of 'function', 'regex' and 'json_schema' \(found none\)",
        {"name": "a"},
    ),
    _plan("two kinds", r"found function and regex", {"function": "mine:f", "regex": "a"}),
    _plan(
        "a regular expression without a name",
        r"'name' is missing: what the figure of this 'regex'",
        {"regex": "a"},
    ),
    _plan(
        "an unknown key", r"unknown key 'eval\.metrics\.0\.regexp'; did you mean 'regex'", {"name": "a", "regexp": "b"}
    ),
    _plan(
        "arguments of a regular expression",
        r"'arguments' and 'files' are for 'function'",
        {"name": "a", "regex": "b", "arguments": {"x": 1}},
    ),
    _plan(
        "a broken regular expression",
        r"'eval\.metrics\.0\.regex': is not a regular expression: ",
        {"name": "a", "regex": "(b"},
    ),
    _plan(
        "the name of a figure",
        r"'accuracy' is a figure of Temper's: give it another name",
        {"name": "accuracy", "regex": "a"},
    ),
    _plan("the name of other tasks' figures", r"'chrf' is a figure of Temper's", {"name": "chrf", "regex": "a"}),
    _plan(
        "the beginning of a figure's name",
        r"'rewards' is a figure of Temper's",
        {"name": "rewards", "regex": "a"},
    ),
    _plan("an interval's name", r"'a_low' looks like the end of an interval", {"name": "a_low", "regex": "a"}),
    _plan("twice the same name", r"two are called 'a'", {"name": "a", "regex": "a"}, {"name": "a", "regex": "b"}),
    _plan(
        "ranking by one that is not there",
        r"'eval\.metric': task 'labels' has no metric 'prise'; did you mean 'price'",
        {"name": "price", "regex": "a"},
        more=("eval.metric=prise",),
    ),
    _plan(
        "no file",
        r"'f': words\.txt: no such file in ",
        {"function": "mine:f", "files": ["words.txt"]},
        files={"mine.py": GOOD},
    ),
    # JSON schemas
    _schema("a broken schema", r"is no JSON Schema: at \$\.type: 'strin' is not valid", {"type": "strin"}),
    _schema("a broken pattern in a schema", r"is no JSON Schema: at \$\.pattern", {"pattern": "(a"}),
    _schema("an unknown kind of schema", r"s\.json: \$schema 'http://x/y' is not known", '{"$schema": "http://x/y"}'),
    _schema("a reference that leads nowhere", r"\$ref '#/\$defs/a' leads nowhere", '{"$ref": "#/$defs/a"}'),
    _schema("a reference to the network", r"\$ref 'https://x\.org/a' leads nowhere", '{"$ref": "https://x.org/a"}'),
    _plan("no schema file", r"'v': s\.json: no such file", {"name": "v", "json_schema": "s.json"}),
    _schema("a schema file that is no JSON", r"s\.json: is not JSON", "{"),
    _schema("a schema file that is no object", r"s\.json: is no JSON Schema, which is an object", "[]"),
    # what calling them tells
    *_before_training(
        "a function that fails",
        r"mine\.py, line 2: eval\.metrics 'f' fails on row \d+: KeyError: 'title'",
        "def f(prediction, reference, row):\n    return row['title']\n",
    ),
    *_before_training(
        "a module that fails",
        r"'f': mine\.py, line 1: ModuleNotFoundError: No module named 'nothere'",
        f"import nothere\n{GOOD}",
    ),
    *_before_training("a class instance for a function", r"'f' of mine\.py is no function \(it is 3\)", "f = 3\n"),
    *_before_training(
        "a figure that the function does not give",
        r"'eval\.metric': no metric 'f/b'; did you mean 'f/a'",
        "def f(prediction, reference, row):\n    return {'a': 1}\n",
        "eval.metric=f/b",
    ),
]
