"""Keys: what an artefact is made from, as a short hash.

``key = hash(stage, upstream keys, the config the stage may see, code key)``. Keys are part of paths, so two configs
never overwrite each other and undoing an edit costs nothing. The code key of a stage covers its step and what that
imports from the computing rooms.
"""

import ast
import functools
import json
import os
from pathlib import Path

from temper.hashing import code_text, digest, imports_of

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
# The rooms whose code decides what an artefact holds. Decisions of planning are in a key by their values, because the
# completed config is hashed. Checks, pages, tracking and commands change no artefact.
COMPUTING = tuple(f"temper.{room}." for room in ("sources", "data", "model", "training", "evaluation"))


def python_path() -> str:
    """PYTHONPATH for a process that is to run the code whose keys these are, whatever is installed."""
    return os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))


def flat(value, prefix: str = "") -> dict[str, str]:
    """Dotted names and values of a nested config, for a table."""
    if isinstance(value, dict) and value:
        rows: dict[str, str] = {}
        for name, item in value.items():
            rows |= flat(item, f"{prefix}.{name}" if prefix else name)
        return rows
    return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)}


def changed_keys(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Keys whose values differ between two flat configs.

    A missing key equals a null one, because defaults are filled in when a stage starts.
    """
    return [key for key in sorted({*before, *now}) if before.get(key, "null") != now.get(key, "null")]


def stage_key(stage: str, config: dict, upstream: dict[str, str]) -> str:
    """The key of one artefact. `upstream` maps the stage's input names to their keys."""
    code = code_key(f"steps.{stage}")
    return digest({"stage": stage, "config": config, "upstream": upstream, "code": code})


@functools.cache
def code_key(module: str) -> str:
    """Hash of the syntax trees of `module` and of every module of a computing room that it imports, directly or not.

    The trees leave out comments, blank lines, formatting and docstrings, so editing those reruns nothing.
    """
    return digest(code_hashes(module))


def code_hashes(module: str) -> dict[str, str]:
    """The same for each module, to name the one that changed."""
    return {name: digest(_tree(name)[0]) for name in sorted(_reachable(module))}


def _reachable(module: str) -> set[str]:
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(_tree(name)[1] - seen)
    return seen


@functools.cache
def _tree(module: str) -> tuple[str, frozenset[str]]:
    """(dump of the module's syntax tree without docstrings, the modules of computing rooms that it imports)."""
    tree = ast.parse(_source_path(module).read_text(encoding="utf-8"))
    text = code_text(tree)
    computing = {name for name in imports_of(tree) if name.startswith(COMPUTING) and _source_path(name).is_file()}
    return text, frozenset(computing)


def _source_path(module: str) -> Path:
    return PACKAGE_ROOT / (module.replace(".", "/") + ".py")
