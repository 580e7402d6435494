"""The training loop: `transformers.Trainer` with our loss, order, randomness and records.

Imported inside `run()` only: it needs torch and transformers.
"""

import functools
import json
import logging
import math
import time
from pathlib import Path

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import activate_neftune

from steps.lib import checkpoints
from steps.lib.adapters import refuse_adapter_misfits
from steps.lib.batches import EpochSampler, collate
from steps.lib.errors import UserError
from steps.lib.loss import SupervisedLoss, tokens_computed, tokens_of, with_decoder_inputs
from steps.lib.preferences import FIGURES, PreferenceLoss, collate_pairs
from steps.lib.progress import Progress
from steps.lib.reading import reading, refuse_tensors
from steps.lib.schema import EARLY_STOPPING

log = logging.getLogger("temper")


def training_arguments(train: dict, seed: int, state: Path) -> TrainingArguments:
    """`train` as TrainingArguments, with what Temper decides itself."""
    fields = {name: value for name, value in train.items() if name not in EARLY_STOPPING}
    args = TrainingArguments(
        **{
            "dataloader_pin_memory": torch.accelerator.is_available(),
            **fields,
            # A resumed training must know for how long it has not become better.
            "restore_callback_states_from_checkpoint": len(fields) < len(train),
            # Trainer deletes old checkpoints before the new one is sealed, so one more must always stay.
            "save_total_limit": max(2, train.get("save_total_limit") or 2),
            "output_dir": str(state),
            "seed": seed,
            "data_seed": seed,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "logging_nan_inf_filter": False,  # a diverged run must show its nan, not an average that hides it
        }
    )
    # Trainer takes all GPUs that it sees and multiplies the batch by their number, which is in no key.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def steps_per_epoch(rows: int, args: TrainingArguments) -> int:
    """Optimizer steps in one pass over `rows` rows, as Trainer counts them."""
    per_step = args.train_batch_size * args.world_size
    batches = rows // per_step if args.dataloader_drop_last else math.ceil(rows / per_step)
    return math.ceil(batches / args.gradient_accumulation_steps)


class TemperTrainer(Trainer):
    """Trainer with token-exact loss at learned positions and an order that follows from seed and epoch alone."""

    ITEMS = "learned_tokens"  # what the loss is a mean over
    collate = staticmethod(collate)

    def __init__(self, *, pad_token_id: int, schedule_steps: int, **arguments):
        """`schedule_steps`: the total that the learning-rate schedule is made for; the training may end before."""
        super().__init__(data_collator=functools.partial(self.collate, pad_token_id=pad_token_id), **arguments)
        self.remove_callback(PrinterCallback)
        if self.args.gradient_checkpointing:  # train() does it again; the estimate before it must see it too
            fields = dict(self.args.gradient_checkpointing_kwargs or {})
            which = {name: fields.pop(name) for name in ("every_n_layers", "offload") if name in fields}
            self.model.gradient_checkpointing_enable(fields or None, **which)
        if self.neftune_noise_alpha is not None:  # likewise; train() would add the noise a second time
            activate_neftune(self.model, self.neftune_noise_alpha, self.accelerator)
            self.neftune_noise_alpha = None
        self.supervised_loss = SupervisedLoss()
        self.schedule_steps = schedule_steps
        self.tokens = 0  # real ones (no padding) that were trained on
        rows = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        self.sampler = EpochSampler(_lengths(self.train_dataset), rows, self.args.seed)

    def create_scheduler(self, num_training_steps, optimizer=None):  # noqa: ARG002 - Trainer's signature
        return super().create_scheduler(self.schedule_steps, optimizer)

    def get_batch_samples(self, *arguments, **keywords):
        batches, items = super().get_batch_samples(*arguments, **keywords)
        self.tokens += sum(tokens_of(self.model, batch) for batch in batches)
        return batches, items

    def tokens_computed(self, rows: list[int]) -> int:
        """How many tokens of a batch of these rows go through the layers, once the way of the loss is chosen."""
        batch = self.data_collator([self.train_dataset[row] for row in rows])
        return tokens_computed(self.supervised_loss.way, self.model, batch, answers=2 if self.ITEMS == "pairs" else 1)

    def _get_train_sampler(self, train_dataset=None):  # noqa: ARG002 - Trainer's signature
        return self.sampler

    def _run_epoch(self, **arguments):
        """Nothing where the checkpoint that training continues from is that of its end: Trainer takes a step more."""
        if not self._has_ended():
            super()._run_epoch(**arguments)

    def _load_best_model(self):
        """As Trainer does, if the checkpoint is still what was sealed."""
        best = Path(self.state.best_model_checkpoint)
        if wrong := checkpoints.fault(best):
            raise UserError(f"{best}: the best model, {wrong}; delete {best.parent}, and train again")
        self.loaded_from = best
        super()._load_best_model()

    def _has_ended(self) -> bool:
        """Whether training is over before an epoch begins: all steps are done, or early stopping ended it."""
        control = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        stopped = self.args.load_best_model_at_end and control.get("should_training_stop", False)
        return stopped or self.state.global_step >= self.state.max_steps

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Go on from all weights of a checkpoint, and from no others."""
        self.loaded_from = resume_from_checkpoint
        with _reading_checkpoint(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if isinstance(self.model, PeftModel):  # Trainer does not look at what PEFT says of it
                result = self.model.load_adapter(resume_from_checkpoint, self.model.active_adapter, is_trainable=True)
                refuse_adapter_misfits(self.model, resume_from_checkpoint, result)

    def _issue_warnings_after_load(self, load_result):
        """Of all parameters: Trainer warns, in a log that nobody sees, and goes on."""
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        wrong = {"missing": sorted(missing), "unknown to the model": sorted(load_result.unexpected_keys)}
        refuse_tensors(self.loaded_from, wrong, "delete it, and the one before it is used")

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _reading_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            _refuse_other_shapes(self.optimizer)

    def _load_rng_state(self, checkpoint):
        with _reading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the learned tokens of the whole optimizer step, however it is cut into batches."""
        assert not return_outputs, "evaluate() is ours and never asks for outputs"
        if self.label_smoother is not None:
            inputs = dict(with_decoder_inputs(model, inputs))  # Trainer takes the labels out of it
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        total, count = self.supervised_loss(model, inputs)
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):  # noqa: ARG002 - Trainer's signature
        """Loss per learned token over the whole validation split (Trainer's own is a mean of batch means)."""
        figures, items = self.mean_figures(eval_dataset if eval_dataset is not None else self.eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        metrics[f"{metric_key_prefix}_{self.ITEMS}"] = items
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def mean_figures(self, dataset) -> tuple[dict[str, float], int]:
        """(figures, mean over a data set's items, and how many those are)."""
        lengths = _lengths(dataset)
        order = sorted(range(len(dataset)), key=lengths.__getitem__)
        loader = DataLoader(
            dataset.select(order), batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator
        )
        self.model.eval()
        sums, items = {}, 0
        for batch in loader:
            with self.compute_loss_context_manager():
                figures, count = self.summed_figures(self._prepare_inputs(batch))
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in figures.items()}
            items += count
        return {name: total / max(items, 1) for name, total in sums.items()}, items

    def summed_figures(self, batch) -> tuple[dict[str, torch.Tensor], int]:
        """(figures, summed over a batch's items, and how many those are): here the loss of learned tokens."""
        loss, count = self.supervised_loss(self.model, batch)
        return {"loss": loss}, count


def _refuse_other_shapes(optimizer) -> None:
    """Refuse a state of other parameters, which torch takes as it is, and trips over in the first step."""
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "state1", "state2"):
            found = state.get(name)
            if found is not None and found.shape != parameter.shape:
                shapes = f"{tuple(found.shape)} for {tuple(parameter.shape)}"
                raise ValueError(f"optimizer.pt has '{name}' of another shape: {shapes}")


def _reading_checkpoint(checkpoint: str | None):
    """Nothing of a checkpoint is ever executed: what torch refuses as a program is one line as well."""
    return reading(checkpoint, remedy=f"delete {checkpoint} and run the same command again: the one before it is used")


class PreferenceTrainer(TemperTrainer):
    """The same for preference pairs: one row is a pair, and the loss is the mean over pairs.

    Args:
        preference_loss: of the two answers of a pair, given the reference's log-probabilities.
    """

    ITEMS = "pairs"
    collate = staticmethod(collate_pairs)

    def __init__(self, *, preference_loss: PreferenceLoss, **arguments):
        super().__init__(**arguments)
        self.preference_loss = preference_loss
        self.figures: list[dict[str, torch.Tensor]] = []  # of the pairs since the last log

    def train(self, *arguments, **keywords):
        self.figures.clear()  # of what went through for the estimate
        return super().train(*arguments, **keywords)

    def pair_losses(self, model, batch):
        """(loss of each pair, figures of each pair); both answers go through the model together."""
        return self.preference_loss(self.supervised_loss.sequence_logps(model, batch, answers=2), batch)

    def _get_num_items_in_batch(self, batch_samples, device):
        pairs = sum(len(batch["input_ids"]) for batch in batch_samples) // 2
        return torch.tensor(pairs, device=device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the pairs of the whole optimizer step, however it is cut into batches."""
        assert not return_outputs, "evaluate() is ours and never asks for outputs"
        losses, figures = self.pair_losses(model, inputs)
        self.figures.append(figures)
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)

    def summed_figures(self, batch):
        """Loss, rewards and log-probabilities, summed over a batch's pairs."""
        losses, figures = self.pair_losses(self.model, batch)
        return {name: values.sum() for name, values in {"loss": losses, **figures}.items()}, len(losses)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With a training loss go the rewards of the same pairs."""
        if "loss" in logs and self.figures:
            logs |= {name: torch.cat([figures[name] for figures in self.figures]).mean().item() for name in FIGURES}
            self.figures.clear()
        super().log(logs, start_time)


def trainer_for(method: dict, **arguments) -> TemperTrainer:
    """The trainer of a config section `method`."""
    if method["name"] == "sft":
        return TemperTrainer(**arguments)
    loss = PreferenceLoss(method["beta"], method["loss_type"], method["label_smoothing"])
    return PreferenceTrainer(preference_loss=loss, **arguments)


LENGTHS = ("input_ids", "labels", "rejected_input_ids", "rejected_labels")


def _lengths(dataset) -> list[int]:
    """Tokens of each row; of a pair those of its longer text, of an encoder-decoder's row those of its longer side."""
    import pyarrow.compute

    table = dataset.with_format("arrow")[:]
    columns = [name for name in LENGTHS if name in table.column_names]
    lengths = [pyarrow.compute.list_value_length(table[name]) for name in columns]
    return pyarrow.compute.max_element_wise(*lengths).to_pylist()


class ExactState(TrainerCallback):
    """Makes every step a function of (seed, step) alone.

    The random state is set anew before each step and the data order before each epoch, so a run
    that continues from a checkpoint, in the middle of an epoch or at its end, goes on exactly as if
    it had never stopped; there is no random state to save.
    """

    def __init__(self, trainer: TemperTrainer, epoch_steps: int):
        self.trainer, self.epoch_steps = trainer, epoch_steps

    def on_epoch_begin(self, args, state, control, **_):  # noqa: ARG002
        self.trainer.sampler.epoch = state.global_step // self.epoch_steps

    def on_step_begin(self, args, state, control, **_):  # noqa: ARG002
        seed = args.seed * 1_000_003 + state.global_step * 1009 + args.process_index
        torch.manual_seed(seed % 2**63)


class SealedCheckpoints(TrainerCallback):
    """Seals each checkpoint, and has one saved, and the training loss logged, where an epoch or the training ends.

    From an epoch's end the trunk's next segment starts. Where the best model is kept, each evaluation is saved too:
    which steps it is chosen from must not depend on `save_steps`, which is in no key. The loss is logged with each
    checkpoint, so that the curve of a training that continues from it is that of one which never stopped.

    Args:
        is_plateau: whether training ends where a decay would begin: that is the end of nothing, and not evaluated.
    """

    def __init__(self, epoch_steps: int, is_plateau: bool):
        self.epoch_steps, self.is_plateau = epoch_steps, is_plateau

    def on_step_end(self, args, state, control, **_):
        if self.is_plateau and state.global_step >= state.max_steps and state.global_step % (state.eval_steps or 1):
            control.should_evaluate = False
        control.should_save |= control.should_evaluate and args.load_best_model_at_end
        control.should_log |= control.should_save
        return control

    def on_epoch_end(self, args, state, control, **_):  # noqa: ARG002
        control.should_log = control.should_save = True
        if self.is_plateau and state.global_step % self.epoch_steps:
            control.should_evaluate = False
        return control

    def on_save(self, args, state, control, **_):  # noqa: ARG002
        checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class StopOnDivergence(TrainerCallback):
    """Ends training when a figure or a weight is no finite number any more. That is a result, and recorded as one.

    Nothing is saved of it, so that who continues from the last checkpoint finds the same end at the same step.
    """

    FIGURES = ("loss", "grad_norm", "eval_loss")

    def __init__(self):
        self.diverged_at: int | None = None

    def on_log(self, args, state, control, logs=None, optimizer=None, **_):  # noqa: ARG002
        for name in self.FIGURES:
            value = (logs or {}).get(name, 0.0)
            # float16's scaler leaves out a step whose gradients overflow, and tries the next with a smaller scale.
            scaled_down = name == "grad_norm" and getattr(optimizer, "step_was_skipped", False)
            if not math.isfinite(value) and not scaled_down:
                return self._stop(state, control, f"{name} is {value}")
        return control

    def on_epoch_end(self, args, state, control, model=None, **_):  # noqa: ARG002
        if self.diverged_at is not None or not _is_finite(model):
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
    """Whether all trained weights are numbers. Their last update shows in no loss."""
    return all(weight.isfinite().all() for weight in model.parameters() if weight.requires_grad)


class MetricsFile(TrainerCallback):
    """Appends what Trainer logs to metrics.jsonl, the truth that everything else (MLflow, reports) mirrors.

    Each line has the step, the epoch, and the training seconds and real tokens since the very first
    step, across all interruptions.
    """

    KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm", *FIGURES, *(f"eval_{name}" for name in FIGURES))

    def __init__(self, path: Path, checkpoint: Path | None, trainer: TemperTrainer, listener=None):
        """Start `path` anew with what stood beside the checkpoint when it was written."""
        self.path, self.trainer, self.listener = path, trainer, listener
        before = read_metrics(checkpoint.parent / path.name) if checkpoint else []
        self.lines = [line for line in before if line["step"] <= checkpoints.step_of(checkpoint)]
        write_metrics(path, self.lines)
        self.seconds_before = self.lines[-1]["seconds"] if self.lines else 0.0
        self.tokens_before = self.lines[-1]["tokens"] if self.lines else 0
        self.started = time.monotonic()

    def on_train_begin(self, args, state, control, **_):  # noqa: ARG002
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, earlier parts of the run included."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def tokens(self) -> int:
        """Real tokens so far, earlier parts of the run included."""
        return self.tokens_before + self.trainer.tokens

    def last(self, name: str, step: int | None = None) -> float | None:
        """The latest value of a figure, or that of a step."""
        lines = (line for line in reversed(self.lines) if step is None or line["step"] == step)
        return next((line[name] for line in lines if name in line), None)

    def on_log(self, args, state, control, logs=None, **_):  # noqa: ARG002
        values = {name: logs[name] for name in self.KEPT if name in (logs or {})}
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
            file.write(json.dumps(line) + "\n")
        if self.listener is not None:
            self.listener(line)


def _json_number(value: float) -> float | None:
    """JSON has no nan: a loss that is no number becomes null."""
    return value if math.isfinite(value) else None


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def write_metrics(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class ShowProgress(TrainerCallback):
    """One bar, or plain lines in a log, for the whole run."""

    def __init__(self):
        self.progress, self.note = None, ""

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
    """A training's callbacks, in the order in which they act, and what they saw."""

    def __init__(
        self, trainer: TemperTrainer, state: Path, checkpoint: Path | None, train: dict, listener, is_plateau: bool
    ):
        self.epoch_steps = steps_per_epoch(len(trainer.train_dataset), trainer.args)
        self.trainer, self.start = trainer, checkpoints.step_of(checkpoint)
        self.divergence = StopOnDivergence()
        self.metrics = MetricsFile(state / "metrics.jsonl", checkpoint, trainer, listener)
        stopping = {name: train[name] for name in EARLY_STOPPING if name in train}
        for callback in (
            ExactState(trainer, self.epoch_steps),
            self.metrics,
            ShowProgress(),
            SealedCheckpoints(self.epoch_steps, is_plateau),
            *([EarlyStoppingCallback(**stopping)] if stopping else []),
            self.divergence,  # has the last word on what is saved
        ):
            trainer.add_callback(callback)

    def facts(self) -> dict:
        """What training.json says of the training itself."""
        metrics, state = self.metrics, self.trainer.state
        seconds, best = (
            metrics.seconds,
            state.best_model_checkpoint if self.trainer.args.load_best_model_at_end else None,
        )
        best_step = checkpoints.step_of(Path(best)) if best else None
        return {
            "train_rows": len(self.trainer.train_dataset),
            "train_seconds": round(seconds, 3),
            "tokens": metrics.tokens,
            "tokens_per_second": round(metrics.tokens / seconds, 1),
            "steps_per_second": round(state.global_step / seconds, 4),
            "global_step": state.global_step,
            "best_step": best_step,
            "final_loss": metrics.last("loss"),
            "eval_loss": metrics.last("eval_loss", best_step or state.global_step),  # of the weights that are saved
            "diverged_at_step": self.divergence.diverged_at,
            "resumed_from_step": self.start,
            "dtype": str(next(self.trainer.model.parameters()).dtype).removeprefix("torch."),
            "device": str(self.trainer.args.device),
        }
