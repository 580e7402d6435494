"""Rows of a training file as tokens, by one process and by several, by turns: rows a second and CPU seconds of all.

    python -m tests.benchmarks.tokenizing results/prompts/movie_reviews-KEY results/models/smollm2_135m-KEY 1 2

The rows are repeated up to ROWS. With other work on the machine, go by CPU seconds.
"""

import gc
import itertools
import os
import sys
import tempfile
from pathlib import Path

from temper.data.encoder import Encoder
from temper.data.tokenized import Conversations
from temper.data.workers import THREADS
from temper.files import each_json_line, json_lines
from temper.model.loading import load_tokenizer, stop_token_ids

ROWS = 10_000
TURNS = 3
PROMPT = {"apply_chat_template": True, "loss_on": "assistant"}
TOKENIZE = {"max_length": 1024, "max_length_policy": "drop"}


def main(prompts: str, model: str, *processes: str) -> None:
    """Print a line for each turn."""
    tokenizer = load_tokenizer(Path(model))
    encoder = Encoder(tokenizer, stop_token_ids(Path(model), tokenizer), PROMPT)
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "train.jsonl"
        source = itertools.islice(itertools.cycle(list(each_json_line(Path(prompts) / "train.jsonl"))), ROWS)
        rows.write_text(json_lines([{**row, "id": number} for number, row in enumerate(source)]), encoding="utf-8")
        gc.freeze()  # as the step does
        for number in TURNS * processes:
            os.environ[THREADS] = number
            before = os.times()
            made = Conversations(rows, encoder, TOKENIZE, None).dataset(Path(scratch) / "rows.arrow")
            after = os.times()
            seconds, cpu = after.elapsed - before.elapsed, sum(after[:4]) - sum(before[:4])
            print(f"{number} processes: {len(made) / seconds:,.0f} rows/s, {cpu:.1f} CPU s, {made._fingerprint}")


if __name__ == "__main__":
    main(*sys.argv[1:])
