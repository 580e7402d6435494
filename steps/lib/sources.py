"""Fetch raw data and models from a repository on the hub; what a model's folder is made of.

Every function writes only where it is told to, and turns what a person can fix (no network, a revision that is not
there) into one line that names the config key.
"""

import datetime
import glob
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from steps.lib.errors import UserError
from steps.lib.files import read_json
from steps.lib.folders import PROVENANCE, locked
from steps.lib.models import refuse_loose_adapter
from steps.lib.progress import Progress, quiet_libraries

log = logging.getLogger("temper")

REVISIONS = Path("data/revisions.json")  # the commits that branches and tags stand for here; belongs into git
COMMIT = "^[0-9a-f]{40}$"
HUB_TIMEOUT = 10  # seconds to wait for the hub's first answer: no network must be an error soon


# --- hub -----------------------------------------------------------------------------------------


def pinned(source: dict, kind: str, section: str) -> dict:
    """A source that says exactly what it is: a hub's branch or tag becomes a commit.

    A branch moves on, and what is made of it must not differ under one key. So its commit is asked for once and kept in
    `REVISIONS`; taken out of there, it is asked for anew.

    Args:
        kind: dataset or model.
        section: the config key of the source, for error messages.
    """
    if source["kind"] != "hub" or re.fullmatch(COMMIT, source["revision"]):
        return source
    repository, revision = f"{kind}s/{source['repository']}", source["revision"]
    with locked(REVISIONS):
        known = _known_revisions()
        commit = known.get(repository, {}).get(revision)
        if commit is None:
            info = _hub_info(source, kind, section)
            commit = info.sha if info else _cached_commit(source, kind, section)
            log.info("%s: %s is commit %s now; %s keeps that", source["repository"], revision, commit, REVISIONS)
            known.setdefault(repository, {})[revision] = commit
            _write_revisions(known)
    return {**source, "revision": commit}


def _known_revisions() -> dict[str, dict[str, str]]:
    """``{"models/acme/thing": {"main": commit}}``."""
    if not REVISIONS.is_file():
        return {}
    remedy = "correct it, or delete it, and the hub is asked for today's commits"
    return read_json(REVISIONS, dict[str, dict[str, Annotated[str, Field(pattern=COMMIT)]]], remedy)


def _write_revisions(known: dict) -> None:
    part = REVISIONS.with_suffix(".part")
    part.write_text(json.dumps(known, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(REVISIONS)


def _cached_commit(source: dict, kind: str, section: str) -> str:
    """The commit that a branch stood for when the hub was last asked, from the libraries' cache."""
    from huggingface_hub import constants, file_download

    folder = Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(repo_id=source["repository"], repo_type=kind)
    reference = folder / "refs" / source["revision"]
    if not reference.is_file():
        raise UserError(
            f"{section}.revision: {source['repository']}: HF_HUB_OFFLINE is set and there is no copy of "
            f"'{source['revision']}' in the cache: unset it, or name a commit"
        )
    return reference.read_text(encoding="ascii").strip()


def hub_rows(source: dict, target: Path, section: str) -> str | None:
    """Write one split of a data set on the hub to `target`, one JSON object a line.

    Returns:
        The commit that was read; None when the hub is switched off (HF_HUB_OFFLINE) and a cached copy served.
    """
    from datasets import load_dataset

    repository, split = source["repository"], source["split"]
    info = _hub_info(source, "dataset", section)
    commit = info.sha if info else None
    _library_bars()
    try:
        rows = load_dataset(repository, source["config"], split=split, revision=commit or source["revision"])
    except ValueError as error:
        raise UserError(f"{section}: {_hub_reason(repository, error)}; check {section}.config and .split") from error
    except Exception as error:  # network, a loading script, a damaged file: all are the user's to see
        raise UserError(f"{section}: {_hub_reason(repository, error)}; {_without_hub(section)}") from error
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
    """Put the files of a model on the hub that are needed to use it into `folder`. Returns the commit."""
    from huggingface_hub import snapshot_download

    repository, where = source["repository"], f"{section}.repository: {source['repository']}"
    info = _hub_info(source, "model", section)
    revision, patterns = source["revision"], None  # without the hub: whatever the cache has
    if info:
        wanted = model_files([file.rfilename for file in info.siblings], where)
        revision, patterns = info.sha, [glob.escape(name) for name in wanted]
        log.info("downloading %s at %s: %s", repository, revision, ", ".join(wanted))
    _library_bars()
    try:
        snapshot = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise UserError(f"{section}: {_hub_reason(repository, error)}; {_without_hub(section)}") from error
    for name in model_files([path.name for path in snapshot.iterdir()], where):
        _link_or_copy((snapshot / name).resolve(), folder / name)
    return snapshot.name  # the cache names a snapshot by its commit


def _link_or_copy(cached: Path, target: Path) -> None:
    """A hard link where the cache is on the same disk: its blobs are named by content and never rewritten."""
    try:
        os.link(cached, target)
    except OSError:
        shutil.copyfile(cached, target)


def _hub_info(source: dict, kind: str, section: str):
    """What the hub says about a repository at a revision; None when HF_HUB_OFFLINE is set.

    Asked first, and once: the libraries' own retries would take half a minute to find out that there is no network.
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
        problem = f"{_hub_reason(repository, error)}; {_without_hub(section)}"
    raise UserError(f"{section}.repository: {problem}")


def _hub_reason(repository: str, error: Exception) -> str:
    """One line of a library's complaint."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{repository} cannot be read from the hub ({lines[0].rstrip('.:')[:200]})"


def _without_hub(section: str) -> str:
    path = "FOLDER" if section.startswith("model") else "FILE"
    return f"no network? use {section}.kind=files {section}.path={path}, or HF_ENDPOINT for a mirror"


def _library_bars() -> None:
    """The libraries' progress bars, on a terminal only."""
    if not sys.stderr.isatty():
        quiet_libraries()


# --- what a model folder is made of --------------------------------------------------------------


def model_files(names: list[str], where: str) -> list[str]:
    """Of a repository's files, those needed to use the model: weights in one format, config, tokenizer, licence.

    Raises:
        UserError: there are no weights among them, or an adapter lies beside them; it starts with `where`.
    """
    weights = _matching(r"model(-\d+-of-\d+)?\.safetensors", names) or _matching(
        r"pytorch_model(-\d+-of-\d+)?\.bin", names
    )
    if not weights:
        found = ", ".join(sorted(names)[:8]) or "nothing"
        raise UserError(f"{where}: no model.safetensors or pytorch_model.bin in it; found: {found}")
    refuse_loose_adapter(names, where)
    other = "pytorch_model.bin" if weights[0].endswith(".safetensors") else "model.safetensors"
    rest = _matching(r"[^/]*\.(json|txt|model|jinja|tiktoken)|(LICEN[CS]E|NOTICE)[^/]*", names)
    return sorted({*weights, *rest} - {f"{other}.index.json", PROVENANCE})  # of a step's folder: the copy gets its own


def _matching(pattern: str, names: list[str]) -> list[str]:
    return [name for name in names if re.fullmatch(pattern, name)]
