"""The page of what a model reads and learns."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from temper.data.columns import IGNORED
from temper.reports.audit_page import ROWS, tokens
from tests.steps.test_tokenize_splits import chat, made
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), learned=st.integers(0, 30))
def test_tokens_are_the_text_in_order(text, learned):
    ids = TOKENIZER(text)["input_ids"]
    labels = [IGNORED if at < learned else token for at, token in enumerate(ids)]
    found = tokens(ids, labels, TOKENIZER)
    assert [token for part in found for token in part.ids] == ids
    assert [part.learned for part in found for _ in part.ids] == [label != IGNORED for label in labels]
    if learned == 0:
        assert "".join(part.text for part in found) == TOKENIZER.decode(ids)


def test_the_page_shows_what_is_learned_and_what_was_left_out(workspace, tiny_model):
    rows = [chat(f"Is <b>it</b> {number}?", f"It is {number}.") for number in range(50)] + [chat("a" * 300, "b")]
    _, audit = made(workspace, tiny_model, rows, "tokenize.max_length=64")
    page = (workspace / "splits/audit.html").read_text(encoding="utf-8")
    assert page.count("data-row>") == ROWS
    assert "<b>" not in page
    shown = re.findall(r'<span class="learned" title="[\d, ]+">(.*?)</span>', page)
    assert "".join(shown).startswith("It is 0.&lt;|im_end|&gt;It is 2.&lt;|im_end|&gt;")
    assert "longer than tokenize.max_length" in page
    assert audit["train"]["dropped"] == 1


def test_the_page_says_of_which_data_set_of_a_mixture_a_row_is(workspace, tiny_model):
    made(workspace, tiny_model, [{**chat("a", "b"), "source": "films"}, {**chat("c", "d"), "source": "books & co"}])
    page = (workspace / "splits/audit.html").read_text(encoding="utf-8")
    assert re.findall(r"row (\d+ \(.*?\))<", page) == ["1 (films)", "2 (books &amp; co)"]
