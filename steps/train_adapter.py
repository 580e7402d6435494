"""Train an adapter (or all parameters) on the splits.

By hand::

    python -m steps.train_adapter --splits results/splits/X --model results/models/Y \\
        --output results/adapters/Z experiment=smoke train.learning_rate=1e-3

Reads   the train and validation splits; the base model; for method=dpo the reference's log-probabilities.
Writes  the adapter as PEFT saves it; metrics.jsonl (curves); training.json (time, memory, speed, sizes).

Checkpoints stand in ``results/.state/<trunk>/``, outside the output, and training continues from
the last one by itself. Runs that differ only in ``num_train_epochs`` under a schedule that does not
depend on the total share a trunk: epoch 2 continues where epoch 1 ended. Under ``warmup_stable_decay`` they share
the plateau, whose folders hold a checkpoint in place of an adapter; each wanted epoch's decay branches off from there.
"""

import json
import logging
import math
import shutil
import sys
from pathlib import Path

from steps.lib import limits
from steps.lib.errors import UserError
from steps.lib.keys import digest
from steps.lib.labels import normalised
from steps.lib.progress import quiet_libraries
from steps.lib.step import locked, peak_memory, run_command

STAGE = "train_adapter"
STATE = Path("results/.state")

log = logging.getLogger("temper")


def run(config: dict, splits: Path, model: Path, output: Path, references: Path | None = None) -> dict:
    """Train, or continue training, up to ``train.num_train_epochs`` (or ``train.max_steps``).

    Raises:
        UserError: nothing to train on, an adapter config that does not fit the model, rows or answers that are longer
            than the model's context, or references of other rows.
    """
    quiet_libraries()
    by_hand = [config, str(splits), str(model), *([str(references)] if references else [])]
    state = STATE / config.get("trunk", f"by-hand-{digest(by_hand)}")
    with locked(state):
        return _train(config, _rows(config, splits, model, references), model, output, state)


def _rows(config: dict, splits: Path, model: Path, references: Path | None):
    """The splits, all within the model's limits; for preference optimization with the reference's figures."""
    from datasets import DatasetDict, concatenate_datasets, load_from_disk

    rows = load_from_disk(splits)
    answered = ["test"] if config.get("max_new_tokens") else []  # what the evaluation will ask for
    virtual_tokens = config["adapter"].get("num_virtual_tokens") or 0
    limits.check(model, rows, answered, config.get("max_new_tokens"), virtual_tokens=virtual_tokens)
    if config["method"]["name"] != "dpo":
        return rows
    if references is None:
        raise UserError("--references is missing: method=dpo needs the folder of reference_logprobs for these splits")
    figures, pairs = load_from_disk(references), {}
    for split in [split for split in ("train", "validation") if split in rows]:
        if split not in figures or list(rows[split]["id"]) != list(figures[split]["id"]):
            raise UserError(f"--references {references}: of other rows than {splits}; run reference_logprobs on these")
        pairs[split] = concatenate_datasets([rows[split], figures[split].remove_columns("id")], axis=1)
    return DatasetDict(pairs)


def _train(config: dict, rows, model: Path, output: Path, state: Path) -> dict:
    from steps.lib import checkpoints, estimates, tracking, training
    from steps.lib.adapters import parameter_counts

    if config.get("labels"):  # what the evaluation would refuse is better refused before training
        _check_references(rows, config["labels"])
    before = peak_memory()
    train = config["train"] if "validation" in rows else {**config["train"], "eval_strategy": "no"}
    args = training.training_arguments(train, config["seed"], state)
    epoch_steps = training.steps_per_epoch(len(rows["train"]), args)
    total = args.max_steps if args.max_steps > 0 else math.ceil(epoch_steps * args.num_train_epochs)
    end = _plateau_end(args, total) if _is_plateau(config) else total
    plateau = [Path(config["plateau"])] if config.get("plateau") else []
    checkpoint = checkpoints.last_whole([state, *plateau], end)
    trainer = _trainer(config, rows, model, args, total)
    sizes = parameter_counts(trainer.model)
    log.info("%s", _headline(rows, sizes, args, end, checkpoint))
    needs = estimates.estimate(trainer, trainer.sampler.lengths)
    log.info("%s", needs.text())
    if end <= args.warmup_steps:
        log.info("note: %d steps end within train.warmup_steps=%g: lower it", end, args.warmup_steps)
    with tracking.follow(config.get("follow")) as listener:
        recorded = training.Recorded(trainer, state, checkpoint, config["train"], listener)
        if end > 0:
            args.max_steps = end
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        facts = recorded.facts() | sizes | needs.facts(before)
    if _is_plateau(config):
        _keep_checkpoint(checkpoints.last_whole([state], end), output)
    else:
        trainer.model.save_pretrained(output)
        (output / "README.md").unlink(missing_ok=True)  # PEFT's empty card; steps.publish writes a real one
    return _write_facts(config, recorded, facts, output)


def _trainer(config: dict, rows, model: Path, args, total: int):
    """The trainer of this config's method, for a schedule over `total` steps."""
    from steps.lib.adapters import add_adapter, load_for_training
    from steps.lib.fast_layers import use_fast_layers
    from steps.lib.models import load_model, load_tokenizer
    from steps.lib.training import trainer_for

    load = load_for_training(config["adapter"], config["model"]["load"])
    base = load_model(model, load, config["quantization"])
    network = add_adapter(base, config["adapter"], config["seed"])
    use_fast_layers(network)
    return trainer_for(
        config["method"],
        model=network,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),  # data.splits.validation=0 leaves it out
        pad_token_id=load_tokenizer(model).pad_token_id,
        schedule_steps=total,
    )


def _write_facts(config: dict, recorded, facts: dict, output: Path) -> dict:
    """Write metrics.jsonl and training.json; returns what provenance.json gets."""
    from steps.lib import training
    from steps.lib.estimates import mebibytes

    training.write_metrics(output / "metrics.jsonl", recorded.metrics.lines)
    facts |= {
        "peak_memory_bytes": peak_memory(),
        "gflop_per_second": round(facts["flops_per_step"] / 1e9 * facts["steps_per_second"], 3),
    }
    if config["method"]["name"] == "dpo":
        facts["beta"] = config["method"]["beta"]
    (output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    log.info(
        "trained %d steps, %.0f tokens/s, %.1f GFLOP/s; peak memory %s (estimated %s)",
        facts["global_step"],
        facts["tokens_per_second"],
        facts["gflop_per_second"],
        mebibytes(facts["peak_memory_bytes"]),
        mebibytes(facts["estimated_peak_memory_bytes"]),
    )
    trained = facts["global_step"] - facts["resumed_from_step"]
    return {"trained_steps": trained, "trained_epochs": trained / recorded.epoch_steps, "part": config.get("part")}


def _is_plateau(config: dict) -> bool:
    """Whether this job ends where the schedule's decay would begin (the plan says so)."""
    return config.get("part") == "plateau"


def _plateau_end(args, total: int) -> int:
    """The step at which a warmup-stable-decay schedule over `total` steps begins to decay; 0 when it has no plateau."""
    return max(0, total - args.lr_scheduler_kwargs["num_decay_steps"])


def _keep_checkpoint(checkpoint: Path | None, output: Path) -> None:
    """A plateau's adapter is its checkpoint, which the decay branch and the next epoch's plateau start from."""
    if checkpoint is not None:  # else it diverged, or the decay is longer than the first epoch
        shutil.copytree(checkpoint, output / checkpoint.name)


def _check_references(rows, labels: list[str]) -> None:
    """Every answer of a labelling task must be one of its labels."""
    known = {normalised(label) for label in labels}
    for split, part in rows.items():
        for number, reference in zip(part["id"], part["reference"], strict=True):
            if normalised(reference) not in known:
                raise UserError(
                    f"{split} split, row {number} of the raw data: the answer '{reference[:60]}' is no label of "
                    f"eval.labels ({', '.join(labels)}); correct the row, data.completion or eval.labels"
                )


def _headline(rows, sizes: dict, args, target: int, checkpoint: Path | None) -> str:
    share = sizes["trainable_parameters"] / sizes["total_parameters"]
    start = f", continuing from {checkpoint}" if checkpoint else ""
    return (
        f"training {sizes['trainable_parameters']:,} of {sizes['total_parameters']:,} parameters ({share:.2%}) on "
        f"{len(rows['train'])} rows, to step {target}, "
        f"batch {args.train_batch_size} x {args.gradient_accumulation_steps}{start}"
    )


def main(argv=None) -> None:
    inputs = {
        "splits": "folder of tokenize_splits",
        "model": "folder of fetch_model, or of merge_adapter to start from a trained model",
        "references?": "folder of reference_logprobs, for method=dpo",
    }
    run_command(sys.modules[__name__], inputs, argv)


if __name__ == "__main__":
    main()
