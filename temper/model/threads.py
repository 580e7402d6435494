"""Number of computing threads and size of oneDNN's caches; both affect the whole process."""

import contextlib
import os

SHAPES = 128  # products of one training step differ in some 30 shapes


def bound_shape_caches() -> None:
    """Keep oneDNN from caching a gigabyte of code, generated for each shape of a product. Only for our own process.

    oneDNN and its wrapper cache 1,024 shapes each, at half a megabyte and more, and most never occur again, because
    batches differ in their number of tokens. Both read the environment at the first product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(SHAPES))


@contextlib.contextmanager
def computing_threads(count: int):
    """Make torch compute with so many threads. Sums are split by their number, so results depend on it.

    This overrides the environment (OMP_NUM_THREADS, Snakemake's threads).
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
