"""Options of TrainingArguments and PEFT that are unknown, without effect here, or that only the library finds out."""

from tests.bad_inputs import Bad, World

BEST = "train.load_best_model_at_end=true"
NO_VALIDATION = "data.splits.validation=0"
ON_ITS_OWN = r"goes by the validation loss.*raise data\.splits\.validation"


def _plan(name: str, says: str, *overrides: str, experiment: str = "smoke") -> Bad:
    return Bad(name, says, "plan", lambda world: ["--experiment", experiment, *overrides])


def _train(name: str, says: str, *overrides: str) -> Bad:
    """Told by the model: where the trainer is made, before its first step."""

    def arguments(world: World) -> list[str]:
        inputs = ["--splits", str(world.splits), "--model", str(world.model), "--output", "adapter"]
        return [*inputs, "experiment=smoke", "sweep=none", "tracking=none", *overrides]

    return Bad(name, says, "train_adapter", arguments)


WITHOUT_EFFECT = {
    "torch_compile": "true",
    "torch_compile_backend": "junk",
    "use_liger_kernel": "true",
    "use_cache": "true",
    "auto_find_batch_size": "true",
    "include_num_input_tokens_seen": "true",
    "label_names": "[labels]",
    "eval_accumulation_steps": "2",
    "batch_eval_metrics": "true",
    "prediction_loss_only": "true",
    "bf16_full_eval": "true",
    "disable_tqdm": "true",
    "deepspeed": "ds.json",
    "ddp_backend": "gloo",
    "accelerator_config": "{split_batches: true}",
    "save_only_model": "true",
    "ignore_data_skip": "true",
    "dataloader_in_order": "false",
    "hub_model_id": "me/model",
    "project": "mine",
    "debug": "underflow_overflow",
    "do_eval": "true",
    "skip_memory_metrics": "false",
}
RENAMED = {"logging_dir": "logs", "group_by_length": "true", "predict_with_generate": "true", "past_index": "1"}
OUT_OF_RANGE = {
    "per_device_train_batch_size": "100000000000000",
    "gradient_accumulation_steps": "10000000",
    "dataloader_num_workers": "100000",
    "logging_steps": "-1",
    "max_grad_norm": "-1",
    "neftune_noise_alpha": "-5",
    "eval_delay": "-1",
    "save_total_limit": "0",
    "early_stopping_patience": "0",
}
SCHEDULES = [
    ("polynomial below its end", "polynomial .*learning_rate=1e-08.*1e-07", "polynomial", "train.learning_rate=1e-8"),
    ("nothing to choose by", r"leaves no rows to choose a run by.*eval\.split=test", "constant", NO_VALIDATION),
    ("plateau without validation", ON_ITS_OWN, "reduce_lr_on_plateau", NO_VALIDATION),
    ("plateau without evaluation", "requires an eval strategy", "reduce_lr_on_plateau", "train.eval_strategy='no'"),
    ("greedy without validation", ON_ITS_OWN, "greedy", NO_VALIDATION),
    ("unknown to it", "does not fit lr_scheduler_type=cosine.*power", "cosine", "train.lr_scheduler_kwargs={power: 2}"),
    ("it takes none", "does nothing with lr_scheduler_type=constant", "constant", "train.lr_scheduler_kwargs={a: 2}"),
]
OPTIMIZERS = [
    ("galore_adamw", "galore_torch", "train.optim_target_modules=[q_proj]"),
    ("apollo_adamw", "apollo", "train.optim_target_modules=[q_proj]"),
    ("grokadamw", "grokadamw"),
    ("stable_adamw", "optimi"),
    ("adamw_torch_4bit", "torchao"),
    ("adamw_anyprecision", "torchdistx"),
    ("schedule_free_adamw", "two sets of weights"),
    ("adalomo", "during the backward pass"),
    ("adamw_torch_nonsense", "did you mean 'adamw_torch"),
    ("adamw_torch", "betas|beta", "train.adam_beta1=1.5"),
    ("sgd", "'train.adam_beta1' does nothing with optim=sgd", "train.adam_beta1=0.8"),
    ("adafactor", "'train.adam_epsilon' does nothing", "train.adam_epsilon=1e-6"),
    ("adamw_torch", "rank=4 does nothing with optim=adamw_torch", "train.optim_args='rank=4'"),
    ("sgd", "write name=value,name=value", "train.optim_args=nonsense"),
    ("sgd", "optim=sgd.*could not convert", "train.optim_args='momentum=much'"),
    ("adamw_torch", "does nothing with optim=adamw_torch", "train.optim_target_modules=[q_proj]"),
]
BY = "train.metric_for_best_model="
CHOICES = [
    ("best model without validation", ON_ITS_OWN, BEST, NO_VALIDATION),
    ("early stopping without validation", ON_ITS_OWN, BEST, NO_VALIDATION, "train.early_stopping_patience=1"),
    ("best checkpoint without validation", ON_ITS_OWN, NO_VALIDATION, "train.save_strategy=best"),
    (
        "best by what is not measured",
        "validation of task 'labels' has no 'acuracy'; did you mean 'accuracy'",
        BEST,
        "train.metric_for_best_model=acuracy",
    ),
    ("best by rewards without pairs", "validation has no 'rewards/margins'.*eval.metric", BEST, BY + "rewards/margins"),
    ("best by answers, unused", "'accuracy' does nothing without train.load_best_model_at_end=true", BY + "accuracy"),
    ("best by the worst answers", "of 'f1' more is better", BEST, BY + "eval_f1", "train.greater_is_better=false"),
    (
        "best by answers under a schedule of the loss",
        "lr_scheduler_type=greedy would go by 'f1' as by a loss",
        BEST,
        BY + "f1",
        "train.lr_scheduler_type=greedy",
    ),
    ("best by answers without validation", ON_ITS_OWN, BEST, BY + "accuracy", NO_VALIDATION),
    ("best without evaluation", "save_strategy=epoch: set both to epoch", BEST, "train.eval_strategy='no'"),
    ("fp16 without a GPU", "fp16|GPU", "train.fp16=true", "train.use_cpu=true"),
    ("workers that stay, of none", "persistent_workers", "train.dataloader_persistent_workers=true"),
    (
        "unknown start of workers",
        "junk",
        "train.dataloader_num_workers=1",
        "train.dataloader_multiprocessing_context=junk",
    ),
    ("unknown log level", "shout", "train.log_level=shout"),
    (
        "unknown checkpointing",
        "did you mean 'use_reentrant'",
        "train.activation_checkpointing=true",
        "train.activation_checkpointing_kwargs={use_reentrent: true}",
    ),
    (
        "checkpointing that is off",
        "needs train.activation_checkpointing=true",
        "train.activation_checkpointing_kwargs={use_reentrant: true}",
    ),
]
STARTS = {
    "eva": "it starts from data",
    "corda": "it starts from data",
    "lora_ga": "it starts from data",
    "loftq": "quantizes the base itself",
    "pissa_niter_16": "would not fit; use pissa",
    "PISSA_NITER_4": "would not fit; use pissa",
    "pisa": "did you mean 'pissa'",
    "3": "allowed: ",
}
ADAPTER_FIELDS = {
    "task_type": ("CAUSAL_LM", "it follows from the model"),
    "inference_mode": ("true", "an adapter is trained here"),
    "layer_replication": ("[[0,1],[0,1]]", "more layers than its base"),
    "alora_invocation_tokens": ("[5]", "cannot merge it"),
    "kasa_config": ("{}", "leaves to the training loop"),
    "monteclora_config": ("{}", "leaves to the training loop"),
    "megatron_config": ("{a: 1}", "not Megatron"),
    "loftq_config": ("{loftq_bits: 4}", "quantizes the base itself"),
    "lora_alpha": ("0", "must be above 0"),
    "r": ("0", "must be above 0"),
    "lora_dropout": ("1.0", "from 0 to below 1"),
    "bias": ("some", "'adapter.bias'"),
    "layers_pattern": ("layers", "layers_to_transform"),
}
KINDS = ["ADALORA", "ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "XLORA", "LILY", "SHADOW"]
NOWHERE = "nothing is called"
OF_THE_MODEL = [
    ("no such layers", "nothing_proj.*its linear layers are called", "adapter.target_modules=[nothing_proj]"),
    ("one of several is misspelt", f"{NOWHERE} v_prj", "adapter.target_modules=[q_proj,v_prj]"),
    ("no such block", "99", "adapter.layers_to_transform=[99]"),
    ("one of two blocks is not there", f"{NOWHERE} 99", "adapter.layers_to_transform=[0,99]"),
    ("no such parameter", "no parameter was matched", "adapter.target_parameters=[nothing.weight]"),
    ("nothing to leave out", f"{NOWHERE} q_prj", "adapter.exclude_modules=[q_prj]"),
    ("nothing to train beside it", f"{NOWHERE} heads", "adapter.modules_to_save=[heads]"),
    ("a rank for nothing", "rank_pattern.*q_prj", "adapter.rank_pattern={q_prj: 2}"),
    ("tokens beyond the vocabulary", "adapter does not fit this model", "adapter.trainable_token_indices=[99999]"),
    ("turned weights of layers that have none", "fan_in_fan_out is set to True", "adapter.fan_in_fan_out=true"),
    ("a bias of layers without", "adapter does not fit this model: .*bias", "adapter.lora_bias=true"),
]

CASES = [
    *(
        _plan(f"without effect: {key}", f"'train.{key}' cannot be set: ", f"train.{key}={value}")
        for key, value in WITHOUT_EFFECT.items()
    ),
    *(
        _plan(f"renamed: {key}", f"unknown key 'train.{key}': ", f"train.{key}={value}")
        for key, value in RENAMED.items()
    ),
    *(
        _plan(f"out of range: {key}", f"'train.{key}' must be ", f"train.{key}={value}")
        for key, value in OUT_OF_RANGE.items()
    ),
    *(
        _plan(f"schedule: {name}", says, f"train.lr_scheduler_type={kind}", more)
        for name, says, kind, more in SCHEDULES
    ),
    *(
        _plan(f"optimizer {number}: {kind}", says, f"train.optim={kind}", *more)
        for number, (kind, says, *more) in enumerate(OPTIMIZERS)
    ),
    *(_plan(name, says, *overrides) for name, says, *overrides in CHOICES),
    *(_plan(f"start: {start}", says, f"adapter.init_lora_weights={start}") for start, says in STARTS.items()),
    *(_plan(f"adapter field: {key}", says, f"adapter.{key}={value}") for key, (value, says) in ADAPTER_FIELDS.items()),
    *(_plan(f"method: {kind}", f"{kind} cannot be used here: ", f"adapter.peft_type={kind}") for kind in KINDS),
    _plan("unknown method", "did you mean 'LORA'", "adapter.peft_type=LORAX"),
    _plan("all parameters of a quantized base", "adapter=qlora", "adapter=full", "quantization=4bit"),
    _plan("blocks of all layers", "layers_to_transform", "adapter=lora_all_linear", "adapter.layers_to_transform=[0]"),
    _plan(
        "best model of the fine-tuning before DPO",
        r"method\.sft|validation loss",
        NO_VALIDATION,
        "eval.split=test",
        "method.sft={train: {load_best_model_at_end: true}}",
        experiment="sft_dpo",
    ),
    *(_train(f"model: {name}", says, *overrides) for name, says, *overrides in OF_THE_MODEL),
]
