"""Labels, references and metrics that could not be judged: all of it is told before training.

What config alone tells is told by the plan; what takes the rows and the tokenizer, by the training, and in the same
words by an evaluation that is asked for by hand.
"""

import json
import shutil
import unicodedata

from temper.config.stages import load_stage_config
from temper.files import load_rows
from tests.bad_inputs import Bad, World
from tests.support.tiny import make_tiny_splits, tiny_rows

OPTIONS = ["experiment=smoke", "sweep=none", "tracking=none", "eval.published=[]", "eval.split=test"]
HINDI = [(f"{prompt} {number}", f"नमस्ते {number}") for number, (prompt, _) in enumerate(tiny_rows(24))]
CZECH = [
    (prompt, ("Příliš žluťoučký kůň", "úpěl ďábelské ódy")[number % 2]) for number, (prompt, _) in enumerate(HINDI)
]
SIGNS = [(prompt, "?!") for prompt, _ in HINDI]


def _published(metric: str) -> str:
    return f"eval.published=[{{name: Theirs, metric: {metric}, value: 0.5, source: a paper}}]"


def _plan(name: str, says: str, *overrides: str) -> Bad:
    return Bad(name, says, "plan", lambda world: ["--experiment", "smoke", *overrides])


def _labels(name: str, says: str, *labels: str) -> Bad:
    return _plan(name, rf"'eval\.labels'.*{says}", f"eval.labels={json.dumps(labels, ensure_ascii=False)}")


def _judged(name: str, says: str, *overrides: str, rows: list | None = None, model=None) -> list[Bad]:
    """The same rows and config before training, as the plan hands them over, and in an evaluation by hand."""

    def arguments(world: World, command: str) -> list[str]:
        folder, splits = model(world) if model else world.model, world.splits
        if rows is not None:
            splits = _splits(world, rows)
        inputs = ["--splits", str(splits), "--model", str(folder), "--output", "out"]
        return [*inputs, *(_planned(*overrides) if command == "train_adapter" else [*OPTIONS, *overrides])]

    return [
        Bad(f"{name}, {when}", says, command, lambda world, command=command: arguments(world, command))
        for when, command in (("before training", "train_adapter"), ("by hand", "evaluate_model"))
    ]


def _splits(world: World, rows: list):
    """Splits whose references are what tokenize_splits writes: the answers without the blanks around them."""
    made = make_tiny_splits("made", world.model, rows={"train": rows[:8], "validation": 0, "test": rows[8:]})
    stripped = load_rows(made).map(lambda row: {"reference": row["reference"].strip()})
    stripped.save_to_disk("splits")
    return "splits"


def _planned(*overrides: str) -> list[str]:
    config = load_stage_config("train_adapter", None, OPTIONS)
    evaluation = load_stage_config("evaluate_model", None, [*OPTIONS, *overrides])["eval"]
    return ["--config", json.dumps(config | {"evaluations": [evaluation]})]


def _uncased(world: World):
    """The tiny model with a tokenizer that knows no capital letters."""
    folder = shutil.copytree(world.model, world.folder / "uncased")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


CASES = [
    # labels
    _labels("twice the same label", "'good' and 'good' are one: leave one out", "good", "good"),
    _labels("labels that differ in blanks", "'a b' and 'a  b ' are one", "a b", "a  b "),
    _labels("labels in two compositions", "are one: leave one out", "café", unicodedata.normalize("NFD", "café")),
    _labels("labels that differ in an emoji's colour", "are one", "❤", "❤\ufe0f"),
    _labels("an empty label", "an empty label", "good", ""),
    _labels("a blank label", "an empty label", "good", "  "),
    _labels("a label with the name of none", "'Unparsed' is what an answer without a label is called", "a", "Unparsed"),
    _plan("one label", r"at least two of them", "eval.labels=[good]"),
    _plan("no labels", r"needs the list 'labels'", "eval.labels=null"),
    _plan("labels that YAML reads as truth values", r"'eval\.labels.*in quotes", "eval.labels=[true,false]"),
    # metrics
    _plan("accuracy without labels", r"task 'text' has no metric 'accuracy'", "eval=text", "eval.metric=accuracy"),
    _plan("ROUGE of labels", r"task 'labels' has no metric 'rouge_l'", "eval.metric=rouge_l"),
    _plan("a published figure of another task", r"'eval\.published': 'Theirs' has metric 'chrf'", _published("chrf")),
    _plan("preferences without pairs", r"'eval\.metric': pref.* needs preference", "eval.metric=preference_accuracy"),
    _plan(
        "published preferences without pairs",
        r"'eval\.published': preference_accuracy needs preference pairs",
        _published("preference_accuracy"),
    ),
    # what rows and tokenizer tell
    *_judged(
        "an answer that is not a label", r"(train|test) split, row \d+ .* is not a label", "eval.labels=[good,bad]"
    ),
    *_judged(
        "an answer that could be two labels",
        r"test split, row 9 .*'MAY' could be May or may: write it as the label",
        "eval.labels=[May,may]",
        rows=[(prompt, "May") for prompt, _ in HINDI[:8]] + [(HINDI[8][0], "MAY")],
    ),
    *_judged(
        "labels of the same tokens",
        r"'positive' and 'Positive' have the same tokens in this model: rename",
        "eval.labels=[positive,Positive,negative]",
        model=_uncased,
    ),
    *_judged(
        "a label whose tokens cannot be told",
        r"no row has 'neutral', and which tokens .* add a row that has it, or leave it out",
        "eval.labels=[positive,negative,neutral]",
        rows=[(prompt, {"positive": " positive"}.get(answer, answer)) for prompt, answer in tiny_rows(16)],
    ),
    *_judged("ROUGE of another script", r"'eval\.metric'.*set eval\.metric=chrf", "eval=text", rows=HINDI),
    *_judged("ROUGE of letters with marks", r"ROUGE-L .* 4\d\.\d% of .*eval\.metric=chrf", "eval=text", rows=CZECH),
    *_judged("ROUGE of no words", r"100\.0% of the test references", "eval=text", rows=SIGNS),
    *_judged(
        "published ROUGE of another script",
        r"'eval\.published': 'Theirs' has metric 'rouge_l', but ROUGE-L .*: leave it out",
        "eval=text",
        "eval.metric=chrf",
        _published("rouge_l"),
        rows=HINDI,
    ),
    *_judged("no test rows", r"no rows in the test split; raise data\.splits\.test", rows=tiny_rows(8)),
]
