"""Turn prompts into tokens: what the model reads, what it learns, and an audit that shows it.

By hand::

    python -m steps.tokenize_splits --prompts results/prompts/X --model results/models/Y \\
        --output results/splits/Z experiment=smoke

Reads   the prompts' train.jsonl, validation.jsonl and test.jsonl; the model's tokenizer.
Writes  a `datasets.DatasetDict` (train, validation, test) with the columns id, input_ids, labels
        (-100 where nothing is learned), prompt_length, prompt, reference (the right answer's tokens decoded), and
        group and source where the prompts have them.
        Preference pairs also have rejected_input_ids, rejected_labels and rejected, the same prompt with the rejected
        answer; the other columns then hold the chosen one. Single answers that are desirable or not have `label`. For a
        causal model, labels align with input_ids, and input_ids[:prompt_length] is exactly the prompt that the finished
        model gets. For an encoder-decoder model, input_ids is the prompt alone, and labels the answer with its end. A
        conversation whose chat template shows
        earlier turns otherwise than they were answered (most drop their reasoning) becomes several rows of train with
        one id, each answer behind the history that it has at inference; of validation and test its last answer is kept.
        Where rows have reasoning, reference is the answer behind it, and reasoning_start and reasoning_end are the
        texts around it.
        overlap.json (which rows of validation and test stand in train, and where the data report is).
        serving.json (sums of tokenizer and template: `temper.model.serving`).
        audit.json (counts, length histogram, suggested max_length), and for people audit.html (the same, and 20 rows
        token by token) and audit.txt (5 rows with what is learned marked).
"""

import contextlib
import gc
import hashlib
import itertools
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from temper.config.audit import check as check_audit
from temper.config.stages import TokenizeSplits
from temper.data import in_train
from temper.data.audit import Audit, doubled, report, shown_rows
from temper.data.chat_template import ChatTemplate
from temper.data.chunks import chunks
from temper.data.columns import ABOUT, SPLITS, features, final_answer
from temper.data.conversations import Conversation, has_reasoning, is_rich, of_record
from temper.data.encoder import Encoded, Encoder
from temper.data.rendering import Turn
from temper.data.templates import DATE
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
            a row or changes its answer; more rows were left out or cut than `tokenize.max_share` allows.
    """
    from datasets import DatasetDict

    from temper.model.loading import is_encoder_decoder, load_tokenizer, stop_token_ids
    from temper.reports.audit_page import write_page

    quiet_libraries()
    tokenizer = load_tokenizer(model)
    encoder = Encoder(
        tokenizer, stop_token_ids(model, tokenizer), config.prompt.model_dump(), is_encoder_decoder(model)
    )
    marks = _look_at_template(encoder, prompts)
    _tell_what_others_do_not_know(encoder, config.prompt.date)
    audits, splits = {}, {}
    with _frozen(), tempfile.TemporaryDirectory(dir=output) as scratch:
        for split in SPLITS:
            rows = _Rows(prompts / f"{split}.jsonl", encoder, config.tokenize.model_dump(), marks)
            made = rows.dataset(Path(scratch) / f"{split}.arrow")
            audits[split] = rows.audit.summary()
            if len(made):  # `datasets` cannot read back a split without rows
                splits[split] = made
        context = limits.limits_of(model).positions
        audit = {"max_length": config.tokenize.max_length, "context": context, "splits": audits}
        report(audits)
        check_audit(audit, config.tokenize.model_dump(), prompts)
        limits.check(model, splits)
        DatasetDict(splits).save_to_disk(output)
        shown = shown_rows(splits["train"], encoder)
        write_page(output, audit, splits["train"], tokenizer, encoder.apart)
    (output / "audit.json").write_text(json.dumps(audit, indent=2) + "\n", encoding="utf-8")
    (output / "audit.txt").write_text(shown, encoding="utf-8")
    serving.write(output, serving.of_folder(model, tokenizer))
    in_train.write(prompts, output)
    written = {"opening": encoder.renderer.opening, "rich": encoder.renderer.rich}
    return {"rows": {split: audit["rows"] for split, audit in audits.items()}, **written}


def _look_at_template(encoder: Encoder, prompts: Path) -> tuple[str, str] | None:
    """Find what the template writes between prompts and answers, which belongs to the prompt in all rows.

    Returns:
        What it writes around reasoning, if the rows have some.
    """
    path, renderer = prompts / "train.jsonl", encoder.renderer
    record = next(each_json_line(path), None)
    if record is None or not isinstance(renderer, ChatTemplate):
        return None
    renderer.rich = _has_rich_rows(path)
    with _named(path, record):
        renderer.find_opening(of_record(record))
        marks = renderer.reasoning_marks(of_record(record)) if renderer.rich else ("", "")
    return marks if marks[1] else None


RICH = (b'"tool_calls"', b'"reasoning_content"', b"</think>")


def _has_rich_rows(path: Path) -> bool:
    """Whether a row has reasoning or tool calls. Parses only lines that may be such rows."""
    with path.open("rb") as file:
        return any(is_rich(json.loads(line)["messages"]) for line in file if any(mark in line for mark in RICH))


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

    def __init__(self, path: Path, encoder: Encoder, tokenize: dict, marks: tuple[str, str] | None):
        self.path, self.encoder = path, encoder
        self.marks = dict(zip(("reasoning_start", "reasoning_end"), marks, strict=True)) if marks else {}
        self.max_length, self.policy = tokenize["max_length"], tokenize["max_length_policy"]
        self.audit = Audit(encoder.allow_special_text)
        self.begin = {encoder.tokenizer.bos_token_id} - {None}
        self.ends = encoder.stop_ids & encoder.added  # a line end may end answers, too, and comes twice in any text
        self.texts: dict[tuple[int, ...], str] = {}
        first: dict = next(each_json_line(path), {})
        self.pairs, self.labels = "rejected" in first, "label" in first
        self.about = [name for name in ABOUT if name in first]

    def dataset(self, path: Path):
        """Write the split to `path` and open that as a `datasets.Dataset`, so that rows do not stay in memory."""
        import pyarrow
        from datasets import Dataset, DatasetInfo

        columns = features(self.pairs, bool(self.marks), self.labels, self.about)
        schema = columns.arrow_schema
        rows = self._rows()
        with pyarrow.ipc.new_stream(path, schema) as file:
            while some := list(itertools.islice(rows, ROWS)):
                table = pyarrow.Table.from_pylist(some, schema=schema)
                self._count_doubled(table)
                file.write_table(table)
        if not self.audit.rows and self.audit.read:
            raise UserError(f"{self.path}: no row is left of {self.audit.read}: {self._why()}")
        with path.open("rb") as file:  # `datasets` itself would copy all rows into memory here
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        return Dataset(table, info=DatasetInfo(features=columns), fingerprint=fingerprint)

    def _count_doubled(self, table) -> None:
        """Count the rows of a table in which a begin token, or one that ends answers, comes twice in a row."""
        for name in limits.READ:
            if name in table.column_names:
                texts, ids = table[name].combine_chunks(), table["id"]
                found = (doubled(texts, self.begin)[0], doubled(texts, self.ends - self.begin)[1])
                for what, rows in zip(("doubled_begin", "doubled_end"), found, strict=True):
                    for row in rows:
                        self.audit.find(what, ids[row].as_py())

    def _why(self) -> str:
        """Say why rows were dropped, and what to do."""
        counts, ways = self.audit.counts, []
        if long := counts["longer_than_max_length"]:
            ways.append(f"{long} are longer than tokenize.max_length={self.max_length}; raise it")
        if early := counts["answer_with_end_token"]:
            ways.append(f"the answers of {early} hold a token that ends answers; leave it out of the data")
        if equal := counts["equal_pairs"]:
            ways.append(f"in {equal} the chosen and the rejected answer are the same tokens; correct the data")
        return "; ".join(ways)

    def _rows(self) -> Iterator[dict]:
        """The rows that are kept."""
        with Progress(None, f"tokenize {self.path.stem}", "rows") as progress:
            for records in chunks(each_json_line(self.path), _characters, BATCH):
                for made in self._encoded(records):
                    if row := self._row(*made):
                        yield row
                    else:
                        self.audit.find("dropped", made[0]["id"])
                progress.update(len(records))

    def _encoded(self, records: list[dict]) -> Iterator[tuple[dict, int, list[Encoded]]]:
        """(record, place of its answer, encoded texts), for each text of a record; for a pair, both texts together."""
        try:
            found = self._encode(records)
        except UserError:  # one by one, to raise the error of the first faulty row
            for record in records:
                with _named(self.path, record):
                    found = self._encode([record])
                yield from found
        else:
            yield from found

    def _encode(self, records: list[dict]) -> list[tuple[dict, int, list[Encoded]]]:
        conversations = self._conversations(records)
        texts = self.encoder.pieces(conversations)
        every = self.path.stem == "train" and not self.pairs and not self.labels  # a label is of the last answer
        if self.pairs:
            places = [found[-1][-1].place for found in texts[::2]]
            pairs = self.encoder.encode_pairs([found[-1] for found in texts])
            made = [(record, at, list(pair)) for record, at, pair in zip(records, places, pairs, strict=True)]
        else:
            kept = [found[0 if every else -1 :] for found in texts]
            flat = [(record, text) for record, found in zip(records, kept, strict=True) for text in found]
            encoded = self.encoder.encode_pieces([text for _, text in flat])
            made = [(record, text[-1].place, [one]) for (record, text), one in zip(flat, encoded, strict=True)]
        alone = slice(None, None, 1 + self.pairs)  # of a pair the chosen answer
        self._count(records, conversations[alone], texts[alone], every)
        return made

    def _conversations(self, records: list[dict]) -> list[Conversation]:
        """One conversation per record; for a pair two, with the chosen and with the rejected answer."""
        conversations = list(map(of_record, records))
        if not self.pairs:
            return conversations
        return [
            text
            for record, chosen in zip(records, conversations, strict=True)
            for text in (chosen, _answered(chosen, record["rejected"]))
        ]

    def _count(
        self, records: list[dict], conversations: list[Conversation], texts: list[list[list[Turn]]], every: bool
    ) -> None:
        """Count what the chat template and the texts of some conversations are like.

        Args:
            every: whether each text of a conversation is a row, and not the last one only.
        """
        audit, ids = self.audit, [record["id"] for record in records]
        for number, found in zip(ids, texts, strict=True):
            more = len(found) - 1
            if more:
                audit.find("became_several_rows" if every else "only_last_answer_learned", number)
            if more and every:
                audit.counts["became_several_rows"] += more  # all of them
                audit.counts["rows_from_earlier_answers"] += more
        for at in self.encoder.spelling(conversations, texts):
            audit.find(audit.special, ids[at])
        if self.encoder.renderer.rich:
            for number, conversation, found in zip(ids, conversations, texts, strict=True):
                self._count_reasoning(number, conversation, [text[-1] for text in found[0 if every else -1 :]])

    def _count_reasoning(self, number: int, conversation: Conversation, answers: list[Turn]) -> None:
        for turn in answers:
            if turn.written:
                self.audit.find("reasoning_not_in_template", number)
            if "</think>" in turn.answer and not has_reasoning(conversation.messages[turn.place]):
                self.audit.find("without_reasoning", number)

    def _row(self, record: dict, place: int, encoded: list[Encoded]) -> dict | None:
        """The finished row of a record, or None if it is dropped."""
        self.audit.count(record["id"], encoded, self.max_length)
        if any(one.ended_early for one in encoded):
            self.audit.find("answer_with_end_token", record["id"])
            return None
        texts = [self._text(one.answer) for one in encoded]
        if max(one.length for one in encoded) > self.max_length:
            shortened = self._shortened(encoded, record["id"])
            if shortened is None:
                return None
            encoded = shortened
            self.audit.find("truncated", record["id"])
        if len(encoded) == 2 and encoded[0].answer == encoded[1].answer:
            self.audit.find("equal_pairs", record["id"])
            return None
        messages = record["messages"][:place]
        user = next(message["content"] for message in reversed(messages) if message["role"] == "user")
        self.audit.keep(record["id"], encoded, self.encoder.stop_ids)
        row = {
            "id": record["id"],
            "input_ids": encoded[0].input_ids,
            "labels": encoded[0].labels,
            "prompt_length": encoded[0].prompt_length,
            "prompt": user,
            "reference": texts[0],
            **{name: record[name] for name in self.about},
            **self.marks,
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
            self.texts[tokens] = final_answer(self.encoder.text(answer), self.marks)
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
            self.audit.find("answer_cut_off_entirely", number)
            return None
        return short


def _answered(conversation: Conversation, answer: str) -> Conversation:
    """The conversation with another last answer."""
    return conversation._replace(
        messages=[*conversation.messages[:-1], {"role": "assistant", "content": answer}],
    )


def _characters(record: dict) -> int:
    """Of a record's texts."""
    return sum(len(message["content"]) for message in record["messages"]) + len(record.get("rejected", ""))


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
