"""Which trainings may share their beginning."""

# Learning-rate schedules that do not look at the total number of steps: runs that differ only in
# num_train_epochs share their history, so they are one chain of epoch segments. With DECAYING_AT_THE_END
# they share all but the decay: each wanted epoch is a branch from the chain's plateau.
MOST_SEGMENTS = 200  # a longer training is one job: Snakemake follows chains of jobs by recursion
TOTAL_INDEPENDENT = frozenset({"constant", "constant_with_warmup", "inverse_sqrt"})
DECAYING_AT_THE_END = "warmup_stable_decay"


def shares_trunk(train: dict) -> bool:
    """Whether runs that differ only in num_train_epochs go through the same states, a decay at their end aside."""
    epochs = train.get("num_train_epochs", 3)
    whole = float(epochs) == int(epochs) and 1 <= epochs <= MOST_SEGMENTS
    warmup = train.get("warmup_steps") or 0
    return (
        _schedule_allows(train)
        and whole
        and train.get("max_steps", -1) <= 0
        and (warmup == 0 or warmup >= 1)  # below 1 it is a share of the total
        and (train.get("eval_steps") or 1) >= 1  # the same
        and not train.get("load_best_model_at_end", False)
    )


def _schedule_allows(train: dict) -> bool:
    schedule = train.get("lr_scheduler_type", "linear")
    if schedule == DECAYING_AT_THE_END:  # with num_stable_steps the decay does not stand at the end
        return "num_stable_steps" not in (train.get("lr_scheduler_kwargs") or {})
    return schedule in TOTAL_INDEPENDENT
