"""`train` as TrainingArguments."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from temper.training import processes

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Fields of `train` for transformers.EarlyStoppingCallback, and for `load_model`; Trainer takes no notice of `fsdp` on a
# CPU. All others are those of TrainingArguments.
EARLY_STOPPING = ("early_stopping_patience", "early_stopping_threshold")
NOT_OF_TRAINER = (*EARLY_STOPPING, "fsdp")


def trainer_fields(train: dict) -> dict:
    """The fields of `train` that are TrainingArguments'.

    When to save is in no key, so a stage's config may lack it, while Trainer wants the candidates for the best model
    saved as they are evaluated: `SealedCheckpoints` saves them in any case.
    """
    fields = {name: value for name, value in train.items() if name not in NOT_OF_TRAINER}
    if not train.get("load_best_model_at_end"):
        return fields
    evaluated = {f"save_{name}": train[f"eval_{name}"] for name in ("strategy", "steps") if f"eval_{name}" in train}
    return {**evaluated, **fields}


def training_arguments(train: dict, seed: int, state: Path) -> "TrainingArguments":
    """`train` as TrainingArguments, with the fields that Temper sets itself."""
    import torch
    from transformers import TrainingArguments

    fields = trainer_fields(train)
    args = TrainingArguments(
        **{
            "dataloader_pin_memory": torch.accelerator.is_available(),
            # Without it, all trained weights must be part of each step's loss, or torch says so.
            "ddp_find_unused_parameters": False if processes.count() > 1 else None,
            **fields,
            # A resumed training must know for how long it has not improved.
            "restore_callback_states_from_checkpoint": any(name in train for name in EARLY_STOPPING),
            # Trainer deletes old checkpoints before the new one is sealed, so keep one more.
            "save_total_limit": max(2, train.get("save_total_limit") or 2),
            "output_dir": str(state),
            "seed": seed,
            "data_seed": seed,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "logging_nan_inf_filter": False,  # a diverged run must show its NaN, not an average that hides it
        }
    )
    # What accelerate does not take for a part of one training would train by itself.
    assert args.world_size == processes.count(), (args.world_size, processes.count())
    # Trainer would use all visible GPUs and multiply the batch size by their number, which is in no key.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def steps_per_epoch(rows: int, args: "TrainingArguments") -> int:
    """Optimizer steps in one pass over `rows` rows, as Trainer counts them."""
    per_step = args.train_batch_size * args.world_size
    batches = rows // per_step if args.dataloader_drop_last else math.ceil(rows / per_step)
    return math.ceil(batches / args.gradient_accumulation_steps)
