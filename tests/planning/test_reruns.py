"""What an edit reruns: the matrix, planned in the fast suite and executed in the slow one.

    python -m tests.planning.test_reruns     # execute all edits, and write docs/reruns.md

The project is copied to a folder of its own, with a tiny model and data set, so that an edit is what it is for a user:
a file with another text, or another override on the command line.
"""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support import tiny
from tests.support.workflow_tools import environment, executed, leaderboard, snakemake

DOCS = ROOT / "docs" / "reruns.md"
# --- the project ---------------------------------------------------------------------------------

CONF = {
    "data/mine.yaml": "name: mine\nsource: {kind: files, path: rows.jsonl}\nlayout: question_answer\n",
    "model/mine.yaml": "name: mine\nsource: {kind: files, path: model}\nload: {dtype: float32}\n",
    "sweep/mine.yaml": "name: mine\naxes:\n  train.learning_rate: 1e-3,1e-2\n",
    "experiment/mine.yaml": """# @package _global_
defaults:
  - override /data: mine
  - override /model: mine
  - override /prompt: plain
  - override /eval: sentiment
  - override /sweep: mine
prompt: {system: Judge the review.}
data: {limit: {train: 24, validation: 8, test: 8}}
train: {num_train_epochs: 1, per_device_train_batch_size: 8, warmup_steps: 2, adam_beta1: 0.9, adam_beta2: 0.95}
""",
    "experiment/own_answers.yaml": """# @package _global_
defaults:
  - mine
  - override /method: dpo
  - _self_
method: {own_answers: {max_new_tokens: 4, do_sample: false}}
sweep: {name: own_answers}
""",
}
STEPS_AN_EPOCH = 3  # 24 rows in batches of 8


def row(question: str, answer: str) -> str:
    return json.dumps({"question": question, "answer": answer}) + "\n"


def make_project(folder: Path) -> Path:
    """A copy of the project as a user has it, with a data set, a model and a sweep of two runs of their own."""
    for name in ("steps", "temper", "conf", "profiles"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name, text in CONF.items():
        (folder / "conf" / name).write_text(text)
    tiny.make_tiny_model(folder / "model")
    (folder / "rows.jsonl").write_text("".join(row(*pair) for pair in tiny.tiny_rows(180)))
    return folder


def run(project: Path, overrides: str = "", *arguments: str, experiment: str = "mine") -> dict[str, int]:
    """Run the sweep in the project; rule -> executed jobs."""
    config = [f"experiment={experiment}", *([f"overrides={overrides}"] if overrides else [])]
    return executed(snakemake(project, *arguments, "--config", *config, project=project))


# --- the matrix ----------------------------------------------------------------------------------

COMPARE = {"compare_runs": 1}
RANK = {"rank_runs": 1, **COMPARE}
SCORE = {"score_rows": 1}
WRITE = {"merge_adapter": 1, **COMPARE}  # of the chosen run
MERGE = {"merge_adapter": 1, "evaluate_model": 3, **SCORE, **RANK}  # one of them for the test split
EVALUATE = {"evaluate_base": 2, "evaluate_model": 3, **RANK}
TRAIN = {"train_adapter": 2, **MERGE}
TOKENIZE = {"tokenize_splits": 1, "train_adapter": 2, "merge_adapter": 1, **SCORE, **EVALUATE}
FORMAT = {"format_prompts": 1, **TOKENIZE}
ALL_BUT_DATA = {"fetch_model": 1, **FORMAT}
REFERENCES = {"reference_logprobs": 1, **TRAIN}
OWN_ANSWERS = {"sample_answers": 1, **REFERENCES}


@dataclasses.dataclass(frozen=True)
class Edit:
    """One edit, the jobs that it should run, and those that run when it is taken back."""

    what: str  # for people, in Markdown
    runs: dict[str, int]
    overrides: str = ""
    files: tuple[tuple[str, str, str], ...] = ()  # (file, a text that is in it once, the text in its place)
    fast: bool = True  # False: left to the slow suite; another edit is planned in the same way, in less time
    back: dict[str, int] | None = None  # None: the comparison if anything ran
    experiment: str = "mine"

    @property
    def runs_back(self) -> dict[str, int]:
        return (COMPARE if self.runs else {}) if self.back is None else self.back


LOG, OTHER_LOG = 'log = logging.getLogger("temper")', 'log = logging.getLogger("temper.x")'
PairsEdit = functools.partial(Edit, fast=False, experiment="own_answers")
MERGE_CODE, LOSS_CODE = "steps/merge_adapter.py", "temper/model/predictions.py"
USED_ROW, UNUSED_ROW = "The acting works.", "The plot is a joy."
MATRIX = (
    Edit("touch the raw file", {}, files=(("rows.jsonl", "", ""),)),
    Edit(
        "edit a raw row that a split uses",
        FORMAT,
        files=(("rows.jsonl", row(USED_ROW, "positive"), row(USED_ROW, "negative")),),
    ),
    Edit(
        "edit a raw row that no split uses (`data.limit`)",
        FORMAT,
        files=(("rows.jsonl", row(UNUSED_ROW, "positive"), row(UNUSED_ROW, "negative")),),
        fast=False,
    ),
    Edit("`prompt.system=...`", FORMAT, "prompt.system=Well", fast=False),
    Edit(
        "the prompt's template in `conf/prompt/plain.yaml`",
        TOKENIZE,
        files=(("conf/prompt/plain.yaml", "{{ prompt }}\\n\\n", "{{ prompt }}\\n"),),
    ),
    Edit("`prompt.loss_on=all`", TOKENIZE, "prompt.loss_on=all", fast=False),
    Edit(
        "`max_length: 256` in `conf/tokenize/default.yaml`",
        TOKENIZE,
        files=(("conf/tokenize/default.yaml", "max_length: 1024", "max_length: 256"),),
        fast=False,
    ),
    Edit(
        "edit a file of your own base model",
        {"fetch_model": 1, **TOKENIZE},
        files=(("model/config.json", '"initializer_range": 0.3', '"initializer_range": 0.2'),),
        fast=False,
    ),
    Edit(
        "`model.load.attn_implementation=eager`",
        {**EVALUATE, **TRAIN},
        "model.load.attn_implementation=eager",
        fast=False,
    ),
    Edit("`train.weight_decay=0.01`", TRAIN, "train.weight_decay=0.01", fast=False),
    Edit(
        "`weight_decay: 0.02` in `conf/train/default.yaml`",
        TRAIN,
        files=(("conf/train/default.yaml", "weight_decay: 0.0\n", "weight_decay: 0.02\n"),),
        fast=False,
    ),
    Edit(
        "swap the values of `train.adam_beta1` and `train.adam_beta2`",
        TRAIN,
        files=(
            (
                "conf/experiment/mine.yaml",
                "adam_beta1: 0.9, adam_beta2: 0.95",
                "adam_beta1: 0.95, adam_beta2: 0.9",
            ),
        ),
        fast=False,
    ),
    Edit("`merge.dtype=bfloat16`", MERGE, "merge.dtype=bfloat16", fast=False),
    Edit("`merge=all`", WRITE, "merge=all"),  # the other run's
    Edit("`merge=none`", COMPARE, "merge=none"),
    Edit("`eval.max_new_tokens=4`", EVALUATE, "eval.max_new_tokens=4"),
    Edit(
        "add a value to an axis of `conf/sweep/mine.yaml`",
        {"train_adapter": 1, "evaluate_model": 1, **RANK},
        files=(("conf/sweep/mine.yaml", "1e-3,1e-2", "1e-3,1e-2,3e-3"),),
    ),
    Edit(
        "remove a value from it",
        RANK,
        files=(("conf/sweep/mine.yaml", "1e-3,1e-2", "1e-3"),),
        fast=False,
    ),
    Edit("`eval.suspects=10`", {**SCORE, **RANK}, "eval.suspects=10"),
    Edit("`eval.test=all`", {"evaluate_model": 1, **RANK}, "eval.test=all"),
    Edit("rename the sweep: `sweep.name=other`", RANK, "sweep.name=other", fast=False, back={}),
    Edit(
        "add a second number of epochs: `train.num_train_epochs=1,2`",
        TRAIN,  # for each of the two trunks one segment
        "train.num_train_epochs=1,2",
    ),
    Edit(
        "`tracking.flush_seconds=9`, `tracking.experiment_name=x`",
        {},
        "tracking.flush_seconds=9 tracking.experiment_name=x",
    ),
    Edit("`tracking=none`", {}, "tracking=none", fast=False),
    Edit(
        "`train.logging_steps=1`, `train.save_total_limit=1`",
        {},
        "train.logging_steps=1 train.save_total_limit=1",
        fast=False,
    ),
    Edit(
        "a comment in `conf/train/default.yaml`",
        {},
        files=(("conf/train/default.yaml", "learning_rate:", "# the first to tune\nlearning_rate:"),),
    ),
    Edit(
        "a statement in `steps/tokenize_splits.py`",
        TOKENIZE,
        files=(("steps/tokenize_splits.py", LOG, OTHER_LOG),),
        fast=False,
    ),
    Edit(
        "a statement in `temper/training/checkpoints.py`, which only the training imports",
        TRAIN,
        files=(("temper/training/checkpoints.py", 'SEAL = "complete.json"', 'SEAL = "sealed.json"'),),
    ),
    Edit(
        "a statement in `steps/merge_adapter.py`",
        WRITE,
        files=((MERGE_CODE, LOG, OTHER_LOG),),
        fast=False,
    ),
    Edit(
        "a statement in `temper/model/merging.py`",
        MERGE,
        files=(("temper/model/merging.py", LOG, OTHER_LOG),),
        fast=False,
    ),
    Edit(
        "a statement in `temper/evaluation/metrics.py`, which only evaluation and comparison import",
        EVALUATE,
        files=(("temper/evaluation/metrics.py", "import dataclasses\n", "import dataclasses\nimport json\n"),),
    ),
    Edit(
        "a statement in `steps/compare_runs.py`",
        COMPARE,
        files=(("steps/compare_runs.py", LOG, OTHER_LOG),),
    ),
    Edit(
        "a check in `temper/config/schema.py`, a message in `config/validate.py`, a `--help` in `temper/step.py`",
        {},
        files=(
            (
                "temper/config/schema.py",
                "samples: Annotated[int, Field(ge=0)]",
                "samples: Annotated[int, Field(gt=-1)]",
            ),
            ("temper/config/validate.py", "needs preference pairs", "wants preference pairs"),
            ("temper/step.py", "also write the log lines to this file", "copy the log lines to this file"),
        ),
    ),
    Edit(
        "comments, docstrings and formatting of `steps/merge_adapter.py` and `temper/model/predictions.py`",
        {},
        files=(
            (
                MERGE_CODE,
                '    """Merge and check.',
                '    # so that nobody needs peft to use the model\n    """Check it too.',
            ),
            (
                MERGE_CODE,
                "_write(Merging(config, model, adapter, splits), output)",
                "_write(Merging(\n\n            config, model,adapter, splits), output)",
            ),
            (LOSS_CODE, "The training loss:", "What is minimised:"),
            (
                LOSS_CODE,
                "def tokens_of(model, batch) -> int:",
                "def tokens_of( model, batch ) -> int:  # by hand",
            ),
        ),
    ),
    Edit(
        "a statement in `temper/tracking.py`",
        {},
        files=(("temper/tracking.py", "import getpass\n", "import getpass\nimport math\n"),),
    ),
    Edit(
        "a template of the report pages, and a name in `temper/reports/run_page.py`",
        {},
        files=(
            ("temper/reports/templates/report.html", "<h1", "<p>Mine.</p><h1"),
            ("temper/reports/run_page.py", 'ours = "tuned" if', 'ours = "fine-tuned" if'),
        ),
    ),
    PairsEdit(
        "in a DPO sweep on the model's own answers: `method.own_answers.max_new_tokens=3`",
        OWN_ANSWERS,
        "method.own_answers.max_new_tokens=3",
    ),
    PairsEdit(
        "in the same sweep: a statement in `steps/sample_answers.py`",
        OWN_ANSWERS,
        files=(("steps/sample_answers.py", LOG, OTHER_LOG),),
    ),
    PairsEdit(
        "in the same sweep: a statement in `steps/reference_logprobs.py`",
        REFERENCES,
        files=(("steps/reference_logprobs.py", LOG, OTHER_LOG),),
    ),
    PairsEdit(
        "in the same sweep: a statement in `temper/evaluation/generation.py`",
        {**OWN_ANSWERS, **EVALUATE},
        files=(("temper/evaluation/generation.py", LOG, OTHER_LOG),),
    ),
    PairsEdit("in the same sweep: `method.beta=0.2`", TRAIN, "method.beta=0.2"),
)


@contextlib.contextmanager
def applied(project: Path, *edits: Edit) -> Iterator[str]:
    """The edits' files with their new texts, and their overrides; afterwards the files are as they were."""
    changes = [change for edit in edits for change in edit.files]
    before = {project / name: (project / name).read_bytes() for name, _, _ in changes}
    try:
        for name, old, new in changes:
            text = (project / name).read_text()
            assert text.count(old) == 1 or old == new, f"{name}: {old!r} is in it {text.count(old)} times"
            (project / name).write_text(text.replace(old, new))
        yield " ".join(edit.overrides for edit in edits)
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def measure(project: Path, edit: Edit) -> tuple[dict[str, int], dict[str, int]]:
    """Execute the edit, then the project without it; of both, rule -> executed jobs.

    The leaderboard is then the one from before, and no training did more than its one epoch.
    """
    run(project, experiment=edit.experiment)
    first = leaderboard(project, edit.experiment)
    with applied(project, edit) as overrides:
        ran = run(project, overrides, experiment=edit.experiment)
    back = run(project, experiment=edit.experiment)
    assert leaderboard(project, edit.experiment) == first
    adapters = [json.loads(path.read_text()) for path in project.glob("results/adapters/*/provenance.json")]
    assert {adapter["trained_steps"] for adapter in adapters} == {STEPS_AN_EPOCH}
    return ran, back


# --- the tests -----------------------------------------------------------------------------------


def known_before_ranking(jobs: dict[str, int]) -> dict[str, int]:
    """What a dry run knows of the jobs of an edit: the ranking decides which models are judged on the test split.

    If the untouched model is judged anew, that is on both splits. Adding a run or a split judges no other one anew.
    """
    if "rank_runs" not in jobs:
        return jobs
    sure = {
        "evaluate_base": jobs.get("evaluate_base", 0) // 2,
        "evaluate_model": jobs.get("evaluate_model", 0) // 3 * 2,
    }
    if jobs.get("train_adapter") == 1:
        sure["evaluate_model"] = 1
    sure |= {"score_rows": 0, "merge_adapter": 0}  # of the chosen run
    return {name: count for name, count in {**jobs, **sure}.items() if count}


def each(edits):
    return pytest.mark.parametrize("edit", edits, ids=lambda edit: edit.what.replace("`", ""))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose sweep ran once."""
    folder = make_project(tmp_path_factory.mktemp("reruns") / "project")
    assert run(folder) == {"fetch_data": 1, **ALL_BUT_DATA}
    used = "".join(path.read_text() for path in folder.glob("results/prompts/*/*.jsonl"))
    assert USED_ROW in used
    assert UNUSED_ROW not in used
    return folder


def test_edits_that_make_no_difference_are_no_work(project):
    """All at once, as that is as good as one by one, and a tenth of the time."""
    with applied(project, *(edit for edit in MATRIX if edit.fast and not edit.runs)) as overrides:
        assert run(project, overrides, "-n") == {}


@each([edit for edit in MATRIX if edit.fast and edit.runs])
def test_an_edit_plans_just_its_jobs(project, edit):
    """Something left behind by the edit before, which was taken back without a run, would show here, too."""
    with applied(project, edit) as overrides:
        assert run(project, overrides, "-n") == known_before_ranking(edit.runs)


def test_a_folder_that_is_not_whole_is_made_again(project):
    """Whether it lost a file, all of them, or the end of one; and all of the commands say so."""
    report = next(path for path in (project / "results/reports").glob("mine-*") if "-test-" not in path.name)
    weights = next((project / "results/merged").glob("*/model.safetensors"))
    whole = weights.read_bytes()
    report.rename(project / "kept")
    report.mkdir()
    weights.write_bytes(whole[:100])
    try:
        done = snakemake(project, "-n", "--config", "experiment=mine", project=project)
        with contextlib.chdir(project):
            command = [sys.executable, "-m", "temper", "plan", "--experiment", "mine"]
            planned = subprocess.run(command, capture_output=True, text=True, env=environment()).stdout
    finally:
        weights.write_bytes(whole)
        report.rmdir()
        (project / "kept").rename(report)
    # Of the other run the evaluation runs too, and finds that it has nothing to do.
    assert executed(done)["compare_runs"] == 1
    assert 1 <= executed(done)["evaluate_model"] <= 2
    assert "train_adapter" not in executed(done)
    for said in (done.stderr, planned):
        assert "(provenance.json is missing)" in said
        assert f"(model.safetensors has 100 bytes, and had {len(whole)} when it was written)" in said
    todo = next(line for line in planned.splitlines() if line.startswith("jobs to do: "))
    assert set(todo.removeprefix("jobs to do: ").split(", ")) == {"merge_adapter 1", "evaluate_model 1"}


def test_a_folder_in_a_place_that_is_asked_for_by_name_is_made(project):
    """What messages propose for one that was deleted: nothing else asks for it."""
    merged = next((project / "results/merged").glob("mine-*"))
    merged.rename(project / "kept")
    try:
        assert run(project, "", "-n") == {}
        assert run(project, "", "-n", str(merged.relative_to(project))) == {"merge_adapter": 1}
    finally:
        (project / "kept").rename(merged)


def test_a_probe_and_a_gate(project):
    """Forgetting is measured by the reports alone. A bound that is not kept ends the same command in the same way."""
    (project / "probe.txt").write_text("\n\n".join(question for question, _ in tiny.tiny_rows(12)))
    probe = "probe.source.kind=files probe.source.path=probe.txt"

    def ended(*overrides: str) -> tuple[dict[str, int], int, str]:
        asked = ["experiment=mine", f"overrides={' '.join(overrides)}"]
        done = snakemake(project, "--config", *asked, check=False, project=project)
        return executed(done), done.returncode, done.stdout + done.stderr

    jobs, code, said = ended(probe, "eval.gate={forgetting:-9}")
    assert jobs == {"fetch_data": 1, "evaluate_base": 1, "evaluate_model": 2, **RANK}, said
    assert code == 1
    assert re.search(r"^gate: forgetting .* bits per byte .* is above -9$", said, flags=re.MULTILINE), said
    jobs, code, again = ended(probe, "eval.gate={forgetting:-9}")
    assert (jobs, code) == (COMPARE, 1), again
    assert leaderboard(project, "mine")[0]["forgetting"]
    receipt = json.loads((project / "results/sweeps/mine/receipt.json").read_text())
    assert any("probe.txt" in part["files"] for part in receipt["parts"])
    jobs, code, said = ended(probe, "eval.gate={forgetting:9}")
    assert (jobs, code) == (COMPARE, 0), said
    jobs, code, again = ended(probe, "eval.gate={forgetting:9}")
    assert (jobs, code) == ({}, 0), said + again

    (project / "probe.txt").write_text("One passage.")
    jobs, code, said = ended(probe)
    assert (jobs, code) == ({}, 2), said
    assert "has 1 passage(s), and its interval takes 2" in said
    assert run(project) == COMPARE, "its ranking is still there"


def test_edits_that_were_taken_back_are_no_work(project):
    assert run(project, "", "-n") == {}


@pytest.mark.slow
@each(MATRIX)
def test_an_edit_executes_just_its_jobs_and_costs_nothing_when_taken_back(project, edit):
    assert measure(project, edit) == (edit.runs, edit.runs_back)


def test_the_docs_have_the_matrix():
    assert table([(edit, edit.runs, edit.runs_back) for edit in MATRIX]) in DOCS.read_text()


# --- the docs ------------------------------------------------------------------------------------


def table(rows: list[tuple[Edit, dict[str, int], dict[str, int]]]) -> str:
    """The matrix in Markdown: (edit, jobs that ran, jobs that ran when it was taken back)."""
    lines = ["| edit | jobs that ran | after undoing it |", "|---|---|---|"]
    lines += [f"| {edit.what} | {_jobs(ran)} | {_jobs(back)} |" for edit, ran, back in rows]
    return "\n".join(lines) + "\n"


def _jobs(counts: dict[str, int]) -> str:
    order = ["fetch_model", "format_prompts", "tokenize_splits", *list(OWN_ANSWERS)[:2], *list(TOKENIZE)[1:]]
    return ", ".join(f"{rule} {counts[rule]}" for rule in sorted(counts, key=order.index)) or "none"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder) / "project")
        run(project)
        rows = []
        for edit in MATRIX:
            rows.append((edit, *measure(project, edit)))
            print(table(rows).splitlines()[-1], flush=True)
    DOCS.write_text(re.sub(r"(^\|.*\n)+", lambda _: table(rows), DOCS.read_text(), count=1, flags=re.MULTILINE))


if __name__ == "__main__":
    main()
