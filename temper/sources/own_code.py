"""Python code and files of your own that a config names: where they are, what stands for them in keys, how they load.

They are looked for beside your configs (`conf_dir`), then in the current folder, and nowhere else: what is installed
is in no key, so a function of a library is called by one of yours.
"""

import ast
import contextlib
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from temper.errors import UserError, lack, suggest, words
from temper.hashing import code_text, digest, file_sha256, imports_of

OWN_CONF = "TEMPER_CONF"  # environment variable: a folder of your own configs
OURS = ("temper", "steps")
_added: set[str] = set()  # folders that `_import` put on sys.path
_loaded: dict[str, tuple[dict, types.ModuleType]] = {}  # module -> (what stood for its code when it was loaded, it)


def own_folder() -> Path | None:
    """The folder of your own configs, if there is one."""
    own = os.environ.get(OWN_CONF)
    if own and not Path(own).is_dir():
        raise UserError(f"{OWN_CONF}={own}: no such folder; correct the variable, or unset it")
    return Path(own) if own else None


def folders() -> list[Path]:
    """The folders that are searched, in this order."""
    own = own_folder()
    return list(dict.fromkeys([*([own.absolute()] if own else []), Path.cwd()]))


def find_file(name: str, place: str) -> Path:
    """A file that a config names.

    Args:
        place: where it is named, for the message.

    Raises:
        UserError: there is none.
    """
    for folder in folders():
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{place}: {name}: no such file in {_folders_shown()}")


def hashes(function: str, place: str) -> dict[str, str]:
    """File -> what stands in keys for its code, of a function's module and of all of yours that this imports.

    As for Temper's own code, comments, docstrings and formatting do not count.

    Args:
        function: ``module:name``.
        place: where it is named, for messages.

    Raises:
        UserError: a module or function that is not there, is no Python, or has the name of an installed one.
    """
    module, _, name = function.partition(":")
    files = _sources(module, place)
    if module not in files:
        raise UserError(f"{place}: no module '{module}' ({module.replace('.', '/')}.py) in {_folders_shown()}")
    defined = _defined(_parsed(files[module]).body)
    if name not in defined and "*" not in defined:
        raise UserError(f"{place}: {shown(files[module])} has no function '{name}'; {suggest(name, defined)}")
    for top in sorted({name.partition(".")[0] for name in files}):
        _refuse_taken(top, files, place)
    return {_key_of(found, path): digest(code_text(_parsed(path))) for found, path in files.items()}


def load(function: str, place: str) -> Callable:
    """The function, imported.

    Raises:
        UserError: as `hashes`; its module fails when it is imported, or the name is no function.
    """
    module, _, name = function.partition(":")
    code, files = hashes(function, place), _sources(module, place)
    known = {str(files[module]): "", **code}
    if _loaded.get(module, ({}, None))[0] != known:
        _loaded[module] = known, _import(module, files, place)
    found = getattr(_loaded[module][1], name, None)
    if not callable(found):
        raise UserError(f"{place}: '{name}' of {shown(files[module])} is no function (it is {found!r:.60})")
    return found


def refuse_changed(planned: dict[str, str] | None, now: dict[str, str]) -> None:
    """Raises: UserError: code or a file is not what the key was computed from."""
    if planned is None:
        return
    for name in sorted({*planned, *now}):
        if planned.get(name) != now.get(name):
            raise UserError(f"{name}: changed since the plan was made: run again, to plan with the new content")


def file_hash(name: str, place: str) -> dict[str, str]:
    """{a file's name: its sha256}."""
    return {name: file_sha256(find_file(name, place))}


def shown(path: Path) -> str:
    """A file for a message: from the current folder, where it is below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def failed_at(error: BaseException, function: str, place: str) -> str:
    """``my_metrics.py, line 12``: the last line of your own code that an error went through, or where it begins."""
    module, _, name = function.partition(":")
    files = _sources(module, place)
    at = _last_line(error, files)
    if at is None:
        body = _parsed(files[module]).body
        line = next((node.lineno for node in body if isinstance(node, ast.FunctionDef) and node.name == name), 1)
        at = f"{shown(files[module])}, line {line}"
    return at


# --- finding -------------------------------------------------------------------------------------


def _folders_shown() -> str:
    return " or ".join(map(str, folders()))


def _key_of(module: str, path: Path) -> str:
    """The name of a module's file, which stays the same when the project's folder is moved."""
    return module.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")


def _source(module: str) -> Path | None:
    name = module.replace(".", "/")
    for folder in folders():
        for path in (folder / name / "__init__.py", folder / f"{name}.py"):
            if path.is_file():
                return path
    return None


def _sources(module: str, place: str) -> dict[str, Path]:
    """Your modules that importing one executes: it, the packages around it, and what they import of yours."""
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = _source(name)
        if path is None or name in found or name.partition(".")[0] in OURS:
            continue
        found[name] = path
        try:
            todo += _imports(_parsed(path), name if path.name == "__init__.py" else name.rpartition(".")[0])
        except SyntaxError as error:
            raise UserError(f"{place}: {shown(path)}, line {error.lineno}: {error.msg}") from None
        except ValueError as error:  # null bytes
            raise UserError(f"{place}: {shown(path)}: is not Python ({words(error)})") from None
        todo += [name.rpartition(".")[0]] if "." in name else []
    return found


def _parsed(path: Path) -> ast.Module:
    return _parse(path.read_bytes())


@functools.lru_cache(maxsize=256)
def _parse(source: bytes) -> ast.Module:
    return ast.parse(source)


def _imports(tree: ast.Module, package: str) -> list[str]:
    """As `imports_of`, with the packages around each, whose code importing it executes, too."""
    names = sorted(imports_of(tree, package))
    parents = [".".join(name.split(".")[:count]) for name in names for count in range(1, name.count(".") + 1)]
    return [name for name in [*names, *parents] if name]


def _defined(body: list[ast.stmt]) -> list[str]:
    """The names that a module's statements give; ``*`` where they may be any."""
    return [name for statement in body for name in _names_of(statement)]


def _names_of(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name for alias in statement.names)
    else:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, (ast.FunctionDef, ast.ImportFrom)):  # within if, try, with
                yield from _names_of(node)


def _refuse_taken(top: str, files: dict[str, Path], place: str) -> None:
    """Refuse a name by which Python may find something else, and not what stands in the key."""
    mine = {str(folder) for folder in folders()} | _added
    others = [path for path in sys.path if str(Path(path or ".").absolute()) not in mine]
    importlib.invalidate_caches()
    other = PathFinder.find_spec(top, others)
    if top in sys.stdlib_module_names or (other is not None and other.origin is not None):
        path = next(path for name, path in files.items() if name.partition(".")[0] == top)
        raise UserError(f"{place}: {shown(path)}: '{top}' is also the name of an installed module: rename the file")


# --- loading -------------------------------------------------------------------------------------


def _import(module: str, files: dict[str, Path], place: str) -> types.ModuleType:
    for name in files:
        sys.modules.pop(name, None)
    mine = [str(folder) for folder in folders()]
    # Last, so that a file of yours never takes the place of a library's module.
    sys.path[:] = [path for path in sys.path if str(Path(path or ".").absolute()) not in {*mine, *_added}] + mine
    _added.clear()
    _added.update(mine)
    importlib.invalidate_caches()
    with _no_bytecode():
        try:
            found = importlib.import_module(module)
        except (Exception, SystemExit) as error:
            if lack(error, module):
                raise
            at = _last_line(error, files) or shown(files[module])
            raise UserError(f"{place}: {at}: {type(error).__name__}: {words(error)}") from error
    for name, path in files.items():
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and Path(file).resolve() != path.resolve():
            raise UserError(f"{place}: {shown(path)}: Python takes '{name}' from {file}: rename one of them")
    return found


def _last_line(error: BaseException, files: dict[str, Path]) -> str | None:
    known, found, trace = {str(path): path for path in files.values()}, None, error.__traceback__
    while trace is not None:
        if path := known.get(trace.tb_frame.f_code.co_filename):
            found = f"{shown(path)}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


@contextlib.contextmanager
def _no_bytecode():
    """Compiled files are told from old ones by size and second: after a quick edit Python would take the old one."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
