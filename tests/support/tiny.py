"""Tiny stand-ins for tests: a random Llama with a chat template, and splits that fit it.

Both are made in a moment, are the same each time, and have the layout of the real ones, so a test can run a whole
stage on them. The model knows nothing: use it for exactness, not for quality.
"""

import json
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "Classify the sentiment."
ROWS = {"train": 24, "validation": 8, "test": 8}
SUBJECTS = ("The plot", "A scene", "This film", "The acting", "An old joke", "The music")
VERDICTS = {"positive": ("is a joy", "works", "moves you deeply"), "negative": ("falls flat", "is dull", "bores")}
ENDINGS = ("", ", again", ", and the ending knows it", ", which nobody had expected at all", ", I fear")


def make_tiny_model(folder: Path, seed: int = 0, **fields) -> Path:
    """Write a random two-layer Llama (float32, 30,000 parameters) and its byte-level tokenizer to `folder`.

    Weights are larger than usual, so that greedy answers differ from prompt to prompt. `fields` go into its config.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(**{**sizes, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_tokenizer():
    """A BPE tokenizer on bytes, trained on the tiny rows: ChatML template, no unknown tokens, about 400 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{prompt} {answer}" for prompt, answer in tiny_rows(90)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_rows(count: int, start: int = 0) -> list[tuple[str, str]]:
    """`count` (at most 180) different prompts of different lengths with their sentiment, from number `start` on."""
    rows = []
    for number in range(start, start + count):
        label = ("positive", "negative")[number % 2]
        subject = SUBJECTS[number // 2 % len(SUBJECTS)]
        verdict = VERDICTS[label][number // 12 % 3]
        rows.append((f"{subject} {verdict}{ENDINGS[number // 36 % len(ENDINGS)]}.", label))
    return rows


def make_tiny_splits(
    folder: Path,
    model_folder: Path,
    rows: dict | None = None,
    system: str | None = SYSTEM,
    pairs: bool = False,
    labels: bool = False,
) -> Path:
    """Write splits as `tokenize_splits` does, with the tokenizer in `model_folder`.

    Args:
        rows: split -> how many rows to make up (0 leaves the split out: `datasets` cannot read an empty one back), or
            the (prompt, answer) pairs themselves; default: `ROWS`.
        system: the system message; None leaves it out.
        pairs: preference pairs: the other sentiment is rejected.
        labels: single answers, of which every third is the other sentiment and undesirable.
    """
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer

    from temper.data.columns import features

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    splits, number = {}, 0
    for split, wanted in {**ROWS, **(rows or {})}.items():
        texts = tiny_rows(wanted, number) if isinstance(wanted, int) else wanted
        made = [tiny_row(tokenizer, number + i, prompt, answer, system) for i, (prompt, answer) in enumerate(texts, 1)]
        if pairs:
            made = [_with_rejected(row, tokenizer, system) for row in made]
        if labels:
            made = [_labelled(row, tokenizer, system) for row in made]
        if made:
            splits[split] = Dataset.from_list(made, features=features(pairs, labels=labels))
        number += len(texts)
    DatasetDict(splits).save_to_disk(str(folder))
    counts = {split: {"rows": len(rows), "read": len(rows), "dropped": 0} for split, rows in splits.items()}
    (Path(folder) / "audit.json").write_text(json.dumps({"splits": counts}))
    return Path(folder)


def tiny_row(tokenizer, number: int, prompt: str, answer: str, system: str | None = SYSTEM) -> dict:
    """One row of a split: the loss is on the answer and the token that ends it."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before = tokenizer(start, add_special_tokens=False)["input_ids"]
    learned = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {
        "id": number,
        "input_ids": before + learned,
        "labels": [-100] * len(before) + learned,
        "prompt_length": len(before),
        "prompt": prompt,
        "reference": answer,
    }


def _with_rejected(row: dict, tokenizer, system: str | None) -> dict:
    """The row as a preference pair whose answers differ in length."""
    wrong = {"positive": "negative", "negative": "not negative, positive"}[row["reference"]]
    other = tiny_row(tokenizer, row["id"], row["prompt"], wrong, system)
    return {**row, "rejected_input_ids": other["input_ids"], "rejected_labels": other["labels"], "rejected": wrong}


def _labelled(row: dict, tokenizer, system: str | None) -> dict:
    """The row with `label`; every third row is answered wrongly."""
    if row["id"] % 3:
        return {**row, "label": True}
    wrong = {"positive": "negative", "negative": "not negative, positive"}[row["reference"]]
    return {**tiny_row(tokenizer, row["id"], row["prompt"], wrong, system), "label": False}


def moved_model(folder: Path, seed: int = 1):
    """The model in a folder with all weights moved at random, as a policy that is no longer the reference."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def gradients(model, loss) -> dict:
    """Name -> gradient of each weight that gets one from `loss`."""
    model.zero_grad()
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found
