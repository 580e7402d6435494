"""A base model and what was trained on it as one network: to be saved as one folder, or asked as if it had been."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

from temper.errors import UserError
from temper.files import load_rows, read_json
from temper.model import agreement, serving
from temper.model.adapters import DIVERGED, can_be_merged, is_adapter, put_on
from temper.model.limits import virtual_tokens_of
from temper.model.loading import (
    device,
    is_quantized,
    is_stored_quantized,
    load_config,
    load_model,
    load_tokenizer,
    refuse_misfits,
    resolve_attention,
    resolve_dtype,
    stop_token_ids,
    stored_dtype,
)
from temper.model.reading import refuse_no_numbers
from temper.model.threads import computing_threads

NOTABLE = 0.1  # warn about rounding above this share of the adapter's effect
STORED, DEQUANTIZED = "as stored", "dequantized"  # the bases that a QLoRA adapter may be merged into

log = logging.getLogger("temper")


# --- merging -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Merging:
    """One adapter, or fully trained model, and the model that it was trained on, on their way into one network.

    `config`: has the config sections `merge` and `quantization`. `splits`: for the rows that the merged network is
    checked on, of which a choice between two bases depends; None: random tokens.
    """

    config: Any
    model: Path
    adapter: Path
    splits: Path | None

    def merged(self):
        """(network in the precision to save it in, facts).

        Raises:
            UserError: it does not compute what was trained.
        """
        if not is_adapter(self.adapter):
            return self._copied()
        trained = self._speak(self._adapted(self._base(self._quantized, self.computing)))
        distances: dict[str, agreement.Agreement] = {}
        for base in self.bases():  # of two, only the better one is kept in memory
            made = self._candidate(base, trained)
            if not distances or made[2].logit_difference < min(each.logit_difference for each in distances.values()):
                taken, best = base, made[:2]
            distances[base] = made[2]
            del made
        network, facts = best
        if self._quantized:
            facts |= {"distances": {base: dataclasses.asdict(distance) for base, distance in distances.items()}}
            for base, distance in distances.items():
                log.info("merged into the base %s, beside the trained network: %s", base, distance)
            log.info("taken: the base %s (%s)", taken, "nearer" if len(distances) > 1 else "no other is asked for")
        return network, {"base": taken, **facts}

    # --- precisions ---------------------------------------------------------------------------------

    @property
    def saved(self) -> str:
        """The precision of the merged weights."""
        if self.config.merge.dtype != "auto":
            return self.config.merge.dtype
        return stored_dtype(self.model) if is_adapter(self.adapter) else "float32"

    @property
    def loaded(self) -> str:
        """The precision in which base and adapter are merged."""
        return "float32" if self.saved == "float32" else stored_dtype(self.model)

    @property
    def computing(self) -> str:
        """That of the comparison: as saved where this machine is fast in it, else float32, so that nothing is lost."""
        fast = str(resolve_dtype("fastest")).removeprefix("torch.")
        return self.saved if self.saved == fast else "float32"

    @property
    def remedy(self) -> str:
        """What to do where the merged network is not what was trained, for the end of a message."""
        if self.saved == "float32":
            return "this kind of adapter cannot be merged here: use the adapter"
        return "try merge.dtype=float32"

    def tell_rounding(self, share: float, what: str) -> None:
        """Log the share of the adapter's effect on something that saving rounds away."""
        log.info("of the adapter's effect on %s, rounding is %.0f%%", what, 100 * share)
        if share > NOTABLE and self.saved != "float32":
            log.info("merge.dtype=float32 keeps all of it, in a file of twice the size")

    @property
    def tolerance(self) -> float:
        return max(agreement.TOLERANCE[self.saved], agreement.TOLERANCE[self.computing])

    @property
    def keeps_format(self) -> bool:
        """Whether weights are saved in the base's format; those that were loaded packed cannot be packed again."""
        return not is_stored_quantized(load_config(self.model))

    # --- networks -----------------------------------------------------------------------------------

    @property
    def _quantized(self) -> bool:
        """Whether the network was trained over a base in 4 or 8 bits."""
        return is_quantized(self.config.quantization.model_dump()) or is_stored_quantized(load_config(self.model))

    def bases(self) -> list[str]:
        """What the adapter is to be merged into; of several the best is taken."""
        asked = self.config.merge.dequantized_base
        if is_stored_quantized(load_config(self.model)) or (self._quantized and asked):
            return [DEQUANTIZED]
        return [STORED] if not self._quantized or asked is not None else [STORED, DEQUANTIZED]

    def _base(self, quantized: bool, dtype: str):
        load = {"dtype": dtype, "attn_implementation": "fastest"}
        return load_model(self.model, load, self.config.quantization.model_dump() if quantized else None)

    def _plain_base(self, base: str, dtype: str):
        if base == STORED:
            return self._base(False, dtype)
        return self._base(True, dtype).dequantize().to(resolve_dtype(dtype))

    def _adapted(self, network):
        return put_on(network, self.adapter).eval()

    def _candidate(self, base: str, trained: agreement.Spoken):
        """(merged network, facts about rounding, distance to the trained network) for one base."""
        adapted = self._adapted(self._plain_base(base, self.computing))
        expected = agreement.logits_along(adapted, trained) if self._quantized else trained.logits
        with adapted.disable_adapter():
            untouched = agreement.logits_along(adapted, trained)
        del adapted
        merged = self._merged_into(base)
        found = self._logits(merged, trained)
        rounding = self._checked(agreement.compare(expected, found))
        effect = agreement.compare(expected, untouched).logit_difference
        share = rounding.logit_difference / effect if effect else 0.0
        self.tell_rounding(share, "the logits")
        facts = {**self._facts(rounding), "share_of_adapter_effect": share}
        return merged, facts, agreement.compare(trained.logits, found)

    def _merged_into(self, base: str):
        """The merged network, in the precision to save it in."""
        plain = self._plain_base(base, self.loaded)
        return self._adapted(plain).merge_and_unload().to(resolve_dtype(self.saved))

    def _fully_trained(self):
        return load_model(self.adapter, {"dtype": "float32", "attn_implementation": "fastest"})

    def _copied(self):
        """The same for a full-parameter training: kept in the precision it was trained in, or rounded."""
        network = self._fully_trained()
        if self.saved == "float32":
            return network, {"fully_trained": self.config.merge.dtype == "auto"}
        trained = self._speak(network.eval())
        network = network.to(resolve_dtype(self.saved))
        rounding = self._checked(agreement.compare(trained.logits, self._logits(network, trained)))
        return network, {"fully_trained": False, **self._facts(rounding)}

    def certain(self) -> dict:
        """What of the facts that `merged` gives is certain before, as `made` takes it; {} if two bases are compared."""
        if not is_adapter(self.adapter):
            return {"fully_trained": self.saved == "float32" and self.config.merge.dtype == "auto"}
        bases = self.bases()
        return {"base": bases[0]} if len(bases) == 1 else {}

    def made(self, facts: dict):
        """The network that `merged` made before, without comparing it again. `facts`: those that it gave then."""
        if is_adapter(self.adapter):
            return self._merged_into(facts["base"])
        return self._fully_trained().to(resolve_dtype(self.saved))

    # --- what they say ------------------------------------------------------------------------------

    def _speak(self, network) -> agreement.Spoken:
        stop_ids = stop_token_ids(self.model, load_tokenizer(self.model))
        return agreement.speak(network, self._prompts(), stop_ids)

    def _prompts(self) -> list[list[int]]:
        if self.splits:
            rows = load_rows(self.splits)
            return agreement.prompts_of(rows.get("validation", rows.get("train")))
        log.info("no --splits: the merged model is compared on random tokens")
        return agreement.random_prompts(load_config(self.model).get_text_config().vocab_size)

    def _logits(self, network, trained: agreement.Spoken) -> list:
        """Logits of a network that is to be saved, computed as the comparison is; its weights stay as they are."""
        found = agreement.logits_along(network.to(resolve_dtype(self.computing)).eval(), trained)
        network.to(resolve_dtype(self.saved))
        return found

    def _checked(self, rounding: agreement.Agreement) -> agreement.Agreement:
        log.info("merged: %s (at most %g is rounding in %s)", rounding, self.tolerance, self.saved)
        if not rounding.within(self.tolerance):
            raise UserError(
                f"{self.adapter}: the merged model is not what was trained: {rounding} (at most {self.tolerance:g} is "
                f"rounding in {self.saved}), and an answer turns where the two tokens are {rounding.turn:.2g} apart "
                f"(at most {agreement.TIE} times the difference is a tie); {self.remedy}"
            )
        return rounding

    def _facts(self, rounding: agreement.Agreement) -> dict:
        return {**dataclasses.asdict(rounding), "tolerance": self.tolerance}


# --- asking without a folder ---------------------------------------------------------------------


@dataclasses.dataclass
class Source:
    """A model to ask: a folder, or a base model and what was trained on it, which are merged in memory.

    `folder`: has the tokenizer and the config. `merging`: None for a folder that is asked as it is. `facts`: what was
    found when they were merged; if they are known already, nothing is compared again.
    """

    folder: Path
    merging: Merging | None = None
    facts: dict = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """What a message calls it."""
        return str(self.merging.adapter if self.merging else self.folder)

    @property
    def diverged_at(self) -> int | None:
        """The step at which the training diverged, which left no model."""
        if self.merging:
            return read_json(self.merging.adapter / "training.json", {"diverged_at_step": int | None})[
                "diverged_at_step"
            ]
        file = self.folder / DIVERGED
        return read_json(file, {"step": int})["step"] if file.is_file() else None

    def refuse_diverged(self, purpose: str) -> None:
        """Refuse a diverged training. `purpose`: what a model is needed for, for the message."""
        if self.diverged_at is not None:
            raise UserError(
                f"{self.name}: its training diverged, so there is no model {purpose}; lower its learning rate"
            )

    @property
    def virtual_tokens(self) -> int:
        """Those before each text that are not part of the folder."""
        return virtual_tokens_of(self.merging.adapter) if self.merging and is_adapter(self.merging.adapter) else 0

    def network(self, load: dict):
        """The network, ready to answer: of a base and an adapter the very one that their merged folder would give.

        Args:
            load: the config section `model.load`.

        Raises:
            UserError: the merged network does not compute what base and adapter compute together.
        """
        if self.merging is None:
            return load_model(self.folder, load).eval()
        return self._merged(self.merging, load).eval()

    def _merged(self, merging: Merging, load: dict):
        if is_adapter(merging.adapter) and not can_be_merged(merging.adapter):
            dtype = str(resolve_dtype(load["dtype"])).removeprefix("torch.")  # as of any folder with an adapter in it
            self.facts = {"bundled": True}
            return put_on(load_model(self.folder, {**load, "dtype": dtype}), merging.adapter)
        with computing_threads(1):  # as in the merge itself
            if self.facts:
                network = merging.made(self.facts)
            else:
                network, found = merging.merged()
                self.facts = {"dtype": str(network.dtype).removeprefix("torch."), **found}
        if load["dtype"] == "fastest" and self.facts.get("fully_trained"):
            load = {**load, "dtype": "float32"}
        return as_if_saved(network, load, merging.adapter, merging.keeps_format)


def source_of(config, model: Path, adapter: Path | None, splits: Path | None, compares: bool = True) -> Source:
    """What `--model` and `--adapter` name: the merged model that came of the adapter, or its base and the adapter.

    Args:
        config: has the config sections `merge` and `quantization`.
        compares: whether the merged network is compared with base and adapter, also where that decides nothing.

    Raises:
        UserError: the adapter was trained on another model.
    """
    if adapter is None or (model / DIVERGED).is_file() or _came_of(model, adapter):
        return Source(model)
    serving.refuse_other_base(adapter, model)
    merging = Merging(config, model, adapter, splits)
    return Source(model, merging, {} if compares else merging.certain())


def _came_of(model: Path, adapter: Path) -> bool:
    """Whether a model's folder holds what came of the adapter, and not what that was trained on."""
    if not (model / serving.FILE).is_file():
        return False
    base = serving.read(model).get(serving.BASE)
    return base is not None and base == serving.read(adapter).get(serving.BASE) != serving.weights(model)


def as_if_saved(network, load: dict, where: Path, keeps_format: bool):
    """The network that `load_model` would make of a folder that `network.save_pretrained` wrote.

    A network in memory is not that one: a cast of it casts buffers that are in no file, as rotary frequencies, while
    loading makes them anew in their own precision.

    Args:
        load: the config section `model.load`; its dtype is that of the new network.
        where: for a message.
        keeps_format: whether the weights would be saved as `save_original_format` has them.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    weights = network.state_dict()
    for name in network._keys_to_ignore_on_save or ():
        weights.pop(name, None)
    weights = remove_tied_weights_from_state_dict(weights, network)
    if keeps_format:
        weights = revert_weight_conversion(network, weights)
    kind, config = type(network), _as_saved(network)
    del network
    made, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=resolve_dtype(load["dtype"]),
        attn_implementation=resolve_attention(load["attn_implementation"]),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    refuse_misfits(where, info)
    refuse_no_numbers(where, made.named_parameters())
    return made.to(device())


def _as_saved(network):
    """The network's config as it comes back from its file."""
    network.config.dtype = str(network.dtype).removeprefix("torch.")
    network.config.architectures = [type(network).__name__]
    with tempfile.TemporaryDirectory() as folder:
        network.config.save_pretrained(folder)
        return load_config(Path(folder))
