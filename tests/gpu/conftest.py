"""What the tests for a GPU share.

`make test-gpu` runs them where torch sees a CUDA device; elsewhere they are skipped, with one line that says so. To try
the tests themselves, without what they are for: `TEMPER_GPU_TESTS_ON=cpu python -m pytest tests/gpu`.
"""

import os
from pathlib import Path

import pytest

DEVICE = os.environ.get("TEMPER_GPU_TESTS_ON", "cuda")


def _missing(gpus: int) -> str | None:
    """Why tests that need so many GPUs cannot run here; None if they can."""
    import torch

    if DEVICE == "cpu":
        return None
    if not torch.cuda.is_available():
        return "gpu: torch sees no CUDA device"
    there = torch.cuda.device_count()
    return f"gpu: {gpus} GPUs are needed, and torch sees {there}" if there < gpus else None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            gpus = next(item.iter_markers("gpus"), None)
            if why := _missing(gpus.args[0] if gpus else 1):
                item.add_marker(pytest.mark.skip(reason=why))
