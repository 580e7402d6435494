"""Load models and tokenizers, with ``fastest`` resolved for this machine."""

import json
import logging
from pathlib import Path

from temper.errors import UserError
from temper.files import read_json
from temper.model.adapters import put_on
from temper.model.reading import reading, refuse_no_numbers, refuse_tensors

log = logging.getLogger("temper")


def device():
    """The accelerator if there is one, else the CPU."""
    import torch

    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def resolve_dtype(dtype: str):
    """The torch dtype for a config value. ``fastest`` is bfloat16 if the hardware supports it, else float32."""
    import torch

    if dtype != "fastest":
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
    """``fastest`` is eager on a CPU, where its backward pass is faster for short rows, else sdpa."""
    if attn_implementation != "fastest":
        return attn_implementation
    return "eager" if device().type == "cpu" else "sdpa"


BUNDLED = "adapter"  # in a model folder: an adapter that cannot be merged and is loaded with the model


# --- config --------------------------------------------------------------------------------------


def _from_pretrained(cls, folder: Path, **arguments):
    """`cls.from_pretrained` of a folder, without network and without running Python code from it."""
    with reading(folder):
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **arguments)


def load_config(folder: Path):
    """The model's config.

    Raises:
        UserError: it cannot be read, or there is an adapter beside it, which transformers would load unasked.
    """
    from transformers import AutoConfig

    refuse_loose_adapter([path.name for path in folder.iterdir()], str(folder))
    return _from_pretrained(AutoConfig, folder)


def stored_dtype(folder: Path) -> str:
    """The precision in which a model is stored, as a value of `model.load.dtype`."""
    return str(load_config(folder).dtype or "float32").removeprefix("torch.")


def refuse_loose_adapter(names: list[str], where: str) -> None:
    """Refuse an adapter among the files of a whole model: nothing tells whether it is already merged."""
    if "adapter_config.json" in names:
        raise UserError(
            f"{where}: adapter_config.json lies beside a whole model, and nothing says whether that adapter is part of "
            "it already: merge it if it is not, and use a folder without adapter_config.json and adapter_model.*"
        )


def is_encoder_decoder(folder: Path) -> bool:
    """Whether the model in a folder has an encoder for the prompt and a decoder for the answer, like T5.

    Only this decides it before a model is loaded; afterwards it is in `config.is_encoder_decoder`.
    """
    return bool(load_config(folder).is_encoder_decoder)


# --- weights -------------------------------------------------------------------------------------


def load_model(folder: Path, load: dict, quantization: dict | None = None, processes: int = 1):
    """A language model, causal or encoder-decoder, on this machine's device, with its bundled adapter if it has one.

    Args:
        folder: a model in Hugging Face layout.
        load: the config section `model.load`: dtype and attn_implementation, each may be ``fastest``.
        quantization: the config section of that name; None loads the weights as stored.
        processes: how many it is spread over, all of which call this; each reads and holds its part of the weights.
    """
    dtype = resolve_dtype("float32" if load["dtype"] == "fastest" and is_fully_trained(folder) else load["dtype"])
    arguments = {"dtype": dtype, "attn_implementation": resolve_attention(load["attn_implementation"])}
    config = load_config(folder)
    if quantization and is_quantized(quantization):
        _refuse_other_width(folder, config, quantization)
        arguments["quantization_config"] = _bitsandbytes(quantization, dtype)
    if "quantization_config" in arguments or is_stored_quantized(config):
        arguments["device_map"] = {"": device()}  # a quantized model is created on its device
        model = _with_steady_weights(_network(folder, config, **arguments))
    elif processes > 1:
        model = _network(folder, config, **arguments, **_spread_over(processes))
    else:
        model = _network(folder, config, **arguments).to(device())
    if (folder / BUNDLED / "adapter_config.json").is_file():
        return put_on(model, folder / BUNDLED)
    return model


def _network(folder: Path, config, **arguments):
    """The network with exactly the weights in the folder.

    transformers would fill missing weights with random numbers and drop unknown ones; here both are refused.
    """
    for file in weight_files(folder):
        _shapes(file)  # names the damaged file
    network, info = _from_pretrained(
        _auto_class(config), folder, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
    )
    refuse_misfits(folder, info)
    refuse_no_numbers(folder, network.named_parameters())
    return network


def _spread_over(processes: int) -> dict:
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=processes)}


def _auto_class(config):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def check_weights(folder: Path) -> None:
    """Check that names and shapes of the stored tensors match the model, without reading the weights.

    Raises:
        UserError: tensors are missing, unknown or of another shape, or a file is damaged.
    """
    config = load_config(folder)
    refuse_unmergeable(folder, config)
    if not is_stored_quantized(config):  # packed tensors have different names and shapes; `load_model` checks them
        network_without_weights(folder, stored_dtype(folder))


def network_without_weights(folder: Path, dtype: str):
    """The network that `load_model` makes of a folder in a precision, on a device without memory.

    Raises:
        UserError: tensors are missing, unknown or of another shape, or a file is damaged.
    """
    import torch

    config = load_config(folder)
    stored = {name: shape for file in weight_files(folder) for name, shape in _shapes(file).items()}
    with reading(folder), torch.device("meta"):
        kind = type(_auto_class(config).from_config(config, trust_remote_code=False))
        tensors = {name: torch.empty(shape) for name, shape in stored.items()}
        network, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=resolve_dtype(dtype),
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    refuse_misfits(folder, info)
    return network


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights: one, or those named in an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / shard for shard in sorted(set(weight_map(index).values()))]
    raise UserError(f"{folder}: no model.safetensors or pytorch_model.bin in it")


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> the name of its file, as an index has them."""
    with reading(index):
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> its shape, from a file's header."""
    import torch
    from safetensors import safe_open

    with reading(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        tensors = torch.load(file, map_location="meta", weights_only=True)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refuse_misfits(where: Path | str, info: dict) -> None:
    """Refuse a load for which transformers reports missing, unexpected or mismatched tensors."""
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unknown to the model": sorted(info["unexpected_keys"]),
        "of another shape": [
            f"{name} {tuple(stored)} instead of {tuple(wanted)}"
            for name, stored, wanted in sorted(info["mismatched_keys"])
        ],
    }
    refuse_tensors(where, wrong, "use a complete model, as save_pretrained writes it, with its own config.json")


def _with_steady_weights(model):
    """Keep bitsandbytes from repacking 4-bit weights, with rounded scales, in the first forward pass without gradients.

    It does so on CPUs with AVX512-BF16. A training would continue with different weights after its first evaluation,
    and end with different bits than a resumed one.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def is_fully_trained(folder: Path) -> bool:
    """Whether a folder holds the float32 weights of a full-parameter training. bfloat16 would lose most of it."""
    provenance = folder / "provenance.json"
    return provenance.is_file() and bool(read_json(provenance).get("fully_trained"))


def is_quantized(quantization: dict) -> bool:
    """Whether the config section `quantization` quantizes."""
    return quantization["load_in_4bit"] or quantization["load_in_8bit"]


def is_stored_quantized(config) -> bool:
    """Whether a model's weights are stored in 4 or 8 bits, as its config says."""
    return getattr(config, "quantization_config", None) is not None


def refuse_unmergeable(folder: Path, config) -> None:
    """Refuse weights quantized in other formats than bitsandbytes', which alone can be dequantized here."""
    method = is_stored_quantized(config) and config.quantization_config.get("quant_method", "bitsandbytes")
    if method and method != "bitsandbytes":
        raise UserError(
            f"{folder}: its weights are stored quantized by {method}, so nothing can be merged into them: use the "
            "model that it was made from, with quantization=4bit if it must be small"
        )


def _refuse_other_width(folder: Path, config, quantization: dict) -> None:
    """Refuse another width than the stored weights have; transformers would silently keep theirs."""
    if not is_stored_quantized(config):
        return
    for bits in ("load_in_4bit", "load_in_8bit"):
        if quantization[bits] and not config.quantization_config.get(bits):
            raise UserError(
                f"{folder}: quantization.{bits}=true, but its weights are stored quantized already, in another way: "
                "set quantization=none (with adapter=lora), or use the model that it was made from"
            )


def _bitsandbytes(quantization: dict, dtype):
    """Weights in 4 or 8 bits, products in `dtype`."""
    from transformers import BitsAndBytesConfig

    if quantization["load_in_8bit"]:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(**quantization, bnb_4bit_compute_dtype=dtype)


# --- tokenizers ----------------------------------------------------------------------------------


def load_tokenizer(folder: Path):
    """The tokenizer. Without a pad token it pads with its end of sequence; labels mask the padding, not that token."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no end-of-sequence token, so answers could never stop")
    known = load_config(folder).get_text_config().vocab_size
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:  # a token that was added but never learned
        tokenizer.pad_token = tokenizer.eos_token
    with reading(folder):
        tokenizer.decode(tokenizer("A 1\n")["input_ids"])
    return tokenizer


def stop_token_ids(folder: Path, tokenizer) -> list[int]:
    """All tokens that end an answer: the tokenizer's and the generation config's end of sequence."""
    from transformers import GenerationConfig

    path, eos = Path(folder) / "generation_config.json", None
    if path.is_file():
        with reading(path):
            eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for number in ids:
        if not isinstance(number, int) or number < 0:
            raise UserError(f"{path}: eos_token_id is {eos!r:.60}, not the number of a token or a list of them")
    return sorted({tokenizer.eos_token_id, *ids})


def decoder_start(model) -> int | None:
    """What an encoder-decoder's decoder starts from: exactly what its training puts before the labels."""
    import torch

    if not model.config.is_encoder_decoder:
        return None
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.config.decoder_start_token_id
    return int(model.prepare_decoder_input_ids_from_labels(labels=torch.zeros((1, 1), dtype=torch.int64))[0, 0])
