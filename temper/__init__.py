"""Temper: a reproducible fine-tuning pipeline for language models.

From Python: `from temper import load_rows, train`; the rest is in `temper.api`.
"""

__all__ = ["load_rows", "train"]


def __getattr__(name: str):
    """Import the public functions on first use, so that commands that need none of them start at once."""
    if name not in __all__:
        raise AttributeError(f"module 'temper' has no attribute '{name}'")
    from temper import api

    return getattr(api, name)
