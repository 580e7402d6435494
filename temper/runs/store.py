"""A store of finished folders that several machines reach: a bucket of S3, or a folder of a shared disk.

A stage's folder is one object there, ``<kind>/<name>.tar``: the files that its provenance lists, after `SUMS` with the
sha256 of each. An upload is an object once it is complete, so the store has a folder whole or not at all, as the disk
has. Names end in keys, so the store never needs a newer one: what it has stays.
"""

import contextlib
import re
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from temper.config.stages import FOLDERS
from temper.errors import UserError, lack, words
from temper.files import read_json
from temper.folders import PROVENANCE, fault, is_complete, locked, own_place, temporary_folder
from temper.hashing import KEY_LENGTH, file_sha256
from temper.planning.plan import RESULTS

SUMS = "SHA256SUMS"  # `sha256sum --check SHA256SUMS` reads it, too
KINDS = tuple(folder for stage, folder in FOLDERS.items() if stage != "compare_runs")  # a sweep's folder has no key
HAS_KEY = re.compile(rf".*-[0-9a-f]{{{KEY_LENGTH}}}")
PACKED = "folder.tar"


class Store:
    """What is at an address: ``s3://bucket/prefix`` or a folder.

    Raises:
        UserError: here and in all methods: the address is of another kind, s3fs is not installed, or the store refuses.
    """

    def __init__(self, address: str):
        import fsspec

        self.address = address.rstrip("/") or address
        protocol = address.partition("://")[0] if "://" in address else "file"
        if protocol not in ("s3", "file"):
            raise UserError(f"{address}: is no store: name s3://BUCKET/PREFIX, or a folder")
        self.local = protocol == "file"
        try:
            self.files, self.root = fsspec.url_to_fs(address, skip_instance_cache=True)
        except ImportError:
            advice = f"python -m pip install s3fs=={fsspec.__version__}"
            raise UserError(f"{address}: needs s3fs, which is not installed: {advice}") from None

    def folders(self) -> dict[Path, int]:
        """Folder in results/ -> bytes of its object, of all that the store has."""
        with self._one_line(self.address):
            if not self.local:
                self.files.ls(self.root.partition("/")[0])  # a bucket that is not there is listed as empty below
            found = self.files.find(self.root, detail=True)
        names = {PurePosixPath(path).relative_to(self.root): entry["size"] for path, entry in found.items()}
        return {
            RESULTS / name.parent / name.stem: number
            for name, number in names.items()
            if name.suffix == ".tar" and str(name.parent) in KINDS
        }

    def put(self, folder: Path) -> int:
        """Send a complete folder, unless one of its name came there meanwhile. Returns the bytes sent."""
        with locked(folder), own_place(folder.parent) as place:
            packed = place / PACKED
            _pack(folder, packed)
            with self._one_line(self._address_of(folder)), contextlib.suppress(FileExistsError):
                self._send(packed, self._name_of(folder))
            return packed.stat().st_size

    def _send(self, packed: Path, name: str) -> None:
        """Nobody sees a half: S3 has an object when its upload is complete, and on a disk the file is renamed."""
        if not self.local:
            self.files.put_file(str(packed), name, mode="create")
            return
        target = Path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target), own_place(target.parent) as place:
            if not target.exists():
                shutil.copyfile(packed, place / target.name)
                (place / target.name).rename(target)

    def get(self, folder: Path) -> None:
        """Fetch a folder, unless it is there; it appears complete, by one rename."""
        address = self._address_of(folder)
        with locked(folder):
            if is_complete(folder):
                return
            with own_place(folder.parent) as place:
                packed = place / PACKED
                with self._one_line(address):
                    self.files.get_file(self._name_of(folder), str(packed))
                with temporary_folder(folder) as new:
                    _unpack(packed, new, address)

    def _name_of(self, folder: Path) -> str:
        return f"{self.root}/{folder.relative_to(RESULTS)}.tar"

    def _address_of(self, folder: Path) -> str:
        return f"{self.address}/{folder.relative_to(RESULTS)}.tar"

    @contextlib.contextmanager
    def _one_line(self, address: str):
        """What the store says, in one line."""
        try:
            yield
        except (UserError, FileExistsError):
            raise
        except Exception as error:  # of botocore, aiohttp and the system, without a class in common
            if self.local or lack(error, address):
                raise
            advice = "check the address, AWS_ENDPOINT_URL, and the credentials (as for aws s3 ls)"
            raise UserError(f"{address}: {words(error)}; {advice}") from None


def own_folders(kinds: tuple[str, ...] = KINDS) -> list[Path]:
    """The folders of results/ that a key names, whole or not. Those made by hand may share a name and nothing else."""
    found = [path for kind in kinds for path in sorted((RESULTS / kind).glob("*/"))]
    return [path for path in found if HAS_KEY.fullmatch(path.name)]


def kinds_of(named: str | None) -> tuple[str, ...]:
    """The folders of results/ that ``--folders`` names, with commas between them; all without it."""
    kinds = tuple(named.split(",")) if named is not None else KINDS
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--folders {kind}: no such folder of results/: name some of {', '.join(KINDS)}")
    return kinds


# --- one folder as one file ----------------------------------------------------------------------


def _pack(folder: Path, packed: Path) -> None:
    """Put the files of a complete folder into a tar, and first their hashes. What a person added stays out."""
    names = [*read_json(folder / PROVENANCE, {"files": dict[str, int]})["files"], PROVENANCE]
    sums = packed.with_name(SUMS)
    sums.write_text("".join(f"{file_sha256(folder / name)}  {name}\n" for name in names), encoding="utf-8")
    with tarfile.open(packed, "w", format=tarfile.PAX_FORMAT, dereference=True) as tar:
        tar.add(sums, SUMS)
        for name in names:
            tar.add(folder / name, name)


def _unpack(packed: Path, folder: Path, address: str) -> None:
    """Write the files of a tar to a folder, and check each."""
    wrong = f"{address}: is not as it was sent (%s); delete it there, and send the folder again (temper push)"
    try:
        with tarfile.open(packed, "r:") as tar:
            members = {member.name: member for member in tar}
            for name, member in members.items():
                if not member.isfile() or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise UserError(wrong % f"{name} is no file of a folder")
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, (folder / name).open("wb") as target:  # type: ignore[union-attr]
                    shutil.copyfileobj(source, target)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(wrong % words(error)) from None
    if SUMS not in members:
        raise UserError(wrong % f"it has no {SUMS}")
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    (folder / SUMS).unlink()
    sums = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    for name in sorted({*sums, *members} - {SUMS}):
        if name not in members or name not in sums or file_sha256(folder / name) != sums[name]:
            raise UserError(wrong % f"{name} has another sha256")
    if missing := fault(folder):
        raise UserError(wrong % missing)
