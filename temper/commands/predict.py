r"""Answer a file of prompts with a run's model.

    temper predict --run best --sweep demo --input prompts.txt --output answers.jsonl
    temper predict --run dec62139a3 --input tickets.csv --output - --max-new-tokens 100
    echo "The plot falls flat." | temper predict --run dec62139a3 --input - --output -

`--input`: one prompt per line (.txt, or `-` for a pipe), or rows with a column `prompt` (text) or `messages` (role and
content, the user's last) as .jsonl, .json, .csv, .tsv or .parquet. A prompt is what the user says; the system message
and the chat template of training are added. `--output`: JSON lines, the input's columns plus `prediction` and
`finished` (whether the model ended by itself). The file appears complete or not at all. Generation is as in the run's
evaluation unless flags say otherwise. A sampled answer depends only on the seed and the row's number, except for
rounding: in 16 bits it may depend on the rows in its batch (`temper.evaluation.generation`).

Reads the prompts, and results/; every row is checked before the model is loaded.
"""

import dataclasses
import datetime
import decimal
import json
import re
import sys
import tempfile
from pathlib import Path

from temper.commands import flags
from temper.data import conversations, encodings, texts
from temper.data.conversations import Conversation
from temper.data.layouts import beside, refuse_unused
from temper.data.rows import FORMATS, RawFile, format_of
from temper.errors import UserError
from temper.files import write_whole
from temper.progress import quiet_libraries
from temper.runs import find as runs
from temper.runs import prompting
from temper.step import logging_to
from temper.units import seconds

STDIO = "-"
NO_LINES = "answers are JSON lines; name a file that ends in .jsonl, or - for a pipe"
HIGH_CONTROLS = re.compile("[\x7f-\x9f]")  # JSON need not escape them, but some control a terminal


def arguments(parser) -> None:
    """Add the arguments of this command."""
    flags.of_a_run(parser)
    parser.add_argument("--input", required=True, help="file of prompts; -: lines of standard input")
    parser.add_argument("--output", required=True, help="new .jsonl file; -: standard output")
    parser.add_argument("--system", help='system message; default: that of training ("": none)')
    parser.add_argument("--batch-size", "--batch_size", type=int, help="prompts per batch; default: the evaluation's")
    prompting.add_generation_flags(parser, max_new_tokens="the evaluation's, else 256")


def run(arguments) -> None:
    """Answer a file of prompts."""
    with logging_to(None):
        predict(arguments)


def predict(arguments) -> None:
    """Answer every prompt of the input, and write the answers."""
    quiet_libraries()
    output = None if arguments.output == STDIO else flags.new_file(arguments.output, ".jsonl", NO_LINES)
    run = runs.find(arguments.run, arguments.sweep)
    settings, batch_size = settings_of(run, vars(arguments))
    rows = read_prompts(arguments.input)
    _check_columns(rows)
    prompter = prompting.prompter_of(run, arguments.system)
    prompts = [ids_of(row, prompter, settings.max_new_tokens) for row in rows]
    if output:
        _check_writable(output)
    answers = prompting.answer_all(runs.load_network(run), prompter, prompts, settings, batch_size, seed=arguments.seed)
    lines = [_line(*made) for made in zip(rows, answers.texts, answers.finished, strict=True)]
    _write(lines, output)
    _summarise(answers, settings, output)


def settings_of(run: runs.FinishedRun, given: dict) -> tuple[prompting.Generation, int]:
    """Generation settings and batch size: those of the run's evaluation, overridden by `given` (None: not given)."""
    evaluated = runs.read_config(run.parts["evaluate_model"])["eval"] if run.has("evaluate_model") else {}
    names = [field.name for field in dataclasses.fields(prompting.Generation)]
    defaults = prompting.Generation(**{name: evaluated[name] for name in names if name in evaluated})
    batch_size = given.get("batch_size")
    batch_size = checked_batch_size(evaluated.get("batch_size", 32) if batch_size is None else batch_size)
    return prompting.generation_settings(defaults, {name: given.get(name) for name in names}), batch_size


def checked_batch_size(batch_size: int) -> int:
    """The number of prompts per batch.

    Raises:
        UserError: it is not at least 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1 (found {batch_size})")
    return batch_size


# --- the prompts ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One prompt: its place in the file, its columns, and their conversation."""

    place: str
    columns: dict
    conversation: Conversation


def read_prompts(name: str) -> list[Row]:
    """All prompts of a file, checked.

    Raises:
        UserError: for the first row without a usable prompt, with file and line.
    """
    if name != STDIO and not Path(name).is_file():
        raise UserError(f"--input {name}: no such file")
    rows = list(_lines(name) if name == STDIO or Path(name).suffix == ".txt" else _table(Path(name)))
    if not rows:
        raise UserError(f"--input {name}: there is no prompt in it")
    return rows


ADDED = ("prediction", "finished")  # columns of the output beside those of the input


def _check_columns(rows: list[Row]) -> None:
    """Refuse rows that could not be written with their answer, before any answer is generated."""
    for row in rows:
        taken = [name for name in ADDED if name in row.columns]
        if taken:
            raise UserError(f"{row.place}: there is a column '{taken[0]}' already, which the answers need: rename it")
        for name, value in row.columns.items():
            _check_column(row.place, name, value)


def _check_column(place: str, name: str, value) -> None:
    try:
        _json({name: value}).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise UserError(f"{place}: a text holds half a character ({half}): correct the file") from None
    except (TypeError, ValueError, RecursionError):
        # bytes; NaN and infinities; nesting beyond Python's limit
        raise UserError(
            f"{place}: column '{name}' holds {texts.shown(value)}, which JSON, and so the output, cannot say: "
            "make text or null of it in the file, or leave the column out"
        ) from None


def _json(columns: dict) -> str:
    return json.dumps(columns, ensure_ascii=False, allow_nan=False, default=_as_text)


def _as_text(value) -> str:
    """Convert parquet values that JSON lacks, if there is only one way to write them."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(type(value).__name__)


def _line(row: Row, text: str, finished: bool) -> str:
    """A row with its answer, as a line of the output."""
    return _json({**row.columns, "prediction": text, "finished": finished}) + "\n"


def _lines(name: str):
    """One prompt per line, without blank lines."""
    content = sys.stdin.buffer.read() if name == STDIO else Path(name).read_bytes()
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            kind = encodings.unmarked_utf16(line) if number == 1 else None
            if kind:
                raise UserError(f"{name}:1: every other byte is 0: convert the file ({encodings.to_utf8(kind)})")
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}: no UTF-8 ({error.reason}): convert the file") from None
        if text:
            yield Row(f"{name}:{number}", {"prompt": text}, Conversation([{"role": "user", "content": text}]))


def _table(path: Path):
    if format_of(path.name) is None:
        raise UserError(f"--input {path}: name a file that ends in .txt, {', '.join(FORMATS)}")
    file = RawFile(path, settable=False)
    for number, columns in file:
        yield row(file.place(number), columns)


def row(place: str, columns: dict) -> Row:
    """One row, checked; an error names its place."""
    try:
        return Row(place, columns, conversation(columns))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def conversation(columns: dict) -> Conversation:
    """The conversation of a row: column `messages`, or `prompt` as a text or a list of messages; and column `tools`.

    Raises:
        UserError: neither column is there, or the last message is the assistant's or the system's.
    """
    name = next((name for name in ("messages", "prompt") if name in columns), None)
    if name is None:
        found = ", ".join(map(str, columns))
        raise UserError(f"no column 'prompt' or 'messages'; there are {found}: rename the one with the prompts")
    value = columns[name]
    if name == "prompt" and isinstance(value, str):
        value = [{"role": "user", "content": value}]
    refuse_unused(columns, [name], way_on="remove it from the file")
    if not isinstance(value, list) or not value:
        raise UserError(f"column '{name}' holds {value!r:.60}, not {'text or ' * (name == 'prompt')}a list of messages")
    messages = conversations.read(value, name)
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"column '{name}' ends with the {messages[-1]['role']}'s message: the user's (or a tool's) must be the last"
        )
    return Conversation(messages, *beside(columns))


def ids_of(row: Row, prompter: prompting.Prompter, max_new_tokens: int) -> list[int]:
    """The tokens that ask a row's prompt; an error names its place."""
    try:
        return prompter.ids(row.conversation, max_new_tokens)
    except UserError as error:
        raise UserError(f"{row.place}: {error}") from None


# --- the answers ---------------------------------------------------------------------------------


def _for_a_terminal(line: str) -> str:
    """The same JSON, with the control characters escaped that JSON would leave."""
    return HIGH_CONTROLS.sub(lambda char: f"\\u{ord(char[0]):04x}", line)


def _check_writable(output: Path) -> None:
    """Checks that the file can be written before any answer is generated."""
    try:
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None


def _write(lines: list[str], output: Path | None) -> None:
    if output is None:
        sys.stdout.writelines(map(_for_a_terminal, lines))
        return
    try:
        write_whole(output, "".join(lines))
    except OSError as error:
        sys.stdout.writelines(lines)  # hours of computing may be in them
        raise UserError(
            f"--output {output}: cannot be written ({error.strerror}); the answers went to standard output instead"
        ) from None


def _summarise(answers, settings: prompting.Generation, output: Path | None) -> None:
    count, cut = len(answers.texts), answers.finished.count(False)
    text = f"{count} answers in {seconds(answers.seconds)}, {sum(answers.tokens) / answers.seconds:.0f} tokens/s"
    if cut:
        text += f"; {cut} cut off at max_new_tokens={settings.max_new_tokens}"
    print(f"{text}; wrote {output}" if output else text, file=sys.stderr)
