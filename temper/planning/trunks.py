"""Which trainings can share their beginning.

Two runs that differ only in num_train_epochs compute the same steps as long as nothing in a step depends on the total.
They are then one chain of segments, the trunk: epochs 1, 2 and 4 cost 4 epochs, not 7. With a decay at the end, they
share the constant part (the plateau), and the decay of each run branches off from it. The rungs of a search by halving
are the ends of such segments, and may lie within an epoch.

This must be decided from the config alone and before any training, because it determines the jobs. If in doubt, do not
share: that costs time, but sharing wrongly would give a run other weights than it has alone.
"""

MOST_SEGMENTS = 200  # a longer training is one job, because Snakemake follows chains of jobs by recursion
TOTAL_INDEPENDENT = ("constant", "constant_with_warmup", "inverse_sqrt")  # learning-rate schedules
DECAYING_AT_THE_END = "warmup_stable_decay"


def shares_trunk(train: dict) -> bool:
    """Whether runs that differ only in num_train_epochs go through the same states up to a possible decay, and their
    epochs are whole."""
    epochs = train.get("num_train_epochs", 3)
    in_whole_epochs = float(epochs) == int(epochs) and 1 <= epochs <= MOST_SEGMENTS and train.get("max_steps", -1) <= 0
    return in_whole_epochs and needs_total(train) is None


def needs_total(train: dict) -> str | None:
    """What makes a training's steps depend on how many there are, with what to do about it; None: nothing does."""
    schedule = train.get("lr_scheduler_type", "linear")
    if schedule not in (*TOTAL_INDEPENDENT, DECAYING_AT_THE_END):
        return (
            f"train.lr_scheduler_type={schedule} depends on the total: choose constant_with_warmup, or "
            f"{DECAYING_AT_THE_END} (train={DECAYING_AT_THE_END}), which ends each with a short decay"
        )
    # It puts the decay somewhere else than at the end.
    if schedule == DECAYING_AT_THE_END and "num_stable_steps" in (train.get("lr_scheduler_kwargs") or {}):
        return "train.lr_scheduler_kwargs.num_stable_steps fixes the total: give num_decay_steps alone"
    # Below 1 these are shares of the total, so that a longer run would warm up, or evaluate, at other steps.
    for name in ("warmup_steps", "eval_steps"):
        if 0 < (train.get(name) or 0) < 1:
            return f"train.{name}={train[name]} is a share of the total: give a number of steps"
    # A segment that ends with its best checkpoint, or stops early, is not where the next one would continue.
    if train.get("load_best_model_at_end", False):
        return "train.load_best_model_at_end=true keeps another state than the last: set it to false"
    return None
