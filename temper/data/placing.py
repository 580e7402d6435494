"""What a row's own columns say about its split: its name, and the group that stays on one side."""

from temper.data import texts
from temper.errors import UserError

NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def split_in(row: dict, column: str) -> str:
    """The split that a row names in `data.splits.column`.

    Raises:
        UserError: there is no such column, or it names no split.
    """
    value = _value(row, column, "column")
    split = NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise UserError(
            f"column '{column}', which data.splits.column names, holds {texts.shown(value)}, which is no split "
            f"({', '.join(NAMES)}); to leave such rows out, use data.where"
        )
    return split


def group_in(row: dict, column: str) -> str:
    """The value of a row in `data.splits.group_by`, as text.

    Raises:
        UserError: there is no such column, or it holds nothing that rows could share.
    """
    value = _value(row, column, "group_by")
    if isinstance(value, (list, dict)) or value is None or not str(value).strip():
        raise UserError(
            f"column '{column}', which data.splits.group_by names, holds {texts.shown(value)}, and a group is a text "
            "or a number; to leave such rows out, use data.where"
        )
    return str(value)


def _value(row: dict, column: str, key: str):
    if column not in row:
        raise UserError(f"no column '{column}', which data.splits.{key} names; there are {', '.join(map(str, row))}")
    return row[column]
