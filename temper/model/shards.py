"""Merge an adapter into a base that is stored in several shards: one is read, merged and written after the other.

PEFT puts the adapter on a network that has the weights of one shard's layers only, and merges these layers by its own
arithmetic, so every tensor has the bits that merging whole networks in memory gives it (`temper.model.merging`). Memory
is that of one shard, of its largest layer in float32, twice, and of the adapter.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any

from temper.errors import UserError
from temper.files import json_text
from temper.model import serving
from temper.model.adapters import is_adapter, put_on
from temper.model.loading import BUNDLED, device, network_without_weights, resolve_dtype, weight_files, weight_map
from temper.model.merging import STORED, Merging
from temper.model.reading import reading, refuse_no_numbers

INDEX = "model.safetensors.index.json"
# Layers of these share vectors, which PEFT moves to the device of the layers that have no weights yet.
SHARING = ("PVERA", "RANDLORA", "SHIRA", "UNILORA", "VBLORA", "VERA")
# These begin with the weights of all layers, or change the base when they are loaded.
NEEDING_ALL = ("ADAMSS", "FROD", "TINYLORA")
LORA_STARTS = ("gaussian", "orthogonal")  # those of LoRA's that do not
INPUTS = 64  # random inputs that a layer is compared on
# How far rounding may move a layer's outputs, as a share of their spread, by the precision that is saved.
TOLERANCE = {"float32": 1e-4, "float64": 1e-4, "float16": 0.003, "bfloat16": 0.02}

log = logging.getLogger("temper")


def sharded(merging: Merging) -> Sharded | None:
    """The way to merge shard by shard; None where whole networks must be in memory, which is said for a base in shards.

    Raises:
        UserError: base or adapter is damaged, or they do not fit.
    """
    if not is_adapter(merging.adapter) or not (merging.model / INDEX).is_file() or len(weight_files(merging.model)) < 2:
        return None
    reason = _lacks(merging)
    if reason is None:
        found = Sharded(merging)
        reason = found.lacks
        if reason is None:
            return found
    log.info("merged as whole networks in memory, not shard by shard: %s", reason)
    return None


def _lacks(merging: Merging) -> str | None:
    """Why it cannot be done, as far as it is known without a network."""
    from peft import PeftConfig

    if merging.bases() != [STORED]:
        return "the dequantized base is in no file"
    if (merging.model / BUNDLED).is_dir():
        return "the base has an adapter beside it"
    with reading(merging.adapter):
        config = PeftConfig.from_pretrained(str(merging.adapter))
    start = getattr(config, "init_lora_weights", None)
    if config.peft_type in NEEDING_ALL or (isinstance(start, str) and start not in LORA_STARTS):
        return "this kind of adapter begins with the base's weights"
    return None


@dataclasses.dataclass
class Compared:
    """How far one merged layer is from the layer with its adapter, in float32 on random inputs of mean 0, variance 1.

    Mean absolute differences of the outputs, as shares of their standard deviation. `difference`: of the merged layer;
    `effect`: of the base's layer without the adapter.
    """

    difference: float
    effect: float


class Sharded:
    """An adapter on its way into a base in several shards. `lacks`: why it cannot be merged so; None if it can."""

    def __init__(self, merging: Merging):
        from peft import PeftConfig

        self.merging, self.folder = merging, merging.model
        with reading(merging.adapter):
            self.kind = PeftConfig.from_pretrained(str(merging.adapter)).peft_type
        self.network = network_without_weights(self.folder, merging.loaded)
        self.files = weight_map(self.folder / INDEX)
        self.saved = self._saved()
        self.compared: dict[str, Compared] = {}
        layers = _adapter_layers(self._adapted({}).get_base_model())
        self.layers = list(layers)
        self.lacks = self._lacks(layers)

    # --- whether it can be done -------------------------------------------------------------------

    def _lacks(self, layers: dict[str, Any]) -> str | None:
        tied = self.network.all_tied_weights_keys
        shared = {*tied, *tied.values()}
        if self.network._weight_conversions or not self.saved <= self.files.keys():
            return "transformers renames or converts the base's weights as it loads them"
        if any({name, other} <= self.files.keys() for name, other in tied.items()):
            return "the base has tied weights twice"
        for name, layer in layers.items():
            if any(one.startswith(f"{name}.") for one in shared):
                return f"the adapter is on tied weights ({name})"
            if not _is_copied(layer) and _inputs(layer.get_base_layer()) is None:
                kind = type(layer.get_base_layer()).__name__
                return f"no layer of this kind can be compared alone ({name}: {kind})"
        return self._trained_outside()

    def _trained_outside(self) -> str | None:
        """Why not, if the adapter has weights of the base that are in none of its layers, as with bias: all."""
        from safetensors import safe_open

        file = self.merging.adapter / "adapter_model.safetensors"
        if not file.is_file():
            return "the adapter is in no safetensors file"
        with reading(file), safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        prefix = "base_model.model."
        inside = tuple(f"{prefix}{layer}." for layer in self.layers)
        outside = [name for name in names if name.startswith(prefix) and not name.startswith(inside)]
        return f"the adapter has weights outside of its layers ({outside[0]})" if outside else None

    def _saved(self) -> set[str]:
        """Names of the tensors that `save_pretrained` writes."""
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        tensors = self.network.state_dict()
        for name in self.network._keys_to_ignore_on_save or ():
            tensors.pop(name, None)
        return set(remove_tied_weights_from_state_dict(tensors, self.network))

    # --- merging ------------------------------------------------------------------------------------

    def write(self, output: Path) -> dict:
        """Write weights, config and generation config as `save_pretrained` of the merged network does; return facts.

        The files are those of the base's shards.

        Raises:
            UserError: a merged layer does not compute what was trained. Part of the files may be in `output`.
        """
        from safetensors.torch import save_file

        places: dict[str, str] = {}  # tensor -> its file
        size = 0
        for file in sorted(set(self.files.values())):
            names = {name for name in self.saved if self.files[name] == file}
            tensors = self._merged_shard(names) if names else {}
            if tensors:
                save_file(tensors, output / file, metadata={"format": "pt"})
            places |= dict.fromkeys(sorted(tensors), file)
            size += sum(tensor.nbytes for tensor in tensors.values())
            del tensors
        facts = self._facts(len(set(places.values())))
        metadata = {"total_parameters": self.network.num_parameters(), "total_size": size}
        (output / INDEX).write_text(json_text({"metadata": metadata, "weight_map": places}), encoding="utf-8")
        self._write_configs(output)
        return facts

    def _merged_shard(self, names: set[str]) -> dict[str, Any]:
        """Name -> tensor as it is saved, of the tensors in one of the base's files."""
        import torch

        inside = {layer for layer in self.layers if any(name.startswith(f"{layer}.") for name in names)}
        whole = tuple(f"{layer}." for layer in inside)  # also what of a layer is in the next shard
        adapted = self._adapted(
            {name: self._read(name) for name in self.network.state_dict() if name.startswith(whole)}
        )
        network = adapted.get_base_model()
        made: dict[str, Any] = {}
        for layer in sorted(inside):
            merged = self._merged_layer(layer, network.get_submodule(layer))
            network.set_submodule(layer, torch.nn.Identity())  # its memory is free for the next one
            tensors = {f"{layer}.{name}": tensor for name, tensor in merged.state_dict().items()}
            made |= {name: self._as_saved(name, tensor) for name, tensor in tensors.items() if name in names}
        return made | {name: self._as_saved(name, self._read(name)) for name in sorted(names - made.keys())}

    def _adapted(self, weights: dict[str, Any]):
        """The network with the adapter on it; it has `weights` (name -> tensor) only."""
        from accelerate.utils import set_module_tensor_to_device

        network = copy.deepcopy(self.network)
        if self.kind in SHARING:
            unknown = {name: _unknown(weight) for name, weight in network.named_parameters() if name not in weights}
            weights = unknown | weights
        for name, tensor in weights.items():
            set_module_tensor_to_device(network, name, device(), value=tensor, dtype=tensor.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")  # of layers that come later
            return put_on(network, self.merging.adapter).eval()

    def _merged_layer(self, name: str, layer):
        """What PEFT makes of a layer with its adapter, compared with it."""
        import torch

        if _is_copied(layer):
            return _unloaded(layer)
        inputs = _inputs(layer.get_base_layer()).to(device())
        with torch.inference_mode():
            expected, untouched = _outputs(layer, inputs)
        merged = _unloaded(layer)
        with torch.inference_mode():
            found = copy.deepcopy(merged).to(resolve_dtype(self.merging.saved)).float()(inputs)
        self.compared[name] = self._checked(name, Compared(_apart(expected, found), _apart(expected, untouched)))
        return merged

    def _checked(self, name: str, compared: Compared) -> Compared:
        saved = self.merging.saved
        if not compared.difference <= TOLERANCE[saved]:
            raise UserError(
                f"{self.merging.adapter}: the merged model is not what was trained: the outputs of {name} differ by "
                f"{compared.difference:.2g} of their spread (at most {TOLERANCE[saved]:g} is rounding in {saved}); "
                f"{self.merging.remedy}"
            )
        return compared

    def _as_saved(self, name: str, tensor):
        """A tensor in the precision to save it in, which must have a number for each of its own."""
        made = tensor.to(resolve_dtype(self.merging.saved)) if tensor.is_floating_point() else tensor
        if self._is_weight(name) and not made.isfinite().all():
            raise UserError(
                f"{self.merging.adapter}: the merged model is not what was trained: {name} has numbers beyond the "
                f"range of {self.merging.saved}; try merge.dtype=float32"
            )
        return made.detach().contiguous()

    def _read(self, name: str):
        """A tensor of the base, as loading it gives it. The file is not mapped: its pages would count as memory."""
        from safetensors import safe_open

        file = self.folder / self.files[name]
        with reading(file), safe_open(file, framework="pt", backend="pread") as tensors:
            tensor = tensors.get_tensor(name)
        tensor = tensor.to(device(), self.network.get_parameter_or_buffer(name).dtype)
        if self._is_weight(name):
            refuse_no_numbers(self.folder, [(name, tensor)])
        return tensor

    def _is_weight(self, name: str) -> bool:
        """Whether it is one of the network's parameters, and not a buffer, which may well hold infinity."""
        import torch

        return isinstance(self.network.get_parameter_or_buffer(name), torch.nn.Parameter)

    # --- what is written beside the weights -----------------------------------------------------------

    def _facts(self, files: int) -> dict:
        differences = [one.difference for one in self.compared.values()]
        effect = sum(one.effect for one in self.compared.values())
        share = sum(differences) / effect if effect else 0.0
        largest, saved = max(differences, default=0.0), self.merging.saved
        log.info(
            "merged shard by shard (%d files): the outputs of %d layers differ by %.2g of their spread at most (at "
            "most %g is rounding in %s)",
            files,
            len(differences),
            largest,
            TOLERANCE[saved],
            saved,
        )
        self.merging.tell_rounding(share, "these outputs")
        return {
            "dtype": saved,
            "base": STORED,
            "shards": files,
            "layers_compared": len(differences),
            "largest_layer_difference": largest,
            "layer_tolerance": TOLERANCE[saved],
            "share_of_layer_effects": share,
        }

    def _write_configs(self, output: Path) -> None:
        from transformers import GenerationConfig

        config = self.network.config
        config.dtype = self.merging.saved
        config.architectures = [type(self.network).__name__]
        config.save_pretrained(output)
        if (self.folder / serving.GENERATION).is_file():
            with reading(self.folder / serving.GENERATION):
                generation = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
            generation.save_pretrained(output)


# --- layers of PEFT ------------------------------------------------------------------------------------


def _adapter_layers(network) -> dict[str, Any]:
    """Name -> what PEFT has put into the place of a layer; of such inside of each other the outermost."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for name, part in network.named_modules():  # outer ones come first
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper) and not name.startswith(
            tuple(f"{outer}." for outer in found)
        ):
            found[name] = part
    return found


def _is_copied(layer) -> bool:
    """Whether merging copies trained weights as they are, so that there is nothing to compute alike."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    return isinstance(layer, LNTuningLayer | TrainableTokensLayer | ModulesToSaveWrapper | TrainableTokensWrapper)


def _inputs(base):
    """Random inputs of a layer of the base, the same each time; None if nothing tells what it takes."""
    import torch
    from transformers.pytorch_utils import Conv1D

    draw = torch.Generator().manual_seed(0)
    if isinstance(base, torch.nn.Embedding):
        return torch.randint(base.num_embeddings, (INPUTS,), generator=draw)
    if isinstance(base, torch.nn.Linear):
        return torch.randn(INPUTS, base.in_features, generator=draw)
    if isinstance(base, Conv1D):
        return torch.randn(INPUTS, base.nx, generator=draw)
    return None


def _outputs(layer, inputs) -> tuple:
    """(outputs of a layer with its adapter, and without), in float32."""
    layer = copy.deepcopy(layer).float()
    with_it = layer(inputs)
    layer.enable_adapters(False)
    return with_it, layer(inputs)


def _unloaded(layer):
    """The merged layer, as `merge_and_unload` makes it of each layer."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    layer.merge()
    return layer.get_base_layer()


def _apart(expected, found) -> float:
    """Mean absolute difference as a share of the spread of what is expected."""
    import torch

    return 0.0 if torch.equal(expected, found) else ((found - expected).abs().mean() / expected.std()).item()


def _unknown(weight):
    """What stands for a weight that is not read yet: as large, all NaN, in the memory of one number."""
    import torch

    return torch.full((), float("nan"), dtype=weight.dtype, device=device()).expand(weight.shape)
