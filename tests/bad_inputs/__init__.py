"""A corpus of bad inputs, one module per kind of thing that can be bad. tests/test_bad_inputs.py runs all of it.

A case writes what is bad into an empty folder and names the command that meets it. What must follow is the same for
all: one line that says what was found, exit code 2, within seconds, and nothing left behind.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass
class World:
    """Where a case happens.

    `folder`: the current folder, empty. `model`, `splits`, `pairs`: the tiny ones of tests/support/tiny.py. `project`:
    a project with one finished run (tests/support/finished.py). Copy what you damage: all but `folder` are shared.
    """

    folder: Path
    model: Path
    splits: Path
    pairs: Path
    project: Path

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file into the folder, with the folders above it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@dataclasses.dataclass
class Bad:
    """One bad input.

    `says`: a regular expression that the line must match. `command`: the module of `steps` whose `main` meets the
    input. `arguments`: makes the input and gives the command's arguments.
    """

    name: str
    says: str
    command: str
    arguments: Callable[[World], list[str]]


def cases() -> dict[str, list[Bad]]:
    """module name -> its cases (`CASES`), for all modules of this package."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"{__name__}.{name}").CASES for name in modules}
