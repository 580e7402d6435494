"""Start a project of your own: a data set, an experiment, and the command that runs it.

temper init my-project
"""

import shlex
import sys
from pathlib import Path

from temper.commands import flags
from temper.files import json_lines
from temper.keys import PACKAGE_ROOT

ASPECTS = ("room", "breakfast", "staff", "view", "pool", "location", "price", "internet")
OPINIONS = {
    "positive": ("The {} was better than we had hoped.", "We loved the {}.", "The {} alone is worth the trip."),
    "negative": ("The {} was a disappointment.", "Nobody should pay for this {}.", "We complained about the {} twice."),
}
DATA = """# A data set: where its rows are, and what its columns mean. Temper's docs/own-data.md lists all layouts.
name: reviews
source:
  kind: files
  path: rows.jsonl
layout: question_answer
"""
EXPERIMENT = """# @package _global_
# snakemake ... --config conf_dir=conf experiment=reviews
# Only what differs from Temper's own conf/.
defaults:
  - override /data: reviews
  - override /eval: reviews
  - override /sweep: learning_rate
prompt:
  system: Is the guest's remark positive or negative?
data:
  splits: {validation: 0.15, test: 0.3}
train:
  per_device_train_batch_size: 8
  warmup_steps: 2
sweep:
  name: reviews
  axes:
    train.learning_rate: 3e-4,1e-3
"""
EVAL = """# How a model is evaluated: by accuracy and F1 over these two answers.
task: labels
labels: [negative, positive]
max_new_tokens: 8
"""
README = """# A project for Temper

`conf/` has a data set and an experiment, `rows.jsonl` the rows. Run from this folder:

    {command}

Results go to `results/`; the page to open first is `results/sweeps/reviews/report.html`. Before a long run,
`temper plan --config-dir conf --experiment reviews` shows what it would make.
"""


def arguments(parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("folder", help="new folder")


def run(arguments) -> None:
    """Write the project.

    Raises:
        UserError: the folder exists and is not empty.
    """
    folder = Path(arguments.folder)
    flags.refuse_used(folder, "", "name a new folder, or an empty one")
    words = [str(Path(sys.executable).parent / "snakemake"), "-s", str(PACKAGE_ROOT / "Snakefile"), "--cores", "all"]
    command = shlex.join([*words, "--config", "conf_dir=conf", "experiment=reviews"])
    files = {
        "rows.jsonl": json_lines(rows()),
        "conf/data/reviews.yaml": DATA,
        "conf/eval/reviews.yaml": EVAL,
        "conf/experiment/reviews.yaml": EXPERIMENT,
        ".gitignore": "results/\ndata/raw/\n.snakemake/\n",
        "README.md": README.format(command=command),
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"wrote {folder}; next: cd {folder} && {command}")


def rows() -> list[dict[str, str]]:
    """A few dozen remarks with their sentiment."""
    return [
        {"question": opinion.format(aspect), "answer": sentiment}
        for aspect in ASPECTS
        for sentiment, opinions in OPINIONS.items()
        for opinion in opinions
    ]
