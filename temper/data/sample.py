"""A sample of the rows in a file of prompts, which is the same wherever and whenever it is taken."""

import zlib

HASHES = 2**32


class Sample:
    """About `most` of `rows` lines, or all: those whose conversation has a hash below a bound.

    The hash is not of the row's number, so adding a row before others changes nothing for them.
    """

    def __init__(self, most: int, rows: int):
        self.whole = rows <= most
        self.bound = HASHES if self.whole else HASHES * most // rows

    def __contains__(self, line: bytes) -> bool:
        return self.whole or zlib.crc32(line[line.index(b'"messages"') :]) < self.bound
