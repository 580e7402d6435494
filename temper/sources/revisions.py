"""Resolves branches and tags of the hub to one commit each, kept in data/revisions.json."""

import json
import logging
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from temper.errors import UserError
from temper.files import read_json, write_whole
from temper.folders import locked
from temper.sources.hub import hub_info

log = logging.getLogger("temper")

REVISIONS = Path("data/revisions.json")  # commits of branches and tags; should be in git
COMMIT = "^[0-9a-f]{40}$"


# --- hub -----------------------------------------------------------------------------------------


def pinned(source: dict, kind: str, section: str) -> dict:
    """The source with a hub's branch or tag replaced by its commit.

    A branch moves, but one key must always mean the same data. So its commit is asked for once and kept in `REVISIONS`;
    remove it there to ask again.

    Args:
        kind: dataset or model.
        section: the config key of the source, for error messages.
    """
    if "kind" not in source:  # one for each split
        return {split: part and pinned(part, kind, f"{section}.{split}") for split, part in source.items()}
    if source["kind"] != "hub" or re.fullmatch(COMMIT, source["revision"]):
        return source
    repository, revision = f"{kind}s/{source['repository']}", source["revision"]
    with locked(REVISIONS):
        known = _known_revisions()
        commit = known.get(repository, {}).get(revision)
        if commit is None:
            info = hub_info(source, kind, section)
            commit = info.sha if info else _cached_commit(source, kind, section)
            log.info("%s: %s is commit %s now; %s keeps that", source["repository"], revision, commit, REVISIONS)
            known.setdefault(repository, {})[revision] = commit
            write_whole(REVISIONS, json.dumps(known, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return {**source, "revision": commit}


def _known_revisions() -> dict[str, dict[str, str]]:
    """``{"models/acme/thing": {"main": commit}}``."""
    if not REVISIONS.is_file():
        return {}
    remedy = "correct it, or delete it, and the hub is asked for today's commits"
    return read_json(REVISIONS, dict[str, dict[str, Annotated[str, Field(pattern=COMMIT)]]], remedy)


def _cached_commit(source: dict, kind: str, section: str) -> str:
    """The last known commit of a branch, from the libraries' cache."""
    from huggingface_hub import constants, file_download

    folder = Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(repo_id=source["repository"], repo_type=kind)
    reference = folder / "refs" / source["revision"]
    if not reference.is_file():
        raise UserError(
            f"{section}.revision: {source['repository']}: HF_HUB_OFFLINE is set and there is no copy of "
            f"'{source['revision']}' in the cache: unset it, or name a commit"
        )
    return reference.read_text(encoding="ascii").strip()
