"""Temper: a reproducible fine-tuning pipeline for language models.

From Python: `from temper import load_rows, train`; the rest is in `temper.api`.
"""

__all__ = ["load_rows", "train"]


def __getattr__(name: str):
    """The public functions, imported when they are asked for: a command that needs none of them answers at once."""
    if name not in __all__:
        raise AttributeError(f"module 'temper' has no attribute '{name}'")
    from temper import api

    return getattr(api, name)
