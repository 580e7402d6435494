"""YAML files: read, or refused with the file's name, its line, and what is wrong.

Hydra and OmegaConf raise whatever their parts raise, often without the file's name.
"""

from pathlib import Path

from temper.errors import UserError

MOST_DEPTH = 50  # levels of nesting
MOST_VALUES = 100_000  # of a file, its aliases expanded: each of a few lines can stand for ten of the line before


def load(path: Path, name: str):
    """A file as OmegaConf loads it.

    Args:
        name: what the file is called in messages.

    Raises:
        UserError: it cannot be read, is not YAML, or is nested or repeats itself out of all proportion.
    """
    import yaml
    from omegaconf import OmegaConf

    text = _text(path, name)
    try:
        _check_size(text, name)
        return OmegaConf.create(text) if text.strip() else OmegaConf.create()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{name}:{line}: is not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: is not valid YAML: {' '.join(str(error).split())}") from None
    except UserError:
        raise
    except Exception as error:  # OmegaConf's own, and what its parser of interpolations raises
        raise UserError(f"{name}: {reason(error)}") from None


def check_size(path: Path, name: str) -> None:
    """Only what would keep a reader busy for ever; all other faults are left to whoever reads the file."""
    import contextlib

    import yaml

    if path.is_file() and b"&" in (content := path.read_bytes()):
        with contextlib.suppress(yaml.YAMLError):
            _check_size(content.decode("utf-8", errors="replace"), name)


def reason(error: Exception) -> str:
    """One line of what OmegaConf or Hydra complain of, with what to do about the usual."""
    text = str(error).partition("\n    full_key:")[0].partition("Config search path:")[0]
    line = " ".join(text.split())[:300] or type(error).__name__
    if "nterpolation key" in line or "token recognition" in line or type(error).__name__ == "GrammarParseError":
        line += r"; ${ begins an interpolation: write \${ where the text itself has these characters"
    return line


def _text(path: Path, name: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); make it a readable YAML file") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{name}:{line}: is not UTF-8; save the file as UTF-8") from None


def _check_size(text: str, name: str) -> None:
    """Follow the nesting, and how many values there are with every alias expanded.

    From YAML's events, which expand nothing.
    """
    import yaml

    opened: list[tuple[str | None, int]] = []  # (anchor, values before it) of the containers around an event
    anchored: dict[str, int] = {}
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        place = f"{name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            anchored[str(anchor)] = total - before
        total += anchored.get(event.anchor, 1) if isinstance(event, yaml.AliasEvent) else 1
        if len(opened) > MOST_DEPTH:
            raise UserError(f"{place}: is nested more than {MOST_DEPTH} levels deep")
        if total > MOST_VALUES:
            raise UserError(f"{place}: holds more than {MOST_VALUES:,} values, its aliases (*name) expanded")
