"""Callbacks of a training: exact state, sealed checkpoints, divergence, metrics, progress."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from temper import signals
from temper.files import json_lines, known_json_lines, write_whole
from temper.model.spread import local
from temper.progress import Progress
from temper.training import checkpoints, processes
from temper.training.arguments import EARLY_STOPPING, steps_per_epoch
from temper.training.preferences import FIGURES_OF
from temper.training.trainers import TemperTrainer

log = logging.getLogger("temper")


class ExactState(TrainerCallback):
    """Makes every step depend only on the seed and its number.

    The random state is set before each step and the data order before each epoch. So a run that continues from a
    checkpoint, in the middle of an epoch or at its end, does exactly what it would have done without stopping, and
    there is no random state to save.
    """

    def __init__(self, trainer: TemperTrainer, epoch_steps: int):
        self.trainer, self.epoch_steps = trainer, epoch_steps

    def on_epoch_begin(self, args, state, control, **_):  # noqa: ARG002
        self.trainer.sampler.epoch = state.global_step // self.epoch_steps

    def on_step_begin(self, args, state, control, **_):  # noqa: ARG002
        seed = args.seed * 1_000_003 + state.global_step * 1009 + args.process_index
        torch.manual_seed(seed % 2**63)


class SealedCheckpoints(TrainerCallback):
    """Seals each checkpoint. Saves one, and logs the training loss, at the end of each epoch and of the training.

    Saves one also when a signal asks the process to end, which then ends there. That step's loss is not logged, or the
    curve would tell when it was; what was to be logged is in the checkpoint (`unlogged.pt`).

    The trunk's next segment starts at the end of an epoch. If the best model is kept, each evaluation is saved too,
    because the choice must not depend on `save_steps`, which is in no key. The loss is logged with each checkpoint, so
    that a training that continues from it has the same curve as one that never stopped.

    Args:
        start: the checkpoint that training continues from.
        is_plateau: whether training ends where a decay would begin. That is not the end of a run, so not evaluated.
        request: whether the process is asked to end.
    """

    def __init__(
        self,
        trainer: TemperTrainer,
        start: Path | None,
        epoch_steps: int,
        is_plateau: bool,
        request: signals.Request | None,
    ):
        self.trainer: Any = trainer  # Trainer's own sums, and the figures of preferences
        self.start, self.request = start, request or signals.Request()
        self.epoch_steps, self.is_plateau = epoch_steps, is_plateau

    def on_train_begin(self, args, state, control, **_):  # noqa: ARG002
        file = self.start / self._unlogged(args) if self.start else None
        if file and file.is_file():
            kept = torch.load(file, map_location=args.device, weights_only=True)
            self.trainer._tr_loss, self.trainer._globalstep_last_logged = kept["loss"], kept["since"]
            if kept["figures"]:
                self.trainer.figures = kept["figures"]

    def on_step_end(self, args, state, control, **_):
        if self.is_plateau and state.global_step >= state.max_steps and state.global_step % (state.eval_steps or 1):
            control.should_evaluate = False
        control.should_save |= control.should_evaluate and args.load_best_model_at_end
        control.should_log |= control.should_save
        is_end = state.global_step >= state.max_steps or state.global_step % self.epoch_steps == 0
        self.request.number = processes.of_first(self.request.number)  # which alone is asked
        control.should_save |= self.request.number is not None and not is_end  # at the end on_epoch_end saves
        return control

    def _keep_unlogged(self, checkpoint: Path, step: int) -> None:
        """Each process its own part of it."""
        trainer = self.trainer
        if (since := trainer._globalstep_last_logged) < step:
            unlogged = {"loss": trainer._tr_loss, "since": since, "figures": getattr(trainer, "figures", [])}
            torch.save(unlogged, checkpoint / self._unlogged(trainer.args))

    @staticmethod
    def _unlogged(args) -> str:
        return "unlogged.pt" if args.world_size == 1 else f"unlogged_{args.process_index}.pt"

    def on_epoch_end(self, args, state, control, **_):  # noqa: ARG002
        control.should_log = control.should_save = True
        if self.is_plateau and state.global_step % self.epoch_steps:
            control.should_evaluate = False
        return control

    def on_save(self, args, state, control, **_):  # noqa: ARG002
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._keep_unlogged(checkpoint, state.global_step)
        processes.wait_for_all()  # each has written its random state, and what it has not logged
        if processes.is_first():
            checkpoints.seal(checkpoint)
        if self.request.number is not None:
            log.info("asked to end: saved step %d of %d", state.global_step, state.max_steps)
        self.request.heed()


class StopOnDivergence(TrainerCallback):
    """Ends training when a figure or a weight becomes NaN or infinite, and records that as a result.

    Nothing is saved then, so a training that continues from the last checkpoint ends in the same way at the same step.
    """

    FIGURES = ("loss", "grad_norm", "eval_loss")

    def __init__(self):
        self.diverged_at: int | None = None

    def on_log(self, args, state, control, logs=None, optimizer=None, **_):  # noqa: ARG002
        for name in self.FIGURES:
            value = (logs or {}).get(name, 0.0)
            # float16's scaler skips a step whose gradients overflow, and reduces the scale for the next.
            scaled_down = name == "grad_norm" and getattr(optimizer, "step_was_skipped", False)
            if not math.isfinite(value) and not scaled_down:
                return self._stop(state, control, f"{name} is {value}")
        return control

    def on_epoch_end(self, args, state, control, model=None, **_):  # noqa: ARG002
        finite = all(processes.gathered(_is_finite(model)))  # each of its part of the weights
        if self.diverged_at is not None or not finite:
            return self._stop(state, control, "trained weights are not finite")
        return control

    def _stop(self, state, control, what: str):
        if self.diverged_at is None:
            self.diverged_at = state.global_step
            hint = "a lower train.learning_rate usually helps"
            log.info("the training diverged: %s at step %d: it stops here; %s", what, state.global_step, hint)
        control.should_training_stop = True
        control.should_evaluate = control.should_save = False
        return control


def _is_finite(model) -> bool:
    """Whether all trained weights are finite. No loss shows their last update."""
    return all(local(weight).isfinite().all() for weight in model.parameters() if weight.requires_grad)


class MetricsFile(TrainerCallback):
    """Appends Trainer's logs to metrics.jsonl, which MLflow and reports mirror.

    Each line has the step, the epoch, and the training seconds and real tokens since the first step, across all
    interruptions.
    """

    OF_PREFERENCES = tuple(dict.fromkeys(name for names in FIGURES_OF.values() for name in names))
    KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm", *OF_PREFERENCES, *(f"eval_{n}" for n in OF_PREFERENCES))

    def __init__(self, path: Path, checkpoint: Path | None, trainer: TemperTrainer, listener=None):
        """Start `path` anew with the metrics stored with the checkpoint."""
        self.path, self.trainer, self.listener = path, trainer, listener
        self.kept = (*self.KEPT, *([f"eval_{trainer.judge.metric}"] if trainer.judge else []))
        before = known_json_lines(checkpoint.parent / path.name) if checkpoint else []
        self.lines = [line for line in before if line["step"] <= checkpoints.step_of(checkpoint)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json_lines(self.lines))
        self.seconds_before = self.lines[-1]["seconds"] if self.lines else 0.0
        self.tokens_before = self.lines[-1]["tokens"] if self.lines else 0
        self.started = time.monotonic()

    def on_train_begin(self, args, state, control, **_):  # noqa: ARG002
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, including earlier parts of the run."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def tokens(self) -> int:
        """Real tokens so far, including earlier parts of the run."""
        return self.tokens_before + self.trainer.tokens

    def last(self, name: str, step: int | None = None) -> float | None:
        """The latest value of a figure, or that of a step."""
        lines = (line for line in reversed(self.lines) if step is None or line["step"] == step)
        return next((line[name] for line in lines if name in line), None)

    def on_log(self, args, state, control, logs=None, **_):  # noqa: ARG002
        values = {name: logs[name] for name in self.kept if name in (logs or {})}
        if not values:
            return
        line = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 6),
            **{name: _json_number(value) for name, value in values.items()},
            "seconds": round(self.seconds, 3),
            "tokens": self.tokens,
        }
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_lines([line]))
        if self.listener is not None:
            self.listener(line)


def _json_number(value: float) -> float | None:
    """JSON has no NaN, so such a loss becomes null."""
    return value if math.isfinite(value) else None


class ShowProgress(TrainerCallback):
    """One bar, or plain lines in a log, for the whole run."""

    def __init__(self):
        self.progress: Any = None  # from the start of training to its end
        self.note = ""

    def on_train_begin(self, args, state, control, **_):  # noqa: ARG002
        self.progress = Progress(state.max_steps, "train", "steps", initial=state.global_step).__enter__()

    def on_log(self, args, state, control, logs=None, **_):  # noqa: ARG002
        shown = {name: value for name, value in (logs or {}).items() if name in ("loss", "eval_loss")}
        for name, value in shown.items():
            self.note = f"{name} {value:.4f}"
        if "eval_loss" in shown:
            log.info("step %d: validation loss %.4f", state.global_step, shown["eval_loss"])

    def on_step_end(self, args, state, control, **_):  # noqa: ARG002
        self.progress.update(1, self.note)

    def on_train_end(self, args, state, control, **_):  # noqa: ARG002
        self.progress.__exit__(None, None, None)


class Recorded:
    """A training's callbacks, in their order, and what they recorded."""

    def __init__(
        self,
        trainer: TemperTrainer,
        state: Path,
        checkpoint: Path | None,
        train: dict,
        listener,
        is_plateau: bool,
        request: signals.Request | None = None,
    ):
        self.epoch_steps = steps_per_epoch(len(trainer.train_dataset), trainer.args)
        self.trainer, self.start = trainer, checkpoints.step_of(checkpoint)
        self.divergence = StopOnDivergence()
        # One process writes; what decides how training goes on is the same in all.
        shown: list[TrainerCallback] = []
        if processes.is_first():
            self.metrics = MetricsFile(state / "metrics.jsonl", checkpoint, trainer, listener)
            shown = [self.metrics, ShowProgress()]
        stopping = {name: train[name] for name in EARLY_STOPPING if name in train}
        for callback in (
            ExactState(trainer, self.epoch_steps),
            *shown,
            SealedCheckpoints(trainer, checkpoint, self.epoch_steps, is_plateau, request),
            *([EarlyStoppingCallback(**stopping)] if stopping else []),
            self.divergence,  # last, so that it decides what is saved
        ):
            trainer.add_callback(callback)

    def facts(self) -> dict:
        """The facts about the training itself in training.json; of the first process."""
        metrics, state = self.metrics, self.trainer.state
        seconds, best = (
            metrics.seconds,
            state.best_model_checkpoint if self.trainer.args.load_best_model_at_end else None,
        )
        best_step = checkpoints.step_of(Path(best)) if best else None
        judged = [f"eval_{self.trainer.judge.metric}"] if self.trainer.judge else []
        return {
            "train_rows": len(self.trainer.train_dataset),
            "num_processes": self.trainer.args.world_size,
            "train_seconds": round(seconds, 3),
            "tokens": metrics.tokens,
            "tokens_per_second": round(metrics.tokens / seconds, 1),
            "steps_per_second": round(state.global_step / seconds, 4),
            "global_step": state.global_step,
            "best_step": best_step,
            "final_loss": metrics.last("loss"),
            "eval_loss": metrics.last("eval_loss", best_step or state.global_step),  # of the saved weights
            **{name: metrics.last(name, best_step or state.global_step) for name in judged},
            "diverged_at_step": self.divergence.diverged_at,
            "resumed_from_step": self.start,
            "dtype": str(next(self.trainer.model.parameters()).dtype).removeprefix("torch."),
            "device": str(self.trainer.args.device),
        }
