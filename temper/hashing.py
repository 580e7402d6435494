"""Hashes of JSON values, code and files; those of files are cached by size and times."""

import ast
import hashlib
import json
import os
import sys
from pathlib import Path

from temper.files import known_json, write_whole

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
    """

    def __init__(self, path: Path):
        self.path = path
        self.known = self._read(path)
        self.changed = False

    @staticmethod
    def _read(path: Path) -> dict:
        """The cached hashes; a damaged cache is discarded."""
        known = known_json(path)
        whole = all(isinstance(entry, list) and len(entry) == 2 for entry in known.values())
        return known if whole and all(isinstance(sha256, str) for _, sha256 in known.values()) else {}

    def sha256(self, path: str | os.PathLike) -> str:
        stat = Path(path).stat()
        # An edit may keep size and modification time (rsync --times --inplace, cp -p), but not the change time.
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
        name = str(Path(path).absolute())
        if name not in self.known or self.known[name][0] != stamp:
            self.known[name] = [stamp, file_sha256(path)]
            self.changed = True
        return self.known[name][1]

    def save(self) -> None:
        """Write the cache if it changed. On a read-only disk, the next plan just takes longer."""
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
