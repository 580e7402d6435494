"""The tokens of an answer that is just a label, as training would learn it.

Of a label that some row has they are that row's. Of any other they are made from a row that has another label, and only
in a way that makes the tokens of all labels that rows have: tokens that no training would learn would be judged too
unlikely without a word.
"""

from collections.abc import Callable, Iterator

from temper.data.columns import answer_start
from temper.errors import UserError

Way = Callable[[str], list[int] | None]  # a label -> the tokens of an answer that is just it


def class_answers(class_names: list[str], rows, tokenizer) -> list[list[int]]:
    """Of each label the tokens of an answer that is just it, with the token that ends it.

    Args:
        rows: split -> its rows.

    Raises:
        UserError: two labels have the same tokens, or those of a label cannot be told.
    """
    found, like = _known(class_names, rows)
    for label in [label for label in class_names if label not in found]:
        found[label] = _made(label, like, found, tokenizer)
    seen: dict[tuple, str] = {}
    for label in class_names:
        other = seen.setdefault(tuple(found[label]), label)
        if other != label:
            raise UserError(
                f"config: 'eval.labels': '{other}' and '{label}' have the same tokens in this model: rename one in "
                "eval.labels and in the data, or leave it out of both"
            )
    return [found[label] for label in class_names]


def _known(class_names: list[str], rows) -> tuple[dict[str, list[int]], dict]:
    """(the answers of labels that rows have, spelled as in `eval.labels`; a row to make the others from)."""
    found: dict[str, list[int]] = {}
    like = None
    for part in rows.values():
        first = {reference: at for at, reference in reversed(list(enumerate(part["reference"])))}
        for label in [label for label in class_names if label in first and label not in found]:
            like = like or part[first[label]]
            found[label] = _answer_of(part[first[label]])
    return found, like or next(part[0] for part in rows.values() if len(part))


def _answer_of(row: dict) -> list[int]:
    return list(row["labels"][answer_start(row["input_ids"], row["prompt_length"]) :])


def _made(label: str, like: dict, known: dict[str, list[int]], tokenizer) -> list[int]:
    """The answer that is a label which no row has."""
    wanted = {like["reference"]: _answer_of(like), **known}
    for ways in _ways(like, tokenizer):
        right = [way for way in ways if all(way(text) == answer for text, answer in wanted.items())]
        tokens = right[0](label) if right else None
        if tokens is not None and all(way(label) == tokens for way in right):
            return tokens
        if right:
            break
    raise UserError(
        f"config: 'eval.labels': no row has '{label}', and which tokens this model's tokenizer would make of it in an "
        "answer cannot be told from the other rows: add a row that has it, or leave it out of eval.labels"
    )


def _ways(like: dict, tokenizer) -> Iterator[list[Way]]:
    """Ways to put another label into a row; the first ones know the most of what stands before an answer.

    Tokens do not always tell whether the answer's text begins with a blank. Both is tried, and must come to the same.
    """
    answer = _answer_of(like)
    for before in _before(like, tokenizer):
        prompt, text = _text(before, tokenizer), _text([*before, *answer], tokenizer)
        if _ids(prompt, tokenizer) == before and text.startswith(prompt):
            said = text.removeprefix(prompt)
            yield [_as_text(prompt, text, like["reference"], tokenizer) for text in {said, said.lstrip()}]
    yield [_as_tokens(answer, like["reference"], tokenizer)]


def _before(like: dict, tokenizer) -> Iterator[list[int]]:
    """Of the prompt's tokens all, those behind its last added token, which parts a text, and none."""
    if answer_start(like["input_ids"], like["prompt_length"]):
        prompt, added = like["input_ids"][: like["prompt_length"]], tokenizer.added_tokens_decoder
        yield prompt
        yield prompt[next((at + 1 for at in reversed(range(len(prompt))) if prompt[at] in added), 0) :]
    yield []


def _as_text(prompt: str, said: str, reference: str, tokenizer) -> Way:
    """An answer's text with another label in it, tokenized as rows are (see temper/data/encoder.py)."""
    before = _ids(prompt, tokenizer)

    def way(label: str) -> list[int]:
        text = said.replace(reference, label, 1)
        whole = _ids(prompt + text, tokenizer)
        return whole[len(before) :] if whole[: len(before)] == before else _ids(text, tokenizer)

    return way


def _as_tokens(answer: list[int], reference: str, tokenizer) -> Way:
    """A label's tokens in place of the reference's: for tokenizers that make no text again of their tokens."""
    theirs = _ids(reference, tokenizer)
    places = range(len(answer) - len(theirs) + 1)
    at = next((at for at in places if answer[at : at + len(theirs)] == theirs), None)
    return lambda label: None if at is None else [*answer[:at], *_ids(label, tokenizer), *answer[at + len(theirs) :]]


def _ids(text: str, tokenizer) -> list[int]:
    return tokenizer(text_target=text, add_special_tokens=False)["input_ids"] if text else []


def _text(ids: list[int], tokenizer) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
