"""The licences that the files of conf/ give for data and models: of what a run was made from, for its model card."""

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from temper import yaml_files
from temper.config.compose import folders
from temper.config.schema import RowsSource, Source
from temper.errors import UserError

KINDS: dict[str, TypeAdapter] = {"model": TypeAdapter(Source), "data": TypeAdapter(RowsSource)}


def licence_of(group: str, source: dict) -> str | None:
    """The `license` of the first file of conf/<group>/ with this source; None: no file says it."""
    wanted = _whole(group, source)
    for path in (path for folder in folders() for path in sorted((folder / group).glob("*.yaml"))):
        found = _read(path)
        if found.get("license") and _whole(group, found.get("source")) == wanted is not None:
            return str(found["license"])
    return None


def _read(path: Path) -> dict:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(yaml_files.load(path, str(path)), resolve=True)
    except (UserError, OmegaConfBaseException):  # of another experiment: the run was made without it
        return {}
    return content if isinstance(content, dict) else {}


def _whole(group: str, source) -> dict | None:
    """A source with all its defaults."""
    try:
        return KINDS[group].validate_python(source).model_dump()
    except ValidationError:
        return None
