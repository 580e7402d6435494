"""Metrics of your own: what they give, what stands for them in keys, and what is said when they fail."""

import json
from pathlib import Path

import numpy as np
import pytest

from steps import compare_runs, evaluate_model
from temper.config import compose
from temper.config.schema import Eval
from temper.errors import UserError
from temper.evaluation import own_metrics
from temper.evaluation.figures import read_figures
from temper.evaluation.intervals import interval
from temper.evaluation.metrics import Mean
from temper.files import read_json_lines
from temper.planning import planner

ROWS = [
    {"id": 7, "prompt": "How much?", "reference": "12 EUR", "prediction": "12 EUR"},
    {"id": 9, "prompt": "And this?", "reference": "7 EUR", "prediction": "about 12 EUR"},
]
MODULE = '''"""Docstring."""
import helpers


def longer(prediction, reference, row, by=0):
    """Doc."""
    return helpers.length(prediction) > len(reference) + by


def both(prediction, reference, row):
    return {"same": prediction == reference, "share": len(row["prompt"]) / 10}
'''


@pytest.fixture
def mine(workspace):
    """The current folder, with a module of metrics and one that it imports."""
    write("mine.py", MODULE)
    write("helpers.py", "def length(text):\n    return len(text)\n")
    return workspace


def write(name, text):
    Path(name).write_text(text)


def settings(*metrics, **rest):
    return Eval(task="text", metrics=list(metrics), **rest).model_dump(mode="json")


def values(*metrics):
    return own_metrics.values(settings(*metrics), ROWS)


def test_a_function_gives_a_figure_for_each_row(mine):
    assert values("mine:longer") == {"longer": [0.0, 1.0]}
    assert values({"function": "mine:longer", "name": "much", "arguments": {"by": 20}}) == {"much": [0.0, 0.0]}
    assert values("mine:both") == {"both/same": [1.0, 0.0], "both/share": [0.9, 0.9]}


def test_checks_that_are_ready_made(mine):
    price = {"name": "price", "regex": r"^\d+ EUR$"}
    assert values(price) == {"price": [1.0, 0.0]}
    assert values({**price, "regex": r"\d+ EUR"}) == {"price": [1.0, 1.0]}
    schema = {
        "type": "object",
        "required": ["n"],
        "properties": {"n": {"$ref": "#/$defs/n"}},
        "$defs": {"n": {"minimum": 1}},
    }
    write("schema.json", json.dumps(schema))
    answers = ['{"n": 1}', ' {"n": 2}\n', '{"n": 0}', "{}", "[]", '{"n": NaN}', '{"n": 1', "", "[" * 100_000]
    rows = [{**ROWS[0], "prediction": answer} for answer in answers]
    for given in (schema, "schema.json"):
        found = own_metrics.values(settings({"name": "valid", "json_schema": given}), rows)
        assert found == {"valid": [1.0, 1.0] + [0.0] * 7}


def test_scalars_of_numpy_are_numbers(mine):
    figures = "{'a': np.float32(0.5), 'b': np.bool_(True), 'c': np.int64(3)}"
    write("scalars.py", f"import numpy as np\n\n\ndef f(p, r, row):\n    return {figures}\n")
    assert values("scalars:f") == {"f/a": [0.5] * 2, "f/b": [1.0] * 2, "f/c": [3.0] * 2}


WRONG = {
    "raises": ("    return 1 / len(prediction[6:])", r"^bad\.py, line 2: eval\.metrics 'f' fails on row 7: ZeroDiv"),
    "ends the process": ("    raise SystemExit", r"^bad\.py, line 2: .*row 7: SystemExit"),
    "nothing": ("    pass", r"'f' \(bad:f\), row 7: returns None: a number, or a dictionary of numbers is needed"),
    "text": ("    return 'yes'", r"row 7: returns str 'yes'"),
    "nan": ("    return float('nan')", r"row 7: returns nan: a finite number"),
    "too large": ("    return 10**400", r"row 7: returns 10+: a finite number"),
    "array": ("    import numpy\n    return numpy.zeros(2)", r"row 7: returns ndarray array\("),
    "no keys": ("    return {}", r"row 7: returns an empty dictionary"),
    "a key that is no name": ("    return {'a b': 1}", r"row 7: returns the key 'a b'"),
    "a text under a key": ("    return {'a': 'x'}", r"row 7: returns 'a': str 'x'"),
    "other keys": ("    return {str(row['id']): 1}", r"row 9: gives 'f/9' for this row, and 'f/7' for the first one"),
    "a number after a dictionary": ("    return {'a': 1} if row['id'] == 7 else 1", r"row 9: gives 'f' for this row"),
    "takes less": (None, r"^bad\.py, line 1: eval\.metrics 'f' fails on row 7: TypeError: f\(\) takes 2 positional"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_function_that_fails_is_one_line_with_the_row(workspace, name):
    body, says = WRONG[name]
    write("bad.py", "def f(a, b):\n    pass\n" if body is None else f"def f(prediction, reference, row):\n{body}\n")
    with pytest.raises(UserError, match=says) as error:
        values("bad:f")
    assert "\n" not in str(error.value)


def test_the_line_is_that_of_your_own_code(mine):
    write("helpers.py", "import json\n\n\ndef length(text):\n    return json.loads(text)\n")
    with pytest.raises(UserError, match=r"^helpers\.py, line 5: .* 'longer' fails on row 7: JSONDecodeError"):
        values("mine:longer")


# --- keys ----------------------------------------------------------------------------------------


def code(*metrics):
    return own_metrics.code(settings(*metrics))


def test_keys_see_the_code_that_runs_and_no_more(mine):
    before = code("mine:longer")
    assert set(before) == {"mine.py", "helpers.py"}
    write("mine.py", MODULE.replace('"""Doc."""', '"""Other."""  # a comment'))
    assert code("mine:longer") == before
    write("helpers.py", "def length(text):\n    return len(text) + 1\n")
    assert code("mine:longer")["helpers.py"] != before["helpers.py"]
    assert values("mine:longer") == {"longer": [1.0, 1.0]}  # and not what was loaded before


def test_packages_and_relative_imports(workspace):
    (workspace / "checks/deep").mkdir(parents=True)
    write("checks/__init__.py", "from .words import LONG\n")
    write("checks/words.py", "LONG = 3\n")
    write("checks/deep/__init__.py", "")
    write(
        "checks/deep/price.py",
        "from .. import words\nfrom ..words import LONG\n\n\ndef f(p, r, row):\n    return LONG\n",
    )
    files = {"checks/__init__.py", "checks/words.py", "checks/deep/__init__.py", "checks/deep/price.py"}
    assert set(code("checks.deep.price:f")) == files
    assert values("checks.deep.price:f") == {"f": [3.0, 3.0]}


def test_files_are_in_the_key(mine):
    write("words.txt", "one")
    write("schema.json", "{}")
    metrics = {"function": "mine:both", "files": ["words.txt"]}, {"name": "valid", "json_schema": "schema.json"}
    before = code(*metrics)
    write("words.txt", "two")
    write("schema.json", '{"type": "object"}')
    changed = {name for name, found in code(*metrics).items() if found != before[name]}
    assert changed == {"words.txt", "schema.json"}


def test_ones_configs_folder_comes_first(mine, monkeypatch):
    (mine / "conf").mkdir()
    write("conf/mine.py", "def longer(prediction, reference, row):\n    return 5\n")
    monkeypatch.setenv(compose.OWN_CONF, "conf")
    assert values("mine:longer") == {"longer": [5.0, 5.0]}


OPTIONS = ["sweep=none", "train.num_train_epochs=1"]
METRICS = ["eval.metrics=[mine:both,{name: price, regex: '[0-9]'}]", "eval.metric=both/same"]


def paths(*overrides):
    plan = planner.build("smoke", None, [*OPTIONS, *overrides])
    return {path for path, job in plan.jobs.items() if job.stage != "compare_runs"}


def test_an_edit_evaluates_again_and_trains_nothing(mine):
    before, plain = paths(*METRICS), paths()
    assert {path.split("/")[1] for path in before - plain} == {"reports", "rankings"}
    write("mine.py", MODULE + "\n\ndef other():\n    pass\n")
    after = paths(*METRICS)
    assert {path.split("/")[1] for path in after - before} == {"reports", "rankings"}
    assert len(after) == len(before) and not {path for path in after & before if path.startswith("results/reports")}
    write("mine.py", MODULE + "\n# a comment\n")
    assert paths(*METRICS) == before


# --- an evaluation and a comparison --------------------------------------------------------------


def test_an_evaluation_has_them_everywhere(mine, tiny_model, tiny_splits, capsys):
    write(
        "mine.py",
        "def closeness(prediction, reference, row):\n    return 1 / (1 + abs(len(prediction) - len(reference)))\n",
    )
    metrics = ["mine:closeness", {"name": "letters", "regex": "[a-z]"}]
    own = settings(*metrics, metric="closeness", max_new_tokens=5)
    config = {"eval": own, "model": {"load": {"dtype": "float32"}}}
    arguments = ["--splits", str(tiny_splits), "--model", str(tiny_model), "--config", json.dumps(config)]
    evaluate_model.main([*arguments, "--output", "base"])
    evaluate_model.main([*arguments, "--output", "out", "--base-report", "base"])
    figures, rows = read_figures(mine / "out"), read_json_lines(mine / "out/predictions.jsonl")
    wanted = [1 / (1 + abs(len(row["prediction"]) - len(row["reference"]))) for row in rows]
    assert [row["metrics"]["closeness"] for row in rows] == wanted
    assert figures.values["closeness"] == pytest.approx(np.mean(wanted))
    assert figures.interval == interval(Mean(wanted), len(rows))
    assert figures.delta.value == 0 and figures.base["letters"] == figures.values["letters"]
    page = (mine / "out/report.html").read_text()
    assert "of your own (eval.metrics), mean over rows" in page and "<strong>0." in page

    runs = [{"name": name, "point": {"seed": 1}, "report": name} for name in ("out", "base")]
    board = compare_runs.compare({"eval": own, "sweep": {"name": "s", "axes": {}}, "runs": runs}, mine / "sweeps/s")
    assert {"validation_closeness", "validation_letters"} <= board.rows[0].keys()

    other = {**config, "eval": settings("mine:closeness", {"name": "digits", "regex": "[0-9]"}, metric="digits")}
    with pytest.raises(SystemExit):
        evaluate_model.main([*arguments[:4], "--config", json.dumps(other), "--output", "x", "--base-report", "base"])
    assert "has no 'digits': evaluate the base model with these eval.metrics" in capsys.readouterr().err


def test_code_that_changed_since_the_plan_is_refused(mine, tiny_model, tiny_splits, capsys):
    own = settings("mine:longer", max_new_tokens=2)
    config = {"eval": own, "model": {"load": {"dtype": "float32"}}, "own_code": own_metrics.code(own)}
    write("helpers.py", "def length(text):\n    return 1\n")
    inputs = ["--splits", str(tiny_splits), "--model", str(tiny_model)]
    with pytest.raises(SystemExit):
        evaluate_model.main([*inputs, "--config", json.dumps(config), "--output", "out"])
    assert "helpers.py: changed since the plan was made: run again" in capsys.readouterr().err
    assert not Path("out").exists()
