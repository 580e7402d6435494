"""Loading models and tokenizers, with ``auto`` resolved for this machine."""

import logging
from pathlib import Path

from steps.lib.errors import UserError
from steps.lib.files import read_json

log = logging.getLogger("temper")


def device():
    """The accelerator if there is one, else the CPU."""
    import torch

    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def resolve_dtype(dtype: str):
    """The torch dtype for a config value; ``auto`` is bfloat16 where the machine computes in it, else float32."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if _has_bfloat16() else torch.float32


def _has_bfloat16() -> bool:
    import torch

    if device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device().type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def resolve_attention(attn_implementation: str) -> str:
    """``auto`` is eager on a CPU, where plain attention has the faster backward pass for short rows, else sdpa."""
    if attn_implementation != "auto":
        return attn_implementation
    return "eager" if device().type == "cpu" else "sdpa"


BUNDLED = "adapter"  # in a model folder: an adapter that cannot be merged and is put on when the model is loaded


def is_encoder_decoder(folder: Path) -> bool:
    """Whether the model in a folder has an encoder for the prompt and a decoder for the answer (T5), or one for both.

    The one place that decides it before a model is loaded; a loaded one says so in its `config.is_encoder_decoder`.
    """
    from transformers import AutoConfig

    return bool(_from_pretrained(AutoConfig, folder).is_encoder_decoder)


def load_model(folder: Path, load: dict, quantization: dict | None = None):
    """A language model, causal or encoder-decoder, on this machine's device, with its bundled adapter if it has one.

    Args:
        folder: a model in Hugging Face layout.
        load: the config section `model.load`: dtype and attn_implementation, each may be ``auto``.
        quantization: the config section of that name; None loads the weights as they are stored.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    cls = AutoModelForSeq2SeqLM if is_encoder_decoder(folder) else AutoModelForCausalLM
    dtype = resolve_dtype("float32" if load["dtype"] == "auto" and is_fully_trained(folder) else load["dtype"])
    arguments = {"dtype": dtype, "attn_implementation": resolve_attention(load["attn_implementation"])}
    if quantization and is_quantized(quantization):
        arguments["quantization_config"] = _bitsandbytes(quantization, dtype)
        arguments["device_map"] = {"": device()}  # a quantized model is made where it stays
        return _with_steady_weights(_from_pretrained(cls, folder, **arguments))
    model = _from_pretrained(cls, folder, **arguments).to(device())
    if (folder / BUNDLED / "adapter_config.json").is_file():
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder / BUNDLED)
    return model


def _with_steady_weights(model):
    """Keep bitsandbytes from repacking 4-bit weights, with rounded scales, at the first forward pass without gradients.

    It does so on CPUs with AVX512-BF16. A training would go on from other weights after its first evaluation, and end
    with other bits than one that was resumed.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def is_fully_trained(folder: Path) -> bool:
    """Whether all weights in a folder were trained here, in float32: in bfloat16 most of what they learned is lost."""
    provenance = folder / "provenance.json"
    return provenance.is_file() and bool(read_json(provenance).get("fully_trained"))


def is_quantized(quantization: dict) -> bool:
    """Whether the config section `quantization` asks for anything."""
    return quantization["load_in_4bit"] or quantization["load_in_8bit"]


def _bitsandbytes(quantization: dict, dtype):
    """Weights in 4 or 8 bits, products in `dtype`."""
    from transformers import BitsAndBytesConfig

    if quantization["load_in_8bit"]:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(**quantization, bnb_4bit_compute_dtype=dtype)


def load_tokenizer(folder: Path):
    """The tokenizer. One without a pad token pads with its end of sequence: labels mask padding, not that token."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no end-of-sequence token, so answers could never stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(folder: Path, tokenizer) -> list[int]:
    """All tokens that end an answer: the tokenizer's and the generation config's end of sequence."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    if (Path(folder) / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder).eos_token_id
        ids.update(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    return sorted(ids)


def _from_pretrained(cls, folder: Path, **arguments):
    try:
        return cls.from_pretrained(folder, local_files_only=True, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
