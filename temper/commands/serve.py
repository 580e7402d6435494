r"""Serve a run's models on this machine, as an endpoint that speaks OpenAI's language.

    temper serve --run best --sweep demo
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
        -d '{"model": "merged", "messages": [{"role": "user", "content": "The plot falls flat."}]}'

A request names one of `merged`, `adapter` (the adapter on its base) and `base` (the untouched model); each is loaded
when it is first named. They are asked as in training: with the run's system message, unless the conversation begins
with one, and answer greedily, unless the run was evaluated otherwise or flags say so. What the endpoint can do, and
what it cannot, is that of transformers' server: `transformers serve`. It needs pip install -e ".[serve]".

Reads results/, where the merged model is written if it is not there; serves this machine only, until Ctrl-C.
"""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from temper.commands import flags, predict
from temper.errors import UserError
from temper.progress import quiet_libraries
from temper.runs import find as runs
from temper.runs import offered
from temper.signals import as_interrupts

HOST = "127.0.0.1"


def arguments(parser) -> None:
    """Add the arguments of this command."""
    flags.of_a_run(parser)
    parser.add_argument("--port", type=int, default=8000, help="port on this machine; default: 8000")
    parser.add_argument(
        "--do-sample", "--do_sample", action="store_true", default=None, help="sample answers; default: greedy"
    )
    parser.add_argument("--temperature", type=float, help="with --do-sample, where a request has none; default: 1")
    parser.add_argument("--top-p", "--top_p", type=float, help="with --do-sample, where a request has none; default: 1")


def run(arguments) -> None:
    """Serve until a signal ends it."""
    _check_packages()
    _check_port(arguments.port)
    quiet_libraries()
    run = runs.find(arguments.run, arguments.sweep)
    runs.check_serving(run)
    settings, _ = predict.settings_of(run, vars(arguments))
    with tempfile.TemporaryDirectory(prefix="temper-serve-") as cache:
        for name, what in offered.offer(run, Path(cache), settings).items():
            print(f"{name}: {what}")
        print(f"http://{HOST}:{arguments.port}/v1/chat/completions; Ctrl-C ends", flush=True)
        _serve(Path(cache), command(run, arguments.port))


def command(run: runs.FinishedRun, port: int) -> list[str]:
    """transformers' server, computing as `temper predict` does."""
    from temper.model.loading import is_fully_trained, resolve_attention, resolve_dtype

    load = run.load
    whole = load["dtype"] == "fastest" and is_fully_trained(runs.model_folder(run))
    dtype = resolve_dtype("float32" if whole else load["dtype"])
    words = {
        "host": HOST,
        "port": port,
        "dtype": dtype,
        "attn-implementation": resolve_attention(load["attn_implementation"]),
    }
    given = [word for name, value in words.items() for word in (f"--{name}", str(value).removeprefix("torch."))]
    return [sys.executable, "-m", "transformers.cli.transformers", "serve", *given]


def _serve(cache: Path, command: list[str]) -> None:
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    with as_interrupts(), subprocess.Popen(command, env=environment, cwd=cache) as server:
        try:
            code = server.wait()
        finally:
            server.terminate()
    if code:
        raise UserError(f"transformers' server ended with exit code {code}; its last lines say why")


def _check_packages() -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise UserError("transformers' server needs the package openai: pip install -e '.[serve]' in Temper's folder")


def _check_port(port: int) -> None:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: cannot be used ({error}); name another") from None
