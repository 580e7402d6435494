# PYTHON_ARGCOMPLETE_OK
"""The command `temper`: plan and explain a sweep, find its best run, prompt it, publish it.

Each command is a module of `temper.commands` with a docstring, `arguments(parser)` and `run(arguments)`. Only the
module of the called command is imported, so that all start at once.
"""

import argparse
import importlib
import importlib.metadata
import os
import sys

from temper.errors import one_line_errors
from temper.step import spare_the_collector

COMMANDS = {
    "init": "start a project of your own",
    "plan": "the runs and artefacts that a sweep would make",
    "explain": "what the next `snakemake` will make, why, and how long that may take",
    "status": "how a sweep stands: which run is in which stage, what failed or waits, the best so far",
    "leaderboard": "the leaderboard of a finished sweep",
    "verify": "make stages of a finished sweep again and compare them bit for bit",
    "chat": "talk to a run",
    "predict": "answer a file of prompts with a run",
    "merge": "write a run's merged model, which a sweep writes of the chosen run alone",
    "keep": "keep runs from being pruned",
    "prune": "what the folders of results/ cost, and delete some",
    "push": "send finished folders to a store that other machines reach",
    "pull": "fetch a sweep's folders from a store",
    "publish": "push a run with a model card to the hub",
    "serve": "serve a run's models on this machine, as an OpenAI-compatible endpoint",
    "export": "write a run as one GGUF file for llama.cpp, Ollama and others",
    "ui": "open the MLflow UI",
}


COMPLETING = "_ARGCOMPLETE" in os.environ  # a shell asks for completions


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit with 0, 2 (user error) or 128 + signal.

    Args:
        argv: the arguments, `sys.argv[1:]` unless given.
    """
    spare_the_collector()
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        # With its own parser, because overrides may stand between flags, which argparse does not allow in subparsers.
        parser = command_parser(words[0])
        run, arguments = _module(words[0]).run, parser.parse_intermixed_args(words[1:])
        with one_line_errors(command=words[0]):
            run(arguments)
    else:
        parser = build_parser()
        if COMPLETING:
            import argcomplete

            argcomplete.autocomplete(parser)
        parser.parse_args(words)


def build_parser() -> argparse.ArgumentParser:
    """The parser that lists all commands."""
    parser = argparse.ArgumentParser(prog="temper", description=__doc__.splitlines()[0])
    version = f"temper {importlib.metadata.version('temper-pipeline')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="<command>", dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in os.environ.get("COMP_LINE", "").split() and COMPLETING:
            _module(name).arguments(command)
    return parser


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    module = _module(name)
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"temper {name}", description=module.__doc__, formatter_class=form)
    module.arguments(parser)
    return parser


def _module(name: str):
    return importlib.import_module(f"temper.commands.{name}")


if __name__ == "__main__":
    main()
