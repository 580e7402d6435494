r"""Talk to a run's model in the terminal.

    temper chat --run best --sweep demo
    temper chat --run dec62139a3 --compare
    echo "The plot falls flat." | temper chat --run dec62139a3

`--run` is a run's name, the key that the leaderboard shows, a folder of results/reports, results/merged or
results/adapters, or `best`. The prompt's format is exactly that of training, with the run's own system message unless
`--system` gives another. The merged model answers, or, if that was deleted or `--run` is an adapter's folder, the base
model with the adapter.

/reset starts a new conversation, /system TEXT starts one with another system message (none without TEXT), /exit, Ctrl-D
and Ctrl-C end. Ctrl-C during an answer stops only that answer. When the model's context is full, the oldest exchanges
are dropped. With input from a pipe, each line is a message, and only answers are printed.

Reads results/ only; writes nothing.
"""

import contextlib
import dataclasses
import sys

from temper.commands import flags
from temper.errors import UserError, suggest
from temper.progress import quiet_libraries
from temper.reports.html import printable
from temper.runs import find as runs
from temper.runs import prompting

COMMANDS = ("/reset", "/system", "/exit")


def arguments(parser) -> None:
    """Add the arguments of this command."""
    flags.of_a_run(parser)
    parser.add_argument("--compare", action="store_true", help="show the base model's answers, too")
    parser.add_argument("--system", help='system message; default: that of training ("": none)')
    prompting.add_generation_flags(parser, max_new_tokens="256")


def run(arguments) -> None:
    """Answer until the input ends."""
    with contextlib.suppress(KeyboardInterrupt):
        chat(arguments)


def chat(arguments) -> None:
    """Answer what is typed or piped until it ends."""
    quiet_libraries()
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(prompting.Generation)}
    settings = prompting.generation_settings(prompting.Generation(), given)
    run = runs.find(arguments.run, arguments.sweep)
    prompter = prompting.prompter_of(run, arguments.system)
    typed = sys.stdin.isatty()
    speakers = _speakers(run, arguments.compare)
    if typed:
        _greet(run, prompter)
    _seed(arguments.seed)
    for line in _typed_lines() if typed else map(str.strip, sys.stdin):
        if line == "/exit":
            break
        try:
            _react(line, speakers, prompter, settings)
        except UserError as error:
            if not typed:
                raise
            print(f"error: {error}")


@dataclasses.dataclass
class Speaker:
    """A model that answers, with its own side of the conversation."""

    name: str
    model: object
    history: list[dict] = dataclasses.field(default_factory=list)


def _speakers(run: runs.FinishedRun, compare: bool) -> list[Speaker]:
    from temper.model.loading import load_model

    speakers = [Speaker("tuned", runs.load_network(run))]
    if compare:
        speakers.insert(0, Speaker("base", load_model(runs.untouched_folder(run), run.load).eval()))
    return speakers


def _greet(run: runs.FinishedRun, prompter: prompting.Prompter) -> None:
    print(f"{run.name}\nsystem: {prompter.system or '(none)'}\n{', '.join(COMMANDS)}; Ctrl-D ends")
    if not prompter.keeps_history:
        print("the run's prompt.template is for single prompts: each message is answered on its own")


def _typed_lines():
    """Typed lines, until Ctrl-D or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history in input()
    while True:
        try:
            line = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _react(line: str, speakers: list[Speaker], prompter: prompting.Prompter, settings: prompting.Generation) -> None:
    """Answer a message, or do as a command says."""
    command, _, text = line.partition(" ")
    if not line:
        return
    if not command.startswith("/"):
        for speaker in speakers:
            _answer(line, speaker, prompter, settings, name=speaker.name if len(speakers) > 1 else None)
        return
    if command not in COMMANDS:
        raise UserError(f"{command} is not a command; {suggest(command, COMMANDS)}")
    if command == "/system":
        prompter.system = text.strip() or None
        print(f"system: {prompter.system or '(none)'}", file=sys.stderr)
    for speaker in speakers:
        speaker.history.clear()
    print("a new conversation", file=sys.stderr)


def _answer(message: str, speaker: Speaker, prompter, settings: prompting.Generation, name: str | None) -> None:
    """Stream one answer and keep the exchange, unless it was stopped."""
    turns = [*speaker.history, {"role": "user", "content": message}]
    ids, left_out = prompter.ids_of_chat(turns, settings.max_new_tokens)
    if left_out and prompter.keeps_history:
        print(f"(the context is full: the oldest {left_out} messages are left out)", file=sys.stderr)
    if name:
        print(f"{name}> ", end="", flush=True)
    try:
        answer, finished = prompting.stream_answer(speaker.model, prompter, ids, settings, _say)
        print(flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print("\n(stopped, and left out of the conversation)")
        return
    if not finished:
        print(f"(cut off at max_new_tokens={settings.max_new_tokens})", file=sys.stderr)
    speaker.history = [*turns, {"role": "assistant", "content": answer}][left_out:]


def _say(text: str) -> None:
    """Show a part of an answer: on a terminal without control characters, in a pipe unchanged."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
