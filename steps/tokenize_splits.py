"""Turn prompts into tokens: what the model reads, what it learns, and an audit that shows it.

By hand::

    python -m steps.tokenize_splits --prompts results/prompts/X --model results/models/Y \\
        --output results/splits/Z experiment=smoke

Reads   the prompts' train.jsonl, validation.jsonl and test.jsonl; the model's tokenizer.
Writes  a `datasets.DatasetDict` (train, validation, test) with the columns id, input_ids, labels
        (-100 where nothing is learned), prompt_length, prompt, reference (the right answer's tokens decoded).
        Preference pairs also have rejected_input_ids, rejected_labels and rejected, the same prompt with the rejected
        answer; the other columns then hold the chosen one. Single answers that are desirable or not have `label`. For a
        causal model, labels align with input_ids, and input_ids[:prompt_length] is exactly the prompt that the finished
        model gets. For an encoder-decoder model, input_ids is the prompt alone, and labels the answer with its end.
        serving.json (sums of tokenizer and template: `temper.model.serving`).
        audit.json (counts, length histogram, suggested max_length) and audit.txt (rows with their learned tokens
        marked).
"""

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

from temper.config.stages import TokenizeSplits
from temper.data.audit import Audit, report, shown_rows
from temper.data.columns import SPLITS, features
from temper.data.encoder import DATE, Encoded, Encoder
from temper.data.rendering import ChatTemplate
from temper.errors import UserError
from temper.files import each_json_line
from temper.model import limits, serving
from temper.progress import Progress, quiet_libraries
from temper.step import run_command

STAGE = "tokenize_splits"
BATCH = 2**18  # characters of the file tokenized at once: 1,000 rows of 50 tokens
ROWS = 1000  # rows written at once
log = logging.getLogger("temper")


def run(config: TokenizeSplits, prompts: Path, model: Path, output: Path) -> dict:
    """Tokenize all splits.

    Raises:
        UserError: a row is too long under ``max_length_policy: error``; a split has no rows left; the template refuses
            a row or changes its answer.
    """
    from datasets import DatasetDict

    from temper.model.loading import is_encoder_decoder, load_tokenizer, stop_token_ids

    quiet_libraries()
    tokenizer = load_tokenizer(model)
    encoder = Encoder(
        tokenizer, stop_token_ids(model, tokenizer), config.prompt.model_dump(), is_encoder_decoder(model)
    )
    _find_opening(encoder, prompts / "train.jsonl")
    _tell_what_others_do_not_know(encoder, config.prompt.date)
    audits, splits = {}, {}
    with _frozen(), tempfile.TemporaryDirectory(dir=output) as scratch:
        for split in SPLITS:
            rows = _Rows(prompts / f"{split}.jsonl", encoder, config.tokenize.model_dump())
            made = rows.dataset(Path(scratch) / f"{split}.arrow")
            audits[split] = rows.audit.summary()
            if len(made):  # `datasets` cannot read back a split without rows
                splits[split] = made
        limits.check(model, splits)
        DatasetDict(splits).save_to_disk(output)
        shown = shown_rows(splits["train"], encoder)
    audit = {"max_length": config.tokenize.max_length, "splits": audits}
    (output / "audit.json").write_text(json.dumps(audit, indent=2) + "\n", encoding="utf-8")
    (output / "audit.txt").write_text(shown, encoding="utf-8")
    serving.write(output, serving.of_folder(model, tokenizer))
    report(audits)
    return {"rows": {split: audit["rows"] for split, audit in audits.items()}, "opening": encoder.renderer.opening}


def _find_opening(encoder: Encoder, path: Path) -> None:
    """What the template writes between the first row's prompt and answer; in all rows it belongs to the prompt."""
    record = next(each_json_line(path), None)
    if record is not None and isinstance(encoder.renderer, ChatTemplate):
        with _named(path, record):
            encoder.renderer.opening = encoder.renderer.opening_of(record["messages"])


def _tell_what_others_do_not_know(encoder: Encoder, date: str) -> None:
    """Warn if programs that know the merged model but not the config would prompt it with different tokens."""
    shipped = "what `temper publish` and `temper export` write does"
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
    """Add the row's number to its errors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: row {record['id']}: {error}") from None


@contextlib.contextmanager
def _frozen():
    """Keep the garbage collector from scanning everything loaded, which took a quarter of the time."""
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
        first: dict = next(each_json_line(path), {})
        self.pairs, self.labels = "rejected" in first, "label" in first

    def dataset(self, path: Path):
        """Write the split to `path` and open that as a `datasets.Dataset`, so that rows do not stay in memory."""
        import pyarrow
        from datasets import Dataset, DatasetInfo

        columns = features(self.pairs, self.labels)
        schema = columns.arrow_schema
        rows = self._rows()
        with pyarrow.ipc.new_stream(path, schema) as file:
            while some := list(itertools.islice(rows, ROWS)):
                file.write_table(pyarrow.Table.from_pylist(some, schema=schema))
        if not self.audit.rows and self.audit.read:
            raise UserError(f"{self.path}: no row is left of {self.audit.read}: {self._why()}")
        with path.open("rb") as file:  # `datasets` itself would copy all rows into memory here
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        return Dataset(table, info=DatasetInfo(features=columns), fingerprint=fingerprint)

    def _why(self) -> str:
        """Say why rows were dropped, and what to do."""
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
        """Records with their encoded texts: one each, or two for a pair."""
        for records in _batches(each_json_line(self.path)):
            try:
                encoded = self._encode(records)
            except UserError:  # one by one, to raise the error of the first faulty row
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
        """One conversation per record; for a pair two, with the chosen and with the rejected answer."""
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
        """The finished row of a record, or None if it is dropped."""
        messages = record["messages"]
        self.audit.count(encoded, self.max_length)
        self.audit.special += self.encoder.names_special_tokens(messages)
        if any(one.ended_early for one in encoded):
            self.audit.ended_early += 1
            return None
        texts = [self._text(one.answer) for one in encoded]
        if max(one.length for one in encoded) > self.max_length:
            shortened = self._shortened(encoded, record["id"])
            if shortened is None:
                return None
            encoded = shortened
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
        if self.labels:
            row["label"] = record["label"]
        return row

    def _text(self, answer: list[int]) -> str:
        """The text of a perfect answer. Cached, because many rows of labels have the same few answers."""
        tokens = tuple(answer)
        if tokens not in self.texts:
            if len(self.texts) >= ROWS:
                self.texts.clear()
            self.texts[tokens] = self.encoder.text(answer)
        return self.texts[tokens]

    def _shortened(self, encoded: list[Encoded], number: int) -> list[Encoded] | None:
        """Apply `max_length_policy` to a row or pair that is too long. None: it is dropped."""
        if self.policy == "error":
            longest = max(one.length for one in encoded)
            raise UserError(
                f"{self.path}: row {number} has {longest} tokens, tokenize.max_length is {self.max_length}; "
                "raise it, or set tokenize.max_length_policy to drop or truncate"
            )
        if self.policy == "drop":
            return None
        short = [one.cut(self.max_length) for one in encoded]
        # Evaluation judges the last answer, and a pair learns nothing else: a row without it is useless.
        if not all(one.answer for one in short):
            self.audit.nothing_left += 1
            return None
        return short


def _learns_less(messages: list[dict], turns: list) -> bool:
    return len(turns) < sum(message["role"] == "assistant" for message in messages)


def _batches(records: Iterable[dict]) -> Iterator[list[dict]]:
    """The records, in batches of about BATCH characters: long rows take no more memory than short ones."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += sum(len(message["content"]) for message in record["messages"]) + len(record.get("rejected", ""))
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
