"""Checks of the config sections that are passed on to a library: `train` to transformers, `adapter` to PEFT.

First fields, types and ranges; then the libraries themselves check, by making their config classes, the optimizer and
the schedule of a single weight, and an empty data loader. What depends on the model is reported when the trainer is
built, also in one line (`told_by_library`).
"""

import contextlib
import copy
import dataclasses
import enum
import functools
import importlib.metadata
import inspect
import logging
import math
import typing
import warnings
from pathlib import Path

from temper.config import options
from temper.config.best import judged_metric
from temper.errors import UserError, found, suggest, told_by_library, words
from temper.hashing import digest
from temper.keys import code_key
from temper.model.adapters import ATTENTION
from temper.training.arguments import EARLY_STOPPING, trainer_fields

CHECKED = Path("results/.state/checked-configs")  # sections found valid, by hash


def check_library_sections(train: dict, adapter: dict, method: str) -> None:
    """Check `train` against TrainingArguments and `adapter` against its PEFT class, for a method (sft, dpo, ...).

    Importing transformers takes seconds, so sections found valid are remembered by hash.

    Raises:
        UserError: for the first fault.
    """
    options.refuse(train, adapter)
    _refuse_nan({"train": train, "adapter": adapter})
    stamp = CHECKED / digest(
        [train, adapter, method, _library_versions(), code_key(__name__), code_key(options.__name__)]
    )
    if stamp.exists():
        return
    for library in ("transformers", "bitsandbytes"):  # warnings at import are not about this config
        if (logger := logging.getLogger(library)).level != logging.ERROR:  # setting it visits all loggers there are
            logger.setLevel(logging.ERROR)
    _check_train(train, method)
    _check_adapter(adapter)
    with contextlib.suppress(OSError):  # if results/ is read-only, the next check just takes longer
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()


def check_processes(num_processes: int, train: dict, adapter: dict, quantization: dict) -> None:
    """Refuse what several processes cannot do, or what one does not need."""
    if num_processes == 1:
        for name in options.OF_PROCESSES:
            if name in train:
                raise UserError(f"config: 'train.{name}' is for num_processes above 1: leave it out")
        return
    if train.get("label_smoothing_factor"):
        raise UserError(
            f"config: 'train.label_smoothing_factor' with num_processes={num_processes}: it is a mean over each "
            "process's rows, which is another loss than that of all rows: leave one of the two out"
        )
    if train.get("average_tokens_across_devices") is False:
        raise UserError(
            f"config: 'train.average_tokens_across_devices' is false with num_processes={num_processes}: the loss is "
            "the mean over the tokens of all processes: leave it out"
        )
    if "fsdp" in train:
        _check_spread(train, adapter, quantization)


def _check_spread(train: dict, adapter: dict, quantization: dict) -> None:
    """Refuse what cannot be done with a model of which each process holds a part."""
    if not train["fsdp"]:
        raise UserError("config: 'train.fsdp': is true or left out")
    if adapter["peft_type"] not in ("LORA", None):
        raise UserError("config: 'train.fsdp' is for adapter=lora and adapter=full: choose one, or leave it out")
    optim = str(train.get("optim", "adamw_torch"))
    if adapter["peft_type"] is None and optim not in options.SPREAD_OPTIM:
        raise UserError(
            f"config: 'train.fsdp' with train.optim={optim}: it does not know weights that are spread: choose one of "
            f"{', '.join(options.SPREAD_OPTIM)}"
        )
    others = [name for name, value in adapter.items() if name not in options.SPREAD_LORA and value]
    if adapter.get("init_lora_weights", True) not in (True, "gaussian"):
        others.append("init_lora_weights")
    if others:
        raise UserError(
            f"config: 'train.fsdp' with adapter.{others[0]}: that reads or trains weights of the base, of which each "
            "process holds a part only: leave one of the two out"
        )
    if quantization["load_in_4bit"] or quantization["load_in_8bit"]:
        raise UserError(
            "config: 'train.fsdp' with a quantized base: its weights are not spread: set quantization=none, or leave "
            "train.fsdp out, where each process holds the whole base in 4 or 8 bits"
        )
    if train.get("use_cpu"):
        raise UserError("config: 'train.fsdp' with train.use_cpu: it spreads the model over what this machine has")
    if metric := judged_metric(train):
        raise UserError(
            f"config: 'train.fsdp' with train.metric_for_best_model={metric}: a model that is spread gives no answers: "
            "choose the best by loss, or leave one of the two out"
        )


@functools.cache
def _library_versions() -> list[str]:
    return [importlib.metadata.version(name) for name in ("transformers", "peft")]


def _refuse_nan(value, key: str = "") -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_nan(item, f"{key}.{name}" if key else name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config: '{key}' is {value}: a finite number is needed")


@functools.cache  # asked for each point of a sweep
def _field_types(cls) -> dict[str, object]:
    """Field name -> type of a library's config dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _check_type(key: str, value, annotation) -> None:
    choices: list[typing.Any] = [
        kind for kind in (annotation, *typing.get_args(annotation)) if isinstance(kind, enum.EnumMeta)
    ]
    if choices and isinstance(value, str) and value not in (known := [str(choice.value) for choice in choices[0]]):
        raise UserError(f"config: '{key}': {value} is not a valid {choices[0].__name__}; {suggest(value, known)}")
    from pydantic import ValidationError

    adapter = _adapter_of(annotation)
    try:
        if adapter:
            adapter.validate_python(value, strict=True)
    except ValidationError as error:
        message = " or ".join(dict.fromkeys(fault["msg"] for fault in error.errors(include_url=False)))
        if choices:
            message = f"must be one of {', '.join(str(choice.value) for choice in choices[0])}"
        raise UserError(f"config: '{key}': {message[0].lower()}{message[1:]} (found {found(value)})") from None


@functools.cache
def _adapter_of(annotation):
    """pydantic's check of an annotation; None if it has none, where the class's own check must do."""
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticUserError

    try:
        return TypeAdapter(annotation, config=ConfigDict(strict=False, arbitrary_types_allowed=True))
    except PydanticUserError:
        return None


def _check_ranges(section: str, values: dict, ranges: dict) -> None:
    """Refuse numbers that a library accepts and then fails on."""
    for key, (low, high, may_be_low) in ranges.items():
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if value < low or (value == low and not may_be_low) or value > high:
            limits = f"from {low} to {high}" if may_be_low or value > high else f"above {low}"
            raise UserError(f"config: '{section}.{key}' must be {limits} (found {value})")


# --- train ---------------------------------------------------------------------------------------

# field -> (lowest, highest, whether the lowest is allowed)
TRAIN_RANGES = {
    "num_train_epochs": (0, 10_000, False),
    "per_device_train_batch_size": (0, 100_000, False),
    "per_device_eval_batch_size": (0, 100_000, False),
    "gradient_accumulation_steps": (0, 100_000, False),
    "learning_rate": (0, math.inf, False),
    "weight_decay": (0, 1, True),
    "label_smoothing_factor": (0, 1, True),
    "max_grad_norm": (0, 1e9, True),
    "neftune_noise_alpha": (0, 1e6, False),
    "logging_steps": (0, 10**9, False),
    "eval_steps": (0, 10**9, False),
    "save_steps": (0, 10**9, False),
    "save_total_limit": (0, 10**6, False),
    "eval_delay": (0, 10**9, True),
    "warmup_steps": (0, 10**9, True),
    "dataloader_num_workers": (0, 256, True),
    "dataloader_prefetch_factor": (0, 10_000, False),
    "early_stopping_patience": (0, 10**6, False),
    "early_stopping_threshold": (0, 1e9, True),
}


def _check_train(train: dict, method: str) -> None:
    from transformers import TrainingArguments

    fields = _field_types(TrainingArguments) | dict(zip(EARLY_STOPPING, (int, float), strict=True)) | {"fsdp": bool}
    for key, value in train.items():
        if key not in fields:
            raise UserError(f"config: unknown key 'train.{key}'; {suggest(key, fields)}")
        _check_type(f"train.{key}", value, fields[key])
    _check_ranges("train", train, TRAIN_RANGES)
    if train.get("max_steps", -1) == 0 or train.get("max_steps", -1) < -1:
        raise UserError(
            f"config: 'train.max_steps' must be above 0, or -1 for num_train_epochs (found {train['max_steps']})"
        )
    given = trainer_fields(train)
    _check_strategies(given)
    with told_by_library("train"):
        args = TrainingArguments(output_dir="unused", **{**given, "report_to": "none"})
        args.get_process_log_level()
    if args.fp16 and args.device.type == "cpu":
        raise UserError("config: 'train.fp16' does nothing without a GPU; leave it out, see model.load.dtype")
    _check_optimizer(args, train)
    _check_schedule(args)
    _check_loader(args)
    _check_checkpointing(args)
    _check_best(args, train, method)


def _check_strategies(given: dict) -> None:
    """Refuse to choose among saved states that are not those that are evaluated."""
    evaluated, saved = str(given.get("eval_strategy", "no")), str(given.get("save_strategy", "steps"))
    if not given.get("load_best_model_at_end") or saved == "best" or (evaluated == saved != "no"):
        return
    wanted = next((strategy for strategy in (saved, evaluated) if strategy != "no"), "epoch")
    raise UserError(
        f"config: train.load_best_model_at_end=true chooses among saved states by their evaluation, and found "
        f"train.eval_strategy={evaluated} with train.save_strategy={saved}: set both to {wanted}"
    )


def _check_best(args, train: dict, method: str) -> None:
    """Check the metric of the best model, which early stopping uses as well."""
    if any(name in train for name in EARLY_STOPPING) and not (
        args.load_best_model_at_end and "early_stopping_patience" in train
    ):
        raise UserError(
            "config: early stopping needs train.early_stopping_patience=<evaluations> and "
            "train.load_best_model_at_end=true (with eval_strategy and save_strategy alike)"
        )
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if judged_metric(train) is not None:  # temper/config/best.py checks these, by `eval`
        return
    known = ["loss"]
    if name not in known and method != "sft":
        from temper.training.preferences import FIGURES_OF

        known += FIGURES_OF[method]
    if name not in known:
        raise UserError(
            f"config: 'train.metric_for_best_model': validation has no '{name}'; {suggest(name, known)} (what runs are "
            "ranked by is eval.metric)"
        )


NEEDS_A_MODEL = ("galore", "apollo")  # needed to make the optimizer; the trainer's own check must do
OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


def _check_optimizer(args, train: dict) -> None:
    """Make the optimizer for a single weight, which checks its library and its arguments."""
    import torch

    if args.optim_args and any(part.count("=") != 1 for part in _optim_args(args)):
        raise UserError(f"config: 'train.optim_args': write name=value,name=value (found {args.optim_args!r})")
    needs_a_model = args.optim.value.startswith(NEEDS_A_MODEL)
    if args.optim_target_modules is not None and not needs_a_model:
        raise UserError(
            f"config: 'train.optim_target_modules' does nothing with optim={args.optim.value}: leave it out"
        )
    with told_by_library(f"train: optim={args.optim.value}"):
        try:
            cls, keywords = _optimizer(args)
        except ValueError:
            if needs_a_model:
                return
            raise
        cls([torch.nn.Parameter(torch.zeros(1))], **keywords)
    _refuse_ignored(args, train, keywords)


def _refuse_ignored(args, train: dict, keywords: dict) -> None:
    """Refuse arguments that have no effect on the optimizer."""
    name = args.optim.value
    for key in OF_ADAM:
        if key in train and _optimizer(args, **{key: 0.25 if train[key] != 0.25 else 0.5})[1] == keywords:
            raise UserError(f"config: 'train.{key}' does nothing with optim={name}: leave it out")
    for argument in _optim_args(args):
        others = [other for other in _optim_args(args) if other != argument]
        if _optimizer(args, optim_args=",".join(others) or None)[1] == keywords:
            raise UserError(f"config: 'train.optim_args': {argument} does nothing with optim={name}: leave it out")


def _optim_args(args) -> list[str]:
    return args.optim_args.replace(" ", "").split(",") if args.optim_args else []


def _optimizer(args, **changed):
    """(class, keywords) of the optimizer, with some arguments changed."""
    from transformers import Trainer

    args = copy.copy(args)
    for name, value in changed.items():
        setattr(args, name, value)
    return Trainer.get_optimizer_cls_and_kwargs(args)


def _check_schedule(args) -> None:
    """Make the learning-rate schedule for a single weight, which checks its arguments."""
    name, keywords = args.lr_scheduler_type.value, args.lr_scheduler_kwargs
    try:
        _schedule(args, 1, keywords)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"config: 'train.lr_scheduler_kwargs' does not fit lr_scheduler_type={name} and learning_rate="
            f"{args.learning_rate:g}: {words(error, 300)}"
        ) from None
    with contextlib.suppress(TypeError):
        _schedule(args, 1, {"no schedule has this": 1})
        if keywords:
            raise UserError(f"config: 'train.lr_scheduler_kwargs' does nothing with lr_scheduler_type={name}")


def ignores_warmup(args) -> bool:
    """Whether the learning-rate schedule ignores `warmup_steps`."""
    import torch
    from transformers.optimization import GreedyLR

    schedules = [_schedule(args, warmup, args.lr_scheduler_kwargs) for warmup in (0, 5)]
    if isinstance(schedules[0], torch.optim.lr_scheduler.ReduceLROnPlateau | GreedyLR):
        return True
    return schedules[0].get_last_lr() == schedules[1].get_last_lr()


def _schedule(args, warmup_steps: int, keywords: dict | None):
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    return get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, 100, scheduler_specific_kwargs=keywords)


def _check_loader(args) -> None:
    """Make a data loader; it starts no worker until it is asked for rows."""
    from torch.utils.data import DataLoader

    with told_by_library("train"):
        DataLoader(
            [0],  # type: ignore[arg-type]
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )


def _check_checkpointing(args) -> None:
    """Refuse names that torch.utils.checkpoint and transformers do not know."""
    from torch.utils.checkpoint import checkpoint

    known = set(inspect.signature(checkpoint).parameters) - {"function", "args", "kwargs", "context_fn"}
    known |= {"preserve_rng_state", "every_n_layers", "offload"}
    for name in args.activation_checkpointing_kwargs or {}:
        if name not in known:
            raise UserError(
                f"config: unknown key 'train.activation_checkpointing_kwargs.{name}'; {suggest(name, known)}"
            )
    if args.activation_checkpointing_kwargs and not args.activation_checkpointing:
        raise UserError("config: 'train.activation_checkpointing_kwargs' needs train.activation_checkpointing=true")


# Options that need a validation split.
NEEDS_VALIDATION = {
    "load_best_model_at_end": lambda value: value,
    "early_stopping_patience": lambda value: value is not None,
    "save_strategy": lambda value: value == "best",
    "lr_scheduler_type": lambda value: value in ("reduce_lr_on_plateau", "greedy"),
}


def refuse_without_validation(train: dict) -> None:
    """Refuse options that depend on the validation loss if there is no validation split."""
    for name, needs_it in NEEDS_VALIDATION.items():
        if needs_it(train.get(name)):
            raise UserError(
                f"config: train.{name}={train[name]} goes by the validation loss, and the splits have no validation "
                "rows: raise data.splits.validation, or leave it out"
            )


# --- adapter -------------------------------------------------------------------------------------

ADAPTER_RANGES = {
    "r": (0, 1_000_000, False),
    "lora_alpha": (0, math.inf, False),
    "alpha": (0, math.inf, False),
    "num_virtual_tokens": (0, 100_000, False),
}


def _check_adapter(adapter: dict) -> None:
    if "peft_type" not in adapter:
        raise UserError("config: 'adapter.peft_type' is missing; choose adapter=lora or adapter=full")
    if adapter["peft_type"] is not None:
        _check_peft(adapter, _peft_class(adapter["peft_type"]))
    elif len(adapter) > 1:
        extra = min(set(adapter) - {"peft_type"})
        raise UserError(f"config: unknown key 'adapter.{extra}': full-parameter training takes no adapter fields")


def _peft_class(peft_type):
    """PEFT's config class of an adapter type."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value in options.PEFT_USED}
    if not isinstance(peft_type, str) or peft_type not in known:
        raise UserError(f"config: 'adapter.peft_type': {peft_type!r}; {suggest(str(peft_type), known)}")
    return known[peft_type]


def _check_peft(adapter: dict, cls) -> None:
    fields = _field_types(cls)
    for key, value in adapter.items():
        if key not in fields:
            raise UserError(f"config: unknown key 'adapter.{key}'; {suggest(key, fields)}")
        if key == "init_lora_weights" and not isinstance(value, bool):
            if value not in options.LORA_INIT_USED:
                known = suggest(str(value), ["true", "false", *options.LORA_INIT_USED])
                raise UserError(f"config: 'adapter.init_lora_weights': {found(value)}; {known}")
        elif key != "peft_type":
            _check_type(f"adapter.{key}", value, fields[key])
        if key.endswith("dropout") and value is not None and not 0 <= value < 1:
            raise UserError(f"config: 'adapter.{key}' must be from 0 to below 1 (found {value})")
    _check_ranges("adapter", adapter, ADAPTER_RANGES)
    own = {key: value for key, value in adapter.items() if key != "peft_type"}
    if own.get("target_modules") == ATTENTION:
        own["target_modules"] = [ATTENTION]  # it will become a list
    with told_by_library("adapter"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cls(**own)
    for warning in said:
        if "ignored" in str(warning.message):
            raise UserError(f"config: adapter: {words(warning.message, 300)}; leave it out")
