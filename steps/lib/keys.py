"""Keys: what an artefact is made from, as a short hash.

``key = hash(stage, upstream keys, the config the stage may see, code key)``. Keys stand in paths,
so two configs never overwrite each other and an edit that is taken back costs nothing.
"""

import ast
import functools
import hashlib
import json
import os
import sys
from pathlib import Path

from steps.lib.files import write_whole

KEY_LENGTH = 10  # 40 bits: a collision among 10,000 artefacts has a chance of about 1 in 20,000
PACKAGE_ROOT = Path(__file__).resolve().parents[2]

# Modules that only watch, show or refuse what the steps do. An edit to them changes no artefact.
ONLY_CHECKS = ("options", "library_checks", "evaluation_checks")
NOT_IN_KEYS = frozenset(
    f"steps.lib.{name}"
    for name in (
        *("tracking", "progress", "errors", "signals", "secrets", "plan", "figures", "pages", "workflow", "forecast"),
        *ONLY_CHECKS,
    )
)


def canonical_json(value) -> str:
    """One text per value: sorted keys, no blanks, so that equal configs hash alike."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value) -> str:
    """Short hash of any JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:KEY_LENGTH]


def flat(value, prefix: str = "") -> dict[str, str]:
    """Dotted names and values of a nested config, for a table."""
    if isinstance(value, dict) and value:
        rows = {}
        for name, item in value.items():
            rows |= flat(item, f"{prefix}.{name}" if prefix else name)
        return rows
    return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)}


def changed_keys(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Keys whose values differ between two flat configs.

    A key that is not set and one that is null are the same: defaults are filled in when a stage starts.
    """
    return [key for key in sorted({*before, *now}) if before.get(key, "null") != now.get(key, "null")]


def stage_key(stage: str, config: dict, upstream: dict[str, str]) -> str:
    """The key of one artefact. `upstream` maps the stage's input names to their keys."""
    code = code_key(f"steps.{stage}")
    return digest({"stage": stage, "config": config, "upstream": upstream, "code": code})


@functools.cache
def code_key(module: str) -> str:
    """Hash of the syntax trees of `module` and of every ``steps`` module it imports, however deep.

    Comments, blank lines, formatting and docstrings are not part of a syntax tree as hashed
    here, so editing them reruns nothing.
    """
    return digest(code_hashes(module))


def code_hashes(module: str) -> dict[str, str]:
    """The same, module by module, to name the one that changed."""
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
    """(dump of the module's syntax tree without docstrings, the ``steps`` modules it imports)."""
    tree = ast.parse(_source_path(module).read_text(encoding="utf-8"))
    imports = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports.add(node.module)
            imports.update(f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            _drop_docstring(node)
    ours = {name for name in imports if name.startswith("steps.") and _source_path(name).is_file()}
    return ast.dump(tree), frozenset(ours - NOT_IN_KEYS)


def _drop_docstring(node) -> None:
    if ast.get_docstring(node, clean=False) is not None:
        node.body = node.body[1:] or [ast.Pass()]


def _source_path(module: str) -> Path:
    return PACKAGE_ROOT / (module.replace(".", "/") + ".py")


def file_sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashCache:
    """sha256 of files, remembered by path, size and times.

    Planning asks for the content of raw files each time. A file whose size and times stand as they
    were is not read again, which keeps planning fast for gigabytes of data.
    """

    def __init__(self, path: Path):
        self.path = path
        self.known = self._read(path)
        self.changed = False

    @staticmethod
    def _read(path: Path) -> dict:
        """What was remembered; a damaged file is only a cache that is lost."""
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        whole = isinstance(known, dict) and all(isinstance(v, list) and len(v) == 2 for v in known.values())
        return known if whole and all(isinstance(sha256, str) for _, sha256 in known.values()) else {}

    def sha256(self, path: str | os.PathLike) -> str:
        stat = Path(path).stat()
        # An edit may keep size and time of modification (rsync --times --inplace, cp -p), but the system notes it.
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
        name = str(Path(path).absolute())
        if name not in self.known or self.known[name][0] != stamp:
            self.known[name] = [stamp, file_sha256(path)]
            self.changed = True
        return self.known[name][1]

    def save(self) -> None:
        """Write the cache if it changed. A read-only disk only costs the next plan some time."""
        if not self.changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self.known))
        except OSError as error:
            print(
                f"note: {self.path} cannot be written ({error.strerror}); hashes will be computed again",
                file=sys.stderr,
            )
