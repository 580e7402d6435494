"""Prompts to tokens: what the model reads, what it learns, and an audit that shows it.

By hand::

    python -m steps.tokenize_splits --prompts results/prompts/X --model results/models/Y \\
        --output results/splits/Z experiment=smoke

Reads   the prompts' train.jsonl, validation.jsonl and test.jsonl; the model's tokenizer.
Writes  a `datasets.DatasetDict` (train, validation, test) with the columns id, input_ids, labels
        (-100 where nothing is learned), prompt_length, prompt, reference (the text that the right answer's tokens
        make); of preference pairs also rejected_input_ids, rejected_labels, rejected: the same prompt tokens with the
        rejected answer (the other columns are then those of the chosen one). For a causal model labels stand at the
        positions of input_ids, and input_ids[:prompt_length] is exactly what the finished model is asked; for an
        encoder-decoder model input_ids is the prompt alone, and labels the answer with its end.
        audit.json (counts, length histogram, suggested max_length) and audit.txt (rows with their learned tokens
        marked).
"""

import bisect
import collections
import contextlib
import gc
import hashlib
import itertools
import json
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from steps.lib import limits
from steps.lib.conversation import DATE, Encoded, Encoder
from steps.lib.errors import UserError
from steps.lib.progress import Progress, quiet_libraries
from steps.lib.splits import IGNORED, features
from steps.lib.step import run_command

STAGE = "tokenize_splits"
SPLITS = ("train", "validation", "test")
BATCH = 2**18  # characters of the file that are tokenized at once: 1,000 rows of 50 tokens
ROWS = 1000  # that are written at once
SHOWN = 5  # rows in audit.txt
DROPPED = {  # what is said of rows that are dropped whatever their length
    "answer_cut_off_entirely": "tokenize.max_length cuts their last answer off",
    "answer_with_end_token": "an answer holds a token that ends answers, and what follows it could not be learned",
    "equal_pairs": "the chosen and the rejected answer are the same tokens",
}
TOLD = {  # what is said of rows that are kept
    "only_last_answer_learned": "only the last answer is learned, for the chat template shows earlier turns otherwise "
    "than when they were answered",
    "special_tokens_in_prompts": "a text spells a special token, which the model reads as that token",
}
NOTABLE = 0.05  # more rows than this share beyond max_length are worth a warning

log = logging.getLogger("temper")


def run(config: dict, prompts: Path, model: Path, output: Path) -> dict:
    """Tokenize all splits.

    Raises:
        UserError: a row is too long under ``max_length_policy: error``; a split has no rows left; the template refuses
            a row or changes its answer.
    """
    from datasets import DatasetDict

    from steps.lib.models import is_encoder_decoder, load_tokenizer, stop_token_ids

    quiet_libraries()
    tokenizer = load_tokenizer(model)
    encoder = Encoder(tokenizer, stop_token_ids(model, tokenizer), config["prompt"], is_encoder_decoder(model))
    _find_opening(encoder, prompts / "train.jsonl")
    _tell_what_others_do_not_know(encoder, config["prompt"].get("date") or DATE)
    audits, splits = {}, {}
    with _frozen(), tempfile.TemporaryDirectory(dir=output) as scratch:
        for split in SPLITS:
            rows = _Rows(prompts / f"{split}.jsonl", encoder, config["tokenize"])
            made = rows.dataset(Path(scratch) / f"{split}.arrow")
            audits[split] = rows.audit.summary()
            if len(made):  # `datasets` cannot read back a split without rows
                splits[split] = made
        limits.check(model, splits)
        DatasetDict(splits).save_to_disk(output)
        shown = _shown_rows(splits["train"], encoder)
    audit = {"max_length": config["tokenize"]["max_length"], "splits": audits}
    (output / "audit.json").write_text(json.dumps(audit, indent=2) + "\n", encoding="utf-8")
    (output / "audit.txt").write_text(shown, encoding="utf-8")
    _report(audits)
    return {"rows": {split: audit["rows"] for split, audit in audits.items()}, "opening": encoder.renderer.opening}


def _find_opening(encoder: Encoder, path: Path) -> None:
    """What the template puts between prompt and answer of the first row belongs to the prompt, in all of them."""
    with path.open(encoding="utf-8") as lines:
        record = json.loads(next(lines, "null"))
    if record is not None and not encoder.free:
        with _named(path, record):
            encoder.renderer.opening = encoder.renderer.opening_of(record["messages"])


def _tell_what_others_do_not_know(encoder: Encoder, date: str) -> None:
    """Where a program that loads the merged model, and knows nothing of the config, asks in other tokens."""
    shipped = "what steps.publish and steps.export_gguf write does"
    if encoder.renderer.reads_clock:
        log.warning(
            "warning: the chat template asks what day it is; here that is always prompt.date=%s, but other programs "
            "that load results/merged tell it today's (%s not)",
            date,
            shipped,
        )
    elif date != DATE:
        log.warning("warning: prompt.date=%s changes nothing: the chat template asks for no date", date)
    if encoder.renderer.opening:
        log.warning(
            "warning: the chat template writes %r before an answer, but not at the end of a prompt; here it is part of "
            "the prompt, so other programs that load results/merged must put it there (%s)",
            encoder.renderer.opening,
            shipped,
        )
    if (
        encoder.free
        and not encoder.apart
        and encoder.tokenizer("a")["input_ids"][-1] in encoder.tokenizer.all_special_ids
    ):
        log.warning(
            "warning: the tokenizer closes each text with a special token, which is left out before an answer: other "
            "programs must leave it out of the prompt as well"
        )


@contextlib.contextmanager
def _named(path: Path, record: dict):
    """An error of a row says which one it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: row {record['id']}: {error}") from None


@contextlib.contextmanager
def _frozen():
    """Keep Python from looking for garbage in all that is loaded, which took a quarter of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Rows:
    """One split: read, encode, count."""

    def __init__(self, path: Path, encoder: Encoder, tokenize: dict):
        self.path, self.encoder = path, encoder
        self.max_length, self.policy = tokenize["max_length"], tokenize["max_length_policy"]
        self.audit = Audit()
        self.texts: dict[tuple[int, ...], str] = {}
        with path.open(encoding="utf-8") as lines:
            self.pairs = "rejected" in json.loads(next(lines, "{}"))

    def dataset(self, path: Path):
        """The split as a `datasets.Dataset` that is read from the file it writes, `path`: many rows take no memory."""
        import pyarrow
        from datasets import Dataset, DatasetInfo

        columns = features(self.pairs)
        schema = columns.arrow_schema
        rows = self._rows()
        with pyarrow.ipc.new_stream(path, schema) as file:
            while some := list(itertools.islice(rows, ROWS)):
                file.write_table(pyarrow.Table.from_pylist(some, schema=schema))
        if not self.audit.rows and self.audit.read:
            raise UserError(f"{self.path}: no row is left of {self.audit.read}: {self._why()}")
        with path.open("rb") as file:  # `datasets` itself would copy all rows into memory for it
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        return Dataset(table, info=DatasetInfo(features=columns), fingerprint=fingerprint)

    def _why(self) -> str:
        """Why rows were dropped, and what to do."""
        audit, ways = self.audit, []
        if audit.too_long:
            ways.append(f"{audit.too_long} are longer than tokenize.max_length={self.max_length}; raise it")
        if audit.ended_early:
            ways.append(f"the answers of {audit.ended_early} hold a token that ends answers; leave it out of the data")
        if audit.equal:
            ways.append(f"in {audit.equal} the chosen and the rejected answer are the same tokens; correct the data")
        return "; ".join(ways)

    def _rows(self) -> Iterator[dict]:
        """The rows that are kept."""
        with Progress(None, f"tokenize {self.path.stem}", "rows") as progress:
            for records, encoded in self._encoded():
                for row in map(self._row, records, encoded):
                    if row is not None:
                        yield row
                progress.update(len(records))

    def _encoded(self) -> Iterator[tuple[list[dict], list[list[Encoded]]]]:
        """Records, and of each its one text, or the two of a pair, in tokens."""
        with self.path.open(encoding="utf-8") as lines:
            for records in _batches(lines):
                try:
                    encoded = self._encode(records)
                except UserError:  # one by one, to end with the error of the first row that has one
                    for record in records:
                        with _named(self.path, record):
                            encoded = self._encode([record])
                        yield [record], encoded
                else:
                    yield records, encoded

    def _encode(self, records: list[dict]) -> list[list[Encoded]]:
        pieces = self.encoder.pieces(self._conversations(records))
        if not self.encoder.apart:
            self.audit.last_only += sum(map(_learns_less, self._conversations(records), pieces)) // (1 + self.pairs)
        if self.pairs:
            return list(map(list, self.encoder.encode_pairs(pieces)))
        return [[one] for one in self.encoder.encode_pieces(pieces)]

    def _conversations(self, records: list[dict]) -> list[list[dict]]:
        """One of each record; of a pair one with the chosen and one with the rejected answer."""
        if not self.pairs:
            return [record["messages"] for record in records]
        return [
            conversation
            for record in records
            for conversation in (
                record["messages"],
                [*record["messages"][:-1], {"role": "assistant", "content": record["rejected"]}],
            )
        ]

    def _row(self, record: dict, encoded: list[Encoded]) -> dict | None:
        """What becomes of a record; None: it is dropped."""
        messages = record["messages"]
        self.audit.count(encoded, self.max_length)
        self.audit.special += self.encoder.names_special_tokens(messages)
        if any(one.ended_early for one in encoded):
            self.audit.ended_early += 1
            return None
        texts = [self._text(one.answer) for one in encoded]
        if max(one.length for one in encoded) > self.max_length:
            encoded = self._shortened(encoded, record["id"])
            if encoded is None:
                return None
        if len(encoded) == 2 and encoded[0].answer == encoded[1].answer:
            self.audit.equal += 1
            return None
        user = next(message["content"] for message in reversed(messages) if message["role"] == "user")
        self.audit.keep(encoded)
        row = {
            "id": record["id"],
            "input_ids": encoded[0].input_ids,
            "labels": encoded[0].labels,
            "prompt_length": encoded[0].prompt_length,
            "prompt": user,
            "reference": texts[0],
        }
        if len(encoded) == 2:
            row |= {"rejected_input_ids": encoded[1].input_ids, "rejected_labels": encoded[1].labels}
            row["rejected"] = texts[1]
        return row

    def _text(self, answer: list[int]) -> str:
        """What a model says that answers just so. Many rows of labels have the same few answers."""
        tokens = tuple(answer)
        if tokens not in self.texts:
            if len(self.texts) >= ROWS:
                self.texts.clear()
            self.texts[tokens] = self.encoder.text(answer)
        return self.texts[tokens]

    def _shortened(self, encoded: list[Encoded], number: int) -> list[Encoded] | None:
        """What `max_length_policy` makes of a row, or of a pair, that is too long; None: it is dropped."""
        if self.policy == "error":
            longest = max(one.length for one in encoded)
            raise UserError(
                f"{self.path}: row {number} has {longest} tokens, tokenize.max_length is {self.max_length}; "
                "raise it, or set tokenize.max_length_policy to drop or truncate"
            )
        if self.policy == "drop":
            return None
        short = [one.cut(self.max_length) for one in encoded]
        # The last answer is what is judged, and all that is learned of a pair: without it there is no row.
        if not all(one.answer for one in short):
            self.audit.nothing_left += 1
            return None
        return short


def _learns_less(messages: list[dict], turns: list) -> bool:
    return len(turns) < sum(message["role"] == "assistant" for message in messages)


def _batches(lines: Iterable[str]) -> Iterator[list[dict]]:
    """The records, in batches of about BATCH characters: long rows take no more memory than short ones."""
    batch, size = [], 0
    for line in lines:
        batch.append(json.loads(line))
        size += len(line)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Audit:
    """What happened to the rows of one split."""

    def __init__(self):
        self.lengths = collections.Counter()  # length -> rows, also those that were dropped
        self.too_long = self.nothing_left = self.retokenized = self.ended_early = self.equal = 0
        self.last_only = self.special = 0
        self.rows = self.tokens = self.learned = self.rejected = 0

    @property
    def read(self) -> int:
        return self.lengths.total()

    def count(self, encoded: list[Encoded], max_length: int) -> None:
        """A row that was read: one text, or the two of a pair, of which the longer counts."""
        length = max(one.length for one in encoded)
        self.lengths[length] += 1
        self.too_long += length > max_length
        self.retokenized += any(one.retokenized for one in encoded)

    def keep(self, encoded: list[Encoded]) -> None:
        self.rows += 1
        self.tokens += sum(one.tokens for one in encoded)
        self.learned += _learned(encoded[0])
        self.rejected += sum(_learned(one) for one in encoded[1:])

    def summary(self) -> dict:
        """Counts, quantiles and a histogram of lengths, and the `max_length` that would keep 99% of the rows."""
        read = self.read
        quantile = {str(q): self._length_of(min(read - 1, int(q * read))) for q in (0.5, 0.9, 0.99)} if read else {}
        suggested = -(-quantile["0.99"] // 8) * 8 if quantile else None
        return {
            "rows": self.rows,
            "read": read,
            "longer_than_max_length": self.too_long,
            "dropped": read - self.rows,
            "answer_cut_off_entirely": self.nothing_left,
            "answer_with_end_token": self.ended_early,
            "equal_pairs": self.equal,
            "only_last_answer_learned": self.last_only,
            "special_tokens_in_prompts": self.special,
            "tokenized_piecewise": self.retokenized,
            "tokens": self.tokens,
            "learned_tokens": self.learned,
            **({"rejected_tokens": self.rejected} if self.rejected else {}),
            "longest": max(self.lengths, default=None),
            "quantiles": quantile,
            "suggested_max_length": suggested,
            "histogram": _histogram(self.lengths),
        }

    def _length_of(self, rank: int) -> int:
        """Of the rows in the order of their lengths, the length of the one with this number, from 0."""
        lengths = sorted(self.lengths)
        return lengths[bisect.bisect_right(list(itertools.accumulate(map(self.lengths.get, lengths))), rank)]


def _learned(encoded: Encoded) -> int:
    return len(encoded.labels) - encoded.labels.count(IGNORED)


def _histogram(lengths: collections.Counter[int]) -> dict[str, int]:
    """Rows per power of two: ``{"33-64": 12, ...}``."""
    counts = collections.Counter()
    for length, rows in lengths.items():
        counts[max(1, 1 << (length - 1).bit_length())] += rows
    return {f"{top // 2 + 1}-{top}": counts[top] for top in sorted(counts)}


def _shown_rows(train, encoder: Encoder) -> str:
    """The first rows as text; what is learned stands between >>> and <<<."""
    pairs = "rejected" in train.column_names
    lines = ["What the model reads in training. It learns what stands between >>> and <<<, nothing else.\n"]
    if pairs:
        lines = [
            "What the model reads in training, the chosen answer first. Supervised fine-tuning learns what stands\n"
            "between >>> and <<< in it; preference optimization compares the last answers of the two.\n"
        ]
    if encoder.apart:
        lines[0] += "The encoder reads what stands before =>, the decoder makes what follows.\n"
    for row in train.select(range(min(SHOWN, len(train)))):
        title = f"--- row {row['id']}"
        lines.append(f"{title}{', chosen' if pairs else ''}\n{_marked(row['input_ids'], row['labels'], encoder)}\n")
        if pairs:
            lines.append(f"{title}, rejected\n{_marked(row['rejected_input_ids'], row['rejected_labels'], encoder)}\n")
    return "\n".join(lines)


def _marked(ids: list[int], labels: list[int], encoder: Encoder) -> str:
    tokenizer = encoder.tokenizer
    if encoder.apart:
        return f"{tokenizer.decode(ids)}\n=> >>>{tokenizer.decode(labels)}<<<"
    text, learning = "", False
    for token, label in zip(ids, labels, strict=True):
        if (label != IGNORED) != learning:
            text += "<<<" if learning else ">>>"
            learning = not learning
        text += tokenizer.decode([token])
    return text + ("<<<" if learning else "")


def _report(audits: dict[str, dict]) -> None:
    for split, audit in audits.items():
        log.info(
            "%s: %d rows, %d tokens, %d learned; dropped %d of %d rows (longest %s, 99%% within %s)",
            split,
            audit["rows"],
            audit["tokens"],
            audit["learned_tokens"],
            audit["dropped"],
            audit["read"],
            audit["longest"],
            audit["quantiles"].get("0.99"),
        )
        for name, what in TOLD.items():
            if audit[name]:
                log.warning("warning: %d of %d rows of %s: %s", audit[name], audit["read"], split, what)
        for name, what in DROPPED.items():
            if audit[name]:
                log.warning("warning: %d of %d rows of %s are left out: %s", audit[name], audit["read"], split, what)
        if audit["longer_than_max_length"] > NOTABLE * audit["read"]:
            log.warning(
                "warning: %d of %d rows of %s are longer than tokenize.max_length; %s would keep 99%% of them",
                audit["longer_than_max_length"],
                audit["read"],
                split,
                audit["suggested_max_length"],
            )


def main(argv=None) -> None:
    inputs = {"prompts": "folder of format_prompts", "model": "folder of fetch_model"}
    run_command(sys.modules[__name__], inputs, argv)


if __name__ == "__main__":
    main()
