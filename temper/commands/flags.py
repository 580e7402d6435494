"""Arguments shared by several commands."""

import os
from pathlib import Path

from temper.errors import UserError
from temper.folders import check_name


def of_a_sweep(parser) -> None:
    """Add the arguments that select a sweep."""
    experiment = parser.add_argument("--experiment", help="a file of conf/experiment")
    experiment.completer = _choices("experiment")
    sweep = parser.add_argument("--sweep", help="a file of conf/sweep; default: the experiment's own")
    sweep.completer = _choices("sweep")
    parser.add_argument(
        "--config-dir", metavar="DIR", help="your own configs, searched before conf/; TEMPER_CONF does the same"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides; a swept value (key=a,b) becomes an axis")


def _choices(group: str):
    """Completions for the shell: the choices of a group in conf/."""

    def names(**_) -> list[str]:
        from temper.config.compose import groups

        return groups()[group]

    return names


def of_a_run(parser) -> None:
    """Add the arguments that select a finished run."""
    parser.add_argument("--run", required=True, help="name, key or folder of a run, or best")
    parser.add_argument("--sweep", help="with --run best: the sweep whose best run is meant")


def of_a_store(parser) -> None:
    """Add the arguments that name a store, and what of it is meant."""
    from temper.runs.store import KINDS

    parser.add_argument("store", help="s3://BUCKET/PREFIX, or a folder")
    parser.add_argument("--folders", help=f"only these of results/, with commas between them: {', '.join(KINDS)}")


def new_file(name: str, ending: str, advice: str) -> Path:
    """The file that `--output` names. What is there already is never replaced.

    Args:
        advice: what to name, when it has another ending.
    """
    path = Path(name)
    if os.path.lexists(path):
        raise UserError(f"--output {name}: is there already; name another file, or move it away")
    if path.suffix != ending:
        raise UserError(f"--output {name}: {advice}")
    if not path.parent.is_dir():
        raise UserError(f"--output {name}: there is no folder {path.parent}")
    check_name(path, f"--output {name[:40]}...")
    return path


def refuse_used(folder: Path, flag: str, advice: str) -> None:
    """Refuse a folder to write that is there and has something in it, or is a file."""
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag}{folder}: is there already; {advice}")


def text_of(flag: str, name: str | None) -> str | None:
    """The text of the file that a flag names; None without one."""
    if name is None:
        return None
    try:
        text = Path(name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {name}: cannot be read ({error}); name a text file in UTF-8") from None
    if not text:
        raise UserError(f"{flag} {name}: there is no text in it")
    return text
