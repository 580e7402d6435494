"""Order and padding of batches."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.data.batches import collate, epoch_order
from temper.data.columns import IGNORED

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=300)


@given(lengths, st.integers(1, 40), st.integers(0, 9), st.integers(0, 5))
def test_an_epoch_has_every_row_once_and_is_reproducible(lengths, batch_size, seed, epoch):
    order = epoch_order(lengths, batch_size, seed, epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert order == epoch_order(lengths, batch_size, seed, epoch)


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order([1] * 50, 4, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(st.integers(1, 30))
def test_rows_of_a_batch_have_similar_lengths(batch_size):
    lengths = [number % 97 + 1 for number in range(20 * batch_size)]
    order = epoch_order(lengths, batch_size, seed=1, epoch=0)
    padded = sum(
        max(lengths[row] for row in order[at : at + batch_size]) * batch_size for at in range(0, len(order), batch_size)
    )
    assert padded <= 1.35 * sum(lengths)


@given(st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=40), min_size=1, max_size=6))
def test_padding_is_masked_and_never_learned(rows):
    batch = collate([{"input_ids": row, "labels": row} for row in rows], pad_token_id=0)
    assert batch["input_ids"].shape[1] % 8 == 0
    for index, row in enumerate(rows):
        assert batch["input_ids"][index, : len(row)].tolist() == row
        assert batch["attention_mask"][index].tolist() == [1] * len(row) + [0] * (
            batch["input_ids"].shape[1] - len(row)
        )
        assert torch.all(batch["labels"][index, len(row) :] == IGNORED)
