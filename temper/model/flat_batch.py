"""A batch as one row of tokens: no padding, and what all rows begin with is computed once.

Rows of one data set begin alike: chat template and system prompt are 25 of the 53 tokens of an average row of the
embedded default. In a causal model a token's state depends on nothing after it, so the state of a common beginning is
the same in all rows, and its gradient is the sum over them. The two answers of a preference pair share their prompt
likewise. All layers but attention work on single tokens; they get the tokens one after another in one long row. Only
attention needs to know which token belongs to which row: `flat_attention`, registered with transformers' attention
interface, puts tokens into rows, attends, and takes the rows apart again. Loss and gradients are the same.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from temper.data.batches import Batch, Learned, tensor_on

NAME = "temper_flat"  # of the attention function, for transformers
SHORTEST_PREFIX = 8  # tokens; attention of a prefix of its own costs more than a few tokens computed again
LONGEST_PRODUCTS = 256  # keys a row sees, on a CPU; beyond, PyTorch's kernel is the faster one, and keeps no scores
UNSEEN = -1e30  # added to a score, it leaves nothing of it in float32 and bfloat16
NOWHERE = -1  # the branch of places behind a row's end
FILLER = -2  # the branch of a token that is there to make their number even, seen by none but itself


@dataclasses.dataclass
class FlatBatch:
    """The tokens of a batch: those common to all rows, then each row's own, one row after the other.

    A row has `width` places for its own tokens. Several answers to one prompt (a preference pair, all labels) are one
    row: the first text, then what is different in each other one, which does not see what is different in those before.

    Args:
        input_ids, position_ids: (1, tokens); positions are those in the row's text.
        prefix: how many tokens all rows have in common at their beginning.
        token_at: (rows * width,) which of the tokens after the prefix is at a place; any, where the row has ended.
        place_of: (tokens - prefix,) the place of each token after the prefix.
        longest: how many tokens the longest text has.
        branches: (rows, width) 0 for a token seen by all of its row, else it is seen by those of its branch only.
        predicting: (learned tokens,) the token whose output predicts each learned one, in the order of the batch.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    prefix: int
    longest: int
    token_at: torch.Tensor
    place_of: torch.Tensor
    branches: torch.Tensor
    predicting: torch.Tensor
    masks: dict = dataclasses.field(default_factory=dict)
    windowed: int = 0  # calls of attention that looked a few tokens back
    unknown: set = dataclasses.field(default_factory=set)  # what attention was asked for and does not know

    def row_of(self) -> torch.Tensor:
        """(1, tokens) the number of each token's row, -1 for what all rows begin with."""
        own = self.place_of // self.branches.shape[1]
        return torch.cat([own.new_full((self.prefix,), -1), own])[None]

    def misunderstood(self, config) -> str | None:
        """What `config`'s attention does beyond `flat_attention`, once this batch went through the model."""
        if self.unknown:
            return f"attention takes {', '.join(sorted(self.unknown))}"
        layers = getattr(config, "layer_types", None)
        windows = layers.count("sliding_attention") if layers else int(bool(getattr(config, "sliding_window", None)))
        if getattr(config, "use_sliding_window", True) and self.windowed < windows:
            return "attention does not say how far back it looks"
        return None

    def bias(self, window: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """What to add to the scores of attention: nothing, or what leaves nothing of them where a token is not seen.

        Args:
            window: how many tokens back a layer looks; None: all.

        Returns:
            of each row's places (rows, 1, width, prefix + width); within the prefix (1, 1, prefix, prefix)
        """
        if (window, dtype) not in self.masks:
            both = self._in_rows(window), self._in_prefix(window)
            self.masks[window, dtype] = tuple(seen.logical_not().to(dtype) * UNSEEN for seen in both)
        return self.masks[window, dtype]

    def _in_rows(self, window: int | None):
        branches = self.branches[:, :, None]
        at = self.position_ids[0, self.prefix :][self.token_at].view_as(branches)
        common = torch.arange(self.prefix, device=at.device).expand(len(at), 1, -1)
        keys = torch.cat([common, at.mT], dim=2)
        branches_of_keys = torch.cat([torch.zeros_like(common), branches.mT], dim=2)
        same_branch = (branches_of_keys == 0) | (branches_of_keys == branches)
        return (_sees(at, keys, window) & same_branch)[:, None]

    def _in_prefix(self, window: int | None):
        at = torch.arange(self.prefix, device=self.branches.device)
        return _sees(at[:, None], at[None, :], window)[None, None]


def _sees(query, key, window: int | None):
    """Whether a token sees another, by their positions in the text."""
    return (key <= query) if window is None else (key <= query) & (query - key < window)


def flatten(batch: Batch, learned: Learned, *, answers: int = 1, share: bool = True, device="cpu") -> FlatBatch:
    """A batch as one row of tokens, laid from its lists.

    Args:
        learned: the tokens to predict.
        answers: how many texts each row has that share a prompt; the batch holds the first of all rows, then the second
            of all rows, and so on (`pairs_batch`: chosen, then rejected).
        share: compute common tokens once. With dropout every row wants draws of its own.
        device: where its tensors go.
    """
    texts = [row["input_ids"] for row in batch.rows]
    prefix = worth_sharing(texts) if share else 0
    count = len(texts) // answers if share else len(texts)
    end, parts = prefix, []
    for row in range(count):
        parts.append(_own_tokens(texts[row::count], prefix, end))
        end += len(parts[-1].tokens)
    if end % 2:  # oneDNN's products of an odd number of rows take 4% longer, of some 20%
        parts[-1].add_filler()
    sizes = [len(part.tokens) for part in parts]
    token_at, place_of = _places(sizes)
    branches = [part.branches + [NOWHERE] * (max(sizes) - size) for part, size in zip(parts, sizes, strict=True)]
    of_texts = [places for side in zip(*(part.of_texts for part in parts), strict=True) for places in side]
    on_device = functools.partial(tensor_on, device)
    return FlatBatch(
        input_ids=on_device([texts[0][:prefix] + _joined(part.tokens for part in parts)]),
        position_ids=on_device([[*range(prefix), *_joined(part.positions for part in parts)]]),
        prefix=prefix,
        longest=max(map(len, texts)),
        token_at=on_device(token_at),
        place_of=on_device(place_of),
        branches=on_device(branches),
        predicting=on_device([of_texts[row][at] for row, at in zip(learned.rows, learned.positions, strict=True)]),
    )


def worth_sharing(texts: list[list[int]]) -> int:
    """How many tokens at the beginning of all texts are computed once: the common ones, unless those are few."""
    common = common_start(texts)
    return common if common >= SHORTEST_PREFIX else 0


def common_start(texts: list[list[int]]) -> int:
    """How many tokens all texts begin with alike. The last token of each is left out: a row is never empty."""
    shortest = min(map(len, texts)) - 1
    first, last = min(texts), max(texts)  # in the order of a dictionary; what these two share, all between them do
    return next((at for at in range(shortest) if first[at] != last[at]), shortest)


@dataclasses.dataclass
class _Row:
    """The part of a row (one text, or several that share their prompt) that comes after the prefix.

    Args:
        tokens, positions, branches: of each own token.
        of_texts: of each text, which of the batch's tokens stands at each of its positions.
    """

    tokens: list[int]
    positions: list[int]
    branches: list[int]
    of_texts: list[list[int]]

    def add_filler(self) -> None:
        self.tokens.append(self.tokens[-1])
        self.positions.append(self.positions[-1])
        self.branches.append(FILLER)


def _own_tokens(texts: list[list[int]], prefix: int, end: int) -> _Row:
    """The row of some texts, where `end` tokens of the batch come before its own."""
    first, others = texts[0], texts[1:]
    fork = common_start(texts) if others else len(first)
    row = _Row(
        tokens=first[prefix:],
        positions=[*range(prefix, len(first))],
        branches=[0] * (fork - prefix) + [1] * (len(first) - fork),
        of_texts=[[*range(prefix), *range(end, end + len(first) - prefix)]],
    )
    for branch, text in enumerate(others, start=2):
        start, size = end + len(row.tokens), len(text) - fork
        row.tokens += text[fork:]
        row.positions += range(fork, len(text))
        row.branches += [branch] * size
        row.of_texts.append([*row.of_texts[0][:fork], *range(start, start + size)])
    return row


def _places(sizes: list[int]) -> tuple[list[int], list[int]]:
    """(`token_at`, `place_of`) of rows with so many tokens of their own."""
    token_at, place_of, width = list[int](), list[int](), max(sizes)
    for row, size in enumerate(sizes):
        start = len(place_of)
        token_at += [*range(start, start + size), *[start + size - 1] * (width - size)]
        place_of += range(row * width, row * width + size)
    return token_at, place_of


def _joined(lists) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


# --- attention -----------------------------------------------------------------------------------


@contextlib.contextmanager
def flat_attention_in(model):
    """Have the layers of a transformers model call `flat_attention` while the block runs."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, flat_attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield before
    finally:
        model.config._attn_implementation = before


# What models hand to their attention beside what it attends with; it changes nothing of what is computed.
WITHOUT_MEANING = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"}
WITHOUT_MEANING |= {"return_dict", "output_router_logits", "position_embeddings"}


def flat_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling,
    dropout=0.0,
    flat=None,
    plain=True,
    sliding_window=None,
    **more,
):
    """Attention of a `FlatBatch`, after transformers' attention interface.

    Args:
        query, key, value: (1, heads or fewer, tokens, size).
        flat: the batch, and `plain` whether to attend by products where rows are short, or always by PyTorch's kernel.

    Returns:
        (output: (1, tokens, heads, size), None)
    """
    del module, attention_mask  # transformers makes no mask for an attention function it does not know
    flat.windowed += bool(sliding_window)
    flat.unknown |= {name for name, value in more.items() if value is not None and name not in WITHOUT_MEANING}
    prefix, own = flat.prefix, query.shape[2] - flat.prefix
    short = plain and prefix + flat.branches.shape[1] <= LONGEST_PRODUCTS
    attend: Callable = functools.partial(_products if short else _kernel, scaling=scaling, dropout=dropout)
    window = sliding_window if sliding_window and flat.longest > sliding_window else None
    in_rows, in_prefix = flat.bias(window, query.dtype)
    of_prefix, of_rows = zip(*(part.split([prefix, own], dim=2) for part in (query, key, value)), strict=True)
    rows = [_into_rows(part, flat) for part in of_rows]
    if prefix:
        common = [part.expand(len(flat.branches), -1, -1, -1) for part in of_prefix[1:]]
        rows[1:] = [torch.cat([part, row], dim=2) for part, row in zip(common, rows[1:], strict=True)]
    output = _out_of_rows(attend(*rows, in_rows), flat)
    if prefix:
        output = torch.cat([attend(*of_prefix, in_prefix).transpose(1, 2)[0], output])
    return output[None], None


def _products(query, key, value, bias, scaling, dropout):
    """Attention by two batched products; query heads that share a key head go through it together."""
    rows, heads, places, size = query.shape
    groups = rows * key.shape[1]
    query = (query * scaling).reshape(groups, -1, size)
    scores = torch.bmm(query, key.reshape(groups, -1, size).transpose(1, 2)).view(rows, heads, places, -1)
    scores += bias
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    shares = drop(shares, dropout) if dropout else shares
    output = torch.bmm(shares.view(groups, -1, scores.shape[-1]), value.reshape(groups, -1, size))
    return output.view(rows, heads, places, size)


def _kernel(query, key, value, bias, scaling, dropout):
    return scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling, enable_gqa=True
    )


def _into_rows(part, flat: FlatBatch):
    """(1, heads, tokens, size) -> (rows, heads, width, size)."""
    _, heads, tokens, size = part.shape
    places = _Gather.apply(part[0].transpose(0, 1).reshape(tokens, -1), flat.token_at, flat.place_of)
    return places.view(*flat.branches.shape, heads, size).transpose(1, 2)


def _out_of_rows(part, flat: FlatBatch):
    """(rows, heads, width, size) -> (tokens, heads, size)."""
    rows, heads, width, size = part.shape
    places = part.transpose(1, 2).reshape(rows * width, -1)
    return _Scatter.apply(places, flat.place_of).view(-1, heads, size)


class _Gather(torch.autograd.Function):
    """Tokens to places. No gradient comes back from a place where its row has ended, so it is a gather again."""

    @staticmethod
    def forward(ctx, tokens, token_at, place_of):
        ctx.save_for_backward(place_of)
        return tokens.index_select(0, token_at)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Scatter(torch.autograd.Function):
    """Places to tokens; what comes back to a place where its row has ended is zero."""

    @staticmethod
    def forward(ctx, places, place_of):
        ctx.save_for_backward(place_of)
        ctx.places = len(places)
        return places.index_select(0, place_of)

    @staticmethod
    def backward(ctx, gradient):
        places = gradient.new_zeros(ctx.places, gradient.shape[1])
        return places.index_copy_(0, ctx.saved_tensors[0], gradient), None
