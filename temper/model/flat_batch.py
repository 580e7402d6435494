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
from collections.abc import Callable

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

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


def flatten(batch: dict, learned: torch.Tensor, *, answers: int = 1, share: bool = True) -> FlatBatch:
    """A right-padded batch as one row of tokens.

    Args:
        batch: `input_ids` and `attention_mask`, (rows, length), as `collate` makes them.
        learned: (rows, length - 1) whether the token at the next position is learned.
        answers: how many texts each row has that share a prompt; the batch holds the first of all rows, then the second
            of all rows, and so on (`collate_pairs`: chosen, then rejected).
        share: compute common tokens once. With dropout every row wants draws of its own.
    """
    ids, lengths = batch["input_ids"].cpu(), batch["attention_mask"].sum(dim=1).tolist()
    texts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    prefix = worth_sharing(texts) if share else 0
    count = len(texts) // answers if share else len(texts)
    rows = zip(*(texts[at : at + count] for at in range(0, len(texts), count)), strict=True)
    end, parts, of_rows = prefix, [], []
    for row in rows:
        part, starts = _own_tokens(row, prefix, end)
        parts.append(part)
        of_rows.append(starts)
        end += len(part[0])
    if end % 2:  # oneDNN's products of an odd number of rows take 4% longer, of some 20%
        parts[-1] = _with_filler(*parts[-1])
    tokens, positions, branches = (torch.cat(kind) for kind in zip(*parts, strict=True))
    sizes = torch.tensor([len(part[0]) for part in parts])
    filled = torch.arange(int(sizes.max())) < sizes[:, None]
    of_texts = [starts for side in zip(*of_rows, strict=True) for starts in side]
    device = batch["input_ids"].device
    return FlatBatch(
        input_ids=torch.cat([texts[0][:prefix], tokens])[None].to(device),
        position_ids=torch.cat([torch.arange(prefix), positions])[None].to(device),
        prefix=prefix,
        longest=max(lengths),
        token_at=(filled.flatten().cumsum(0) - 1).clamp(min=0).to(device),
        place_of=filled.flatten().nonzero()[:, 0].to(device),
        branches=torch.full(filled.shape, NOWHERE).masked_scatter(filled, branches).to(device),
        predicting=torch.cat([_tokens_at(*pair) for pair in zip(learned.cpu(), of_texts, strict=True)]).to(device),
    )


def worth_sharing(texts) -> int:
    """How many tokens at the beginning of all texts are computed once: the common ones, unless those are few."""
    common = common_start(texts)
    return common if common >= SHORTEST_PREFIX else 0


def common_start(texts) -> int:
    """How many tokens all texts begin with alike. The last token of each is left out: a row is never empty."""
    shortest = min(map(len, texts)) - 1
    stacked = torch.stack([text[:shortest] for text in texts])
    return int((stacked == stacked[:1]).all(dim=0).cumprod(0).sum())


def _own_tokens(texts, prefix: int, end: int):
    """The part of a row (one text, or several that share their prompt) that comes after the prefix.

    Returns:
        ((tokens, positions, branches), of each text [(first position, which token that is), ...])
    """
    first = texts[0]
    fork = common_start(texts) if len(texts) > 1 else len(first)
    positions = [torch.arange(prefix, len(first)), *(torch.arange(fork, len(text)) for text in texts[1:])]
    tokens = [first[prefix:], *(text[fork:] for text in texts[1:])]
    starts, token = [[(0, 0), (prefix, end)]], end + len(tokens[0])
    for part in tokens[1:]:
        starts.append([(0, 0), (prefix, end), (fork, token)])
        token += len(part)
    branches = [torch.full((len(part),), number + 1) for number, part in enumerate(tokens)]
    branches[0][: fork - prefix] = 0
    return tuple(map(torch.cat, (tokens, positions, branches))), starts


def _with_filler(tokens, positions, branches):
    return (
        torch.cat([tokens, tokens[-1:]]),
        torch.cat([positions, positions[-1:]]),
        torch.cat([branches, torch.tensor([FILLER])]),
    )


def _tokens_at(places, starts: list[tuple[int, int]]):
    """Which tokens stand at the places of a text that are marked."""
    positions = places.nonzero()[:, 0]
    tokens = positions
    for position, token in starts:
        tokens = torch.where(positions >= position, positions - position + token, tokens)
    return tokens


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
