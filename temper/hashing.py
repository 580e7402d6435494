"""Hashes of JSON values, code and files; those of files are cached by size and times."""

import ast
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from temper.files import known_json, write_whole

# Seconds in which a file system may give two changes one time: 2 on FAT, 1 on old servers, milliseconds elsewhere.
SETTLED = 2.0
KEY_LENGTH = 10  # 40 bits: a collision among 10,000 artefacts has a chance of about 1 in 20,000


def canonical_json(value) -> str:
    """One text per value: sorted keys, no blanks, so that equal configs have equal hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value) -> str:
    """Short hash of any JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:KEY_LENGTH]


def code_text(tree: ast.Module) -> str:
    """A syntax tree as text, without docstrings, which are taken out of it."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            _drop_docstring(node)
    return ast.dump(tree)


def _drop_docstring(node) -> None:
    if ast.get_docstring(node, clean=False) is not None:
        node.body = node.body[1:] or [ast.Pass()]


def imports_of(tree: ast.Module, package: str = "") -> set[str]:
    """Names of all modules that a syntax tree imports, and of the names imported from them, which may be modules.

    Args:
        package: that of the module, for relative imports.
    """
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            imports.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return imports - {""}


def file_sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashCache:
    """sha256 of files, cached by path, size and times.

    Planning needs the content of raw files each time. A file with unchanged size and times is not read again, which
    keeps planning fast for gigabytes of data.

    A file that changed less than `SETTLED` seconds before it was read may change once more without another time (git
    calls such files racy), and so may one that changed while it was read: their hashes are not kept.

    Args:
        path: the file that keeps them; None: they are kept in memory.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.known = self._read(path) if path else {}
        self.changed = False

    @staticmethod
    def _read(path: Path) -> dict:
        """The cached hashes; a damaged cache is discarded."""
        known = known_json(path)
        whole = all(isinstance(entry, list) and len(entry) == 2 for entry in known.values())
        return known if whole and all(isinstance(sha256, str) for _, sha256 in known.values()) else {}

    def sha256(self, path: str | os.PathLike) -> str:
        """Hex sha256 of a file's content. A link and the file it leads to are one."""
        name = os.path.realpath(path)
        with Path(path).open("rb") as file:  # where disks are shared, opening a file asks for its times anew
            started, before = time.time(), os.fstat(file.fileno())
            if name in self.known and self.known[name][0] == _stamp(before):
                return self.known[name][1]
            found = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
        if _stamp(after) == _stamp(before) and before.st_ctime + SETTLED < started:
            self.known[name] = [_stamp(before), found]
            self.changed = True
        return found

    def save(self) -> None:
        """Write the cache if it changed. On a read-only disk, the next plan just takes longer."""
        if not self.changed or self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self.known))
        except OSError as error:
            print(
                f"note: {self.path} cannot be written ({error.strerror}); hashes will be computed again",
                file=sys.stderr,
            )


def _stamp(stat: os.stat_result) -> list[int]:
    """What an edit of a file changes. It may keep size and modification time (rsync --times --inplace, cp -p), but not
    the change time."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
