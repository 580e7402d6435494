"""How many threads compute, and how much they may remember: both act on the whole process."""

import contextlib
import os

SHAPES = 128  # products of one training step differ in some 30 shapes


def bound_shape_caches() -> None:
    """Keep oneDNN, in a process of our own, from hoarding the code it made for each shape of a product: a gigabyte.

    It and its wrapper keep 1,024 shapes each, at half a megabyte and more, and most are never met again: no two batches
    have as many tokens. Both look at the environment when the first product is computed.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(SHAPES))


@contextlib.contextmanager
def computing_threads(count: int):
    """Let torch compute with so many threads: sums are cut by their number, so that results depend on it.

    What the environment says (OMP_NUM_THREADS, Snakemake's threads) makes no difference then.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
