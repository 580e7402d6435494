"""A split's rows as tokens, written to a file while they are read, and counted."""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any

from temper.data import documents
from temper.data.audit import Audit, doubled
from temper.data.chunks import chunks
from temper.data.columns import ABOUT, DOCUMENTS, IGNORED, features, final_answer
from temper.data.conversations import Conversation, asked_text, has_reasoning, is_document, of_record
from temper.data.documents import Piece
from temper.data.encoder import Encoded, Encoder
from temper.data.rendering import Turn
from temper.data.special_text import SpecialText
from temper.data.workers import in_order, worth
from temper.errors import UserError
from temper.files import each_json_line, json_of, line_chunks
from temper.model import limits
from temper.progress import Progress

BATCH = 2**18  # bytes or characters of the file tokenized at once: 1,000 rows of 50 tokens
ROWS = 1000  # rows of documents written at once, and texts of answers kept


@contextlib.contextmanager
def named(path: Path, record: dict):
    """Add the row's number to its errors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: row {record['id']}: {error}") from None


class Split:
    """Reads the rows of one split, makes token ids of them, and counts.

    Args:
        path: the file of conversations or documents.
        tokenizer: of the model.
        stop_ids: token ids that end an answer.
        tokenize: the config section.
    """

    POLICY = "drop"  # what becomes of rows that are too long, where the config does not say it

    def __init__(self, path: Path, tokenizer, stop_ids: Collection[int], tokenize: dict, special_allowed: bool):
        self.path, self.stop_ids = path, frozenset(stop_ids)
        self.max_length, self.policy = tokenize["max_length"], tokenize["max_length_policy"] or self.POLICY
        self.audit = Audit(special_allowed)
        self.begin = {tokenizer.bos_token_id} - {None}
        # A line end may end answers, too, and comes twice in any text.
        self.ends = self.stop_ids & frozenset(tokenizer.added_tokens_decoder)
        self.first: dict = next(each_json_line(path), {})
        self.about = [name for name in ABOUT if name in self.first]

    def features(self):
        """The columns of the split, as `datasets.Features`."""
        return features(about=self.about)

    def dataset(self, path: Path):
        """Write the split to `path` and open that as a `datasets.Dataset`, so that rows do not stay in memory."""
        import pyarrow
        from datasets import Dataset, DatasetInfo

        columns = self.features()
        schema = columns.arrow_schema
        with pyarrow.ipc.new_stream(path, schema) as file, contextlib.closing(self._tables(schema)) as tables:
            for table in tables:
                file.write_table(table)
        if not self.audit.rows and self.audit.read:
            raise UserError(f"{self.path}: no row is left of {self.audit.read}: {self._why()}")
        with path.open("rb") as file:  # `datasets` itself would copy all rows into memory here
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        return Dataset(table, info=DatasetInfo(features=columns), fingerprint=fingerprint)

    def _tables(self, schema) -> Generator:
        """The rows that are kept, as `pyarrow.Table`s of this schema."""
        raise NotImplementedError

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

    def _refuse_length(self, length: int, number: int) -> None:
        """Under `max_length_policy: error`, refuse a row that is too long."""
        if self.policy == "error":
            raise UserError(
                f"{self.path}: row {number} has {length} tokens, tokenize.max_length is {self.max_length}; "
                "raise it, or set tokenize.max_length_policy to drop or truncate"
            )


class Conversations(Split):
    """A split of conversations.

    Args:
        marks: what the template writes around reasoning, if the rows have some.
    """

    def __init__(self, path: Path, encoder: Encoder, tokenize: dict, marks: tuple[str, str] | None):
        super().__init__(path, encoder.tokenizer, encoder.stop_ids, tokenize, encoder.allow_special_text)
        if self.policy == "split":
            raise UserError(
                "config: 'tokenize.max_length_policy': split is for documents (data.layout=text), and these rows are "
                "conversations: choose drop, truncate or error"
            )
        self.encoder = encoder
        ends = [] if encoder.allow_special_text else encoder.tokenizer.convert_ids_to_tokens(sorted(self.ends))
        self.end_texts = tuple(filter(None, ends))  # as rows may spell them
        self.marks = dict(zip(("reasoning_start", "reasoning_end"), marks, strict=True)) if marks else {}
        self.texts: dict[tuple[int, ...], str] = {}
        self.pairs, self.labels = "rejected" in self.first, "label" in self.first

    def features(self):
        return features(self.pairs, bool(self.marks), self.labels, self.about)

    def _tables(self, schema) -> Generator:
        """A table for each chunk of the file, made by several processes if the file is large."""
        total, name, workers = self.audit, f"tokenize {self.path.stem}", worth(self.path.stat().st_size)
        made = in_order(functools.partial(self._table, schema), line_chunks(self.path, BATCH), workers, self.path)
        with Progress(None, name, "rows") as progress, contextlib.closing(made):
            for records, table, audit in made:
                total.add(audit)
                progress.update(records)
                yield table
        self.audit = total

    def _table(self, schema, lines: list[bytes]) -> tuple[int, Any, Audit]:
        """(records, table of the rows that are kept of them, counts) of some lines."""
        import pyarrow

        self.audit, records = Audit(self.encoder.allow_special_text), json_of(lines, self.path)
        rows = []
        for made in self._encoded(records):
            if row := self._row(*made):
                rows.append(row)
            else:
                self.audit.find("dropped", made[0]["id"])
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        self._count_doubled(table)
        return len(records), table, self.audit

    def _count_doubled(self, table) -> None:
        """Count the rows of a table in which a begin token, or one that ends answers, comes twice in a row."""
        for name in limits.READ:
            if name in table.column_names:
                texts, ids = table[name].combine_chunks(), table["id"]
                found = (doubled(texts, self.begin)[0], doubled(texts, self.ends - self.begin)[1])
                for what, rows in zip(("doubled_begin", "doubled_end"), found, strict=True):
                    for row in rows:
                        self.audit.find(what, ids[row].as_py())

    def _encoded(self, records: list[dict]) -> Iterator[tuple[dict, int, list[Encoded]]]:
        """(record, place of its answer, encoded texts), for each text of a record; for a pair, both texts together."""
        try:
            found = self._encode(records)
        except UserError:  # one by one, to raise the error of the first faulty row
            for record in records:
                with named(self.path, record):
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
            if conversations[at].messages[-1]["content"].rstrip().endswith(self.end_texts):
                audit.find("end_spelled", ids[at])
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
        self.audit.keep(record["id"], encoded, self.encoder.stop_ids)
        row = {
            "id": record["id"],
            "input_ids": encoded[0].input_ids,
            "labels": encoded[0].labels,
            "prompt_length": encoded[0].prompt_length,
            "prompt": asked_text(record["messages"][:place]),
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
        self._refuse_length(max(one.length for one in encoded), number)
        if self.policy == "drop":
            return None
        short = [one.cut(self.max_length) for one in encoded]
        # Evaluation judges the last answer, and a pair learns nothing else: a row without it is useless.
        if not all(one.answer for one in short):
            self.audit.find("answer_cut_off_entirely", number)
            return None
        return short


class Documents(Split):
    """A split of documents (data.layout=text).

    Args:
        pack: whether documents share a row, as they do where they are learned. In other splits each row is a document,
            or a part of one, so that each has a figure of its own.
    """

    POLICY = "split"

    def __init__(self, path: Path, tokenizer, stop_ids: Collection[int], tokenize: dict, allowed: bool, pack: bool):
        super().__init__(path, tokenizer, stop_ids, tokenize, allowed)
        self.documents, self.pack = documents.Documents(tokenizer, allowed), pack
        self.special = SpecialText(tokenizer, self.stop_ids)
        self.about = list(dict.fromkeys([*self.about, "group"]))

    def features(self):
        return features(about=self.about, documents=True)

    def _tables(self, schema) -> Generator:
        """A table for each `ROWS` rows. Tokenizing is most of the work, for which tokenizers has its own threads."""
        import pyarrow

        rows = self._rows()
        while some := list(itertools.islice(rows, ROWS)):
            yield pyarrow.Table.from_pylist(some, schema=schema)

    def _rows(self) -> Iterator[dict]:
        """The rows that are kept."""
        if not self.pack:
            yield from (self._row([part]) for part in self._parts())
            return
        for _, parts in itertools.groupby(self._parts(), lambda part: part[0].get("source")):
            packed = documents.packed(parts, self.max_length, lambda part: len(part[1].ids))
            yield from map(self._row, packed)

    def _parts(self) -> Iterator[tuple[dict, Piece]]:
        """(the document's record, a part of it) for all parts of all documents that are kept."""
        with Progress(None, f"tokenize {self.path.stem}", "documents") as progress:
            for records in chunks(each_json_line(self.path), _characters, BATCH):
                self._refuse_conversations(records)
                texts = [record["messages"][0]["content"] for record in records]
                for record, text, made in zip(records, texts, self.documents.tokens(texts), strict=True):
                    yield from ((record, piece) for piece in self._pieces(record, text, *made))
                progress.update(len(records))

    def _refuse_conversations(self, records: list[dict]) -> None:
        for record in records:
            if not is_document(record["messages"]):
                raise UserError(
                    f"{self.path}: row {record['id']}: is a conversation, and the first training row is a document "
                    "(data.layout=text): the two do not mix"
                )

    def _pieces(self, record: dict, text: str, tokens: list[int], starts: list[int]) -> list[Piece]:
        """The parts of a document, after `max_length_policy`."""
        number, length = record["id"], 1 + len(tokens)
        if self.special.spelt(of_record(record)):
            self.audit.find(self.audit.special, number)
        pieces = self.documents.pieces(text, tokens, starts, self.max_length)
        self.audit.count(number, [_encoded(self.documents.first, tokens)], self.max_length)
        if length > self.max_length:
            self._refuse_length(length, number)
            self.audit.find({"drop": "dropped", "truncate": "truncated", "split": "continued"}[self.policy], number)
            pieces = {"drop": [], "truncate": pieces[:1], "split": pieces}[self.policy]
        if pieces:
            kept = [token for piece in pieces for token in piece.ids[1:]]
            self.audit.keep(number, [_encoded(self.documents.first, kept)], self.stop_ids)
        return pieces

    def _row(self, parts: list[tuple[dict, Piece]]) -> dict:
        record, piece = parts[0]
        beside = {name: record.get(name, str(record["id"])) for name in self.about}
        return {
            "id": record["id"],
            "input_ids": [token for _, part in parts for token in part.ids],
            "labels": [label for _, part in parts for label in part.labels],
            "prompt_length": 1,
            "prompt": "",
            "reference": "" if self.pack else piece.text,
            DOCUMENTS: [len(part.ids) for _, part in parts],
            **beside,
        }


def _encoded(first: int, tokens: list[int]) -> Encoded:
    """A whole document."""
    return Encoded([first, *tokens], [IGNORED, *tokens], 1, retokenized=False)


def _answered(conversation: Conversation, answer: str) -> Conversation:
    """The conversation with another last answer."""
    return conversation._replace(
        messages=[*conversation.messages[:-1], {"role": "assistant", "content": answer}],
    )


def _characters(record: dict) -> int:
    """Of a record's texts."""
    return sum(len(message["content"]) for message in record["messages"]) + len(record.get("rejected", ""))
