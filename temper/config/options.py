"""Every option of transformers' TrainingArguments and every PEFT method: what it does here, or why it is refused.

The config check calls `refuse`, and docs/options.md is generated from the same tables::

    python -m temper.config.options > docs/options.md

A test asserts that each field and type of the installed versions is listed here once, so that a new version of a
library forces a decision. Options that would do nothing are refused: an option without effect is a silent fault.
"""

from temper.errors import UserError

# --- train: fields of transformers.TrainingArguments ------------------------------------------------------------


# field -> what it does here. Each is passed on to TrainingArguments under its own name (but for `fsdp`: a model that is
# spread as it is loaded is not for Trainer to spread).
TRAIN_USED = {
    "per_device_train_batch_size": "rows per batch",
    "gradient_accumulation_steps": "batches per step; the loss is the mean over all learned tokens of the step",
    "num_train_epochs": "may be a fraction",
    "max_steps": "above 0, overrides num_train_epochs",
    "learning_rate": "",
    "lr_scheduler_type": "reduce_lr_on_plateau and greedy need a validation split",
    "lr_scheduler_kwargs": "refused if the schedule ignores it",
    "warmup_steps": "below 1: a share of all steps (warmup_ratio works as well)",
    "optim": "refused if its library is missing",
    "optim_args": "refused if the optimizer ignores it",
    "optim_target_modules": "for GaLore and APOLLO, whose libraries must be installed",
    "weight_decay": "",
    "adam_beta1": "refused if the optimizer ignores it",
    "adam_beta2": "refused if the optimizer ignores it",
    "adam_epsilon": "refused if the optimizer ignores it",
    "max_grad_norm": "0: gradients are not clipped",
    "label_smoothing_factor": "method=sft only",
    "average_tokens_across_devices": "always so",
    "ddp_find_unused_parameters": "with num_processes; for a model of which a batch may leave trained weights unused",
    "fsdp": "true, with num_processes: each process holds a part of the model (FSDP2); for lora and full",
    "bf16": "mixed precision; on a CPU with use_cpu=true",
    "fp16": "mixed precision; needs a GPU",
    "tf32": "needs a GPU that supports it",
    "activation_checkpointing": "recomputes layers in the backward pass, on padded rows",
    "activation_checkpointing_kwargs": "those of torch.utils.checkpoint",
    "gradient_checkpointing": "older name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "older name of activation_checkpointing_kwargs",
    "neftune_noise_alpha": "noise as in transformers, separate for each row, on padded rows",
    "torch_empty_cache_steps": "",
    "logging_strategy": "",
    "logging_steps": "",
    "logging_first_step": "",
    "log_level": "level of the libraries' messages in the log",
    "eval_strategy": "validation; refused with data.splits.validation=0 if another option depends on it",
    "eval_steps": "with eval_strategy=steps",
    "eval_delay": "no validation before this epoch or step",
    "eval_on_start": "",
    "per_device_eval_batch_size": "rows per batch of validation",
    "save_strategy": "ends of epochs are always saved, because longer runs continue from there",
    "save_steps": "with save_strategy=steps",
    "save_total_limit": "at least 2, because the last complete checkpoint must stay",
    "load_best_model_at_end": "needs a validation split",
    "metric_for_best_model": "loss; in preference optimization also one of the reward figures; or a metric of answers",
    "greater_is_better": "",
    "full_determinism": "",
    "use_cpu": "",
    "dataloader_drop_last": "",
    "dataloader_num_workers": "",
    "dataloader_pin_memory": "",
    "dataloader_persistent_workers": "needs dataloader_num_workers",
    "dataloader_prefetch_factor": "needs dataloader_num_workers",
    "dataloader_multiprocessing_context": "needs dataloader_num_workers",
}
_FOLDERS = "the workflow names all folders"
_TRACKING = "use 'tracking'"
_PUBLISHING = "publishing is a step of its own (make publish), never part of training"
_OWN_LOSS = "the loss is computed at learned positions only and bypasses what this would replace"
_OWN_EVALUATION = "validation sums the loss over all learned tokens by its own code, so this would do nothing"
_ONE_MACHINE = "num_processes says on how many devices of this machine a training runs; it needs nothing more"
_SHARDED = "a model too large for a device is spread by train.fsdp=true, with num_processes; it needs nothing more"
# Fields of train that are refused with num_processes=1, where they would do nothing.
OF_PROCESSES = ("ddp_find_unused_parameters", "fsdp")
_SEED = "use the top-level 'seed'"
_RESUME = "training resumes by itself, exactly, from results/.state"
_SCRIPTS = "it is for transformers' scripts; here each stage has its own command"
_ORDER = "rows of similar length always train together, in an order that depends only on the seed"
_COMPILE = "the loss calls the layers one by one and bypasses the compiled model, so this would do nothing"
# field -> why it cannot be set, or where the choice goes instead
TRAIN_REFUSED = {
    "output_dir": _FOLDERS,
    "seed": _SEED,
    "data_seed": _SEED,
    "resume_from_checkpoint": _RESUME,
    "restore_callback_states_from_checkpoint": _RESUME,
    "ignore_data_skip": _RESUME,
    "enable_jit_checkpoint": _RESUME,
    "save_only_model": "a run continues from its checkpoints, which need the optimizer",
    "report_to": "use tracking.report_to: what only shows a run is in no key",
    "project": _TRACKING,
    "trackio_space_id": _TRACKING,
    "trackio_bucket_id": _TRACKING,
    "trackio_static_space_id": _TRACKING,
    "run_name": "runs are named by the plan",
    "push_to_hub": _PUBLISHING,
    "hub_token": "a config is stored and shown, so it must not hold a token",
    "hub_private_repo": _PUBLISHING,
    "hub_model_id": _PUBLISHING,
    "hub_strategy": _PUBLISHING,
    "hub_always_push": _PUBLISHING,
    "hub_revision": _PUBLISHING,
    "remove_unused_columns": "the collator takes what it needs",
    "label_names": "the collator takes what it needs",
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "dataloader_in_order": _ORDER,
    "auto_find_batch_size": "the order of rows follows from the batch size; the log says before training what it needs",
    "accelerator_config": "batches and their order are Temper's own",
    "parallelism_config": _SHARDED,
    "do_train": _SCRIPTS,
    "do_eval": "use train.eval_strategy",
    "do_predict": _SCRIPTS,
    "bf16_full_eval": _OWN_EVALUATION,
    "fp16_full_eval": _OWN_EVALUATION,
    "prediction_loss_only": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _OWN_LOSS,
    "liger_kernel_config": _OWN_LOSS,
    "use_cache": "training never uses the cache",
    "include_num_input_tokens_seen": "training.json and metrics.jsonl count the tokens",
    "logging_nan_inf_filter": "a diverged run must show its NaN, not an average that hides it",
    "log_on_each_node": _ONE_MACHINE,
    "log_level_replica": _ONE_MACHINE,
    "save_on_each_node": _ONE_MACHINE,
    "ddp_bucket_cap_mb": _ONE_MACHINE,
    "ddp_broadcast_buffers": _ONE_MACHINE,
    "ddp_static_graph": _ONE_MACHINE,
    "ddp_backend": _ONE_MACHINE,
    "ddp_timeout": _ONE_MACHINE,
    "fsdp_config": _SHARDED,
    "deepspeed": _SHARDED,
    "local_rank": _ONE_MACHINE,
    "disable_tqdm": "Temper has a bar of its own, and plain lines in a log",
    "debug": "a loss that is not a number ends the training by itself, and says so",
    "skip_memory_metrics": "training.json has the memory that was used",
}
# train.optim -> why not, for all that begin with it or end with it
OPTIM_REFUSED = {
    "schedule_free": "it keeps two sets of weights, and validation and saving would have to switch between them",
    "lomo": "it updates the weights during the backward pass, which is also run to estimate the memory",
    "adalomo": "it updates the weights during the backward pass, which is also run to estimate the memory",
    "layerwise": "it updates the weights during the backward pass, which is also run to estimate the memory",
}
# Renamed or removed in transformers 5: what to write instead.
TRAIN_RENAMED = {
    "evaluation_strategy": "it is called eval_strategy now",
    "group_by_length": "rows of similar length always train together",
    "no_cuda": "write train.use_cpu=true",
    "num_threads": "it is a top-level key, for all stages: write num_threads=<number>",
    "logging_dir": "use 'tracking'",
    "predict_with_generate": "evaluation generates answers by itself, see 'eval'",
    "past_index": "training never uses the cache",
    "jit_mode_eval": "evaluation has its own loop, see 'eval'",
    "tpu_num_cores": "training on TPUs is not supported",
    "torchdynamo": _COMPILE,
    "half_precision_backend": "write train.bf16=true or train.fp16=true",
    "per_gpu_train_batch_size": "it is called per_device_train_batch_size now",
    "per_gpu_eval_batch_size": "it is called per_device_eval_batch_size now",
    "overwrite_output_dir": _FOLDERS,
    "save_safetensors": "weights are always saved as safetensors",
}
# Fields of adapter=lora with train.fsdp: those that neither read nor train the base's weights.
SPREAD_LORA = (
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
)
# train.optim with train.fsdp and all weights.
SPREAD_OPTIM = ("adamw_torch", "adamw_torch_fused", "sgd")
# --- adapter: PEFT's methods and their fields -------------------------------------------------------------------

# peft_type -> what it is. Each is tested to train as PEFT's own loop does, to load again and to be merged.
PEFT_USED = {
    "LORA": "see below for how it starts",
    "ADAMSS": "",
    "BOFT": "",
    "C3A": "",
    "DEFT": "",
    "DELORA": "",
    "FOURIERFT": "",
    "FROD": "",
    "GLORA": "",
    "GRALORA": "",
    "HIRA": "",
    "HRA": "",
    "IA3": "",
    "LN_TUNING": "",
    "LOHA": "",
    "LOKR": "",
    "MISS": "",
    "OFT": "",
    "OSF": "",
    "P_TUNING": "virtual tokens, not merged",
    "PEANUT": "",
    "PREFIX_TUNING": "virtual tokens, not merged",
    "PROMPT_TUNING": "virtual tokens, not merged",
    "PSOFT": "",
    "PVERA": "",
    "RANDLORA": "",
    "ROAD": "",
    "SHIRA": "",
    "SUPERTUNING": "",
    "TINYLORA": "",
    "TRAINABLE_TOKENS": "",
    "UNILORA": "",
    "VBLORA": "",
    "VERA": "",
    "WAVEFT": "",
}
_NO_MERGE = "PEFT cannot merge it into the model's weights, which every run needs"
_TASKS = "it needs a task number for each row, which the data does not have"
# peft_type -> why not
PEFT_REFUSED = {
    "ADALORA": "its ranks are reallocated by its own training loop; use LORA, whose rank_pattern sets ranks",
    "ADAPTION_PROMPT": _NO_MERGE,
    "BEFT": "it trains the biases of layers, and most models have none",
    "CARTRIDGE": "it starts from the cache of a text, which PEFT needs made beforehand; use PREFIX_TUNING",
    "CPT": "it needs its own loss; use PROMPT_TUNING",
    "LILY": _NO_MERGE,
    "MULTITASK_PROMPT_TUNING": f"{_TASKS}; use PROMPT_TUNING",
    "POLY": f"{_TASKS}; use LORA",
    "SHADOW": "it adds a network beside the model's layers, which cannot be merged",
    "XLORA": "it mixes adapters that are already trained; use LORA",
}
_DATA_START = "it starts from data, through functions that PEFT needs called before; use pissa or olora"
# adapter.init_lora_weights -> what it does, or why not. Also true and false; others are unknown.
LORA_INIT_USED = {
    "gaussian": "",
    "olora": "",
    "orthogonal": "",
    "pissa": "",
    "mica": "",
}
LORA_INIT_REFUSED = {
    "eva": _DATA_START,
    "corda": _DATA_START,
    "lora_ga": _DATA_START,
    "loftq": "it quantizes the base itself; use adapter=qlora, or init_lora_weights=pissa",
    "pissa_niter_": "it starts at random, and again when the adapter is loaded, so what was trained would not fit; "
    "use pissa, which is exact",
}
# adapter.<field> -> why it cannot be set, with any method
ADAPTER_REFUSED = {
    "task_type": "it follows from the model",
    "inference_mode": "an adapter is trained here",
    "base_model_name_or_path": "use 'model'",
    "revision": "use model.source.revision",
    "auto_mapping": "PEFT writes it itself",
    "peft_version": "PEFT writes it itself",
    "megatron_config": "models are transformers', not Megatron's",
    "megatron_core": "models are transformers', not Megatron's",
    "runtime_config": "it cannot be written in YAML",
    "eva_config": _DATA_START,
    "corda_config": _DATA_START,
    "lora_ga_config": _DATA_START,
    "loftq_config": LORA_INIT_REFUSED["loftq"],
    "monteclora_config": "its loss has a part that PEFT leaves to the training loop",
    "kasa_config": "its loss has a part that PEFT leaves to the training loop",
    "arrow_config": "it routes between adapters that are already trained",
    "alora_invocation_tokens": _NO_MERGE,
    "use_bdlora": "its blocks are for serving on several devices",
    "layer_replication": "the merged model would have more layers than its base",
    "use_asa": "its subspaces are chosen by its own training loop",
    "save_only_topk_weights": "a run could not continue from its checkpoints",
}


def refuse(train: dict, adapter: dict) -> None:
    """Refuse what cannot be set, or would do nothing.

    Raises:
        UserError: for the first such option, with the reason and what to do instead.
    """
    for key in train:
        if key in TRAIN_REFUSED:
            raise UserError(f"config: 'train.{key}' cannot be set: {TRAIN_REFUSED[key]}")
        if key in TRAIN_RENAMED:
            raise UserError(f"config: unknown key 'train.{key}': {TRAIN_RENAMED[key]}")
    optim = str(train.get("optim"))
    for name, reason in OPTIM_REFUSED.items():
        if optim.startswith(name) or optim.endswith(name):
            raise UserError(f"config: 'train.optim': {optim} cannot be used here: {reason}; choose adamw_torch")
    _refuse_adapter(adapter)


def _refuse_adapter(adapter: dict) -> None:
    if adapter.get("peft_type") in PEFT_REFUSED:
        kind = adapter["peft_type"]
        raise UserError(f"config: 'adapter.peft_type': {kind} cannot be used here: {PEFT_REFUSED[kind]}")
    start = adapter.get("init_lora_weights")
    for name, reason in LORA_INIT_REFUSED.items():
        if isinstance(start, str) and start.casefold().startswith(name):
            raise UserError(f"config: 'adapter.init_lora_weights': {start} cannot be used here: {reason}")
    for key, value in adapter.items():
        if key in ADAPTER_REFUSED and value not in (None, False):
            raise UserError(f"config: 'adapter.{key}' cannot be set: {ADAPTER_REFUSED[key]}")


# --- the page ---------------------------------------------------------------------------------------------------


HEAD = """\
# Options of the libraries

`train.*` are the fields of `transformers.TrainingArguments`, `adapter.*` those of the PEFT method. An option that
is unknown, missing on this machine, or without effect here is refused before training, in one line that says why.
This page is generated from the code that decides: `python -m temper.config.options`.
"""
EARLY = "`early_stopping_patience` and `early_stopping_threshold` are those of `EarlyStoppingCallback`.\n\n"
METHODS = """\
`adapter.peft_type`; null (`adapter=full`) trains all parameters. A test trains each method as PEFT's own
loop does, then loads and merges it.

"""


def page() -> str:
    """docs/options.md."""
    starts = {"true, false": "", **LORA_INIT_USED}
    sections = [
        HEAD,
        "## train: used\n\n" + EARLY + _table("field", "remark", TRAIN_USED),
        "## train: refused\n\n" + _table("field", "why", TRAIN_REFUSED),
        "## train.optim\n\nAny whose library is installed, except:\n\n" + _table("optim", "why", OPTIM_REFUSED),
        "## adapter: methods that are used\n\n" + METHODS + _table("peft_type", "remark", PEFT_USED),
        "## adapter: methods that are refused\n\n" + _table("peft_type", "why", PEFT_REFUSED),
        "## adapter.init_lora_weights\n\n" + _table("value", "remark", starts),
        _table("refused value", "why", LORA_INIT_REFUSED),
        "## adapter: fields that are refused with any method\n\n" + _table("field", "why", ADAPTER_REFUSED),
    ]
    return "\n".join(sections)


def _table(name: str, remark: str, rows: dict[str, str]) -> str:
    lines = [f"| {name} | {remark} |", "|---|---|", *(f"| `{key}` | {value} |" for key, value in rows.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
