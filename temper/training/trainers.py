"""The training loop: `transformers.Trainer` with our loss, order, randomness and records.

Imported inside `run()` only: it needs torch and transformers.
"""

import dataclasses
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

from temper.data.batches import Batch, EpochSampler, Shares, WithCopies, count_learned, padded_shape
from temper.data.columns import DOCUMENTS
from temper.data.documents import apart
from temper.errors import UserError
from temper.model import spread
from temper.model.adapters import refuse_adapter_misfits, trained_weights
from temper.model.predictions import SupervisedLoss, tokens_computed, tokens_of, with_decoder_inputs
from temper.model.reading import reading, refuse_tensors
from temper.model.spread import is_spread
from temper.training import checkpoints, processes, unpaired
from temper.training.preferences import NLL, PAIR_LOSSES, PairLoss, answers_and_rest

log = logging.getLogger("temper")


def _batch_of(rows: list[dict], pad_token_id: int) -> Batch:
    """A batch of rows, in which documents that share a row are apart."""
    return Batch([part for row in rows for part in apart(row)], pad_token_id)


class TemperTrainer(Trainer):
    """Trainer with token-exact loss at learned positions and an order that follows from seed and epoch alone."""

    ITEMS = "learned_tokens"  # what the loss is a mean over
    ANSWERS = 1  # to a prompt, one row each
    model: Any  # Trainer allows None here, which is no case of ours
    train_dataset: Any
    batch_of: Callable = staticmethod(_batch_of)

    def __init__(self, *, pad_token_id: int, schedule_steps: int, judge: Any = None, **arguments):
        """Arguments beside Trainer's.

        `schedule_steps`: the total that the learning-rate schedule is made for; the training may end before. `judge`:
        gives the figure `metric` of a model, where answers choose the checkpoint.
        """
        args = arguments["args"]
        saves, args.save_strategy = args.save_strategy, "no"  # Trainer would refuse to save a model that is spread
        super().__init__(data_collator=functools.partial(self.batch_of, pad_token_id=pad_token_id), **arguments)
        args.save_strategy = saves
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
        self.resumed_from: str | None = None  # the checkpoint whose optimizer was loaded
        self.tokens = 0  # real ones (no padding) that were trained on
        rows = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        self.sampler = EpochSampler(_longest_texts(self.train_dataset), rows, self.args.seed)

    def create_scheduler(self, num_training_steps, optimizer=None):  # noqa: ARG002 - Trainer's signature
        return super().create_scheduler(self.schedule_steps, optimizer)

    def autocast_smart_context_manager(self, cache_enabled=True):  # noqa: ARG002 - Trainer's signature
        """Mixed precision: accelerate puts it into the model's own forward pass, and our loss calls the layers."""
        return self.accelerator.autocast()

    def get_batch_samples(self, *arguments, **keywords):
        """The batches of an optimizer step that this process computes, and the items of those of all processes."""
        batches, items = super().get_batch_samples(*arguments, **keywords)
        counted = [batch for batch in batches if batch.counts]
        tokens = sum(tokens_of(self.model, batch) for batch in counted)
        self.tokens += processes.added({"tokens": tokens})["tokens"]
        return batches, items

    def _get_num_items_in_batch(self, batch_samples, device):
        """As Trainer counts them, which asks for no more of labels than how many of them are learned."""
        ahead = int(self._loss_shifts_labels)
        counts = [batch.learned_count(ahead) if batch.counts else 0 for batch in batch_samples]
        marks = [torch.zeros(count, dtype=torch.int64, device=device) for count in counts]
        return super()._get_num_items_in_batch([{"labels": mark, "shift_labels": mark} for mark in marks], device)

    def floating_point_ops(self, inputs):
        """As Trainer counts them, padding too, which asks for no more of tokens than how many they are."""
        tokens = torch.empty(padded_shape(inputs.rows, "input_ids"), device="meta")
        return super().floating_point_ops({"input_ids": tokens})

    def tokens_computed(self, rows: list[int]) -> int:
        """How many tokens of a batch of these rows go through the layers, once the way of the loss is chosen."""
        batch: Any = self.data_collator([self.train_dataset[row] for row in rows])
        return tokens_computed(self.supervised_loss.way, self.model, batch, answers=self.ANSWERS)

    def _get_train_sampler(self, train_dataset=None):  # noqa: ARG002 - Trainer's signature
        return self.sampler

    def get_train_dataloader(self):
        """Trainer's; of several processes each gets its share, where accelerate would fill up an epoch's end."""
        args = self.args
        if args.world_size == 1:
            return super().get_train_dataloader()
        place = args.process_index, args.world_size
        return DataLoader(
            WithCopies(self.train_dataset),  # type: ignore[arg-type]
            batch_sampler=Shares(self.sampler, args.train_batch_size, *place, args.dataloader_drop_last),
            collate_fn=self._share,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _share(self, rows: list[dict]) -> Batch:
        batch: Any = self.data_collator(rows)
        return dataclasses.replace(batch, counts=WithCopies.COPY not in rows[0])

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
        if self._all_weights_are_spread():
            self._load_spread(best)
        else:
            super()._load_best_model()

    def _load_spread(self, checkpoint: Path) -> None:
        self._issue_warnings_after_load(spread.load_weights(self.model, checkpoint))

    def _all_weights_are_spread(self) -> bool:
        return is_spread(self.model) and not isinstance(self.model, PeftModel)

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
            if self._all_weights_are_spread():
                self._load_spread(Path(resume_from_checkpoint))
            else:
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
            self.resumed_from = checkpoint
            super()._load_optimizer_and_scheduler(checkpoint)
            _refuse_other_shapes(self.optimizer)

    def create_optimizer(self, model=None):
        """Trainer's. Of a spread model each process stores its part of the state, which nobody else needs."""
        optimizer = super().create_optimizer(model)
        if is_spread(self.model):
            optimizer.register_state_dict_post_hook(spread.own_state)
            optimizer.register_load_state_dict_pre_hook(self._of_own_parts)
        return optimizer

    def _of_own_parts(self, optimizer, state: dict) -> dict:
        if self.resumed_from and not processes.is_first():  # Trainer has read the first's
            device = self.args.device.type if self.args.device.type == "cpu" else self.args.device  # not cpu:1
            state = torch.load(self._own_optimizer(self.resumed_from), map_location=device, weights_only=True)
        return spread.joined_state(optimizer, state)

    def _own_optimizer(self, checkpoint: str) -> Path:
        return Path(checkpoint, f"optimizer_{self.args.process_index}.pt")

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if is_spread(self.model) and not processes.is_first():
            optimizer: Any = self.optimizer
            torch.save(optimizer.state_dict(), self._own_optimizer(output_dir))

    def _save(self, output_dir=None, state_dict=None):
        """As Trainer does; of a model that is spread what is trained, where PEFT would gather all of the base."""
        if is_spread(self.model):
            state_dict = trained_weights(self.model)
        super()._save(output_dir, state_dict)

    def _load_rng_state(self, checkpoint):
        with _reading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the learned tokens of the whole optimizer step, however it is cut into batches."""
        assert not return_outputs, "evaluate() is ours and never asks for outputs"
        if self.label_smoother is not None:
            inputs = with_decoder_inputs(model, inputs)
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        loss = processes.within_forward(model, self._mean_loss, inputs, num_items_in_batch)
        return self._of_all_processes(loss, inputs, num_items_in_batch)

    def _mean_loss(self, network, batch: Batch, items):
        total, count = self.supervised_loss(network, batch)
        return total / (count if items is None else items)

    def _of_all_processes(self, loss, batch: Batch, items):
        """A process's part of the loss, such that the mean over the processes, which gradients become, is the whole."""
        if items is None or self.args.world_size == 1:
            return loss
        return loss * (self.args.world_size if batch.counts else 0)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):  # noqa: ARG002 - Trainer's signature
        """Loss per learned token over the whole validation split (Trainer's own is a mean of batch means)."""
        figures, items = self.mean_figures(eval_dataset if eval_dataset is not None else self.eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        metrics[f"{metric_key_prefix}_{self.ITEMS}"] = items
        if self.judge is not None:  # what has diverged gives no answers
            finite = math.isfinite(figures["loss"])
            with self.compute_loss_context_manager():
                judged = self.judge(self.model) if finite else math.nan
            metrics[f"{metric_key_prefix}_{self.judge.metric}"] = processes.of_first(judged)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def mean_figures(self, dataset) -> tuple[dict[str, float], int]:
        """(figures, mean over a data set's items, and how many those are)."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for batch in self._evaluated_batches(dataset):
            figures = self._evaluated(self.summed_figures, batch)
            for name, (value, count) in figures.items() if batch.counts else ():
                sums[name] = sums.get(name, 0.0) + value.item()
                counts[name] = counts.get(name, 0) + count
        sums, counts = processes.added(sums), processes.added(counts)
        return {name: total / max(counts[name], 1) for name, total in sums.items()}, counts.get("loss", 0)

    def _evaluated_batches(self, dataset):
        """This process's batches of a data set, rows of similar length together, with the model in evaluation.

        All processes have as many, since a model that is spread over them computes only where all of them do.
        """
        lengths = _longest_texts(dataset)
        order = sorted(range(len(dataset)), key=lengths.__getitem__)
        place = self.args.process_index, self.args.world_size
        size = min(self.args.per_device_eval_batch_size, max(1, len(order) // self.args.world_size))
        self.model.eval()
        if order and self.args.world_size > 1:  # all choose the same way to compute, whatever their own rows are
            self._evaluated(self._way_of, self._share([dataset[row] for row in order[:size]]))
        batches = Shares(order, size, *place, drop_last=False)
        return DataLoader(WithCopies(dataset), batch_sampler=batches, collate_fn=self._share)  # type: ignore[arg-type]

    def _evaluated(self, function: Callable, batch: Batch):
        """`function(model, batch)` in evaluation."""
        with self.compute_loss_context_manager():
            return processes.within_forward(self.model, function, batch)

    def _way_of(self, model, batch: Batch) -> None:
        self.supervised_loss.choose(model, batch, self.ANSWERS)

    def summed_figures(self, model, batch) -> dict[str, tuple[torch.Tensor, int]]:
        """Name -> (sum of a figure over a batch's items, how many those are): here the loss of learned tokens."""
        return {"loss": self.supervised_loss(model, batch)}


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
        preference_loss: of the two answers of a pair. Where it learns the chosen texts as well, that part is the mean
            over their learned tokens.
    """

    ITEMS = "pairs"
    ANSWERS = 2

    def __init__(self, *, preference_loss: PairLoss | unpaired.KtoLoss, **arguments):
        self.batch_of = preference_loss.batch_of
        super().__init__(**arguments)
        self.preference_loss: Any = preference_loss
        self.figures: list[dict[str, torch.Tensor]] = []  # of the items since the last log

    def train(self, *arguments, **keywords):
        self.figures.clear()  # of what went through for the estimate
        return super().train(*arguments, **keywords)

    def pair_losses(self, model, batch):
        """(loss of each pair, figures, each the values that it is the mean of); both answers go through together.

        With the cross entropy of each learned token of the chosen texts as a figure, if the loss has that part; it is
        the one with a gradient.
        """
        if not self.preference_loss.nll_weight:
            return self.preference_loss(self.supervised_loss.sequence_logps(model, batch, answers=2), batch)
        logps, cross_entropies = answers_and_rest(self.supervised_loss.predictions(model, batch, answers=2), batch)
        losses, figures = self.preference_loss(logps, batch)
        return losses, {**figures, NLL: cross_entropies}

    def _get_num_items_in_batch(self, batch_samples, device):  # noqa: ARG002 - Trainer's signature
        """(pairs, learned tokens of the chosen texts) of an optimizer step."""
        return self._items([batch for batch in batch_samples if batch.counts])

    def _items(self, batches: list[Batch]) -> tuple[int, int]:
        pairs = sum(map(len, batches)) // 2
        ahead = int(self._loss_shifts_labels)
        chosen = (row["labels"] for batch in batches for row in batch.rows[: len(batch) // 2])
        tokens = sum(count_learned(labels[ahead:]) for labels in chosen)
        of_all = processes.added({"pairs": pairs, "tokens": tokens})
        return of_all["pairs"], of_all["tokens"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the pairs of the whole optimizer step, however it is cut into batches."""
        assert not return_outputs, "evaluate() is ours and never asks for outputs"
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        loss = processes.within_forward(model, self._mean_loss, inputs, num_items_in_batch)
        return self._of_all_processes(loss, inputs, num_items_in_batch)

    def _mean_loss(self, network, batch: Batch, items):
        losses, figures = self.pair_losses(network, batch)
        if batch.counts:
            self.figures.append({name: values.detach() for name, values in figures.items()})
        pairs, tokens = items or (len(losses), len(figures.get(NLL, ())))
        loss = losses.sum() / pairs
        if NLL in figures:
            loss = loss + self.preference_loss.nll_weight * figures[NLL].sum() / max(tokens, 1)
        return loss

    def mean_figures(self, dataset):
        """Loss, rewards and log-probabilities, mean over a data set's pairs."""
        figures, items = super().mean_figures(dataset)
        if NLL in figures:
            figures["loss"] += self.preference_loss.nll_weight * figures[NLL]
        return figures, items

    def summed_figures(self, model, batch):
        losses, figures = self.pair_losses(model, batch)
        return {name: (values.sum(), len(values)) for name, values in {"loss": losses, **figures}.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With a training loss go the rewards of the same pairs."""
        if "loss" in logs:
            own = _joined(self.figures)
            names = processes.of_first(list(own))
            logs |= _means({name: processes.gathered_rows(own.get(name, torch.empty(0))) for name in names})
            self.figures.clear()
        super().log(logs, start_time)


class UnpairedTrainer(PreferenceTrainer):
    """The same for single answers: one row is an answer, desirable or not, and the loss is the mean over rows."""

    ITEMS = "answers"
    ANSWERS = 1

    def ratios(self, model, batch):
        """(`unpaired.ratios` of a batch, log-probability of each answer). Mismatched texts get no gradient."""
        with torch.no_grad():
            mismatched = self.supervised_loss.sequence_logps(model, unpaired.mismatched_batch(batch))
        logps = self.supervised_loss.sequence_logps(model, batch)
        return unpaired.ratios(batch, logps, mismatched), logps.detach()

    def _items(self, batches):
        return processes.added({"answers": sum(map(len, batches))})["answers"], 0

    def pair_losses(self, model, batch):
        """(loss of each answer, figures, each the values that it is the mean of).

        How far the model has moved is estimated from the rows of all processes.
        """
        (gains, kl_gains, desirable), logps = self.ratios(model, batch)
        kl_gains = processes.gathered_rows(kl_gains if batch.counts else kl_gains[:0])
        return self._judged((gains, kl_gains, desirable), logps)

    def _judged(self, ratios, logps):
        losses, figures = self.preference_loss(*ratios)
        desirable = ratios[2]
        return losses, {**figures, "logps/chosen": logps[desirable], "logps/rejected": logps[~desirable]}

    @torch.no_grad()
    def mean_figures(self, dataset):
        """Figures of a data set as one batch: how far the model has moved is estimated from all its rows."""
        parts = []
        for batch in self._evaluated_batches(dataset):
            ratios, logps = self._evaluated(self.ratios, batch)
            parts.append([part if batch.counts else part[:0] for part in (*ratios, logps)])
        columns = zip(*parts, strict=True)
        *ratios, logps = (processes.gathered_rows(torch.cat(column)) for column in columns)
        losses, figures = self._judged(ratios, logps)
        return _means({"loss": losses, **figures}), len(losses)


def _joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = parts[0] if parts else {}
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def _means(figures: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each figure that has values, and the margin of rewards where it is not one of each pair."""
    means = {name: values.mean().item() for name, values in figures.items() if len(values)}
    if "rewards/chosen" in means and "rewards/rejected" in means:
        means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
    return means


def trainer_for(method: dict, **arguments) -> TemperTrainer:
    """The trainer of a config section `method`."""
    if method["name"] in PAIR_LOSSES:
        return PreferenceTrainer(preference_loss=PAIR_LOSSES[method["name"]](method), **arguments)
    if method["name"] == "kto":
        weights = method["desirable_weight"], method["undesirable_weight"]
        return UnpairedTrainer(preference_loss=unpaired.KtoLoss(method["beta"], *weights), **arguments)
    return TemperTrainer(**arguments)


LENGTHS = ("input_ids", "labels", "rejected_input_ids", "rejected_labels")


def _longest_texts(dataset) -> list[int]:
    """Tokens of each row's longest text, since rows are computed together at the least cost if these are similar."""
    if DOCUMENTS in dataset.column_names:
        return list(map(max, dataset[DOCUMENTS][:]))
    return row_lengths(dataset)


def row_lengths(dataset) -> list[int]:
    """Tokens of each row; of a pair those of its longer text, of an encoder-decoder's row those of its longer side."""
    import pyarrow.compute

    table = dataset.with_format("arrow")[:]
    columns = [name for name in LENGTHS if name in table.column_names]
    lengths = [pyarrow.compute.list_value_length(table[name]) for name in columns]
    return pyarrow.compute.max_element_wise(*lengths).to_pylist()
