"""Check `eval.harness` before any job: whether lm-eval is there and knows the tasks, and which files they are made of.

In no key, because it only refuses; the hashes that it computes are in the key by their values.
"""

import glob
import importlib.metadata
import importlib.util
import os
import shlex
import sys
from pathlib import Path

from temper.errors import UserError, suggest, words
from temper.files import known_json, write_whole
from temper.hashing import canonical_json, file_sha256
from temper.sources import own_code

PLACE = "config: 'eval.harness'"
REQUIREMENTS = ["lm-eval==0.4.13", "python-dateutil>=4"]  # the extra `harness` of pyproject.toml


def version() -> str:
    """The version of lm-eval.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        command = shlex.join([sys.executable, "-m", "pip", "install", *REQUIREMENTS])
        raise UserError(f"{PLACE}: needs EleutherAI's lm-eval: {command}")
    return importlib.metadata.version("lm_eval")


def include_path(settings: dict) -> Path | None:
    """The folder of your own tasks, which is looked for beside your configs, then in the current folder."""
    if settings["include_path"] is None:
        return None
    for folder in own_code.folders():
        if (folder / settings["include_path"]).is_dir():
            return folder / settings["include_path"]
    where = " or ".join(own_code.shown(folder) for folder in own_code.folders())
    raise UserError(f"{PLACE}: include_path: {settings['include_path']}: no such folder in {where}")


def files(settings: dict) -> dict[str, str]:
    """File -> sha256, of all that own tasks are made of: the folder, and the local files that its tasks name.

    Raises:
        UserError: a folder, or a file that a task names, is not there; a task's file is not YAML.
    """
    folder = include_path(settings)
    if folder is None:
        return {}
    inside = [path for path in _all_files(folder) if "__pycache__" not in path.parts]
    found = {str(Path(settings["include_path"]) / path.relative_to(folder)): file_sha256(path) for path in inside}
    known = {path.resolve() for path in inside}
    for path in inside:
        for named in _named(path) if path.suffix in (".yaml", ".yml") else ():
            if named.resolve() not in known:
                found[str(named)] = file_sha256(named)
    return found


def _all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _named(task: Path) -> list[Path]:
    """The local files that a task's YAML names: data (looked for in the current folder), and what it includes."""
    config = _read(task)
    include = config.get("include")
    found = [task.parent / include] if isinstance(include, str) and (task.parent / include).is_file() else []
    dataset, given = config.get("dataset_path"), config.get("dataset_kwargs")
    places = _texts(given.get("data_files")) + _texts(given.get("data_dir")) if isinstance(given, dict) else []
    of_files = isinstance(dataset, str) and dataset in ("json", "csv", "parquet", "text", "arrow", "webdataset")
    for place in places if of_files else [dataset] if isinstance(dataset, str) and Path(dataset).exists() else []:
        if "://" in place:
            continue
        matches = [Path(path) for path in sorted(glob.glob(place, recursive=True))]  # noqa: PTH207
        if not matches:
            raise UserError(f"{PLACE}: {own_code.shown(task)}: {place}: no such file in {Path.cwd()}")
        for match in matches:
            found += _all_files(match) if match.is_dir() else [match]
    return found


def _texts(value) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def _read(task: Path) -> dict:
    import yaml

    class Loader(yaml.SafeLoader):
        """lm-eval's tag ``!function`` names code, which is in the folder."""

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        config = yaml.load(task.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{PLACE}: {own_code.shown(task)}: is not YAML: {words(error)}") from None
    return config if isinstance(config, dict) else {}


def check_tasks(settings: dict, cache: Path) -> None:
    """Check that lm-eval knows the tasks.

    Args:
        cache: a folder where the names of lm-eval's own tasks are kept: to read them takes it half a minute.

    Raises:
        UserError: there is no such task, group or tag.
    """
    from lm_eval.tasks import TaskManager

    folder = include_path(settings)
    own = TaskManager(include_path=str(folder), include_defaults=False).all_tasks if folder else []
    unknown = [name for name in settings["tasks"] if name not in own]
    if not unknown:
        return
    known = [*own, *_own_names(cache / f"lm_eval-{version()}.json")]
    for name in unknown:
        if name not in known:
            raise UserError(f"{PLACE}: no task '{name}'; {suggest(name, known)}")


def _own_names(file: Path) -> list[str]:
    from lm_eval.tasks import TaskManager

    known = known_json(file)
    if not isinstance(known.get("tasks"), list):
        print("reading the names of lm-eval's tasks, once: half a minute", file=sys.stderr)
        known = {"tasks": TaskManager().all_tasks}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, canonical_json(known))
    return known["tasks"]


def rare_lines() -> None:
    """Let lm-eval's bars write to a log every ten seconds. To be called before tqdm is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
