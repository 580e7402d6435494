"""Small random networks of many families, and rows for them."""

import torch
import transformers

from temper.data.columns import IGNORED
from tests.support.tiny import tiny_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPREAD = {"initializer_range": 0.3}  # large weights, so that answers differ from prompt to prompt
GROUPED = {**SIZES, **SPREAD, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
GEMMA = {**GROUPED, "initializer_range": 0.1}  # its embeddings are scaled up, and would drown the layers
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.3, "decoder_start_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
# family -> (config class, its arguments, has a chat template, names of the attention's layers)
LLAMA_LIKE = {f"self_attn.{name}_proj" for name in "qkvo"}
FUSED = {"query_key_value", "dense"}
FAMILIES = {
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, **SPREAD}, False, {f"attention.{name}" for name in FUSED}),
    "bloom": (
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, **SPREAD},
        False,
        {f"self_attention.{name}" for name in FUSED},
    ),
    "llama": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}, True, LLAMA_LIKE),
    "qwen2": ("Qwen2Config", GROUPED, True, LLAMA_LIKE),
    "qwen3": ("Qwen3Config", GROUPED, True, LLAMA_LIKE),
    "gemma2": ("Gemma2Config", {**GEMMA, "final_logit_softcapping": 3.0}, True, LLAMA_LIKE),
    "gemma3": ("Gemma3TextConfig", GEMMA, True, LLAMA_LIKE),
    "t5": ("T5Config", T5, False, {f"{side}Attention.{name}" for side in ("Self", "EncDec") for name in "qkvo"}),
    "bart": (
        "BartConfig",
        BART,
        False,
        {f"{side}.{name}_proj" for side in ("self_attn", "encoder_attn") for name in ("q", "k", "v", "out")},
    ),
}
ENCODER_DECODERS = {"t5", "bart"}


def tokenizer_of(family: str):
    """Causal models pad with their end of sequence; encoder-decoders have a pad token, and close what they encode."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    if not FAMILIES[family][2]:
        tokenizer.chat_template = None
    if family in ENCODER_DECODERS:
        tokenizer.pad_token = "<|endoftext|>"
        ends = [("<|im_start|>", 1), ("<|im_end|>", 2)]
        text = "$A <|im_end|>" if family == "t5" else "<|im_start|> $A <|im_end|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=text, special_tokens=ends)
    else:
        tokenizer.pad_token = None  # as GPT-NeoX and Llama come; Temper pads with the end of sequence
    return tokenizer


def network_of(family: str, tokenizer):
    """A random model in float32, the same each time."""
    config_class, arguments, _, _ = FAMILIES[family]
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = getattr(transformers, config_class)(vocab_size=len(tokenizer), **ids, **arguments)
    kind = transformers.AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = kind.from_config(config, attn_implementation="eager")
        if family == "t5":  # its own start is made for larger models: all answers would be the same
            for weight in network.parameters():
                weight.data.add_(torch.randn_like(weight), alpha=0.15)
    return network.eval()


def rows_of(lengths, prefix=30, seed=0):
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(1, 40, (prefix,), generator=draw).tolist()
    rows = [start + torch.randint(1, 40, (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [IGNORED] * (len(row) - 3) + row[-3:]} for row in rows]


HIDDEN_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HIDDEN_SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}
HIDDEN_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}


def network(kind: str = "Llama", **fields):
    torch.manual_seed(0)
    sizes = MAMBA if kind == "Mamba" else HIDDEN_SIZES
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **fields})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
