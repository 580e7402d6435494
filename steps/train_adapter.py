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
        UserError: nothing to train on, an adapter config that does not fit the model, or references of other rows.
    """
    quiet_libraries()
    by_hand = [config, str(splits), str(model), *([str(references)] if references else [])]
    state = STATE / config.get("trunk", f"by-hand-{digest(by_hand)}")
    with locked(state):
        return _train(config, _rows(config, splits, references), model, output, state)


def _rows(config: dict, splits: Path, references: Path | None):
    """The splits; for preference optimization with the reference's figures beside each pair."""
    from datasets import DatasetDict, concatenate_datasets, load_from_disk

    rows = load_from_disk(splits)
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
    from steps.lib import checkpoints, tracking, training
    from steps.lib.adapters import add_adapter, load_for_training, parameter_counts
    from steps.lib.models import load_model, load_tokenizer

    if config.get("labels"):  # what the evaluation would refuse is better refused before training
        _check_references(rows, config["labels"])
    validation = rows.get("validation")  # data.splits.validation=0 leaves it out
    train = config["train"] if validation is not None else {**config["train"], "eval_strategy": "no"}
    args = training.training_arguments(train, config["seed"], state)
    epoch_steps = training.steps_per_epoch(len(rows["train"]), args)
    total = args.max_steps if args.max_steps > 0 else math.ceil(epoch_steps * args.num_train_epochs)
    is_plateau = config.get("part") == "plateau"
    end = _plateau_end(args, total) if is_plateau else total
    plateau = [Path(config["plateau"])] if config.get("plateau") else []
    checkpoint = checkpoints.last_whole([state, *plateau], end)
    load = load_for_training(config["adapter"], config["model"]["load"])
    base = load_model(model, load, config["quantization"])
    network = add_adapter(base, config["adapter"], config["seed"])
    sizes = parameter_counts(network)
    trainer = training.trainer_for(
        config["method"],
        model=network,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=validation,
        pad_token_id=load_tokenizer(model).pad_token_id,
        schedule_steps=total,
    )
    with tracking.follow(config.get("follow")) as listener:
        metrics = training.MetricsFile(state / "metrics.jsonl", checkpoint, listener)
        divergence = training.StopOnDivergence()
        trainer.add_callback(training.ExactState(trainer, epoch_steps))
        trainer.add_callback(training.CountTokens(trainer, metrics))
        for callback in (divergence, metrics, training.ShowProgress(), training.SealedCheckpoints(epoch_steps)):
            trainer.add_callback(callback)
        log.info("%s", _headline(rows, sizes, args, end, checkpoint))
        if end <= args.warmup_steps:
            log.info("note: %d steps end within train.warmup_steps=%g: lower it", end, args.warmup_steps)
        if end > 0:
            args.max_steps = end
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = metrics.seconds
    if is_plateau:
        _keep_checkpoint(checkpoints.last_whole([state], end), output)
    else:
        network.save_pretrained(output)
    final = trainer.state
    facts = {
        "train_seconds": round(seconds, 3),
        "tokens": metrics.tokens,
        "tokens_per_second": round(metrics.tokens / seconds, 1),
        **sizes,
        "peak_memory_bytes": peak_memory(),
        "train_rows": len(rows["train"]),
        **({"beta": config["method"]["beta"]} if config["method"]["name"] == "dpo" else {}),
        "global_step": final.global_step,
        "final_loss": _last(metrics.lines, "loss"),
        "eval_loss": _last(metrics.lines, "eval_loss"),
        "diverged_at_step": divergence.diverged_at,
        "resumed_from_step": checkpoints.step_of(checkpoint),
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
        "device": str(args.device),
    }
    training.write_metrics(output / "metrics.jsonl", metrics.lines)
    (output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    log.info("trained %d steps, %.0f tokens/s", final.global_step, facts["tokens_per_second"])
    trained = final.global_step - facts["resumed_from_step"]
    return {"trained_steps": trained, "trained_epochs": trained / epoch_steps, "part": config.get("part")}


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


def _last(lines: list[dict], name: str) -> float | None:
    return next((line[name] for line in reversed(lines) if name in line), None)


def main(argv=None) -> None:
    inputs = {
        "splits": "folder of tokenize_splits",
        "model": "folder of fetch_model, or of merge_adapter to start from a trained model",
        "references?": "folder of reference_logprobs, for method=dpo",
    }
    run_command(sys.modules[__name__], inputs, argv)


if __name__ == "__main__":
    main()
