"""Merge an adapter into its base model, giving one folder that plain transformers loads.

By hand::

    python -m steps.merge_adapter --model results/models/X --adapter results/adapters/Y \\
        --output results/merged/Z

Reads   the base model; the adapter. A full-parameter run is copied in float32, because rounding to 16 bits would lose
        most of what it learned; merge.dtype=bfloat16 rounds anyway, if it must be small.
Writes  the merged model in Hugging Face layout, with the base's tokenizer. Before writing, the merged
        model's logits are compared with the adapter's on a fixed input; provenance.json has the difference.
        A QLoRA adapter is merged into the base as stored, or into the dequantized one (merge.dequantized_base=true, or
        if the base is stored in 4 or 8 bits).
        Virtual tokens (prompt tuning, prefix tuning, P-tuning) cannot be merged: the output is then the base model with
        the adapter in adapter/, to be loaded with `PeftModel.from_pretrained(model, folder + "/adapter")`.
        After a diverged training there is nothing to merge; diverged.json says at which step it diverged.
"""

import json
import logging
import shutil
import sys
from pathlib import Path

from temper.config.stages import MergeAdapter
from temper.errors import UserError
from temper.files import read_json
from temper.model.adapters import DIVERGED, can_be_merged, is_adapter, put_on
from temper.model.loading import BUNDLED, is_stored_quantized, load_config, load_model, resolve_dtype, stored_dtype
from temper.model.threads import computing_threads
from temper.progress import quiet_libraries
from temper.step import run_command

STAGE = "merge_adapter"
PROBE_TOKENS = 64
TOLERANCE = (
    0.1  # share of the logits' spread; merging into bfloat16 rounds every weight (measured: 0.03; float32: 1e-6)
)
NOTABLE = 0.1  # warn about rounding above this share of the adapter's effect

log = logging.getLogger("temper")


def run(config: MergeAdapter, model: Path, adapter: Path, output: Path) -> dict:
    """Merge and check.

    Raises:
        UserError: the merged model does not compute what base and adapter compute together.
    """
    from temper.model.loading import load_tokenizer

    quiet_libraries()
    diverged_at = read_json(adapter / "training.json", {"diverged_at_step": int | None})["diverged_at_step"]
    if diverged_at is not None:  # a result, not a model: the report says so
        (output / DIVERGED).write_text(json.dumps({"step": diverged_at}), encoding="utf-8")
        log.info("the training diverged at step %d: there is nothing to merge", diverged_at)
        return {"diverged_at_step": diverged_at}
    if is_adapter(adapter) and not can_be_merged(adapter):
        return _bundle(model, adapter, output)
    with computing_threads(1):  # only a few products; the weights' bits do not depend on the number of cores
        network, facts = _merged(config, model, adapter)
    if config.merge.dtype != "auto":
        network = network.to(resolve_dtype(config.merge.dtype))
    # Weights that were loaded packed are plain now and cannot be packed again.
    network.save_pretrained(output, save_original_format=not is_stored_quantized(load_config(model)))
    load_tokenizer(model).save_pretrained(output)
    return {"dtype": str(network.dtype).removeprefix("torch."), **facts}


def _bundle(model: Path, adapter: Path, output: Path) -> dict:
    """Base and adapter side by side in one folder: virtual tokens cannot become part of the base's weights."""
    shutil.copytree(model, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("provenance.json", "config.yaml"))
    (output / BUNDLED).mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, output / BUNDLED / name)
    log.info("virtual tokens cannot be merged: the base model, and the adapter in %s/", BUNDLED)
    return {"bundled": True}


def _merged(config: MergeAdapter, model: Path, adapter: Path):
    """(merged model, facts)."""
    dtype = "float32" if config.merge.dtype == "float32" else stored_dtype(model)
    load = {"dtype": dtype, "attn_implementation": "fastest"}
    if not is_adapter(adapter):  # kept in the precision it was trained in
        return load_model(adapter, {**load, "dtype": "float32"}), {"fully_trained": config.merge.dtype == "auto"}
    if not (config.merge.dequantized_base or is_stored_quantized(load_config(model))):
        network, facts = _merge(load_model(model, load), adapter)
        return network, {"base": "as stored", **facts}
    base = load_model(model, load, config.quantization.model_dump()).dequantize()
    network, facts = _merge(base, adapter)
    return network, {"base": "dequantized", **facts}


def _merge(network, adapter: Path):
    import torch

    with_adapter = put_on(network, adapter).eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(network.get_input_embeddings().weight)
    tokens = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator).to(network.device)
    probe = {"input_ids": tokens}
    if network.config.is_encoder_decoder:
        probe["decoder_input_ids"] = tokens
    with torch.no_grad():
        with with_adapter.disable_adapter():
            base = with_adapter(**probe).logits.float()
        before = with_adapter(**probe).logits.float()
        merged = with_adapter.merge_and_unload()
        after = merged(**probe).logits.float()
    error = (after - before).abs().mean()
    difference, share = (error / before.std()).item(), (error / (before - base).abs().mean()).item()
    log.info(
        "merged: rounding moves the logits by %.2g of their spread (up to %g is fine), %.0f%% of the adapter's effect",
        difference,
        TOLERANCE,
        100 * share,
    )
    if share > NOTABLE:
        log.info("merge.dtype=float32 keeps all of it, in a file of twice the size")
    if not difference <= TOLERANCE:
        coarse = merged.dtype != torch.float32
        remedy = "try merge.dtype=float32" if coarse else "this kind of adapter cannot be merged here: use the adapter"
        raise UserError(
            f"{adapter}: the merged model's logits differ from the adapter's by {difference:.2g} of their spread "
            f"(at most {TOLERANCE} is rounding); {remedy}"
        )
    return merged, {"logit_difference": difference, "share_of_adapter_effect": share}


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
