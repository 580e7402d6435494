"""Read YAML files; errors give the file, the line, and the fault.

Hydra and OmegaConf pass on errors of their parts, often without the file's name.
"""

from pathlib import Path

from temper.errors import UserError

MOST_DEPTH = 50  # levels of nesting
MOST_VALUES = 100_000  # in a file with aliases expanded: with them, each line can multiply the line before by ten


def load(path: Path, name: str):
    """A file as OmegaConf loads it.

    Args:
        name: the file's name in messages.

    Raises:
        UserError: it cannot be read, is not YAML, is nested too deeply or repeats itself too much.
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
    except Exception as error:  # OmegaConf's errors, and those of its interpolation parser
        raise UserError(f"{name}: {reason(error)}") from None


def check_size(path: Path, name: str) -> None:
    """Refuse only what would keep a reader busy for ever; other faults are left to the reader."""
    import contextlib

    import yaml

    if path.is_file() and b"&" in (content := path.read_bytes()):
        with contextlib.suppress(yaml.YAMLError):
            _check_size(content.decode("utf-8", errors="replace"), name)


def reason(error: Exception) -> str:
    """OmegaConf's or Hydra's error in one line, with advice for common ones."""
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
    """Check the nesting, and the number of values with all aliases expanded.

    Works on YAML's events, which expand nothing.
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
