"""A split's columns and answers, as tokenize_splits and sample_answers write them and later stages read them."""

from collections.abc import Collection

SPLITS = ("train", "validation", "test")
IGNORED = -100  # the label of a token that is not learned, which torch's cross_entropy ignores


DOCUMENTS = "documents"  # the column of how many tokens each document of a row has
ABOUT = ("group", "source")  # what a row may have besides: the group of rows it is one of, its part of a mixture


def features(
    pairs: bool = False,
    reasoning: bool = False,
    labels: bool = False,
    about: Collection[str] = (),
    documents: bool = False,
):
    """The columns as `datasets.Features`.

    Args:
        pairs: including those of the rejected answer.
        reasoning: including the texts around the reasoning in an answer.
        labels: including `label`, whether the answer is desirable.
        about: those of `ABOUT` that the rows have.
        documents: including how many tokens each of a row's documents has.
    """
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
    if reasoning:
        columns |= {"reasoning_start": Value("string"), "reasoning_end": Value("string")}
    if labels:
        columns["label"] = Value("bool")
    columns |= {name: Value("string") for name in ABOUT if name in about}
    if documents:
        columns[DOCUMENTS] = ids
    return Features(columns)


def with_right_answers(splits):
    """Splits without the rows whose answer is an undesirable one (`label`), which is nothing to judge a model by."""
    from datasets import DatasetDict

    if not any("label" in rows.column_names for rows in splits.values()):
        return splits
    kept = {name: _right(rows) for name, rows in splits.items()}
    return DatasetDict({name: rows for name, rows in kept.items() if len(rows)})


def _right(rows):
    if "label" not in rows.column_names:
        return rows
    return rows.select([number for number, label in enumerate(rows["label"]) if label]).remove_columns("label")


def answer_start(input_ids: list[int], prompt_length: int) -> int:
    """Where the last answer begins in a row's labels.

    That is behind the prompt, except for an encoder-decoder: there the prompt is all of input_ids, and the labels hold
    only the answer.
    """
    return 0 if prompt_length == len(input_ids) else prompt_length


def final_answer(text: str, row: dict) -> str:
    """The part of an answer behind its reasoning, which is what is judged; empty while the reasoning has not ended.

    Args:
        row: reasoning_start (empty: in the prompt) and reasoning_end, if the rows have reasoning.
    """
    end = row.get("reasoning_end")
    if not end:
        return text
    if end in text:
        return text.rpartition(end)[2].strip()
    return "" if text.startswith(row["reasoning_start"]) else text


def answer_text(tokenizer, ids: list[int], stop_ids) -> str:
    """The text of an answer's tokens, up to the one that ends it.

    Special tokens in it are kept, because they are part of the answer: labels may be special tokens.
    """
    end = next((at for at, token in enumerate(ids) if token in stop_ids), None)
    return tokenizer.decode(ids[:end], skip_special_tokens=False).strip()
