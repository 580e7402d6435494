"""A split's columns and answers: what tokenize_splits and sample_answers write, and everything below reads."""

SPLITS = ("train", "validation", "test")
IGNORED = -100  # the label of a token that is not learned: torch's cross_entropy leaves it out


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


def answer_start(input_ids: list[int], prompt_length: int) -> int:
    """Where the last answer begins in a row's labels.

    Behind the prompt; but where the prompt is all of the row's tokens, an encoder reads them, and the labels are the
    answer alone.
    """
    return 0 if prompt_length == len(input_ids) else prompt_length


def answer_text(tokenizer, ids: list[int], stop_ids) -> str:
    """The text of an answer's tokens, up to the one that ends it.

    Special tokens in it are part of what the model says, so they are shown: labels may be such tokens.
    """
    end = next((at for at, token in enumerate(ids) if token in stop_ids), None)
    return tokenizer.decode(ids[:end], skip_special_tokens=False).strip()
