"""Merge an adapter into its base model, giving one folder that plain transformers loads.

By hand::

    python -m steps.merge_adapter --model results/models/X --adapter results/adapters/Y \\
        --splits results/splits/V --output results/merged/Z

Reads   the base model; the adapter; the first rows of the validation split (without one, of train; without --splits,
        random tokens). A full-parameter run is copied in float32, because rounding to 16 bits would lose most of what
        it learned; merge.dtype=bfloat16 rounds anyway, if it must be small.
Writes  the merged model in Hugging Face layout, with the base's tokenizer, and serving.json (`temper.model.serving`).
        Before writing, its logits along the greedy answers to those rows, and the answers themselves, are compared with
        those of base and adapter; provenance.json has the figures, and beyond a tolerance nothing is written.
        A QLoRA adapter is merged into the base as stored and into the dequantized one, and the model that is nearer to
        the trained network is kept. merge.dequantized_base decides otherwise; if the base is stored in 4 or 8 bits, it
        is always the dequantized one.
        Virtual tokens (prompt tuning, prefix tuning, P-tuning) cannot be merged: the output is then the base model with
        the adapter in adapter/, to be loaded with `PeftModel.from_pretrained(model, folder + "/adapter")`.
        After a diverged training there is nothing to merge; diverged.json says at which step it diverged.
"""

import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path

from temper.config.stages import MergeAdapter
from temper.errors import UserError
from temper.files import load_rows, read_json
from temper.model import agreement, serving
from temper.model.adapters import DIVERGED, can_be_merged, is_adapter, put_on
from temper.model.loading import (
    BUNDLED,
    is_quantized,
    is_stored_quantized,
    load_config,
    load_model,
    load_tokenizer,
    resolve_dtype,
    stop_token_ids,
    stored_dtype,
)
from temper.model.threads import computing_threads
from temper.progress import quiet_libraries
from temper.step import run_command

STAGE = "merge_adapter"
NOTABLE = 0.1  # warn about rounding above this share of the adapter's effect
STORED, DEQUANTIZED = "as stored", "dequantized"  # the bases that a QLoRA adapter may be merged into

log = logging.getLogger("temper")


def run(config: MergeAdapter, model: Path, adapter: Path, output: Path, splits: Path | None = None) -> dict:
    """Merge and check.

    Raises:
        UserError: the adapter was trained on another model, or the merged model does not compute what base and adapter
            compute together.
    """
    quiet_libraries()
    diverged_at = read_json(adapter / "training.json", {"diverged_at_step": int | None})["diverged_at_step"]
    if diverged_at is not None:  # a result, not a model: the report says so
        (output / DIVERGED).write_text(json.dumps({"step": diverged_at}), encoding="utf-8")
        log.info("the training diverged at step %d: there is nothing to merge", diverged_at)
        return {"diverged_at_step": diverged_at}
    trained_with = serving.refuse_other_base(adapter, model)
    if is_adapter(adapter) and not can_be_merged(adapter):
        return _bundle(model, adapter, output)
    with computing_threads(1):  # only a few products; the weights' bits do not depend on the number of cores
        network, facts = _Merging(config, model, adapter, splits).merged()
    # Weights that were loaded packed are plain now and cannot be packed again.
    network.save_pretrained(output, save_original_format=not is_stored_quantized(load_config(model)))
    if not (model / serving.GENERATION).is_file():
        (output / serving.GENERATION).unlink(missing_ok=True)  # made from the config, which says it as well
    load_tokenizer(model).save_pretrained(output)
    serving.write(output, {**serving.of_folder(output), serving.BASE: trained_with[serving.BASE]})
    return {"dtype": str(network.dtype).removeprefix("torch."), **facts}


def _bundle(model: Path, adapter: Path, output: Path) -> dict:
    """Base and adapter side by side in one folder: virtual tokens cannot become part of the base's weights."""
    shutil.copytree(model, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("provenance.json", "config.yaml"))
    (output / BUNDLED).mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, output / BUNDLED / name)
    shutil.copy(adapter / serving.FILE, output / serving.FILE)
    log.info("virtual tokens cannot be merged: the base model, and the adapter in %s/", BUNDLED)
    return {"bundled": True}


@dataclasses.dataclass
class _Merging:
    """One adapter, or fully trained model, on its way into one folder."""

    config: MergeAdapter
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
        for base in self._bases():  # of two, only the better one is kept in memory
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
    def computing(self) -> str:
        """That of the comparison: as saved where this machine is fast in it, else float32, so that nothing is lost."""
        fast = str(resolve_dtype("fastest")).removeprefix("torch.")
        return self.saved if self.saved == fast else "float32"

    @property
    def tolerance(self) -> float:
        return max(agreement.TOLERANCE[self.saved], agreement.TOLERANCE[self.computing])

    # --- networks -----------------------------------------------------------------------------------

    @property
    def _quantized(self) -> bool:
        """Whether the network was trained over a base in 4 or 8 bits."""
        return is_quantized(self.config.quantization.model_dump()) or is_stored_quantized(load_config(self.model))

    def _bases(self) -> list[str]:
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
        dtype = "float32" if self.saved == "float32" else stored_dtype(self.model)
        merged = self._adapted(self._plain_base(base, dtype)).merge_and_unload().to(resolve_dtype(self.saved))
        found = self._logits(merged, trained)
        rounding = self._checked(agreement.compare(expected, found))
        effect = agreement.compare(expected, untouched).logit_difference
        share = rounding.logit_difference / effect if effect else 0.0
        log.info("of the adapter's effect on the logits, rounding is %.0f%%", 100 * share)
        if share > NOTABLE and self.saved != "float32":
            log.info("merge.dtype=float32 keeps all of it, in a file of twice the size")
        facts = {**self._facts(rounding), "share_of_adapter_effect": share}
        return merged, facts, agreement.compare(trained.logits, found)

    def _copied(self):
        """The same for a full-parameter training: kept in the precision it was trained in, or rounded."""
        load = {"dtype": "float32", "attn_implementation": "fastest"}
        network = load_model(self.adapter, load)
        if self.saved == "float32":
            return network, {"fully_trained": self.config.merge.dtype == "auto"}
        trained = self._speak(network.eval())
        network = network.to(resolve_dtype(self.saved))
        rounding = self._checked(agreement.compare(trained.logits, self._logits(network, trained)))
        return network, {"fully_trained": False, **self._facts(rounding)}

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
            remedy = "try merge.dtype=float32"
            if self.saved == "float32":
                remedy = "this kind of adapter cannot be merged here: use the adapter"
            raise UserError(
                f"{self.adapter}: the merged model is not what was trained: {rounding} (at most {self.tolerance:g} is "
                f"rounding in {self.saved}), and an answer turns where the two tokens are {rounding.turn:.2g} apart "
                f"(at most {agreement.TIE} times the difference is a tie); {remedy}"
            )
        return rounding

    def _facts(self, rounding: agreement.Agreement) -> dict:
        return {**dataclasses.asdict(rounding), "tolerance": self.tolerance}


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
