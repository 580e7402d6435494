"""The figures of docs/scale.md: memory of large models by formula, and what of that can be measured on a small one.

    python -m tests.benchmarks.large                 # formulas, checks against published figures, hours and costs
    python -m tests.benchmarks.large --activations   # what autograd keeps of a token in a layer, by Temper's estimate
    python -m tests.benchmarks.large --loading       # memory of a process that loads a model of several files

Nothing of it needs a GPU.
"""

import argparse
import contextlib
import dataclasses
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

GB, GIB = 1e9, 2**30
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes a parameter: double quantization, blocks of 64 and of 256
LOGIT = 10  # bytes: bfloat16, float32, and the gradient of that
A100, H100 = (1.49, 2.49), (2.49, 3.99)  # $ an hour


@dataclasses.dataclass
class Llama:
    """A model's shape; `k`: width of keys and values."""

    h: int
    layers: int
    f: int
    k: int
    vocabulary: int = 128256

    @property
    def linear(self) -> int:
        """Parameters of all linear layers but the head."""
        return self.layers * (2 * self.h**2 + 2 * self.h * self.k + 3 * self.h * self.f)

    @property
    def outside(self) -> int:
        """Those of embeddings, head and norms."""
        return 2 * self.vocabulary * self.h + (2 * self.layers + 1) * self.h

    @property
    def parameters(self) -> int:
        return self.linear + self.outside

    def lora(self, rank: int) -> int:
        return rank * self.layers * (4 * self.h + 2 * (self.h + self.k) + 3 * (self.h + self.f))


LLAMA_70B = Llama(8192, 80, 28672, 1024)
LLAMA_8B = Llama(4096, 32, 14336, 1024)
QWEN_72B = Llama(8192, 80, 24576, 8192, 152064)
KEPT_LORA, KEPT_FULL = 43.5, 94.0  # of a token in a layer, in units of h: `--activations`


def formulas() -> None:
    for name, model in (("70B", LLAMA_70B), ("8B", LLAMA_8B)):
        print(f"{name}: {model.parameters:,} parameters, {model.linear:,} of them linear")
    for tokens, rows in ((1024, 1), (2048, 1), (2048, 2), (8192, 1)):
        print(f"70B QLoRA, {rows} x {tokens}:", *(f"{part} {size:.1f}" for part, size in qlora(tokens * rows).items()))
    for gpus in (1, 8, 64):
        print(f"8B over {gpus}:", *(f"{part} {size:.1f}" for part, size in sharded(8192, gpus).items()))
    saved = 16 * LLAMA_8B.parameters * (1 / 8 - 1 / 128) / GIB
    flops = 6 * LLAMA_8B.parameters + 12 * LLAMA_8B.layers * LLAMA_8B.h * 8192
    print(f"FSDP, 128 GPUs save over 8: {saved:.1f} GiB; 8B at 2,973 tokens/s: {2973 * flops / 312e12:.1%} of an A100")
    gptq = QWEN_72B.linear * (4 + 16 / 128 + 4 / 128) / 8
    lora = 64 * QWEN_72B.layers * (QWEN_72B.h * 4 + QWEN_72B.h * 2 + 3 * (QWEN_72B.h + QWEN_72B.f))
    print(f"Qwen 72B: {gptq / GB:.1f} + {2 * QWEN_72B.outside / GB:.1f} + {16 * lora / GB:.1f} GB of LoRA ({lora:,})")
    for name, tokens, rate, gpus, price in (
        ("70B on 8 A100, one copy each", 51.2e6, 8 * 8 * 2048 / 59.5, 8, A100),
        ("70B on 8 A100, FSDP", 51.2e6, 1024 * 2048 / 672, 8, A100),
        ("70B on 4 H100, FSDP", 51.2e6, 1024 * 2048 / 667, 4, H100),
        ("8B on 64 A100", 1e9, 64 * 2904, 64, A100),
        ("8B on 64 H100", 1e9, 64 * 5605, 64, H100),
    ):
        hours = tokens / rate / 3600
        print(f"{name}: {rate:,.0f} tokens/s, {hours:.1f} h, $", *(f"{hours * gpus * each:.0f}" for each in price))


def qlora(tokens: int) -> dict[str, float]:
    """GB on each GPU for a batch of so many tokens, every one of them learned, with a whole copy of the base."""
    model, lora = LLAMA_70B, LLAMA_70B.lora(16)
    always = {
        "4 bits": NF4 * model.linear,
        "outside": 2 * model.outside,
        "LoRA": (4 + 4 + 4 + 8) * lora,
        "logits": LOGIT * tokens * model.vocabulary,
        "dequantized": 2 * model.h * model.f,
    }
    layer = KEPT_LORA * tokens * model.h
    inputs = 2 * tokens * model.h * model.layers
    sums = {"checkpointed": sum(always.values()) + inputs + layer, "not": sum(always.values()) + model.layers * layer}
    return {name: size / GB for name, size in (always | {"inputs": inputs, "layer": layer} | sums).items()}


def sharded(tokens: int, gpus: int) -> dict[str, float]:
    """GB on each GPU for all weights: whole copies in float32 (1), or sharded, and activations in bfloat16."""
    model, whole = LLAMA_8B, gpus == 1
    width = 4 if whole else 2
    gathered = 2 * (2 * model.linear / model.layers + model.outside)
    parts = {
        "weights": 4 * model.parameters / gpus,
        "gradients": 4 * model.parameters / gpus,
        "buckets": 4 * model.parameters if whole else 0,
        "Adam": 8 * model.parameters / gpus,
        "gathered": 0 if whole else gathered,
        "inputs": width * tokens * model.h * model.layers,
        "layer": KEPT_FULL * width / 4 * tokens * model.h,
        "logits": LOGIT * tokens * model.vocabulary,
    }
    return {name: size / GB for name, size in (parts | {"sum": sum(parts.values())}).items()}


# --- measured --------------------------------------------------------------------------------------


def activations() -> None:
    """Bytes of a token in a layer over the width: the difference between four layers and two."""
    for full in (False, True):
        for checkpointing in (False, True):
            two, four = (_kept(layers, full, checkpointing) for layers in (2, 4))
            print(f"all weights: {full}, checkpointing: {checkpointing}: {(four - two) / 2:.1f} h")


def _kept(layers: int, full: bool, checkpointing: bool, h: int = 512, tokens: int = 24) -> float:
    """Of LoRA in the proportions of the 70B model, of all weights in those of the 8B one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from temper.data.batches import Batch
    from temper.model.adapters import add_adapter
    from temper.model.fast_layers import use_fast_layers
    from temper.model.predictions import SupervisedLoss
    from temper.training.estimates import _probe

    torch.manual_seed(0)
    shape = {"hidden_size": h, "intermediate_size": int(3.5 * h), "num_hidden_layers": layers, "vocab_size": 512}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4 if full else 2, "head_dim": h // 16}
    config = LlamaConfig(**shape, **heads, tie_word_embeddings=False)
    dtype = torch.float32 if full else torch.bfloat16
    network = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    if not full:  # rank 1: at the width of a large model the low ranks are as narrow
        network = add_adapter(network, {"peft_type": "LORA", "r": 1, "target_modules": "all-linear"}, 0)
    use_fast_layers(network)
    if checkpointing:
        network.gradient_checkpointing_enable()
    loss = SupervisedLoss()

    def compute_loss(model, batch):
        total, count = loss(model, batch)
        return total / count

    rows = [torch.randint(1, 500, (tokens,)).tolist() for _ in range(2)]
    batch = Batch([{"input_ids": row, "labels": [-100] * (tokens - 8) + row[-8:]} for row in rows], 0)
    trainer = SimpleNamespace(
        model=network, compute_loss=compute_loss, compute_loss_context_manager=contextlib.nullcontext
    )
    return _probe(trainer, batch)[1] / (2 * tokens * h)


def loading() -> None:
    """Own and whole memory that is added while a Llama of 336M parameters in six files is loaded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from temper.model.loading import load_model

    four = {"load_in_4bit": True, "load_in_8bit": False}
    four |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    shape = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "vocab_size": 4096}
    config = LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False)
    load = {"dtype": "bfloat16", "attn_implementation": "fastest"}
    with tempfile.TemporaryDirectory() as folder:
        network = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        network.save_pretrained(folder, max_shard_size="120MB")
        del network
        for name, quantization in (("as stored", None), ("4 bits", four)):
            before, most, over = _own_memory(), [0], threading.Event()
            watch = threading.Thread(target=_watch, args=(most, over), daemon=True)
            watch.start()
            model = load_model(Path(folder), load, quantization)
            over.set()
            watch.join()
            held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
            print(f"{name}: {(most[0] - before) / 1e6:.0f} MB more at most, for weights of {held / 1e6:.0f} MB")
            del model


def _watch(most: list[int], over: threading.Event) -> None:
    while not over.is_set():
        most[0] = max(most[0], _own_memory())
        time.sleep(0.005)


def _own_memory() -> int:
    """Bytes that no other process can have, as those of a mapped file can be."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("activations", "loading"):
        parser.add_argument(f"--{name}", action="store_true")
    arguments = parser.parse_args()
    if arguments.activations:
        activations()
    elif arguments.loading:
        loading()
    else:
        formulas()


if __name__ == "__main__":
    main()
