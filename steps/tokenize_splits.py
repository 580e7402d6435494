"""Turn prompts into tokens: what the model reads, what it learns, and an audit that shows it.

By hand::

    python -m steps.tokenize_splits --prompts results/prompts/X --model results/models/Y \\
        --output results/splits/Z experiment=smoke

Reads   the prompts' train.jsonl, validation.jsonl and test.jsonl; the model's tokenizer.
Writes  a `datasets.DatasetDict` (train, validation, test) with the columns id, input_ids, labels
        (-100 where nothing is learned), prompt_length, prompt (for people: the user's message; of several turns all,
        without the system message), reference (the right answer's tokens decoded), and group and source where the
        prompts have them.
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
import json
import logging
import sys
import tempfile
from pathlib import Path

from temper.config.audit import check as check_audit
from temper.config.stages import TokenizeSplits
from temper.data import in_train
from temper.data.audit import report, shown_rows
from temper.data.chat_template import ChatTemplate
from temper.data.columns import SPLITS
from temper.data.conversations import is_document, is_rich, of_record
from temper.data.encoder import Encoder
from temper.data.templates import DATE
from temper.data.tokenized import Conversations, Documents, Split, named
from temper.errors import UserError
from temper.files import each_json_line
from temper.model import limits, serving
from temper.progress import quiet_libraries
from temper.step import run_command

STAGE = "tokenize_splits"
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
    stop_ids, settings = stop_token_ids(model, tokenizer), config.tokenize.model_dump()
    read = _documents if _are_documents(prompts) else _conversations
    apart = is_encoder_decoder(model)
    of_split, facts = read(config, prompts, tokenizer, stop_ids, apart)
    audits, splits = {}, {}
    with _frozen(), tempfile.TemporaryDirectory(dir=output) as scratch:
        for split in SPLITS:
            rows = of_split(prompts / f"{split}.jsonl", settings)
            made = rows.dataset(Path(scratch) / f"{split}.arrow")
            audits[split] = rows.audit.summary()
            if len(made):  # `datasets` cannot read back a split without rows
                splits[split] = made
        context = limits.limits_of(model).positions
        audit = {"max_length": config.tokenize.max_length, "context": context, "splits": audits}
        report(audits)
        check_audit(audit, settings, prompts)
        limits.check(model, splits)
        DatasetDict(splits).save_to_disk(output)
        shown = shown_rows(splits["train"], tokenizer, apart)
        write_page(output, audit, splits["train"], tokenizer, apart)
    (output / "audit.json").write_text(json.dumps(audit, indent=2) + "\n", encoding="utf-8")
    (output / "audit.txt").write_text(shown, encoding="utf-8")
    serving.write(output, serving.of_folder(model, tokenizer))
    in_train.write(prompts, output)
    return {"rows": {split: audit["rows"] for split, audit in audits.items()}, **facts}


def _are_documents(prompts: Path) -> bool:
    """Whether the rows are raw text (data.layout=text)."""
    first = next(each_json_line(prompts / "train.jsonl"), None)
    return first is not None and is_document(first["messages"])


def _documents(config: TokenizeSplits, _prompts: Path, tokenizer, stop_ids: list[int], apart: bool):
    """(what makes a split of a file of documents, facts for provenance)."""
    if apart:
        raise UserError(
            "config: 'data.layout': text is for causal models, and this one reads a prompt in an encoder: choose "
            "another model, or a layout with prompts and answers"
        )
    allowed = config.prompt.allow_special_text

    def of_split(path: Path, settings: dict) -> Split:
        return Documents(path, tokenizer, stop_ids, settings, allowed, pack=path.stem == "train")

    return of_split, {}


def _conversations(config: TokenizeSplits, prompts: Path, tokenizer, stop_ids: list[int], apart: bool):
    """The same of conversations: what the template writes is found out by the first row."""
    encoder = Encoder(tokenizer, stop_ids, config.prompt.model_dump(), apart)
    marks = _look_at_template(encoder, prompts)
    _tell_what_others_do_not_know(encoder, config.prompt.date)

    def of_split(path: Path, settings: dict) -> Split:
        return Conversations(path, encoder, settings, marks)

    return of_split, {"opening": encoder.renderer.opening, "rich": encoder.renderer.rich}


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
    with named(path, record):
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
def _frozen():
    """Keep the garbage collector from scanning everything loaded, which took a quarter of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
