"""Data sets and models from the hub."""

import datetime
import glob
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from temper.errors import NetworkError, UserError
from temper.model.layout import model_files
from temper.progress import Progress, quiet_libraries

log = logging.getLogger("temper")
HUB_TIMEOUT = 10  # seconds to wait for the hub's first answer, so that a missing network is an error soon


def hub_rows(source: dict, target: Path, section: str) -> str | None:
    """Write one split of a data set on the hub to `target`, one JSON object a line.

    Returns:
        The commit that was read; None if the hub is switched off (HF_HUB_OFFLINE) and a cached copy was used.
    """
    from datasets import load_dataset

    repository, split = source["repository"], source["split"]
    info = hub_info(source, "dataset", section)
    commit = info.sha if info else None
    _library_bars()
    try:
        rows = load_dataset(repository, source["config"], split=split, revision=commit or source["revision"])
    except ValueError as error:
        raise UserError(f"{section}: {_hub_reason(repository, error)}; check {section}.config and .split") from error
    except Exception as error:  # network, a loading script, a damaged file: the user must see all of these
        raise NetworkError(f"{section}: {_hub_reason(repository, error)}; {_without_hub(section)}") from error
    with target.open("w", encoding="utf-8") as file, Progress(len(rows), "write rows", "rows") as progress:
        for row in rows:
            file.write(_json_line(row, repository, section))
            progress.update()
    return commit


def _json_line(row: dict, repository: str, section: str) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, default=_date_as_text) + "\n"
    except TypeError as error:
        raise UserError(f"{section}.repository: {repository} cannot be written as JSON lines: {error}") from None


def _date_as_text(value) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"it holds values of type {type(value).__name__}, and only text, numbers and lists can be used")


def hub_model(source: dict, folder: Path, section: str) -> str:
    """Download the files needed to use a model from the hub into `folder`. Returns the commit."""
    from huggingface_hub import snapshot_download

    repository, where = source["repository"], f"{section}.repository: {source['repository']}"
    info = hub_info(source, "model", section)
    revision, patterns = source["revision"], None  # without the hub: what the cache has
    if info:
        wanted = model_files([file.rfilename for file in info.siblings], where)
        revision, patterns = info.sha, [glob.escape(name) for name in wanted]
        log.info("downloading %s at %s: %s", repository, revision, ", ".join(wanted))
    _library_bars()
    try:
        snapshot = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise NetworkError(f"{section}: {_hub_reason(repository, error)}; {_without_hub(section)}") from error
    for name in model_files([path.name for path in snapshot.iterdir()], where):
        _link_or_copy((snapshot / name).resolve(), folder / name)
    return snapshot.name  # the cache names a snapshot by its commit


def _link_or_copy(cached: Path, target: Path) -> None:
    """Hard-link a file if the cache is on the same disk: its blobs are named by content and never rewritten."""
    try:
        os.link(cached, target)
    except OSError:
        shutil.copyfile(cached, target)


def hub_info(source: dict, kind: str, section: str):
    """What the hub says about a repository at a revision; None when HF_HUB_OFFLINE is set.

    Asked first, and once, because the libraries would retry for half a minute without a network.
    """
    from huggingface_hub import HfApi, errors

    repository, revision = source["repository"], source["revision"]
    try:
        return HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=HUB_TIMEOUT)
    except errors.OfflineModeIsEnabled:
        log.info("HF_HUB_OFFLINE is set: using a cached copy of %s, if there is one", repository)
        return None
    except errors.GatedRepoError:
        problem = f"access to {repository} is restricted: accept its terms on its page, then set HF_TOKEN"
    except errors.RevisionNotFoundError:
        raise UserError(f"{section}.revision: {repository} has no branch, tag or commit '{revision}'") from None
    except errors.RepositoryNotFoundError:
        what = "data set" if kind == "dataset" else "model"
        problem = f"the hub has no {what} {repository}, or it is private: check the name, or set HF_TOKEN"
    except (errors.HTTPError, errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = f"{_hub_reason(repository, error)}; {_without_hub(section)}"
        raise NetworkError(f"{section}.repository: {reason}") from None
    raise UserError(f"{section}.repository: {problem}")


def _hub_reason(repository: str, error: Exception) -> str:
    """A library's error in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{repository} cannot be read from the hub ({lines[0].rstrip('.:')[:200]})"


def _without_hub(section: str) -> str:
    path = "FOLDER" if section.startswith("model") else "FILE"
    return f"no network? use {section}.kind=files {section}.path={path}, or HF_ENDPOINT for a mirror"


def _library_bars() -> None:
    """Show the libraries' progress bars on a terminal only."""
    if not sys.stderr.isatty():
        quiet_libraries()
