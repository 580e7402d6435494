r"""Write a run's merged model as one GGUF file, for llama.cpp and programs built on it (Ollama, LM Studio, ...).

    temper export --run best --sweep demo --output reviews.gguf
    temper export --run best --sweep demo --output reviews-q8.gguf --outtype q8_0
    temper export --run best --sweep demo --output reviews-q4.gguf --outtype q4_k_m

Beside it is a Modelfile with template, system message, stop words and parameters, for `ollama create`. `q4_k_m` and
`q5_k_m` are made by llama.cpp itself: pip install -e ".[llama]".

For models of the Llama architecture with a byte-level BPE tokenizer whose word splitting llama.cpp implements. Others
are refused, because a file that tokenizes differently gives worse answers for no visible reason. The file holds the
tokenizer and the chat template (with the date of training, if it asks for one), but not the system message, so give
that when you prompt the model without the Modelfile. If the run has a `prompt.template`, write prompts in that format,
not through the chat template.

Reads results/merged/, where the merged model is written if it is not there; writes the files by a rename.
"""

import collections
import json
import os
import tempfile
from pathlib import Path

from temper.commands import flags, predict
from temper.errors import UserError
from temper.files import whole_file, write_whole
from temper.model import serving
from temper.progress import quiet_libraries
from temper.runs import find as runs
from temper.runs import forms, ollama
from temper.runs.merged import merged_folder
from temper.runs.prompting import tokenizer_to_ship

K_QUANTS = ("q4_k_m", "q5_k_m")  # llama.cpp alone makes them
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0", *K_QUANTS)
# llama.cpp's names for ways to split text before byte-pair encoding, by their description in a tokenizer.json. GPT-2's
# regular expression is the one built into ByteLevel.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (f"Split {LLAMA3}", "ByteLevel without regex"): "llama-bpe",
}


def arguments(parser) -> None:
    """Add the arguments of this command."""
    flags.of_a_run(parser)
    parser.add_argument("--output", required=True, help="new .gguf file")
    parser.add_argument("--outtype", choices=OUTTYPES, default="auto", help="type of the weights; auto: as stored")


def run(arguments) -> None:
    """Write the files."""
    output = flags.new_file(arguments.output, ".gguf", "name a file that ends in .gguf")
    asking = flags.new_file(str(output.with_suffix(ollama.ENDING)), ollama.ENDING, "name another file")
    if arguments.outtype in K_QUANTS:
        _llama_cpp(arguments.outtype)
    tuned = runs.find(arguments.run, arguments.sweep)
    folder = merged_folder(tuned, "and it is part of what is exported")
    runs.refuse_bundled(folder, "there is no one file of that")
    serving.check(folder, folder, leaves=True)
    text, remarks = modelfile(tuned, folder, output.name)
    export(folder, output, arguments.outtype, tuned.prompt)
    print(f"wrote {output} ({output.stat().st_size:,} bytes; {types_in(output)})")
    write_whole(asking, text)
    print(f"wrote {asking}: ollama create NAME -f {asking}")
    for remark in remarks:
        print(f"{asking}: {remark}")
    if not tuned.prompt["apply_chat_template"]:
        print(f"ask it in the words of its training, without a chat template: {tuned.prompt['template']!r}")


def export(folder: Path, output: Path, outtype: str, prompt: dict) -> None:
    """Write the model in `folder`, whose run has the config section `prompt`, to `output`.

    Raises:
        UserError: GGUF readers would not compute or tokenize as the model does.
    """
    with whole_file(output) as part:
        if outtype not in K_QUANTS:
            _write(folder, part, outtype, prompt)
            return
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            whole = Path(scratch) / "whole.gguf"
            _write(folder, whole, "auto", prompt)
            _quantize(whole, part, outtype)


def modelfile(run: runs.FinishedRun, folder: Path, name: str) -> tuple[str, list[str]]:
    """(the Modelfile for the GGUF file of that name, what of the run's prompts it does not say)."""
    from temper.model.loading import load_config, stop_token_ids

    prompt, tokenizer = run.prompt, tokenizer_to_ship(folder, run.prompt)
    form = forms.of_run(tokenizer, prompt)
    if form and _adds_bos(tokenizer, prompt):
        form = form.without(tokenizer.bos_token)
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(folder, tokenizer))
    context = load_config(folder).max_position_embeddings
    settings, _ = predict.settings_of(run, {})
    text = ollama.modelfile(name, form, prompt["system"], stops, settings, context)
    return text, ollama.remarks(form, prompt["system"])


def _write(folder: Path, file: Path, outtype: str, prompt: dict) -> None:
    from gguf import GGUFWriter

    from temper.model.loading import load_config

    quiet_libraries()
    config = load_config(folder)
    _check_architecture(folder, config)
    tokenizer = tokenizer_to_ship(folder, prompt)
    splits_words = pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()), folder)
    writer = GGUFWriter(file, "llama")
    _add_config(writer, config, folder.name)
    _add_tokenizer(writer, tokenizer, config, folder, splits_words, _adds_bos(tokenizer, prompt))
    for name, value in serving.of_folder(folder, tokenizer).items():
        writer.add_string(f"temper.serving.{name}", value)
    _add_weights(writer, folder, config, outtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- K-quants ------------------------------------------------------------------------------------


def _llama_cpp(outtype: str):
    """llama.cpp, in Python."""
    try:
        import llama_cpp
    except ImportError:
        raise UserError(
            f"--outtype {outtype}: llama.cpp makes it, and it is not installed: pip install -e '.[llama]' in Temper's "
            "folder, which compiles it (some minutes), or take q8_0"
        ) from None
    return llama_cpp


def _quantize(whole: Path, output: Path, outtype: str) -> None:
    """A GGUF file with its matrices in another type, by llama.cpp."""
    import ctypes

    llama_cpp = _llama_cpp(outtype)
    from llama_cpp._logger import llama_log_callback

    silent = llama_cpp.llama_log_callback(lambda *_: None)  # it has a line for each tensor
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{outtype.upper()}")
    settings.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    try:
        failed = llama_cpp.llama_model_quantize(os.fsencode(whole), os.fsencode(output), ctypes.byref(settings))
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p())
    if failed:
        raise UserError(f"--outtype {outtype}: llama.cpp cannot quantize this model (code {failed}); take q8_0")


def types_in(file: Path) -> str:
    """How many tensors have which type. Rows of no multiple of 256 cannot have a K-quant, and get the next larger."""
    from gguf import GGUFReader

    found = collections.Counter(tensor.tensor_type.name.lower() for tensor in GGUFReader(file).tensors)
    return "tensors: " + ", ".join(f"{count} {kind}" for kind, count in found.most_common())


# --- the file ------------------------------------------------------------------------------------


def _adds_bos(tokenizer, prompt: dict) -> bool:
    """Whether readers put a first token before a text: as the tokenizer does, and as the run's prompts have it."""
    if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        return False
    if not prompt["apply_chat_template"]:
        return True
    said = [{"role": "user", "content": "a"}]
    return tokenizer.apply_chat_template(said, tokenize=False).startswith(tokenizer.bos_token)


def _check_architecture(folder: Path, config) -> None:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    wrong = {
        f"architecture {config.model_type}": config.model_type != "llama",
        "biases": getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        f"rotary embedding of type {rope}": rope != "default",
    }
    for what, found in wrong.items():
        if found:
            raise UserError(f"{folder}: {what}: this exporter is for plain Llama models; use llama.cpp's own converter")


def pre_tokenizer(tokenizer: dict, folder: Path) -> str:
    """llama.cpp's name for how a tokenizer (the content of its tokenizer.json) splits words."""
    top = tokenizer["pre_tokenizer"] or {}
    parts = top["pretokenizers"] if top.get("type") == "Sequence" else [top]
    found = tuple(_kind(part) for part in parts)
    known = PRE_TOKENIZERS.get(found)
    if known is None or tokenizer["model"]["type"] != "BPE" or tokenizer["normalizer"] is not None:
        raise UserError(
            f"{folder}: its tokenizer ({tokenizer['model']['type']}, split by {' and '.join(found)}) is none that this "
            "exporter knows llama.cpp's name of; use llama.cpp's own converter"
        )
    return known


def _kind(part: dict) -> str:
    """What a pre-tokenizer does, in the words of `PRE_TOKENIZERS`; its plain type when it does something else."""
    kind = part.get("type", "nothing")
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return "ByteLevel" if part.get("use_regex", True) else "ByteLevel without regex"
    if kind == "Digits" and part["individual_digits"]:
        return "Digits"
    if kind == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
        return f"Split {part['pattern'].get('Regex')}"
    return f"{kind} with other settings"


def _add_config(writer, config, name: str) -> None:
    heads = config.num_attention_heads
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_vocab_size(config.vocab_size)


def _head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_tokenizer(writer, tokenizer, config, folder: Path, splits_words: str, adds_bos: bool) -> None:
    from gguf import SpecialVocab, TokenType

    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens = [names.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    types = [TokenType.NORMAL if number in names else TokenType.UNUSED for number in range(config.vocab_size)]
    for number, token in added.items():
        types[number] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits_words)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=True)
    special.special_token_ids |= {
        kind: number
        for kind in ("bos", "eos", "unk", "pad")
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None
    }
    special.add_special_token["bos"] = adds_bos
    special.chat_template = tokenizer.chat_template
    special.add_to_gguf(writer, quiet=True)


def _add_weights(writer, folder: Path, config, outtype: str) -> None:
    """All weights: matrices in `outtype`; the rest, a few numbers, in float32."""
    import torch
    from gguf import MODEL_ARCH, GGMLQuantizationType, LlamaFileType, get_tensor_name_map, quants

    from temper.model.loading import load_model, stored_dtype

    model = load_model(folder, {"dtype": stored_dtype(folder), "attn_implementation": "fastest"})
    stored = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(model.dtype, "f32")
    chosen = (stored if outtype == "auto" else outtype).upper()
    writer.add_file_type(LlamaFileType["ALL_F32" if chosen == "F32" else f"MOSTLY_{chosen}"])
    writer.add_quantization_version(2)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # readers then use the embeddings
        projection = name.split(".")[-2]
        values = _interleaved(weight, heads[projection]) if projection in heads else weight
        kind = GGMLQuantizationType[chosen if values.dim() > 1 else "F32"]
        array = values.float().cpu().numpy()
        try:
            packed = quants.quantize(array, kind)
        except quants.QuantError as error:
            raise UserError(f"--outtype {outtype}: does not fit {name}: {error}; use f16") from None
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), packed, raw_dtype=kind)


def _interleaved(weight, heads: int):
    """Rows in llama.cpp's order: its rotary embedding rotates neighbours, that of transformers the halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
