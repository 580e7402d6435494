"""The columns of a split: what tokenize_splits and sample_answers write, and everything below reads."""

from pathlib import Path

from steps.lib.errors import UserError


def features(pairs: bool = False):
    """As `datasets.Features`. `pairs`: with the rejected answer beside each row's own, which is the chosen one."""
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    columns = {
        "id": Value("int64"),
        "input_ids": ids,
        "labels": ids,
        "prompt_length": Value("int32"),
        "prompt": Value("string"),
        "reference": Value("string"),
    }
    if pairs:
        columns |= {"rejected_input_ids": ids, "rejected_labels": ids, "rejected": Value("string")}
    return Features(columns)


def load_rows(folder: Path):
    """The `datasets.DatasetDict` in the folder of a stage.

    Raises:
        UserError: what is there cannot be read; it was cut off, or changed by hand.
    """
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are of these kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its rows cannot be read ({reason}); delete it and run its stage again") from None


def answer_start(input_ids: list[int], prompt_length: int) -> int:
    """Where the last answer begins in a row's labels.

    Behind the prompt; but where the prompt is all of the row's tokens, an encoder reads them, and the labels are the
    answer alone.
    """
    return 0 if prompt_length == len(input_ids) else prompt_length
