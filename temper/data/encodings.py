"""Encodings of text files: which there are, and what a file's first bytes say."""

import codecs
import re

from temper.errors import suggest

USUAL = (
    "utf-8",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "cp1250",
    "cp1251",
    "cp1252",
    "latin-1",
    "iso8859-15",
    "mac-roman",
)
# Byte order marks. UTF-32's little-endian one begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# First bytes of files that are no text -> what they are, and what to do.
NO_TEXT = {
    b"PK\x03\x04": "is a zip archive or an Excel workbook: unpack it, or save the sheet as csv",
    b"\xd0\xcf\x11\xe0": "is an Excel workbook: save the sheet as csv",
    b"\x1f\x8b": "is gzipped: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is packed by zstd: let its name end in .zst",
    b"BZh": "is packed by bzip2: unpack it, or pack it as .gz or .zst",
    b"\xfd7zXZ": "is packed by xz: unpack it, or pack it as .gz or .zst",
    b"PAR1": "is a parquet file: let its name end in .parquet, or set data.format=parquet",
}


def checked(name: str) -> str:
    """`name`, if Python knows the encoding and its lines end in a line feed.

    Raises:
        ValueError: it does not, or files of it cannot be read line by line.
    """
    try:
        by_lines = is_wide(name) or "a\n".encode(name) == b"a\n" or codecs.lookup(name).name == "utf-8-sig"
    except (LookupError, UnicodeError):
        raise ValueError(f"'{name}' is no encoding that Python knows; {suggest(name, USUAL)}") from None
    if not by_lines:
        raise ValueError(f"'{name}' is not for files of lines: convert them to UTF-8")
    return name


def is_wide(encoding: str) -> bool:
    """Whether characters take two or four bytes, so that a byte of a line feed ends no line."""
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def to_utf8(encoding: str) -> str:
    """The command that converts a file, by the name that iconv knows (utf-16le for Python's utf-16-le)."""
    name = re.sub("-([bl]e)$", r"\1", encoding)
    return f"iconv -f {name} -t utf-8"


def is_latin1(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "iso8859-1"


def has_one_byte_each(encoding: str) -> bool:
    """Whether each byte is one character, as in cp1252."""
    return len(b"\xe9\xe8\xe0\xe9".decode(encoding, "replace")) == 4


def by_mark(start: bytes) -> str | None:
    """The encoding that a file's first four bytes announce, if they do."""
    return next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), None)


def no_text(start: bytes) -> str | None:
    """What a file with these first bytes is, and what to do; None if it may be text."""
    return next((what for magic, what in NO_TEXT.items() if start.startswith(magic)), None)


def unmarked_utf16(line: bytes) -> str | None:
    """The kind of UTF-16 that a first line is in, without a byte order mark: as UTF-8 every other byte would be 0."""
    if line.count(0) * 3 <= len(line) or by_mark(line):
        return None
    return "utf-16-be" if line.startswith(b"\0") else "utf-16-le"


def likely(lines) -> str | None:
    """cp1252, if that is what `lines` of bytes are in; "utf-8", if most of those beyond ASCII are; None: neither."""
    right = wrong = 0
    windows = True
    for line in lines:
        if line.isascii():
            continue
        if decodes(line, "utf-8"):
            right += 1
        else:
            wrong += 1
            windows = windows and decodes(line, "cp1252")
    if right > wrong:
        return "utf-8"
    return "cp1252" if windows else None


def decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
