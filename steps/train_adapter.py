"""Train an adapter (or all parameters) on the splits.

By hand::

    python -m steps.train_adapter --splits results/splits/X --model results/models/Y \\
        --output results/adapters/Z experiment=smoke train.learning_rate=1e-3

Reads   the train and validation splits; the base model; for method=dpo
        and method=kto the reference's log-probabilities.
Writes  the adapter as PEFT saves it; metrics.jsonl (curves); training.json (time, memory, speed, sizes); serving.json
        (sums of the base's weights, tokenizer and template, without which the adapter means nothing).

Checkpoints are in ``results/.state/<trunk>/``, outside the output, and training continues from the last one by itself.
Runs that differ only in ``num_train_epochs`` share a trunk if the schedule does not depend on the total: epoch 2
continues where epoch 1 ended. Under ``warmup_stable_decay`` they share the plateau, whose folders hold a checkpoint
instead of an adapter; the decay of each run branches off from there.
"""

import dataclasses
import importlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from temper import signals
from temper.config import best
from temper.config import evaluation as checks
from temper.config.libraries import ignores_warmup, refuse_without_validation
from temper.config.schema import WITH_REFERENCE, Dpo, Kto
from temper.config.stages import NOT_PLANNED, PLATEAU, Planned, TrainAdapter, typed
from temper.data.columns import with_right_answers
from temper.errors import UserError, told_by_library
from temper.files import json_lines, load_rows, write_whole
from temper.folders import locked
from temper.hashing import HashCache, digest
from temper.keys import code_key
from temper.model import limits, serving
from temper.model.adapters import refuse_diverged
from temper.model.loading import load_tokenizer
from temper.model.threads import computing_threads
from temper.progress import quiet_libraries
from temper.provenance import peak_memory
from temper.step import run_command
from temper.training import processes
from temper.units import size

STAGE = "train_adapter"
STATE = Path("results/.state")
LEARNED = ("train", "validation")  # splits that training sees

log = logging.getLogger("temper")


def run(
    config: TrainAdapter,
    splits: Path,
    model: Path,
    output: Path,
    references: Path | None = None,
    planned: Planned = NOT_PLANNED,
) -> dict:
    """Train, or continue training, up to ``train.num_train_epochs`` (or ``train.max_steps``).

    Raises:
        UserError: nothing to train on, splits of another tokenizer or template, an adapter config that does not fit the
            model, rows or answers that are longer than the model's context, or that the evaluation would refuse, or
            references of other rows.
    """
    quiet_libraries()
    refuse_diverged(model)
    served_with = {**serving.refuse_other_splits(splits, model), serving.BASE: serving.weights(model)}
    inputs = [splits, model, *([references] if references else [])]
    state = STATE / (planned.trunk or _by_hand(config, inputs))
    job = _job(config, planned, splits=splits, model=model, references=references, state=state, output=output)
    with (
        locked(state),
        computing_threads(config.num_threads),
        processes.started(f"steps.{STAGE}", job, config.num_processes, bool(config.train.get("use_cpu"))) as others,
    ):
        rows = _rows(config, planned, splits, model)
        learned = _learned(config, rows, splits, references)
        facts = _train(config, planned, rows, learned, model, output, state, others)
    serving.write(output, served_with)
    return facts


def finish(planned: Planned) -> None:
    """Called when the output is in its place: only then are the checkpoints needed for nothing but longer trainings."""
    from temper.training import checkpoints

    if planned.trunk and planned.keep:
        state = STATE / planned.trunk
        with locked(state):
            checkpoints.cut(state, planned.keep)


def _by_hand(config: TrainAdapter, inputs: list[Path]) -> str:
    """A name for the checkpoints of a training outside a plan: like a key, a hash of everything it depends on.

    The inputs' paths are not enough, because their content may have been made anew.
    """
    hashes = HashCache(STATE / "hashes.json")
    made_of = [
        {str(path.relative_to(folder)): hashes.sha256(path) for path in sorted(folder.rglob("*")) if _counts(path)}
        for folder in inputs
    ]
    hashes.save()
    code = [code_key(f"steps.{STAGE}")]
    if config.eval is not None:
        code += [code_key(best.JUDGING), importlib.import_module(best.JUDGING).own_code(config.eval.model_dump())]
    return f"by-hand-{digest([config.model_dump(), made_of, *code])}"


def _counts(path: Path) -> bool:
    """Whether a file of an input affects training; records such as the time it took do not."""
    return path.is_file() and path.name not in ("provenance.json", ".snakemake_timestamp")


def _rows(config: TrainAdapter, planned: Planned, splits: Path, model: Path):
    """The splits, checked against the model's limits and the evaluation."""
    rows = load_rows(splits)
    evaluations = [(one, checks.splits_judged(one)) for one in planned.evaluations]
    answered = {split: planned.max_new_tokens or 0 for _, judged in evaluations for split in judged}
    if (metric := best.judged_metric(config.train)) and config.eval:
        settings = {**config.eval.model_dump(), "metric": metric}
        evaluations = evaluations or [(settings, ["validation"])]
        tokens = settings["max_new_tokens"] if best.needs_answers(settings, metric) else 0
        answered["validation"] = max(tokens, answered.get("validation", 0))
    asked = [split for split, tokens in answered.items() if tokens]
    virtual_tokens = config.adapter.get("num_virtual_tokens") or 0
    limits.check(model, rows, asked, max(answered.values(), default=0), virtual_tokens=virtual_tokens)
    if evaluations:
        tokenizer = load_tokenizer(model)
        for evaluation, judged in evaluations:
            checks.check(evaluation, splits, with_right_answers(rows), tokenizer, judged)
    return rows


def _learned(config: TrainAdapter, rows, splits: Path, references: Path | None):
    """The rows to learn from and to validate on, with the reference's figures where the method compares with one."""
    from datasets import DatasetDict

    from temper.training import preferences, unpaired

    method = config.method.name
    for split, part in rows.items():
        _refuse_other_rows(method, part, split, splits)
    if method not in WITH_REFERENCE:
        return rows
    if references is None:
        raise UserError(
            f"--references is missing: method={method} needs the folder of reference_logprobs for these splits"
        )
    of_method = {"dpo": preferences.with_references, "kto": unpaired.with_references}[method]
    figures, learned = load_rows(references), {}
    for split in [split for split in LEARNED if split in rows]:
        made = of_method(rows[split], figures[split]) if split in figures else None
        if made is None:
            raise UserError(
                f"--references {references}: of other rows than {splits}, or for another method than {method}; run "
                "reference_logprobs on these"
            )
        learned[split] = made
    if method == "kto" and "train" in learned:
        note = unpaired.imbalance(learned["train"]["label"][:], config.method.model_dump())
        if note:
            log.info("note: %s", note)
    return DatasetDict(learned)


def _refuse_other_rows(method: str, part, split: str, splits: Path) -> None:
    """Refuse a split that the method cannot learn from, or would learn the wrong thing from."""
    pairs, labels = ("rejected_input_ids" in part.column_names), ("label" in part.column_names)
    if split not in LEARNED:
        return
    if method == "sft" and labels:
        raise UserError(
            f"{splits}: says which answers are undesirable, and method=sft would learn these as well: choose "
            "method=kto, or make splits of the desirable ones alone (data.where)"
        )
    if method not in ("sft", "kto") and not pairs:
        raise UserError(f"{splits}: no preference pairs in the {split} split, which method={method} needs")
    if method == "kto" and not pairs and not labels:
        raise UserError(
            f"{splits}: the {split} split has neither labels nor pairs, and method=kto needs to know which answers are "
            "desirable"
        )


@dataclasses.dataclass
class _Training:
    """A training that is ready to begin or to go on, in one or in several processes.

    Args:
        end: the step at which it ends.
        needs: the estimate of its memory and work.
    """

    trainer: Any
    end: int
    checkpoint: Path | None
    state: Path
    needs: Any
    config: TrainAdapter
    is_plateau: bool

    def go_on(self, listener=None, request: signals.Request | None = None):
        """Train to the end; returns the records of it.

        Args:
            listener: takes each line of metrics.jsonl.
            request: whether the process is asked to end.
        """
        from temper.training import callbacks

        args, start = self.trainer.args, self.checkpoint
        recorded = callbacks.Recorded(
            self.trainer, self.state, start, self.config.train, listener, self.is_plateau, request
        )
        if self.end > 0:
            args.max_steps = self.end
            args.eval_on_start &= start is None  # the start of training, not of each of its parts
            self.trainer.train(resume_from_checkpoint=str(start) if start else None)
        return recorded

    def save(self, output: Path) -> None:
        """Save what was trained, which all processes of a spread model must do together."""
        from temper.model.adapters import save_adapter
        from temper.model.spread import is_spread
        from temper.training import checkpoints

        first = processes.is_first()
        if self.is_plateau:
            if first:
                _keep_checkpoint(checkpoints.last_whole([self.state], self.end), output)
        elif first or is_spread(self.trainer.model):
            save_adapter(self.trainer.model, output, first)


def _train(
    config: TrainAdapter, planned: Planned, rows, learned, model: Path, output: Path, state: Path, others
) -> dict:
    from temper import tracking
    from temper.model.adapters import parameter_counts

    with others.joined():
        training = _ready(config, planned, rows, learned, model, state)
        sizes = parameter_counts(training.trainer.model)
        _say(training, sizes, len(learned["train"]))
        with tracking.follow(planned.follow) as listener, signals.put_off() as request:
            recorded = training.go_on(listener, request)
            facts = recorded.facts() | sizes | training.needs.facts()
        training.save(output)
    return _write_facts(config, recorded, facts, output) | {"part": planned.part}


def other_process(job: dict) -> Callable[[], object]:
    """What another process of a training does once it has joined (`temper.training.processes`).

    Args:
        job: of `_job`.
    """
    quiet_libraries()
    config, planned = typed(STAGE, job["config"]), Planned(**job["planned"])
    assert isinstance(config, TrainAdapter)
    splits, model, state = (Path(job[name]) for name in ("splits", "model", "state"))
    rows = load_rows(splits)
    learned = _learned(config, rows, splits, Path(job["references"]) if job["references"] else None)

    def train():
        with computing_threads(config.num_threads):
            training = _ready(config, planned, rows, learned, model, state)
            training.go_on()
            training.save(Path(job["output"]))

    return train


def _job(config: TrainAdapter, planned: Planned, **paths: Path | None) -> dict:
    words = {name: str(path) if path else None for name, path in paths.items()}
    return {"config": config.model_dump(mode="json"), "planned": dataclasses.asdict(planned), **words}


def _ready(config: TrainAdapter, planned: Planned, rows, learned, model: Path, state: Path) -> _Training:
    """Load and check everything. All processes of a training do this at the same time."""
    from temper.training import arguments, checkpoints, estimates
    from temper.training.trainers import row_lengths

    before = peak_memory()
    with told_by_library("train"):
        train = _without_validation(config.train, rows)
        if best.judged_metric(train):  # Trainer would go by the end of its name
            train = {**train, "greater_is_better": True}
        args = arguments.training_arguments(train, config.seed, state)
    epoch_steps = _epoch_steps(learned, args)
    total = args.max_steps if args.max_steps > 0 else math.ceil(epoch_steps * args.num_train_epochs)
    end = _plateau_end(args, total) if planned.part == PLATEAU else total
    plateau = [Path(planned.plateau)] if planned.plateau else []
    checkpoint = processes.of_first(checkpoints.last_whole([state, *plateau], end) if processes.is_first() else None)
    judge = _judge(config, planned, rows, model, lambda: _evaluations(args, end, epoch_steps))
    trainer = _trainer(config, learned, model, args, total, judge)
    needs = estimates.estimate(trainer, row_lengths(learned["train"]), before)
    return _Training(trainer, end, checkpoint, state, needs, config, planned.part == PLATEAU)


def _say(training: _Training, sizes: dict, rows: int) -> None:
    """What is about to be trained, what it needs, and what is odd about it."""
    args, config, end = training.trainer.args, training.config, training.end
    log.info("%s", _headline(rows, sizes, args, end, training.checkpoint, config.num_threads))
    log.info("%s", training.needs.text())
    if end <= args.warmup_steps:
        log.info("note: %d steps end within train.warmup_steps=%g: lower it", end, args.warmup_steps)
    if args.warmup_steps and ignores_warmup(args):
        name = config.train["lr_scheduler_type"]
        log.info("note: lr_scheduler_type=%s takes no notice of train.warmup_steps", name)


def _without_validation(train: dict, rows) -> dict:
    """`train`, without evaluation if there is no validation split (data.splits.validation=0)."""
    if "validation" in rows:
        return train
    refuse_without_validation(train)
    return {**train, "eval_strategy": "no", "eval_on_start": False}


def _epoch_steps(rows, args) -> int:
    """Optimizer steps in an epoch; at least one."""
    from temper.training.arguments import steps_per_epoch

    count = len(rows["train"]) if "train" in rows else 0
    if not count:
        raise UserError("the splits have no training rows: see audit.json there for what was left out, and data.splits")
    steps = steps_per_epoch(count, args)
    if not steps:
        raise UserError(
            f"config: train.dataloader_drop_last=true leaves nothing to train on: {count} rows are less than a batch "
            f"of {args.train_batch_size * args.world_size}; lower train.per_device_train_batch_size to {count} or less"
        )
    return steps


def _evaluations(args, end: int, epoch_steps: int) -> int:
    """About how often the validation split is evaluated."""
    if args.eval_strategy == "epoch":
        every = float(epoch_steps)
    else:
        every = args.eval_steps if args.eval_steps >= 1 else args.eval_steps * end
    return math.ceil(end / every) + args.eval_on_start


def _judge(config: TrainAdapter, planned: Planned, rows, model: Path, evaluations: Callable[[], int]):
    """What gives the metric of answers that chooses the checkpoint, if one does."""
    metric = best.judged_metric(config.train)
    if metric is None or config.eval is None:
        return None
    settings = config.eval.model_dump()
    by_answers = best.needs_answers(settings, metric)
    # By name: otherwise the code that judges answers would be in the key of every training.
    choosing = importlib.import_module(best.JUDGING)
    tokenizer = load_tokenizer(model)
    return choosing.ValidationJudge(
        metric, settings, by_answers, with_right_answers(rows), model, tokenizer, evaluations(), planned.own_code
    )


def _trainer(config: TrainAdapter, rows, model: Path, args, total: int, judge):
    """The trainer of this config's method, for a schedule over `total` steps."""
    from temper.model.adapters import add_adapter, load_for_training
    from temper.model.fast_layers import use_fast_layers
    from temper.model.loading import load_model
    from temper.model.spread import refuse_tied
    from temper.training.trainers import trainer_for

    load = load_for_training(config.adapter, config.model.load.model_dump())
    spread = processes.count() if config.train.get("fsdp") else 1
    base = load_model(model, load, config.quantization.model_dump(), spread)
    if spread > 1 and config.adapter["peft_type"] is None:
        refuse_tied(base)
    network = add_adapter(base, config.adapter, config.seed)
    use_fast_layers(network)
    pad_token_id = load_tokenizer(model).pad_token_id
    with told_by_library("train"):
        trainer = trainer_for(
            config.method.model_dump(),
            model=network,
            args=args,
            train_dataset=rows["train"],
            eval_dataset=rows.get("validation"),  # data.splits.validation=0 leaves it out
            pad_token_id=pad_token_id,
            schedule_steps=total,
            judge=judge,
        )
        trainer.create_optimizer()  # train() needs it; make it now, so that its errors come before training
    return trainer


def _write_facts(config: TrainAdapter, recorded, facts: dict, output: Path) -> dict:
    """Write metrics.jsonl and training.json; returns what provenance.json gets."""
    write_whole(output / "metrics.jsonl", json_lines(recorded.metrics.lines))
    facts |= {
        "peak_memory_bytes": peak_memory(),
        "gflop_per_second": round(facts["flops_per_step"] / 1e9 * facts["steps_per_second"], 3),
    }
    if isinstance(config.method, Dpo | Kto):
        facts["beta"] = config.method.beta
    (output / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    log.info(
        "trained %d steps, %.0f tokens/s, %.1f GFLOP/s; peak memory %s (estimated %s)",
        facts["global_step"],
        facts["tokens_per_second"],
        facts["gflop_per_second"],
        size(facts["peak_memory_bytes"]),
        size(facts["estimated_peak_memory_bytes"]),
    )
    trained = facts["global_step"] - facts["resumed_from_step"]
    return {"trained_steps": trained, "trained_epochs": trained / recorded.epoch_steps}


def _plateau_end(args, total: int) -> int:
    """The step at which a warmup-stable-decay schedule of `total` steps begins to decay; 0 if it has no plateau."""
    return max(0, total - args.lr_scheduler_kwargs["num_decay_steps"])


def _keep_checkpoint(checkpoint: Path | None, output: Path) -> None:
    """Store the plateau's checkpoint as its adapter: the decay and the next epoch's plateau start from it."""
    if checkpoint is not None:  # missing if training diverged, or if the decay is longer than the first epoch
        shutil.copytree(checkpoint, output / checkpoint.name)


def _headline(rows: int, sizes: dict, args, target: int, checkpoint: Path | None, threads: int) -> str:
    share = sizes["trainable_parameters"] / sizes["total_parameters"]
    computed = f", {threads} thread(s)" if args.device.type == "cpu" else ""
    start = f", continuing from {checkpoint}" if checkpoint else ""
    together = f" x {args.world_size} processes" if args.world_size > 1 else ""
    return (
        f"training {sizes['trainable_parameters']:,} of {sizes['total_parameters']:,} parameters ({share:.2%}) on "
        f"{rows} rows, to step {target}, "
        f"batch {args.train_batch_size} x {args.gradient_accumulation_steps}{together}{computed}{start}"
    )


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
