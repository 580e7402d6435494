"""Trainings that could not be what they say: options that break continuing, nothing to learn from, nothing to go by."""

import shutil

from tests.bad_inputs import Bad, World
from tests.support.tiny import make_tiny_splits

OPTIONS = ["experiment=smoke", "sweep=none", "tracking=none"]


def _plan(name: str, says: str, *overrides: str) -> Bad:
    return Bad(name, says, "plan", lambda world: ["--experiment", "smoke", *overrides])


def _train(name: str, says: str, *overrides: str, rows: dict | None = None, pairs: bool = False) -> Bad:
    """A training by hand; `rows`: of splits of its own, as for `make_tiny_splits`."""

    def arguments(world: World) -> list[str]:
        splits = world.pairs if pairs else world.splits
        if rows is not None:
            splits = make_tiny_splits(world.folder / "splits", world.model, rows=rows, pairs=pairs)
        return ["--splits", str(splits), "--model", str(world.model), "--output", "out", *OPTIONS, *overrides]

    return Bad(name, says, "train_adapter", arguments)


def _other_references(world: World) -> list[str]:
    from datasets import Dataset, DatasetDict

    figures = {"id": [901], "ref_chosen_logps": [-1.0], "ref_rejected_logps": [-2.0]}
    DatasetDict({"train": Dataset.from_dict(figures)}).save_to_disk("references")
    world.write("references/references.json", "{}")
    inputs = ["--splits", str(world.pairs), "--model", str(world.model), "--references", "references"]
    return [*inputs, "--output", "out", "experiment=dpo", "tracking=none"]


def _diverged(command: str, *overrides: str):
    def arguments(world: World) -> list[str]:
        world.write("merged/diverged.json", '{"step": 7}')
        return ["--splits", str(world.pairs), "--model", "merged", "--output", "out", *overrides]

    return Bad(f"{command} from a training that diverged", r"merged.*diverged", command, arguments)


def _cut_off_splits(world: World) -> list[str]:
    shutil.copytree(world.splits, "splits")
    for path in (world.folder / "splits" / "train").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    return ["--splits", "splits", "--model", str(world.model), "--output", "out", *OPTIONS]


NO_VALIDATION = {"validation": 0}
BEST = "train.load_best_model_at_end=true"

CASES = [
    _plan("checkpoints without optimizer", r"'train\.save_only_model' cannot be set", "train.save_only_model=true"),
    _plan("rows from the start again", r"'train\.ignore_data_skip' cannot be set", "train.ignore_data_skip=true"),
    _plan(
        "callbacks of one's own choice",
        r"'train\.restore_callback_states_from_checkpoint' cannot be set",
        "train.restore_callback_states_from_checkpoint=true",
    ),
    _plan(
        "a stopped training is a finished one",
        r"'train\.enable_jit_checkpoint' cannot be set",
        "train.enable_jit_checkpoint=true",
    ),
    _plan("a batch by memory", r"'train\.auto_find_batch_size' cannot be set", "train.auto_find_batch_size=true"),
    _plan("whichever row is first", r"'train\.dataloader_in_order' cannot be set", "train.dataloader_in_order=false"),
    _plan("no steps", r"'train\.max_steps' must be above 0, or -1", "train.max_steps=0"),
    _plan("less than no steps", r"'train\.max_steps' must be above 0, or -1", "train.max_steps=-5"),
    _plan("no threads", r"'num_threads'.*greater than 0 \(found 0\)", "num_threads=0"),
    _plan("half a thread", r"'num_threads'.*\(found 0\.5\)", "num_threads=0.5"),
    _plan("all threads", r"'num_threads'.*\(found .all.\)", "num_threads=all"),
    _plan(
        "threads of training alone", r"unknown key 'train\.num_threads': .*write num_threads=", "train.num_threads=2"
    ),
    _train(
        "a batch larger than the split, whole ones only",
        r"24 rows are less than a batch of 64; lower train\.per_device_train_batch_size to 24",
        "train.dataloader_drop_last=true",
        "train.per_device_train_batch_size=64",
    ),
    _train("no training rows", r"no training rows: see audit\.json", rows={"train": 0}),
    _train("the best model, no validation", r"train\.load_best.*no validation rows", BEST, rows=NO_VALIDATION),
    _train(
        "early stopping, no validation",
        r"no validation rows: raise data\.splits\.validation",
        BEST,
        "train.early_stopping_patience=2",
        rows=NO_VALIDATION,
    ),
    _train(
        "a rate by validation, no validation",
        r"train\.lr_scheduler_type=reduce_lr_on_plateau goes by the validation loss.*no validation rows",
        "train.lr_scheduler_type=reduce_lr_on_plateau",
        rows=NO_VALIDATION,
    ),
    _train(
        "saving the best, no validation",
        r"train\.save_strategy=best goes by the validation loss.*no validation rows",
        "train.save_strategy=best",
        "train.metric_for_best_model=loss",
        rows=NO_VALIDATION,
    ),
    _train("preferences without references", r"--references is missing", "experiment=dpo", pairs=True),
    Bad("references of other rows", r"--references references: of other rows", "train_adapter", _other_references),
    _diverged("train_adapter", *OPTIONS),
    _diverged("reference_logprobs", "experiment=dpo"),
    _diverged("sample_answers", "experiment=dpo", "method.own_answers={max_new_tokens: 4}"),
    Bad(
        "sampling that nobody asked for",
        r"'method\.own_answers' is not set",
        "sample_answers",
        lambda world: [
            *("--splits", str(world.pairs), "--model", str(world.model), "--output", "out"),
            "experiment=dpo",
        ],
    ),
    Bad("splits that were cut off", r"splits: cannot be read", "train_adapter", _cut_off_splits),
]
