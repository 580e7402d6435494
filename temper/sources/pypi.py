"""A file inside a PyPI distribution that is pinned by version and sha256.

Archives are downloaded and opened, never installed or built, so none of their code runs. The indexes are those of pip's
settings on this machine.
"""

import ast
import contextlib
import difflib
import logging
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from temper.errors import NetworkError, UserError, words
from temper.folders import locked, temporary_folder
from temper.hashing import file_sha256
from temper.progress import Progress
from temper.units import size

log = logging.getLogger("temper")
DOWNLOADS = Path("results/.state/downloads")  # downloaded archives, each in a folder named by its sha256
# A member may be so many times larger than its archive, or of this size in any case. Text shrinks to a tenth, but zeros
# to a thousandth, so an archive of zeros would fill the disk.
MOST_GROWTH, SMALL = 200, 2**30


def package_archive(source: dict, section: str) -> Path:
    """The distribution of a `package` source, from an earlier download or an index. None of its code is run.

    Args:
        source: requirement (``name==version``), sha256, sdist.
        section: the config key of the source, for error messages.

    Returns:
        Path of the archive under `DOWNLOADS`, after checking its sha256.
    """
    folder = DOWNLOADS / source["sha256"]
    with locked(folder):
        kept = _archive_in(folder)
        if kept and file_sha256(kept) == source["sha256"]:
            log.info("%s: found in %s", source["requirement"], folder)
            return kept
        with temporary_folder(folder) as part:
            _download(source, section, part)
        return next(path for path in folder.iterdir() if path.is_file())


def _archive_in(folder: Path) -> Path | None:
    """The one file of a finished download."""
    return next((path for path in folder.iterdir() if path.is_file()), None) if folder.is_dir() else None


# --- downloading ---------------------------------------------------------------------------------


def _download(source: dict, section: str, folder: Path) -> None:
    """Put the archive into `folder`.

    Raises:
        UserError: no index has it or answers, or its sha256 differs.
    """
    import httpx2
    from unearth.errors import HashMismatchError, UnpackError

    log.info("downloading %s", source["requirement"])
    settings = pip_settings(section)
    with _client(settings, section) as client:
        packages, silent = _packages(settings, client, source)
        links = _of_this_version(packages, source["requirement"])
        link = next((link for link in links if source["sha256"] in (link.hashes or {}).get("sha256", [])), None)
        if not links:
            raise _nowhere(source, packages, silent, f"{section}.requirement")
        try:
            _fetch(client, link or links[0], source["sha256"], folder)
        except HashMismatchError as error:
            raise UserError(
                f"{section}.sha256: {source['requirement']} ({_kind(source)}) has sha256 {error.actual['sha256']}, "
                f"not {source['sha256']}: correct the config if you trust the file, else use another package index"
            ) from None
        except (UnpackError, httpx2.HTTPError) as error:
            raise NetworkError(
                f"{section}.requirement: the download of {source['requirement']} broke off "
                f"({error or type(error).__name__}): check the network, and run again"
            ) from None


def pip_settings(section: str) -> dict[str, str]:
    """pip's settings as `pip config list` shows them (files and PIP_* variables), without their section."""
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        if "No module named pip" in done.stderr:
            python = Path(sys.executable).name
            raise UserError(
                f"{section}: this Python has no pip, whose settings name the index: run {python} -m ensurepip"
            )
        raise UserError(f"{section}: pip's settings cannot be read: {' '.join(done.stderr.split())[:200]}")
    said = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    settings: dict[str, str] = {}
    for prefix in ("global.", "download.", ":env:."):  # later values win, as for `pip download`
        mine = {key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)}
        settings |= {key.replace("_", "-"): ast.literal_eval(value) for key, value in mine.items()}
    return settings


def _client(settings: dict[str, str], section: str):
    """An HTTP client with pip's certificates, proxy, trusted hosts and passwords (netrc)."""
    from unearth.auth import MultiDomainBasicAuth
    from unearth.fetchers import PyPIClient

    # unearth's own messages name indexes, and an address may hold a password.
    logging.getLogger("unearth").setLevel(logging.ERROR)
    verify: bool | ssl.SSLContext = True
    if settings.get("cert"):
        try:
            verify = ssl.create_default_context(cafile=settings["cert"])
        except (OSError, ssl.SSLError) as error:
            raise UserError(f"{section}: pip's setting cert={settings['cert']}: {error}; see pip config list") from None
    client = PyPIClient(
        trusted_hosts=settings.get("trusted-host", "").split(),
        verify=verify,
        cert=settings.get("client-cert"),
        timeout=float(settings.get("timeout", settings.get("default-timeout", 15))),
        proxy=settings.get("proxy"),
        follow_redirects=True,
    )
    client.auth = MultiDomainBasicAuth(prompting=False, index_urls=_indexes(settings))
    return client


def _indexes(settings: dict[str, str]) -> list[str]:
    """The indexes named in the settings, without pip's default one."""
    if _no_index(settings):
        return []
    return [*settings.get("index-url", "").split(), *settings.get("extra-index-url", "").split()]


def _no_index(settings: dict[str, str]) -> bool:
    return settings.get("no-index", "0").lower() in ("1", "true", "yes", "on")


def _packages(settings: dict[str, str], client, source: dict) -> tuple[list, list[str]]:
    """(all files of the package in the places that pip's settings name, errors of places that did not answer).

    Each place is asked separately, so that one without an answer does not affect the others.
    """
    import httpx2
    from unearth import PackageFinder

    name = source["requirement"].partition("==")[0]
    # Wheels for other platforms will do, because they are not installed.
    options = {"session": client, "ignore_compatibility": True}
    options["no_binary" if source.get("sdist") else "only_binary"] = [name]
    finders = [PackageFinder(index_urls=[index], **options) for index in _indexes(settings)]
    finders += [PackageFinder(find_links=[link], **options) for link in settings.get("find-links", "").split()]
    if "index-url" not in settings and not _no_index(settings):
        finders.insert(0, PackageFinder(**options))  # the default index
    packages: list = []
    silent: list = []
    for finder in finders:
        try:
            packages += finder.find_all_packages(name, allow_yanked=True)
        except (httpx2.HTTPError, ValueError) as error:  # ValueError: a missing find-links folder
            silent.append(str(error) or type(error).__name__)
    return packages, silent


def _of_this_version(packages: list, requirement: str) -> list:
    """Links to the files of the required version."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement).specifier
    return [package.link for package in packages if wanted.contains(package.version, prereleases=True)]


def _nowhere(source: dict, packages: list, silent: list[str], where: str) -> UserError:
    """Why there is nothing to download, and what to do. `where`: the key that asks for it."""
    name, _, version = source["requirement"].partition("==")
    if packages:
        from packaging.version import parse

        versions = sorted({package.version for package in packages}, key=parse)
        close = difflib.get_close_matches(version, versions, n=3) or versions[-3:]
        return UserError(f"{where}: {name} has no {_kind(source)} of version {version}; there are {', '.join(close)}")
    if silent:
        return NetworkError(
            f"{where}: no package index answers, so {source['requirement']} cannot be downloaded ({silent[0][:100]}): "
            "check the network and pip's settings (pip config list)"
        )
    return UserError(
        f"{where}: no package index of pip's settings (pip config list) has a {_kind(source)} of {name}: "
        "check the name, or use an index that has it"
    )


def _kind(source: dict) -> str:
    return "source distribution" if source.get("sdist") else "wheel"


def _fetch(client, link, sha256: str, folder: Path) -> None:
    """Download `link` into `folder` and check it."""
    from unearth.preparer import download_link

    with Progress(None, "download", "B") as progress:

        def report(link, completed: int, total: int | None) -> None:  # noqa: ARG001 - unearth's names
            progress.total = total
            progress.update(completed - progress.count)

        file = download_link(client, link, folder, {"sha256": [sha256]}, download_reporter=report)
    if file.parent != folder:  # a local file is checked where it is
        shutil.copyfile(file, folder / file.name)


# --- opening -------------------------------------------------------------------------------------


def member_name(source: dict) -> str:
    """The name of a `package` source's file: of nested archives, the innermost member."""
    member = source["member"]
    return Path(member if isinstance(member, str) else member[-1]).name


def extract_member(archive: Path, member: str | list[str], target: Path, section: str) -> None:
    """Write one file of a zip or tar archive to `target`; a list of members goes through nested archives.

    Raises:
        UserError: the member is missing, the archive is damaged or encrypted, or its content is too large.
    """
    members = [member] if isinstance(member, str) else member
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".extract-") as scratch:
        for depth, name in enumerate(members):
            extracted = Path(scratch) / f"{depth}"
            with _readable(name, f"{section}.member"):
                _extract(archive, name, extracted, f"{section}.member")
            archive = extracted
        archive.replace(target)


@contextlib.contextmanager
def _readable(member: str, key: str):
    """Turn errors of zipfile, tarfile and the decompressors about a damaged archive into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the archive's
            raise
        raise UserError(
            f"{key}: {member} cannot be read from the archive, which is damaged or encrypted ({words(error)})"
        ) from None


def _extract(archive: Path, member: str, target: Path, key: str) -> None:
    with contextlib.ExitStack() as stack:
        if tarfile.is_tarfile(archive):
            tar = stack.enter_context(tarfile.open(archive))
            names = [entry.name for entry in tar if entry.isfile()]
            open_member: Callable = tar.extractfile
        elif zipfile.is_zipfile(archive):
            packed = stack.enter_context(zipfile.ZipFile(archive))
            names = [name for name in packed.namelist() if not name.endswith("/")]
            open_member = packed.open
        else:
            raise UserError(f"{key}: cannot look for {member}: what it should be in is neither a zip nor a tar archive")
        if member not in names:
            raise UserError(f"{key}: the archive has no file {member}; {_similar(member, names)}")
        most = max(SMALL, MOST_GROWTH * archive.stat().st_size)
        with open_member(member) as content, target.open("wb") as file:
            while chunk := content.read(2**20):
                file.write(chunk)
                if file.tell() > most:
                    raise UserError(
                        f"{key}: {member} unpacks to over {size(most)}, {MOST_GROWTH} times its archive: "
                        "if you trust it, unpack it yourself and use source.kind=files"
                    )


def _similar(name: str, names: list[str]) -> str:
    same_name = [path for path in names if Path(path).name == Path(name).name]
    close = same_name or difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"it has {len(names)} files, for instance {', '.join(names[:5])}"
