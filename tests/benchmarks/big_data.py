"""What many rows take, stage by stage: rows a second, rows a second of a core's computing, and memory at its peak.

    python -m tests.benchmarks.big_data --rows 1000000 --model results/models/smollm2_135m-KEY --workers 1 2

Prints a Markdown table. The rows are made up: questions of 12 to 30 words and answers of 8 to 40, one in a hundred a
repetition and one in two hundred nearly one. Each step is a process of its own, as in the workflow. Memory is what all
its processes have of their own (Pss_Anon), looked at twice a second: files that are mapped, which the system may
drop, do not count. `--model` takes a folder with a tokenizer; without it, that of the tests (byte-level, 400 tokens).
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from temper.data.workers import THREADS
from temper.hashing import HashCache
from temper.units import size
from tests.support import tiny

BLOCK = 50_000  # rows made at once
WORDS, REPEATED, NEARLY = 5_000, 0.01, 0.005
SHARE = 0.01  # of validation, and of test
STEPS = ("fetch_data", "format_prompts", "mix_prompts", "tokenize_splits")


class Cost(NamedTuple):
    """Of a step: seconds, seconds of computing of all its processes, most memory in bytes."""

    seconds: float
    cpu: float
    memory: int


def write_rows(path: Path, rows: int) -> None:
    """Write a jsonl file of question and answer, the same each time; of more rows the first are these."""
    import numpy as np

    letters = np.random.default_rng(0)
    words = ["".join(letters.choice(list("abcdefghijklmnoprstuvwy"), letters.integers(2, 11))) for _ in range(WORDS)]
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, rows, BLOCK):
            draw = np.random.default_rng(start + 1)
            asked, said = draw.integers(12, 31, BLOCK), draw.integers(8, 41, BLOCK)
            numbers = iter((WORDS * draw.random(int(asked.sum() + said.sum())) ** 2).astype(int).tolist())
            again = draw.random(BLOCK)
            before = ["first"]
            for at in range(min(BLOCK, rows - start)):
                question = [words[next(numbers)] for _ in range(asked[at])]
                answer = [words[next(numbers)] for _ in range(said[at])]
                if again[at] < REPEATED + NEARLY:
                    question = before if again[at] < REPEATED else [*before[:-1], words[at % WORDS]]
                before = question
                row = {"question": f"{' '.join(question)}?", "answer": f"{' '.join(answer)}."}
                file.write(json.dumps(row) + "\n")


def measured(command: list[str], workers: int) -> Cost:
    """Run a command to its end, with so many processes for rows."""
    environment = {**os.environ, THREADS: str(workers), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    process = psutil.Popen([sys.executable, "-m", *command], env=environment, stderr=subprocess.PIPE, text=True)
    most = [0]
    watch = threading.Thread(target=_watch, args=(process, most), daemon=True)
    watch.start()
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(said)
    return Cost(time.monotonic() - started, usage.ru_utime + usage.ru_stime, most[0])


def _watch(process: psutil.Process, most: list[int]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        while True:
            most[0] = max(most[0], sum(map(_own_memory, [process, *process.children(recursive=True)])))
            time.sleep(0.5)


def _own_memory(process: psutil.Process) -> int:
    """Bytes that are no file's; those that processes share are divided among them."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:")), 0)


def commands(rows: int, model: Path) -> dict[str, list[str]]:
    """Step -> its command, in a folder with rows.jsonl."""
    source = {"kind": "files", "path": "rows.jsonl"}
    data = {"name": "big", "layout": "question_answer", "splits": {"validation": SHARE, "test": SHARE}}
    mix = {"mix": [{"source": "big", "weight": 1.5}]}
    tokenize = {"tokenize": {"max_length": 512}, "prompt": {}}
    configs = {
        "fetch_data": {"data": {"source": source}},
        "format_prompts": {"data": data, "prompt": {"system": None}},
        "mix_prompts": {"data": mix},
        "tokenize_splits": tokenize,
    }
    inputs = {
        "fetch_data": [],
        "format_prompts": ["--raw", "data/raw/big"],
        "mix_prompts": ["--prompts", "format_prompts"],
        "tokenize_splits": ["--prompts", "format_prompts", "--model", str(model.absolute())],
    }
    outputs = dict.fromkeys(STEPS) | {"fetch_data": "data/raw/big"}
    return {
        step: [f"steps.{step}", *inputs[step], "--output", outputs[step] or step, "--config", json.dumps(configs[step])]
        for step in STEPS
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=[*STEPS])
    parser.add_argument("--folder", type=Path, help="where the rows and results go, and stay")
    asked = parser.parse_args(argv)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    model = asked.model and asked.model.absolute()
    print("| rows | step | processes | seconds | rows/s | rows per core second | memory | written |")
    print("|---" * 8 + "|")
    with contextlib.ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        model = model or tiny.make_tiny_model(folder.absolute() / "model", max_position_embeddings=1024)
        for rows in asked.rows:
            _measure(folder / f"{rows}", rows, asked, model)


def _measure(folder: Path, rows: int, asked: argparse.Namespace, model: Path) -> None:
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        if not Path("rows.jsonl").is_file():
            write_rows(Path("rows.jsonl"), rows)
        started = time.monotonic()
        HashCache().sha256("rows.jsonl")
        print(f"| {rows:,} | hash {size(Path('rows.jsonl').stat().st_size)} | 1 | {time.monotonic() - started:.1f} |")
        for step, command in commands(rows, model).items():
            for workers in asked.workers if step in asked.steps else ():
                output = Path(command[command.index("--output") + 1])
                subprocess.run(["rm", "-rf", output], check=True)
                cost = measured(command, workers)
                written = sum(file.stat().st_size for file in output.rglob("*") if not file.is_symlink())
                print(
                    f"| {rows:,} | {step} | {workers} | {cost.seconds:.1f} | {rows / cost.seconds:,.0f} "
                    f"| {rows / cost.cpu:,.0f} | {size(cost.memory)} | {size(written)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
