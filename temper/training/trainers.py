"""The training loop: `transformers.Trainer` with our loss, order, randomness and records.

Imported inside `run()` only: it needs torch and transformers.
"""

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer
from transformers.integrations import activate_neftune

from temper.data.batches import Batch, EpochSampler, padded_shape
from temper.errors import UserError
from temper.model.adapters import refuse_adapter_misfits
from temper.model.predictions import SupervisedLoss, tokens_computed, tokens_of, with_decoder_inputs
from temper.model.reading import reading, refuse_tensors
from temper.training import checkpoints
from temper.training.preferences import FIGURES, PreferenceLoss, pairs_batch

log = logging.getLogger("temper")


class TemperTrainer(Trainer):
    """Trainer with token-exact loss at learned positions and an order that follows from seed and epoch alone."""

    ITEMS = "learned_tokens"  # what the loss is a mean over
    model: Any  # Trainer allows None here, which is no case of ours
    train_dataset: Any
    batch_of: Callable = staticmethod(Batch)  # rows and the pad token

    def __init__(self, *, pad_token_id: int, schedule_steps: int, judge: Any = None, **arguments):
        """Arguments beside Trainer's.

        `schedule_steps`: the total that the learning-rate schedule is made for; the training may end before. `judge`:
        gives the figure `metric` of a model, where answers choose the checkpoint.
        """
        super().__init__(data_collator=functools.partial(self.batch_of, pad_token_id=pad_token_id), **arguments)
        self.remove_callback(PrinterCallback)
        if self.args.gradient_checkpointing:  # train() does it again; the estimate before it must see it too
            fields: dict = dict(self.args.gradient_checkpointing_kwargs or {})  # type: ignore[arg-type]
            which = {name: fields.pop(name) for name in ("every_n_layers", "offload") if name in fields}
            self.model.gradient_checkpointing_enable(fields or None, **which)
        if self.neftune_noise_alpha is not None:  # likewise; train() would add the noise a second time
            activate_neftune(self.model, self.neftune_noise_alpha, self.accelerator)
            self.neftune_noise_alpha = None
        self.supervised_loss = SupervisedLoss()
        self.schedule_steps = schedule_steps
        self.judge = judge
        self.tokens = 0  # real ones (no padding) that were trained on
        rows = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        self.sampler = EpochSampler(_lengths(self.train_dataset), rows, self.args.seed)

    def create_scheduler(self, num_training_steps, optimizer=None):  # noqa: ARG002 - Trainer's signature
        return super().create_scheduler(self.schedule_steps, optimizer)

    def get_batch_samples(self, *arguments, **keywords):
        batches, items = super().get_batch_samples(*arguments, **keywords)
        self.tokens += sum(tokens_of(self.model, batch) for batch in batches)
        return batches, items

    def _get_num_items_in_batch(self, batch_samples, device):
        """As Trainer counts them, which asks for no more of labels than how many of them are learned."""
        counts = [batch.learned_count(ahead=int(self._loss_shifts_labels)) for batch in batch_samples]
        marks = [torch.zeros(count, dtype=torch.int64, device=device) for count in counts]
        return super()._get_num_items_in_batch([{"labels": mark, "shift_labels": mark} for mark in marks], device)

    def floating_point_ops(self, inputs):
        """As Trainer counts them, padding too, which asks for no more of tokens than how many they are."""
        tokens = torch.empty(padded_shape(inputs.rows, "input_ids"), device="meta")
        return super().floating_point_ops({"input_ids": tokens})

    def tokens_computed(self, rows: list[int]) -> int:
        """How many tokens of a batch of these rows go through the layers, once the way of the loss is chosen."""
        batch: Any = self.data_collator([self.train_dataset[row] for row in rows])
        return tokens_computed(self.supervised_loss.way, self.model, batch, answers=2 if self.ITEMS == "pairs" else 1)

    def _get_train_sampler(self, train_dataset=None):  # noqa: ARG002 - Trainer's signature
        return self.sampler

    def _run_epoch(self, **arguments):  # type: ignore[override]
        """Nothing where the checkpoint that training continues from is that of its end: Trainer takes a step more."""
        if not self._has_ended():
            super()._run_epoch(**arguments)

    def _load_best_model(self):
        """As Trainer does, if the checkpoint is still what was sealed."""
        best = Path(str(self.state.best_model_checkpoint))
        if wrong := checkpoints.fault(best):
            raise UserError(f"{best}: the best model, {wrong}; delete {best.parent}, and train again")
        self.loaded_from = best
        super()._load_best_model()

    def _has_ended(self) -> bool:
        """Whether training is over before an epoch begins: all steps are done, or early stopping ended it."""
        kept: Any = self.state.stateful_callbacks
        control = kept.get("TrainerControl", {}).get("args", {})
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
            inputs = with_decoder_inputs(model, inputs)
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
        if self.judge is not None:  # what has diverged gives no answers
            finite = math.isfinite(figures["loss"])
            with self.compute_loss_context_manager():
                metrics[f"{metric_key_prefix}_{self.judge.metric}"] = self.judge(self.model) if finite else math.nan
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
        sums: dict[str, float] = {}
        items = 0
        for batch in loader:
            with self.compute_loss_context_manager():
                figures, count = self.summed_figures(batch)
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


def _reading_checkpoint(checkpoint: str):
    """Nothing of a checkpoint is ever executed: what torch refuses as a program is one line as well."""
    return reading(checkpoint, remedy=f"delete {checkpoint} and run the same command again: the one before it is used")


class PreferenceTrainer(TemperTrainer):
    """The same for preference pairs: one row is a pair, and the loss is the mean over pairs.

    Args:
        preference_loss: of the two answers of a pair, given the reference's log-probabilities.
    """

    ITEMS = "pairs"
    batch_of = staticmethod(pairs_batch)

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
        pairs = sum(map(len, batch_samples)) // 2
        return torch.full((), pairs, device=device)  # torch.tensor would wait for the device

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
