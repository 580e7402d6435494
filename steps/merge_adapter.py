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
        A base in several safetensors files is read, merged and written file by file, with memory of one file and the
        adapter, to the same bits. Then each merged layer is compared with the layer and its adapter on random inputs,
        instead of the logits. What cannot be done so (two bases to choose from, a dequantized base, full-parameter
        runs, adapters on tied weights, weights that transformers renames or
        converts) is merged in memory; the log says why.
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
from temper.files import read_json
from temper.model import serving
from temper.model.adapters import DIVERGED, can_be_merged, is_adapter
from temper.model.loading import BUNDLED, load_tokenizer
from temper.model.merging import Merging
from temper.model.shards import sharded
from temper.model.threads import computing_threads
from temper.progress import quiet_libraries
from temper.step import run_command

STAGE = "merge_adapter"
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
        facts = _write(Merging(config, model, adapter, splits), output)
    load_tokenizer(model).save_pretrained(output)
    serving.write(output, {**serving.of_folder(output), serving.BASE: trained_with[serving.BASE]})
    return facts


def _write(merging: Merging, output: Path) -> dict:
    """Merge, write the network with its configs, and return facts."""
    by_shards = sharded(merging)
    if by_shards:
        return by_shards.write(output)
    network, facts = merging.merged()
    network.save_pretrained(output, save_original_format=merging.keeps_format)
    if not (merging.model / serving.GENERATION).is_file():
        (output / serving.GENERATION).unlink(missing_ok=True)  # made from the config, which says it as well
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


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
