"""The columns of a split: what tokenize_splits and sample_answers write, and everything below reads."""


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
