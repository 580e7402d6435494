"""Read model folders, adapters and checkpoints of others. Damage or a mismatch is one error line."""

import contextlib
import pickle
from pathlib import Path

from temper.errors import UserError, lack


@contextlib.contextmanager
def reading(path: Path | str, called: str | None = None, remedy: str | None = None):
    """Turn any error of a library while it reads `path` into one line that names the path, or `called` instead.

    Libraries report a damaged file in different ways: safetensors by its own error, torch by an UnpicklingError or a
    RuntimeError, a tokenizer by a panic of its Rust code, which is not an Exception.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if isinstance(error, UserError) or not (panic or isinstance(error, Exception)) or lack(error, str(path)):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, pickle.UnpicklingError):
            said = "it is damaged, or holds a program, which is never run"
        if "trust_remote_code" in said:
            raise UserError(
                f"{called or path}: needs Python code of its own (auto_map), and a model's code is never run here: "
                "use a model that transformers itself knows"
            ) from error
        raise UserError(f"{called or path}: cannot be read ({said[:300]}); {remedy or _remedy(Path(path))}") from error


def _remedy(path: Path) -> str:
    """What to do about a damaged file: make it again if a step wrote it, else fetch it again."""
    folder = path if path.is_dir() else path.parent
    made = next((place for place in (folder, *folder.parents[:1]) if (place / "provenance.json").is_file()), None)
    if made:
        return f"if a file of it is damaged, delete {made} and run the same command again, which makes it anew"
    return "if a file of it is damaged, download it again"


def refuse_tensors(where: Path | str, wrong: dict[str, list[str]], remedy: str) -> None:
    """Raise a UserError that names the tensors in `wrong` (what is wrong -> names), if there are any."""
    found = [f"{len(names)} {what} ({_some(names)})" for what, names in wrong.items() if names]
    if not found:
        return
    if any(name.startswith("module.") for names in wrong.values() for name in names):
        remedy = "they were saved from inside DistributedDataParallel: save model.module instead"
    raise UserError(f"{where}: its tensors do not fit the model: {', '.join(found)}; {remedy}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def refuse_no_numbers(where: Path | str, weights) -> None:
    """Raise a UserError for the first of `weights` (name, tensor) that holds infinity or NaN."""
    import torch

    for name, weight in weights:
        # A sum takes a tenth of the time of checking each number.
        suspect = weight.is_floating_point() and not weight.sum(dtype=torch.float32).isfinite()
        if suspect and not weight.isfinite().all():
            raise UserError(f"{where}: {name} holds infinite numbers or nan, so nothing it is part of can be used")
