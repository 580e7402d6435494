"""Packages of data whose archive, or what is asked of it, is no good. Nothing comes from a network here."""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable

from tests.bad_inputs import Bad, World


def _fetch(name: str, says: str, archive: bytes, member="rows.jsonl") -> Bad:
    """Fetch `member` of an archive that an earlier download left."""

    def arguments(world: World) -> list[str]:
        sha256 = hashlib.sha256(archive).hexdigest()
        world.write(f"results/.state/downloads/{sha256}/archive", archive)
        source = {"kind": "package", "requirement": "set==1", "sha256": sha256, "member": member}
        return ["--output", "data/raw/set", "--config", json.dumps({"data": {"source": source}})]

    return Bad(name, says, "fetch_data", arguments)


def _zip(**members: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return made.getvalue()


def _tar(content: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        entry = tarfile.TarInfo("rows.jsonl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def _changed(archive: bytes, change: Callable[[bytearray], None]) -> bytes:
    copy = bytearray(archive)
    change(copy)
    return bytes(copy)


def _encrypted(archive: bytearray) -> None:
    archive[6] |= 1  # the flag in the file's own header
    archive[archive.index(b"PK\1\2") + 8] |= 1  # and in the directory at the end


def _unknown_method(archive: bytearray) -> None:
    archive[8] = archive[archive.index(b"PK\1\2") + 10] = 77


def _scrambled(archive: bytearray) -> None:
    start = 30 + len("rows.jsonl")
    archive[start : start + 8] = b"\xff" * 8


ROWS = b"".join(b'{"question": "%d?", "answer": "%d"}\n' % (i, i * i) for i in range(400))
ZIP = _zip(rows__jsonl=ROWS)
CASES = [
    _fetch("no archive at all", r"rows\.jsonl: .* neither a zip nor a tar", b"rows\n"),
    _fetch("empty archive file", r"neither a zip nor a tar", b""),
    _fetch("a zip that was cut off", r"rows\.jsonl", ZIP[:-40]),
    _fetch("a zip with a damaged member", r"damaged or encrypted", _changed(ZIP, _scrambled)),
    _fetch("an encrypted member", r"damaged or encrypted .*password", _changed(ZIP, _encrypted)),
    _fetch("an unknown compression", r"damaged or encrypted", _changed(ZIP, _unknown_method)),
    _fetch("a tar.gz that was cut off", r"rows\.jsonl", _tar(ROWS)[:-200]),
    _fetch("a tar.gz cut off in its first block", r"rows\.jsonl", _tar(ROWS)[:40]),
    _fetch("a member that is not there", r"did you mean 'rows\.jsonl'", ZIP, member="row.jsonl"),
    _fetch("a member of a member that is not an archive", r"neither a zip nor a tar", ZIP, member=["rows.jsonl", "x"]),
    _fetch("no member", r"data\.source", ZIP, member=[]),
    _fetch("an empty member", r"must end in the name of a file", ZIP, member=""),
    _fetch("the folder above", r"must end in the name of a file", ZIP, member="x/.."),
    _fetch("a folder", r"must end in the name of a file", ZIP, member="x/"),
    _fetch("a name that is too long", r"at most 200 bytes", ZIP, member="x" * 250),
    _fetch("a hidden member", r"hidden files, pin-\*\.json and marks", _zip(**{"__rows": ROWS}), member=".rows"),
    _fetch(
        "a member named like a pin",
        r"hidden files, pin-\*\.json and marks",
        _zip(**{"pin-1__json": b"{}"}),
        member="pin-1.json",
    ),
]
