"""Which trainings can share their beginning.

Two runs that differ only in num_train_epochs compute the same steps as long as nothing in a step depends on the total.
They are then one chain of segments, the trunk: epochs 1, 2 and 4 cost 4 epochs, not 7. With a decay at the end, they
share the constant part (the plateau), and the decay of each run branches off from it.

This must be decided from the config alone and before any training, because it determines the jobs. If in doubt, do not
share: that costs time, but sharing wrongly would give a run other weights than it has alone.
"""

MOST_SEGMENTS = 200  # a longer training is one job, because Snakemake follows chains of jobs by recursion
TOTAL_INDEPENDENT = frozenset({"constant", "constant_with_warmup", "inverse_sqrt"})  # learning-rate schedules
DECAYING_AT_THE_END = "warmup_stable_decay"


def shares_trunk(train: dict) -> bool:
    """Whether runs that differ only in num_train_epochs go through the same states up to a possible decay."""
    epochs = train.get("num_train_epochs", 3)
    in_whole_epochs = float(epochs) == int(epochs) and 1 <= epochs <= MOST_SEGMENTS and train.get("max_steps", -1) <= 0

    # Below 1 these are shares of the total, so that a longer run would warm up, or evaluate, at other steps.
    warmup = train.get("warmup_steps") or 0
    in_steps = (warmup == 0 or warmup >= 1) and (train.get("eval_steps") or 1) >= 1

    # A segment that ends with its best checkpoint, or stops early, is not where the next epoch would continue.
    keeps_last = not train.get("load_best_model_at_end", False)

    return _schedule_allows(train) and in_whole_epochs and in_steps and keeps_last


def _schedule_allows(train: dict) -> bool:
    schedule = train.get("lr_scheduler_type", "linear")
    if schedule == DECAYING_AT_THE_END:  # num_stable_steps puts the decay somewhere else than at the end
        return "num_stable_steps" not in (train.get("lr_scheduler_kwargs") or {})
    return schedule in TOTAL_INDEPENDENT
