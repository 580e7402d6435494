"""Hashes of more rows than memory holds: in buckets of equal ones, on the disk once there are many."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST = 2**18  # rows in memory
BITS = 7  # of a hash that tell its bucket: of 10**9 rows each has 8 million
NUMBER = 2**BITS


class Buckets:
    """Rows of numbers. Iterate over it for arrays: rows with equal hashes are in one, in the order they were added.

    Args:
        folder: where files are made as soon as there are more than `MOST` rows. They have no names, so nothing is left
            of them, however the process ends.
        dtype: of numpy, of a row.
    """

    def __init__(self, folder: Path, dtype):
        self.folder, self.dtype = folder, dtype
        self.waiting: list[tuple[Any, Any]] = []  # (hashes, rows)
        self.number = 0  # of rows that wait
        self.files: list[Any] = []

    def add(self, hashes, rows) -> None:
        """Add an array of rows, with an array of a hash of 64 bits for each."""
        self.waiting.append((hashes, rows))
        self.number += len(rows)
        if self.number >= MOST:
            self._write()

    def _write(self) -> None:
        """Write the rows that wait to the files of their buckets."""
        import numpy as np

        self.files = self.files or [tempfile.TemporaryFile(dir=self.folder) for _ in range(NUMBER)]  # noqa: SIM115
        of = np.concatenate([hashes for hashes, _ in self.waiting]).view("u8") >> np.uint64(64 - BITS)
        order = np.argsort(of, kind="stable")
        rows = np.concatenate([rows for _, rows in self.waiting])[order]
        ends = np.cumsum(np.bincount(of.astype(np.int64), minlength=NUMBER))
        for file, part in zip(self.files, np.split(rows, ends[:-1]), strict=True):
            file.write(part.tobytes())
        self.waiting, self.number = [], 0

    def __iter__(self) -> Iterator[Any]:
        import numpy as np

        if not self.files:
            yield np.concatenate([np.empty(0, self.dtype), *(rows for _, rows in self.waiting)])
            return
        if self.waiting:
            self._write()
        for file in self.files:
            file.seek(0)
            yield np.fromfile(file, self.dtype)
