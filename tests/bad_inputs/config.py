"""Config that cannot be: keys, values, choices, files of conf/."""

from tests.bad_inputs import Bad


def _plan(name: str, says: str, *overrides: str) -> Bad:
    return Bad(name, says, "plan", lambda world: ["--experiment", "smoke", *overrides])


CASES = [
    _plan("unknown key", r"train\.lerning_rate.*did you mean 'learning_rate'", "train.lerning_rate=1e-3"),
    _plan("unknown choice", r"conf/data/nothing\.yaml does not exist", "data=nothing"),
    _plan("unbalanced bracket", r"override 'adapter\.target_modules=\[a'", "adapter.target_modules=[a"),
]
