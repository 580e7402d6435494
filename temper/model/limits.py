"""A model's limits: how many tokens, and which. Rows beyond them are found before any training."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from temper.data.columns import DOCUMENTS
from temper.errors import UserError
from temper.model.loading import BUNDLED, load_config, load_tokenizer
from temper.model.reading import reading

READ = ("input_ids", "rejected_input_ids")  # columns of token ids
ANSWERED = ("labels", "rejected_labels")  # for an encoder-decoder model these are separate texts
# Config fields with the longest text. GPT-2's n_positions also has the first name; the others are LED's.
POSITIONS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")


@dataclasses.dataclass
class Limits:
    """The limits of one model.

    `positions`: the most tokens in one text; None: no limit (T5 and BLOOM count distances). A text is prompt plus
    answer for a causal model, and either of them for an encoder-decoder. Rotary positions have a limit, too: beyond it
    a model still computes, but on positions it never learned.
    `vocabulary`: token ids are below it. `virtual_tokens`: those of an adapter, before each text.
    """

    model: Path
    positions: int | None
    vocabulary: int
    apart: bool
    virtual_tokens: int

    @property
    def context(self) -> float:
        """The most tokens in one text, not counting virtual ones; infinite without a limit."""
        return float("inf") if self.positions is None else self.positions - self.virtual_tokens

    def check_answer(self, prompt: int, max_new_tokens: int, where: str = "", setting: str = "max_new_tokens") -> None:
        """Check that a prompt of so many tokens leaves room for its answer.

        Raises:
            UserError: it does not. The message starts with `where` and calls the answer's limit `setting`.
        """
        needed = max(prompt, max_new_tokens) if self.apart else prompt + max_new_tokens
        if needed > self.context:
            raise UserError(
                f"{where}the prompt has {prompt} tokens and the answer may have {max_new_tokens} ({setting}), "
                f"but the model's context is {self.context}: shorten the one or the other"
            )

    def check_prompts(self, rows, split: str, max_new_tokens: int, setting: str) -> None:
        """Check that all prompts of a split leave room for their answers."""
        longest, row = max(zip(rows["prompt_length"], rows["id"], strict=True))
        self.check_answer(longest, max_new_tokens, f"{split} split, row {row} of the raw data: ", setting)

    def check_rows(self, rows, split: str) -> None:
        """Check all texts of a split.

        Raises:
            UserError: one is longer than the model's context, or has a token that the model does not know.
        """
        import pyarrow.compute as compute

        table = rows.with_format("arrow")[:]
        names = [name for name in (*READ, *(ANSWERED if self.apart else ())) if name in table.column_names]
        documents = DOCUMENTS in table.column_names  # which share a row, and are each a text
        for name in names:
            texts = table[name]
            lengths = compute.list_flatten(table[DOCUMENTS]) if documents else compute.list_value_length(texts)
            longest = compute.max(lengths).as_py()
            largest = compute.max(compute.list_flatten(texts)).as_py()
            if longest > self.context:
                row = next(row for row in rows if longest in (row[DOCUMENTS] if documents else [len(row[name])]))
                packed = " or one that shares a row with it" if documents and len(row[DOCUMENTS]) > 1 else ""
                self._refuse_length(longest, f"{split} split, row {row['id']} of the raw data{packed}")
            if largest is not None and largest >= self.vocabulary:
                row = next(row for row in rows if largest in row[name])
                self._refuse_token(largest, f"{split} split, row {row['id']} of the raw data")

    def _refuse_length(self, length: int, where: str) -> None:
        raise UserError(
            f"{where}: it has {length} tokens, but the model's context is {self.context}: set tokenize.max_length="
            f"{self.context} (tokenize.max_length_policy says what becomes of longer rows)"
        )

    def _refuse_token(self, token: int, where: str) -> None:
        word = load_tokenizer(self.model).convert_ids_to_tokens(token)
        raise UserError(
            f"{where}: it has token {token} ({word}), but the model's embedding has {self.vocabulary} rows: the token "
            "was added to the tokenizer alone; call model.resize_token_embeddings(len(tokenizer)) and save the model"
        )


def limits_of(model: Path, virtual_tokens: int = 0) -> Limits:
    """The limits of the model in a folder.

    Args:
        virtual_tokens: those of the adapter to be loaded, in addition to those of one in the folder.
    """
    config = load_config(model)
    text = config.get_text_config()
    bundled = model / BUNDLED
    if (bundled / "adapter_config.json").is_file():
        virtual_tokens += virtual_tokens_of(bundled)
    return Limits(model, _positions(text), text.vocab_size, bool(config.is_encoder_decoder), virtual_tokens)


def virtual_tokens_of(adapter: Path) -> int:
    """Number of virtual tokens that an adapter puts before each text."""
    with reading(adapter / "adapter_config.json"):
        return json.loads((adapter / "adapter_config.json").read_text()).get("num_virtual_tokens") or 0


def _positions(config) -> int | None:
    """The context in tokens: as in the config, or as extended by scaled rotary positions (YaRN, ...)."""
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):  # distant tokens just count less
        return None
    said = [value for name in POSITIONS if (value := getattr(config, name, None))]
    rope = getattr(config, "rope_parameters", None) or {}
    stretched = (rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or 0)
    return max(min(said), int(stretched)) if said else None


def check(
    model: Path,
    splits: Mapping,
    answered: Iterable[str] = (),
    max_new_tokens: int = 0,
    setting: str = "eval.max_new_tokens",
    virtual_tokens: int = 0,
) -> None:
    """Check splits, as tokenize_splits makes them, against the model in a folder.

    Args:
        answered: splits whose prompts the model will answer, in at most `max_new_tokens` tokens each; `setting` is
            the name of that limit.

    Raises:
        UserError: a row, or a prompt and its answer, is longer than the model's context, or has an unknown token.
    """
    limits = limits_of(model, virtual_tokens)
    for split, rows in splits.items():
        if len(rows):
            limits.check_rows(rows, split)
            if split in answered:
                limits.check_prompts(rows, split, max_new_tokens, setting)
