"""Models and adapters that are damaged, do not fit, or want to bring a program: whatever command meets them."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.bad_inputs import Bad, World
from tests.support import finished, tiny

MARKER = "executed"  # a file that a program in a model writes, if somebody runs it


# --- damage --------------------------------------------------------------------------------------


def _cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    """Cut a file short."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def _text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content)


def _entries(name: str, **entries) -> Callable[[Path], None]:
    """Set entries of a JSON file; it may not be there yet."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(content | entries))

    return damage


def _tensors(change: Callable[[dict], dict], name: str = "model.safetensors") -> Callable[[Path], None]:
    """Write other tensors: what `change` makes of name -> tensor."""

    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = {name: tensor.contiguous() for name, tensor in change(load_file(folder / name)).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return damage


def _renamed(tensors: dict) -> dict:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def _without_a_layer(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}


def _half(tensors: dict) -> dict:
    return dict(list(tensors.items())[::2])


def _with_one_more(tensors: dict) -> dict:
    first = next(iter(tensors.values()))
    return {**tensors, "model.layers.0.mlp.extra.weight": first.clone()}


def _with_nan(tensors: dict) -> dict:
    name, tensor = next(iter(tensors.items()))
    return {**tensors, name: tensor * float("nan")}


def _sharded(folder: Path) -> None:
    """The same weights in several files."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")


def _shard_missing(folder: Path) -> None:
    _sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def _index_is_no_json(folder: Path) -> None:
    _sharded(folder)
    (folder / "model.safetensors.index.json").write_text("{")


class _Program:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return open, (MARKER, "w")


def _pickled(raw: bool, name: str = "pytorch_model.bin", instead_of: str = "model.safetensors"):
    """A pickle that is a program, as torch writes it or raw."""

    def damage(folder: Path) -> None:
        import torch

        (folder / instead_of).unlink()
        content = io.BytesIO()
        if raw:
            pickle.dump(_Program(), content)
        else:
            torch.save({"model.embed_tokens.weight": _Program()}, content)
        (folder / name).write_bytes(content.getvalue())

    return damage


def _program(folder: Path) -> None:
    (folder / "custom.py").write_text(f"open({MARKER!r}, 'w').close()\nclass Config: pass\nclass Tokens: pass\n")


def _own_code(folder: Path) -> None:
    _program(folder)
    _entries("config.json", model_type="newest", auto_map={"AutoConfig": "custom.Config"})(folder)


def _own_tokenizer(folder: Path) -> None:
    _program(folder)
    (folder / "tokenizer.json").unlink()
    code = {"AutoTokenizer": ["custom.Tokens", None]}
    _entries("tokenizer_config.json", tokenizer_class="Tokens", auto_map=code)(folder)


# (name, what the line says, damage to a model's folder)
DAMAGED_MODELS = [
    ("weights cut short", r"model\.safetensors: cannot be read \(SafetensorError", _cut("model.safetensors")),
    ("weights cut in the header", r"model\.safetensors: cannot be read", _cut("model.safetensors", 0.001)),
    ("weights empty", r"model\.safetensors: cannot be read", _text("model.safetensors", "")),
    ("weights are a web page", r"model\.safetensors: cannot be read", _text("model.safetensors", "<html>" * 99)),
    ("weights are an LFS pointer", r"cannot be read", _text("model.safetensors", "version https://git-lfs.github\n")),
    ("tensors of DDP", r"21 missing \(.*20 unknown.*module\..*save model\.module", _tensors(_renamed)),
    ("a layer lacks", r"9 missing \(model\.layers\.1\.input_layernorm\.weight", _tensors(_without_a_layer)),
    ("a tensor too many", r"1 unknown to the model \(model\.layers\.0\.mlp\.extra", _tensors(_with_one_more)),
    ("more layers than the config says", r"9 unknown to the model", _entries("config.json", num_hidden_layers=1)),
    ("another size than the config says", r"of another shape \(", _entries("config.json", hidden_size=64)),
    ("another vocabulary than the config says", r"embed_tokens.* instead of", _entries("config.json", vocab_size=99)),
    ("embeddings are not tied, and one lacks", r"1 missing", _entries("config.json", tie_word_embeddings=False)),
    ("a shard lacks", r"model-00001-of-.*cannot be read", _shard_missing),
    ("the shards' index is not JSON", r"index\.json: cannot be read", _index_is_no_json),
    ("weights are a program", r"pytorch_model\.bin: .*never run", _pickled(raw=False)),
    ("weights are a raw program", r"pytorch_model\.bin: .*never run", _pickled(raw=True)),
    ("config is not JSON", r"m: cannot be read \(.*valid JSON", _text("config.json", "{")),
    ("config is a list", r": cannot be read", _text("config.json", "[]")),
    ("config is not text", r": cannot be read", lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00")),
    ("unknown architecture", r"model type `newest`", _entries("config.json", model_type="newest")),
    ("sizes that do not divide", r"m: cannot be read|of another shape", _entries("config.json", num_attention_heads=5)),
    ("a size that is a word", r": cannot be read", _entries("config.json", hidden_size="wide")),
    ("tokenizer is not JSON", r": cannot be read", _text("tokenizer.json", "{")),
    ("tokenizer of nothing", r": cannot be read", _text("tokenizer.json", '{"model": 1}')),
    ("tokenizer config is a list", r": cannot be read", _text("tokenizer_config.json", "[]")),
    ("no end of sequence", r"has no end-of-sequence token", _entries("tokenizer_config.json", eos_token=None)),
    ("generation config is not JSON", r"generation_config\.json: cannot be read", _text("generation_config.json", "{")),
    ("generation config is a list", r"generation_config\.json: cannot be read", _text("generation_config.json", "[]")),
    ("an end that is a word", r"eos_token_id is 'end'", _entries("generation_config.json", eos_token_id="end")),
    ("code of its own", r"never run here", _own_code),
    ("a tokenizer with code of its own", r"never run here|cannot be read", _own_tokenizer),
    ("an adapter beside it", r"adapter_config\.json lies beside", _text("adapter_config.json", "{}")),
    ("stored by GPTQ", r"quantized by gptq", _entries("config.json", quantization_config={"quant_method": "gptq"})),
]

ADAPTER = "adapter_model.safetensors"
# (name, what the line says, damage to an adapter's folder)
DAMAGED_ADAPTERS = [
    ("weights cut short", r"cannot be read \(SafetensorError.*delete results/adapters/", _cut(ADAPTER)),
    ("half of its tensors", r"8 missing \(base_model\.model\.", _tensors(_half, ADAPTER)),
    ("tensors of DDP", r"16 missing .*16 unknown.*save model\.module", _tensors(_renamed, ADAPTER)),
    ("a tensor too many", r"1 unknown to the model", _tensors(_with_one_more, ADAPTER)),
    ("another rank than its config says", r"size mismatch", _entries("adapter_config.json", r=8)),
    ("nan", r"holds infinite numbers or nan", _tensors(_with_nan, ADAPTER)),
    ("weights are a program", r"never run", _pickled(False, "adapter_model.bin", ADAPTER)),
    ("no weights", r"cannot be read", lambda folder: (folder / ADAPTER).unlink()),
    ("config is not JSON", r"cannot be read", _text("adapter_config.json", "{")),
    ("unknown kind", r"cannot be read", _entries("adapter_config.json", peft_type="NEWEST")),
    ("layers that the model lacks", r"cannot be read", _entries("adapter_config.json", target_modules=["none"])),
]


# --- the commands that meet it -------------------------------------------------------------------


def _model(world: World, damage: Callable[[Path], None]) -> Path:
    shutil.copytree(world.model, "m")
    damage(Path("m"))
    return Path("m")


def _fetch(world: World, damage) -> list[str]:
    _model(world, damage)
    return ["--output", "out", "model.source.kind=files", "model.source.path=m", "sweep=none"]


HAND = ["--output", "out", "experiment=smoke", "sweep=none", "model.load.dtype=float32"]


def _train(world: World, damage) -> list[str]:
    return ["--splits", str(world.splits), "--model", str(_model(world, damage)), *HAND]


def _evaluate(world: World, damage) -> list[str]:
    return _train(world, damage)


def _sample(world: World, damage) -> list[str]:
    own = ["method=dpo", "method.own_answers={max_new_tokens: 4}", "data.rejected_from=[positive,negative]"]
    return ["--splits", str(world.pairs), "--model", str(_model(world, damage)), *HAND, *own]


def _reference(world: World, damage) -> list[str]:
    own = ["method=dpo", "data.rejected_from=[positive,negative]"]
    return ["--splits", str(world.pairs), "--model", str(_model(world, damage)), *HAND, *own]


def _results(world: World) -> None:
    shutil.copytree(world.project / "results", "results", ignore=shutil.ignore_patterns(".state", ".locks"))
    for provenance in Path("results").rglob("provenance.json"):  # as if the damage had been there from the start
        facts = json.loads(provenance.read_text(encoding="utf-8"))
        facts.pop("files", None)
        provenance.write_text(json.dumps(facts), encoding="utf-8")


def _merge(world: World, damage) -> list[str]:
    _results(world)
    damage(Path(f"results/adapters/{finished.ADAPTER}"))
    model = "results/models/tiny-00000000a0"
    return ["--model", model, "--adapter", f"results/adapters/{finished.ADAPTER}", "--output", "out"]


def _ask_adapter(world: World, damage) -> list[str]:
    _merge(world, damage)
    return ["--run", f"results/adapters/{finished.ADAPTER}", *_prompts()]


def _ask_merged(world: World, damage) -> list[str]:
    _results(world)
    damage(Path(f"results/merged/{finished.MERGED}"))
    return ["--run", f"results/merged/{finished.MERGED}", *_prompts()]


def _prompts() -> list[str]:
    Path("prompts.txt").write_text("The plot is a joy.\n")
    return ["--input", "prompts.txt", "--output", "answers.jsonl", "--max-new-tokens", "4"]


def _chat(world: World, damage) -> list[str]:
    return _ask_merged(world, damage)[:2]


def _export(world: World, damage) -> list[str]:
    return [*_ask_merged(world, damage)[:2], "--output", "model.gguf"]


def _publish(world: World, damage) -> list[str]:
    return [*_ask_merged(world, damage)[:2], "--repository", "me/it", "--merged", "--dry-run", "card"]


def _publish_adapter(world: World, damage) -> list[str]:
    _merge(world, damage)
    flags = ["--repository", "me/it", "--base-model", "me/base", "--dry-run", "card"]
    return ["--run", f"results/adapters/{finished.ADAPTER}", *flags]


def _cases(kind: str, command: str, arguments, damaged: list[tuple], names: list[str] | None = None) -> list[Bad]:
    return [
        Bad(f"{command}, {kind}: {name}", says, command, lambda world, damage=damage: arguments(world, damage))
        for name, says, damage in damaged
        if names is None or name in names
    ]


LOADED = ["weights cut short", "tensors of DDP", "a layer lacks", "weights are a program", "code of its own"]
ASKED = ["weights cut short", "a layer lacks", "code of its own", "tokenizer is not JSON"]
SHARED = ["weights cut short", "half of its tensors", "nan"]
NUMBERS = [("nan", r"holds infinite numbers or nan", _tensors(_with_nan))]


# --- models that are whole, and cannot do what is asked ------------------------------------------


def _small(world: World) -> Path:
    """A model that reads fewer tokens than the longest rows have."""
    return tiny.make_tiny_model(Path("small"), max_position_embeddings=40)


def _too_long(command: str, says: str, *more: str, pairs: bool = False) -> Bad:
    def arguments(world: World) -> list[str]:
        splits = world.pairs if pairs else world.splits
        return ["--splits", str(splits), "--model", str(_small(world)), *HAND, *more]

    return Bad(f"{command}: rows longer than the model's context", says, command, arguments)


def _unknown_token(world: World) -> list[str]:
    from transformers import AutoTokenizer

    shutil.copytree(world.model, "m")
    tokenizer = AutoTokenizer.from_pretrained("m")
    tokenizer.add_tokens(["joy"])
    tokenizer.save_pretrained("m")
    return _tokenize(world, "m")


def _tokenize(world: World, model: str) -> list[str]:
    prompts = world.project / "results/prompts/reviews-00000000a1"
    return ["--prompts", str(prompts), "--model", model, *HAND]


def _endless(world: World) -> list[str]:
    """A tokenizer whose regular expression tries all ways to split a word."""
    shutil.copytree(world.model, "m")
    content = json.loads(Path("m/tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a|a|[a-z ])+$!"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    Path("m/tokenizer.json").write_text(json.dumps(content))
    prompts = Path("prompts")
    prompts.mkdir()
    turns = [{"role": "user", "content": "a" * 5000}, {"role": "assistant", "content": "b"}]
    for split in ("train", "validation", "test"):
        (prompts / f"{split}.jsonl").write_text(json.dumps({"id": 1, "messages": turns}) + "\n")
    return ["--prompts", "prompts", "--model", "m", *HAND]


def _asked(says: str, command: str, *more: str, name: str) -> Bad:
    splits = {"train_adapter": "splits", "evaluate_model": "splits", "sample_answers": "pairs"}[command]
    return Bad(
        name,
        says,
        command,
        lambda world: ["--splits", str(getattr(world, splits)), "--model", str(world.model), *HAND, *more],
    )


TOO_LONG = r"split, row \d+ of the raw data: it has \d+ tokens.*context is 40: set tokenize\.max_length=40"
OWN = ["method=dpo", "data.rejected_from=[positive,negative]"]

CASES = [
    *_cases("model", "fetch_model", _fetch, DAMAGED_MODELS),
    *_cases("model", "train_adapter", _train, [*DAMAGED_MODELS, *NUMBERS], [*LOADED, "an adapter beside it", "nan"]),
    *_cases("model", "evaluate_model", _evaluate, [*DAMAGED_MODELS, *NUMBERS], [*LOADED, "nan"]),
    *_cases("model", "sample_answers", _sample, DAMAGED_MODELS, ASKED),
    *_cases("model", "reference_logprobs", _reference, DAMAGED_MODELS, LOADED),
    *_cases("adapter", "merge_adapter", _merge, DAMAGED_ADAPTERS),
    *_cases("adapter", "predict", _ask_adapter, DAMAGED_ADAPTERS, ["weights cut short", "half of its tensors"]),
    *_cases("merged", "predict", _ask_merged, [*DAMAGED_MODELS, *NUMBERS], [*ASKED, "nan", "an end that is a word"]),
    *_cases("merged", "chat", _chat, DAMAGED_MODELS, ASKED),
    *_cases("merged", "export", _export, DAMAGED_MODELS, ASKED),
    *_cases("merged", "publish", _publish, DAMAGED_MODELS, ["a layer lacks", "weights cut short", "code of its own"]),
    *_cases(
        "adapter", "publish", _publish_adapter, DAMAGED_ADAPTERS, ["weights cut short", "half of its tensors", "nan"]
    ),
    _too_long("train_adapter", TOO_LONG),
    _too_long("evaluate_model", TOO_LONG),
    _too_long("reference_logprobs", TOO_LONG, *OWN, pairs=True),
    Bad("tokenize_splits: rows too long", TOO_LONG, "tokenize_splits", lambda w: _tokenize(w, str(_small(w)))),
    Bad("tokenize_splits: unknown token", r"row \d+ .*token \d+ \(joy\).*resize", "tokenize_splits", _unknown_token),
    Bad("tokenize_splits: endless tokenizer", r"m: cannot be read \(PanicException", "tokenize_splits", _endless),
    _asked(
        r"validation split, row \d+ .*answer may have 100000 \(eval\.max_new_tokens\).*context is 256",
        "evaluate_model",
        "eval.max_new_tokens=100000",
        name="evaluate_model: answers longer than the context",
    ),
    _asked(
        r"train split, row \d+ .*answer may have 250 \(method\.own_answers\.max_new_tokens\)",
        "sample_answers",
        *OWN,
        "method.own_answers={max_new_tokens: 250}",
        name="sample_answers: answers longer than the context",
    ),
    _asked(
        r"split, row .*context is 56",
        "train_adapter",
        "adapter=prompt_tuning",
        "adapter.num_virtual_tokens=200",
        name="train_adapter: no room beside the virtual tokens",
    ),
    _asked(
        r"lm_head shares its weights.*adapter\.modules_to_save=\[lm_head\]",
        "train_adapter",
        "adapter.target_modules=[q_proj,lm_head]",
        name="train_adapter: LoRA on tied embeddings",
    ),
    _asked(
        r"adapter\.lora_bias: layers without a bias have no place for it when they are merged",
        "train_adapter",
        "adapter.lora_bias=true",
        name="train_adapter: a bias that the layers lack",
    ),
    _asked(
        r"'adapter\.alora_invocation_tokens' cannot be set: PEFT cannot merge it",
        "train_adapter",
        "adapter.alora_invocation_tokens=[1,2]",
        name="train_adapter: aLoRA",
    ),
]
