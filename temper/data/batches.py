"""Which rows train together, in which order (a pure function of seed and epoch), and how they become tensors."""

import dataclasses
import random
from typing import NamedTuple

from temper.data.columns import IGNORED

MEGABATCH = 50  # batches that are sorted together: short rows meet short rows, yet the order stays random
PAD_TO = 8  # a multiple that matrix units like, and that bounds the number of different shapes


def epoch_order(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Row numbers of one epoch, batch after batch, rows of similar length together.

    Shuffled, cut into stretches of 50 batches, each stretch sorted by length and cut into batches,
    the batches shuffled. A last batch that is not full stays last. The state of a run needs no
    sampler: the order follows from `seed` and `epoch` alone, on every machine.

    Args:
        batch_size: the rows of an optimizer step. Steps that accumulate gradients are cut from the same order, so
            that 4 x 2 rows are the 8 of one batch.
    """
    rng = random.Random(f"{seed}/{epoch}")
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    stretch = MEGABATCH * batch_size
    batches = []
    for start in range(0, len(rows), stretch):
        similar = sorted(rows[start : start + stretch], key=lengths.__getitem__)
        batches += [similar[at : at + batch_size] for at in range(0, len(similar), batch_size)]
    last = [batch for batch in batches if len(batch) < batch_size]
    full = [batch for batch in batches if len(batch) == batch_size]
    rng.shuffle(full)
    return [row for batch in [*full, *last] for row in batch]


class EpochSampler:
    """A torch sampler over `epoch_order`. Set `epoch` before each epoch."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __iter__(self):
        return iter(epoch_order(self.lengths, self.batch_size, self.seed, self.epoch))

    def __len__(self) -> int:
        return len(self.lengths)


class Shares:
    """A torch batch sampler: of each batch of an epoch the rows of one of several processes.

    A batch is the rows that all of them compute at a time. Every one gets some, for they add up their gradients
    together: where there are more processes than rows, as at the end of an epoch, one gets a copy of another's row,
    which `WithCopies` marks.

    Args:
        rows: the sampler of the epoch's order.
        batch_size: rows of a process at a time.
    """

    def __init__(self, rows, batch_size: int, rank: int, processes: int, drop_last: bool):
        self.rows, self.rank, self.processes = rows, rank, processes
        self.of_all, self.drop_last = batch_size * processes, drop_last

    def __iter__(self):
        order = list(self.rows)
        for number in range(len(self)):
            batch = order[number * self.of_all : (number + 1) * self.of_all]
            yield batch[self.rank :: self.processes] or [len(order) + batch[0]]

    def __len__(self) -> int:
        full, left = divmod(len(self.rows), self.of_all)
        return full + bool(left and not self.drop_last)


class WithCopies:
    """A dataset of its rows, and of the same again as copies, which count nothing (see `Shares`)."""

    COPY = "copy"

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        if number < len(self.rows):
            return self.rows[number]
        return {**self.rows[number - len(self.rows)], self.COPY: True}


class Learned(NamedTuple):
    """The learned tokens of a batch, row after row; three lists of one length.

    Args:
        rows: the number of each token's row.
        positions: the position in the row whose output predicts it.
        targets: the token.
    """

    rows: list[int]
    positions: list[int]
    targets: list[int]


@dataclasses.dataclass
class Batch:
    """Rows that go through a model together: lists, until a way of computing lays tensors of them.

    They are laid on the CPU and then sent (`tensor_on`), so that no step waits for its device. Trainer and its loader
    hand a batch through as it is.

    Args:
        rows: `input_ids` and `labels` of each, whatever else it has.
        counts: whether it is trained on; not if its rows are copies (see `Shares`).
    """

    rows: list[dict]
    pad_token_id: int
    counts: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    def padded(self, device="cpu") -> dict:
        """The tensors of `collate`, on a device."""
        return {name: _sent(part, device) for name, part in collate(self.rows, self.pad_token_id).items()}

    def learned(self, ahead: int) -> Learned:
        """The tokens that count in the loss.

        Args:
            ahead: how far before a token's own position it is predicted: 1 in a causal model, 0 in a decoder that has
                its labels apart.
        """
        found = Learned([], [], [])
        for number, row in enumerate(self.rows):
            labels = row["labels"][ahead:]
            positions = [position for position, label in enumerate(labels) if label != IGNORED]
            found.rows.extend([number] * len(positions))
            found.positions.extend(positions)
            found.targets.extend([labels[position] for position in positions])
        return found

    def learned_count(self, ahead: int) -> int:
        """How many tokens `learned` finds."""
        return sum(count_learned(row["labels"][ahead:]) for row in self.rows)


def count_learned(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED)


def tensor_on(device, numbers: list, dtype: str = "int64"):
    """A list as a tensor on its way to a device. What is computed there waits for it; we do not."""
    import numpy
    import torch

    return _sent(torch.from_numpy(numpy.array(numbers, dtype)), device)  # torch.tensor takes five times as long


def _sent(tensor, device):
    import torch

    # CUDA has copied the tensor's memory when this returns; another device may not have, and the memory is freed here.
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def collate(rows: list[dict], pad_token_id: int) -> dict:
    """Rows (input_ids, labels) to right-padded int64 tensors.

    Returns:
        input_ids and attention_mask (rows, length), labels (rows, length of the labels). The two lengths are one for a
        causal model; an encoder-decoder's labels are the answer alone.
    """
    import torch

    shape, labels_shape = (padded_shape(rows, name) for name in ("input_ids", "labels"))
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(labels_shape, IGNORED),
    }
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        batch["input_ids"][index, :size] = torch.as_tensor(row["input_ids"])
        batch["attention_mask"][index, :size] = 1
        batch["labels"][index, : len(row["labels"])] = torch.as_tensor(row["labels"])
    return batch


def padded_shape(rows: list[dict], name: str) -> tuple[int, int]:
    """(rows, length) of what `collate` makes of the rows' `input_ids` or `labels`."""
    return len(rows), padded(max(len(row[name]) for row in rows))


def padded(length: int) -> int:
    """The length that `collate` gives to a batch whose longest row has `length` tokens."""
    return -(-length // PAD_TO) * PAD_TO
