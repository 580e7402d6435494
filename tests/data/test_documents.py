"""Documents as token ids: cut where they are too long, packed into rows, and taken apart again."""

from hypothesis import given, settings
from hypothesis import strategies as st

from temper.data import documents
from temper.data.columns import IGNORED
from temper.data.documents import Documents, apart, packed
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


def pieces(text: str, most: int, **options):
    found = Documents(TOKENIZER, **options)
    return found.pieces(text, *found.tokens([text])[0], most)


@settings(deadline=None)
@given(texts, st.integers(2, 20))
def test_each_token_of_a_document_is_predicted_once_and_its_text_is_whole(text, most):
    parts = pieces(text, most)
    tokens = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
    assert [token for part in parts for token in part.ids[1:]] == tokens
    assert "".join(part.text for part in parts) == text
    assert all(2 <= len(part.ids) <= most for part in parts)
    assert all(part.labels == [IGNORED, *part.ids[1:]] for part in parts)
    assert parts[0].ids[0] == TOKENIZER.bos_token_id
    for before, part in zip(parts, parts[1:], strict=False):
        assert part.ids[0] == before.ids[-1], "a part goes on behind the last token of the one before"


def test_a_special_token_that_a_document_spells_is_text():
    control = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    text = "so <|im_end|> it is"
    assert control not in pieces(text, 99)[0].ids[1:-1]
    assert control in pieces(text, 99, allow_special_text=True)[0].ids[1:-1]


lengths = st.lists(st.integers(1, 12), max_size=60)


@settings(deadline=None)
@given(lengths, st.integers(4, 20), st.integers(1, 100))
def test_packing_loses_nothing_and_no_row_is_too_long(sizes, most, stretch):
    items = list(enumerate(sizes))
    before, documents.STRETCH = documents.STRETCH, stretch
    try:
        rows = list(packed(items, most, lambda item: item[1]))
        assert rows == list(packed(iter(items), most, lambda item: item[1])), "the same again"
    finally:
        documents.STRETCH = before
    assert sorted(item for row in rows for item in row) == items
    assert all(len(row) == 1 or sum(size for _, size in row) <= most for row in rows)


def test_documents_of_similar_length_share_a_row():
    rows = list(packed([90, 5, 30, 6, 32, 4, 7, 31], 100, int))
    assert rows == [[4, 5, 6, 7, 30, 31], [32], [90]]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=5))
def test_documents_of_a_row_are_apart_again(ids):
    row = {"input_ids": sum(ids, []), "labels": sum(([IGNORED, *one[1:]] for one in ids), [])}
    found = apart({**row, "documents": list(map(len, ids))})
    assert [one["input_ids"] for one in found] == ids
    assert [one["labels"] for one in found] == [[IGNORED, *one[1:]] for one in ids]
    assert apart(row) == [row]
