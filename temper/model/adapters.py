"""Adapters: from the config section to a PEFT model, and merged back into the base."""

import collections
import re
import warnings
from pathlib import Path

from temper.errors import UserError, told_by_library, words
from temper.model.reading import reading, refuse_no_numbers, refuse_tensors
from temper.model.spread import is_spread, whole_copy

DIVERGED = "diverged.json"  # in a merged folder instead of a model: the training became NaN or infinite


def load_for_training(adapter: dict, load: dict) -> dict:
    """`model.load` for training: full-parameter training is in float32, because bfloat16 rounds most updates away."""
    return load if adapter["peft_type"] is not None else {**load, "dtype": "float32"}


ATTENTION = "attention"  # adapter.target_modules: the projections of all attention layers


def add_adapter(model, adapter: dict, seed: int):
    """`model` with a fresh adapter, or itself with all parameters trainable (``peft_type: null``).

    The adapter's initial weights depend only on `seed`. They are float32 even over a bfloat16 base, because 8 bits of
    mantissa would lose an update of 1e-4 of a weight.
    """
    import torch
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, get_peft_model

    if adapter["peft_type"] is None:
        if getattr(model, "is_quantized", False):
            raise UserError(
                f"{model.name_or_path}: its weights are stored quantized, so they cannot be trained themselves: choose "
                "adapter=lora, or the model that it was made from"
            )
        return model
    fields = {key: value for key, value in adapter.items() if key != "peft_type"}
    if fields.get("prompt_tuning_init") == "TEXT":  # PEFT tokenizes the text itself
        fields.setdefault("tokenizer_name_or_path", model.name_or_path)
    if fields.get("target_modules") == ATTENTION:
        fields["target_modules"] = attention_projections(model)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    with told_by_library("adapter"):
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(adapter["peft_type"])](task_type=task, **fields)
    torch.manual_seed(seed)
    names, linear = [name for name, _ in model.named_modules()], _linear_layers(model)  # before PEFT adds its modules
    try:
        with told_by_library("adapter"), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")  # whatever PYTHONWARNINGS hides
            network = get_peft_model(model, config)
    except UserError as error:
        raise _misfit(linear, str(error).removeprefix("config: adapter: ")) from None
    without_effect = _without_effect(network, adapter, names, [str(warning.message) for warning in said])
    if without_effect:
        raise _misfit(linear, without_effect[0])
    if not config.is_prompt_learning:
        _refuse_tied(network)
        _refuse_unmergeable(network)
    return network


def _without_effect(network, adapter: dict, names: list[str], said: list[str]) -> list[str]:
    """The settings of `adapter` without effect on the model. `names`: its modules; `said`: PEFT's warnings."""
    signs = r"ignored|no parameter was matched|has no effect"
    signs += r"|fan_in_fan_out is set to True" if adapter.get("fan_in_fan_out") else ""
    found = [text for text in said if re.search(signs, text)]
    found += _unmatched(adapter, names, getattr(network.base_model, "targeted_module_names", None))
    if adapter.get("lora_bias") and any(_lacks_bias(part) for part in network.modules()):
        found.append("adapter.lora_bias: layers without a bias have no place for it when they are merged")
    if not any(weight.requires_grad for weight in network.parameters()):
        found.append("nothing of it would be trained")
    return found


def _unmatched(adapter: dict, names: list[str], targeted: list[str] | None) -> list[str]:
    """Names in `adapter` that the model does not have. PEFT accepts a list if one of its names exists.

    Args:
        names: of all the model's modules. targeted: of those that got an adapter; None: the method targets none.
    """
    if targeted is None:
        return []
    layers = {int(part) for name in targeted for part in name.split(".") if part.isdigit()}
    wanted = {
        "target_modules": lambda name: any(f".{one}".endswith(f".{name}") for one in targeted),
        "exclude_modules": lambda name: any(f".{one}".endswith(f".{name}") for one in names),
        "modules_to_save": lambda name: any(one.endswith(name) for one in names),
        "layers_to_transform": lambda number: number in layers,
    }
    found = [
        f"adapter.{key}: nothing is called {one}"
        for key, is_there in wanted.items()
        for one in _listed(adapter.get(key))
        if not is_there(one)
    ]
    return found + [
        f"adapter.{key}: {pattern} matches nothing that gets an adapter"
        for key in adapter
        if key.endswith("_pattern") and isinstance(adapter[key], dict)
        for pattern in adapter[key]
        if not any(re.match(rf"(.*\.)?({pattern})$", one) for one in targeted)
    ]


def _lacks_bias(layer) -> bool:
    return hasattr(layer, "lora_bias") and getattr(layer.get_base_layer(), "bias", None) is None


def _listed(value) -> list:
    """Only literal names: no regular expression, and no word that stands for several."""
    return value if isinstance(value, list) else [value] if isinstance(value, int) else []


def _refuse_unmergeable(model) -> None:
    """Refuse before training what PEFT could not merge afterwards, by trying it on a copy of a layer of each kind."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    kinds = {(type(layer), getattr(layer.get_base_layer(), "bias", None) is None): layer for layer in layers}
    try:
        for layer in kinds.values():
            whole_copy(layer).merge()
        able = hasattr(model.base_model, "merge_and_unload")
        said = f"PEFT cannot merge {model.active_peft_config.peft_type.value}"
    except (RuntimeError, NotImplementedError, ValueError) as error:
        able, said = False, words(error)
    if not able:
        raise UserError(f"config: adapter: what is trained so could never be merged ({said}): choose another one")


def _refuse_tied(model) -> None:
    """Refuse an adapter on a weight that two layers share: merging it would change the other layer, too."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer  # knows about tied weights
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = collections.Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, TrainableTokensLayer):
            continue
        if any(layers[id(weight)] > 1 for weight in layer.get_base_layer().parameters(recurse=False)):
            name = name.rpartition(".")[2]
            raise UserError(
                f"config: adapter.target_modules: this model's {name} shares its weights with another layer (tied "
                "embeddings), so an adapter on it could never be merged: leave it out; "
                f"adapter.modules_to_save=[{name}] trains it as a whole"
            )


def save_adapter(model, folder: Path, is_first: bool = True) -> None:
    """Save what was trained, as PEFT does (or for all parameters, as transformers does).

    `is_first`: whether this process writes. The others must call this too if the model is spread.
    """
    trained = trained_weights(model) if is_spread(model) else None
    model.save_pretrained(folder, state_dict=trained, is_main_process=is_first)
    if is_first:
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; `temper publish` writes a real one


def trained_weights(model) -> dict:
    """Name -> weight, of those that are trained."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def attention_projections(model) -> list[str]:
    """The linear layers directly in this model's attention, as PEFT's `target_modules`.

    ``self_attn.q_proj, self_attn.k_proj, ...`` in Llama, ``attention.query_key_value, attention.dense`` in GPT-NeoX,
    ``SelfAttention.q, ..., EncDecAttention.q, ...`` in T5. Attention is any class named ...Attention, as in
    transformers.
    """
    found = {
        f"{name.rpartition('.')[2]}.{child}"
        for name, part in model.named_modules()
        if type(part).__name__.endswith("Attention")
        for child, layer in part.named_children()
        if _is_linear(layer)
    }
    if not found:
        raise _misfit(
            _linear_layers(model), "target_modules: attention finds no attention layer; name the layers, or all-linear"
        )
    return sorted(found)


def _is_linear(layer) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's

    return isinstance(layer, torch.nn.Linear | Conv1D)


def _linear_layers(model) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, part in model.named_modules() if _is_linear(part)})


def _misfit(linear: list[str], what: str) -> UserError:
    return UserError(
        f"config: adapter does not fit this model: {what.rstrip('.')}; its linear layers are called {', '.join(linear)}"
    )


def put_on(network, adapter: Path):
    """The network with the adapter of a folder; refused unless all its weights match the folder's."""
    from peft import PeftModel, load_peft_weights

    with reading(adapter):
        weights = load_peft_weights(str(adapter), device="cpu")
        model = PeftModel.from_pretrained(network, adapter)
        # PeftModel only warns of missing tensors and ignores extra ones; this reports both.
        result = model.load_adapter(adapter, "default")
    refuse_adapter_misfits(model, adapter, result)
    refuse_no_numbers(adapter, weights.items())
    return model


def refuse_adapter_misfits(model, adapter: Path, result) -> None:
    """Refuse an adapter or checkpoint for which PEFT reports missing or unexpected tensors."""
    # Virtual tokens are loaded separately, and each must be there.
    unknown = [] if model.active_peft_config.is_prompt_learning else sorted(result.unexpected_keys)
    weights = dict(model.named_parameters(remove_duplicate=False))
    there = {id(weight) for name, weight in weights.items() if name not in result.missing_keys}
    missing = [name for name in sorted(result.missing_keys) if id(weights.get(name)) not in there]  # unless shared
    wrong = {"missing": missing, "unknown to the model": unknown}
    refuse_tensors(adapter, wrong, "use an adapter of this base model; if it was made here, delete it and run again")


def parameter_counts(model) -> dict[str, int]:
    """Trained parameters and all parameters. PEFT knows how many a 4-bit weight holds."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()
    else:
        trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
    return {"trainable_parameters": trainable, "total_parameters": total}


def is_prompt_learning(model) -> bool:
    """Whether a model has learned virtual tokens (prompt tuning, prefix tuning, P-tuning) in front of each prompt."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def refuse_diverged(model: Path, purpose: str = "to start from") -> None:
    """Refuse a diverged training, which left no model. `purpose`: what that is needed for, for the message."""
    if (model / DIVERGED).is_file():
        raise UserError(f"{model}: its training diverged, so there is no model {purpose}; lower its learning rate")


def is_adapter(folder: Path) -> bool:
    """Whether a train_adapter folder holds a PEFT adapter (else it is a full model)."""
    return (folder / "adapter_config.json").is_file()


def can_be_merged(folder: Path) -> bool:
    """Whether the adapter in a train_adapter folder can become part of the base's weights."""
    from peft import PeftConfig

    with reading(folder):
        return not PeftConfig.from_pretrained(str(folder)).is_prompt_learning
