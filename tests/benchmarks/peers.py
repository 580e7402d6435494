"""One contender of `tests.benchmarks.training`, in a process of its own.

    python -m tests.benchmarks.peers <contender> <folder of the job, with job.json>

All get the same rows in the same order, tokens and labels ready made, so that none has to tokenize; the same LoRA, the
same optimizer steps. Written to the folder: steps.json (seconds and tokens after each optimizer step) and the adapter.
"""

import json
import sys
import time
from pathlib import Path


def main(contender: str, folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    CONTENDERS[contender](job, folder)


# --- supervised fine-tuning ----------------------------------------------------------------------


def trainer(job: dict, folder: Path) -> None:
    """transformers.Trainer with a model of the stored precision, all else as it comes."""
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = _with_lora(AutoModelForCausalLM.from_pretrained(job["model"]), job)
    collator = DataCollatorForSeq2Seq(_tokenizer(job))
    arguments = TrainingArguments(**_common(job, folder))
    _train(_in_order(Trainer)(model=model, args=arguments, train_dataset=_rows(job), data_collator=collator), folder)


def trl(job: dict, folder: Path) -> None:
    """trl.SFTTrainer as it comes: bf16 mixed precision over float32 weights, gradient checkpointing."""
    _sft(job, folder)


def trl_tuned(job: dict, folder: Path) -> None:
    """Its fastest way found on a CPU: see `_tuned`."""
    _sft(job, folder, **_tuned())


def trl_compiled(job: dict, folder: Path) -> None:
    """The same with torch.compile."""
    _sft(job, folder, **_tuned(), torch_compile=True)


def trl_liger(job: dict, folder: Path) -> None:
    """The same with Liger's kernels, which are Triton's: on a GPU, where liger-kernel is installed."""
    _sft(job, folder, **_tuned(), use_liger_kernel=True)


def _sft(job: dict, folder: Path, **options) -> None:
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**_common(job, folder), max_length=None, **options)
    cls = _in_order(SFTTrainer)
    _train(
        cls(model=job["model"], args=arguments, train_dataset=_rows(job), peft_config=_lora(job)),
        folder,
    )


# --- preference optimization ---------------------------------------------------------------------


def trl_dpo(job: dict, folder: Path) -> None:
    """trl.DPOTrainer, tuned as above, with the reference's log-probabilities computed before training."""
    from datasets import Dataset, load_from_disk
    from trl import DPOConfig, DPOTrainer

    tokenizer = _tokenizer(job)
    pairs = load_from_disk(job["splits"])["train"].select(job["order"])
    starts = [
        tokenizer.decode(ids[:length]) for ids, length in zip(pairs["input_ids"], pairs["prompt_length"], strict=True)
    ]
    answers = [
        [
            tokenizer.decode(ids[length:]).removesuffix(tokenizer.eos_token)
            for ids, length in zip(pairs[name], pairs["prompt_length"], strict=True)
        ]
        for name in ("input_ids", "rejected_input_ids")
    ]
    texts = {"prompt": starts, "chosen": answers[0], "rejected": answers[1]}
    arguments = DPOConfig(
        **_common(job, folder),
        beta=0.1,
        max_length=None,
        precompute_ref_log_probs=True,
        **_tuned(),
    )
    cls = _in_order(DPOTrainer)
    _train(
        cls(
            model=job["model"],
            args=arguments,
            train_dataset=Dataset.from_dict(texts),
            processing_class=tokenizer,
            peft_config=_lora(job),
        ),
        folder,
    )


# --- what all share ------------------------------------------------------------------------------


def _tuned() -> dict:
    """Mixed precision over bfloat16 weights: without it, TRL was 10 to 17% slower on a CPU."""
    import torch

    attention = "sdpa" if torch.accelerator.is_available() else "eager"
    return {
        "gradient_checkpointing": False,
        "bf16": True,
        "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": attention},
    }


def _common(job: dict, folder: Path) -> dict:
    """TrainingArguments that are the same for all."""
    import torch

    return {
        "use_cpu": not torch.accelerator.is_available(),
        "output_dir": str(folder / "state"),
        "per_device_train_batch_size": job["batch_size"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": job["warmup_steps"],
        "num_train_epochs": 1,
        "seed": 42,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _lora(job: dict):
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **job["lora"])


def _with_lora(model, job: dict):
    from peft import get_peft_model

    return get_peft_model(model, _lora(job))


def _tokenizer(job: dict):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job["model"])


def _rows(job: dict):
    """Tokens and labels, in the order in which Temper takes them."""
    from datasets import load_from_disk

    rows = load_from_disk(job["splits"])["train"].select_columns(["input_ids", "labels"])
    return rows.select(job["order"]).flatten_indices()


def _in_order(cls: type) -> type:
    """A trainer that takes the rows as they lie: already shuffled, rows of similar length together."""
    from torch.utils.data import SequentialSampler

    class InOrder(cls):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    return InOrder


def _train(trainer, folder: Path) -> None:
    import torch
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):  # noqa: ARG002
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            times.append(time.monotonic())

    trainer.add_callback(Clock())
    trainer.train()
    (folder / "steps.json").write_text(json.dumps(times))
    trainer.model.save_pretrained(folder / "adapter")


# --- measures ------------------------------------------------------------------------------------


def score(job: dict, folder: Path) -> None:
    """Validation loss of the adapter in the folder, computed in float32 by the same code, whoever trained it."""
    import torch
    from datasets import load_from_disk
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from temper.evaluation.likelihoods import row_losses

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    rows = list(load_from_disk(job["splits"])["validation"])
    (folder / "score.json").write_text(json.dumps({"validation_loss": row_losses(model, rows, 32, 0).loss}))


def ceiling(job: dict, folder: Path) -> None:
    """Seconds that the products of one step's real tokens alone take: forward, and the gradient of each input.

    With frozen weights no other large products are needed. Once for all real tokens, once for those that are left when
    what rows have in common is computed once.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    linear = [part for part in model.base_model.modules() if isinstance(part, torch.nn.Linear)]
    seconds = {}
    for name in ("tokens_per_step", "computed_tokens_per_step"):
        inputs = {size: torch.randn(round(job[name]), size).bfloat16() for part in linear for size in part.weight.shape}

        def products(inputs=inputs):
            for part in linear:
                torch.mm(inputs[part.in_features], part.weight.t())
            for part in reversed(linear):
                torch.mm(inputs[part.out_features], part.weight)

        with torch.no_grad():
            products()
            started = time.monotonic()
            for _ in range(10):
                products()
            seconds[name] = (time.monotonic() - started) / 10
    (folder / "ceiling.json").write_text(json.dumps(seconds))


def pipeline(job: dict, folder: Path) -> None:
    """Answers by transformers.pipeline, one prompt after the other."""
    import torch
    from datasets import load_from_disk
    from transformers import pipeline as make

    generate = make("text-generation", model=job["merged"], dtype=torch.bfloat16)
    tokenizer, rows = generate.tokenizer, load_from_disk(job["splits"])["test"].select(range(job["prompts"]))
    prompts = [tokenizer.decode(row["input_ids"][: row["prompt_length"]]) for row in rows]
    started = time.monotonic()
    for prompt in prompts:
        generate(prompt, max_new_tokens=job["max_new_tokens"], do_sample=False, return_full_text=False)
    _write_seconds(folder, time.monotonic() - started, len(prompts))


def answers(job: dict, folder: Path) -> None:
    """The same by Temper's evaluation: every answer generated, none known from the loss."""
    from datasets import load_from_disk

    from temper.evaluation import generation
    from temper.model import loading

    merged = Path(job["merged"])
    tokenizer = loading.load_tokenizer(merged)
    model = loading.load_model(merged, {"dtype": "fastest", "attn_implementation": "fastest"}).eval()
    rows = list(load_from_disk(job["splits"])["test"])
    settings = {"batch_size": 32, "max_new_tokens": job["max_new_tokens"], "do_sample": False}
    started = time.monotonic()
    generation.generate_answers(model, tokenizer, rows, settings, loading.stop_token_ids(merged, tokenizer))
    _write_seconds(folder, time.monotonic() - started, len(rows))


def _write_seconds(folder: Path, seconds: float, rows: int) -> None:
    (folder / "seconds.json").write_text(json.dumps({"seconds_per_answer": seconds / rows}))


CONTENDERS = {
    function.__name__: function
    for function in (trainer, trl, trl_tuned, trl_compiled, trl_dpo, score, ceiling, pipeline, answers)
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
