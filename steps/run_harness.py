"""Ask a model the tasks of EleutherAI's lm-eval (`eval.harness`), as lm-eval itself asks them.

By hand::

    python -m steps.run_harness --model results/models/Y --output results/harness/base \\
        'eval.harness={tasks: [arc_easy], limit: 100}'
    python -m steps.run_harness --model results/models/Y --adapter results/adapters/Z --splits results/splits/X \\
        --base-harness results/harness/base --output results/harness/Z 'eval.harness={tasks: [arc_easy], limit: 100}'

Reads   an untouched model, or one and what was trained on it, merged in memory as evaluate_model does (the splits have
        the rows that this is checked on), or a merged model; the untouched model's figures, to compare with. Own tasks
        from `include_path`; lm-eval's get their rows from the hub.
Writes  harness.json (task -> figures with standard errors); samples.jsonl (each row: prompt, answer, figures).

With `prompt.apply_chat_template` lm-eval wraps its prompts in the model's chat template, without a system message;
otherwise it asks them as they are.
"""

import logging
import sys
from pathlib import Path

from temper.config import harness as checks
from temper.config.stages import NOT_PLANNED, Planned, RunHarness
from temper.data.templates import to_ship
from temper.errors import UserError
from temper.evaluation import harness
from temper.evaluation.figures import finite
from temper.files import json_lines, json_text, write_whole
from temper.model.limits import limits_of
from temper.model.loading import load_tokenizer
from temper.model.merging import Source, source_of
from temper.model.threads import computing_threads
from temper.progress import quiet_libraries
from temper.sources.own_code import refuse_changed
from temper.step import run_command

STAGE = "run_harness"
log = logging.getLogger("temper")


def run(
    config: RunHarness,
    model: Path,
    output: Path,
    adapter: Path | None = None,
    splits: Path | None = None,
    base_harness: Path | None = None,
    planned: Planned = NOT_PLANNED,
) -> dict:
    """Measure `model`, and write harness.json and samples.jsonl.

    Raises:
        UserError: no lm-eval, or another version than was planned; no task, or one that cannot be loaded; no model,
            because its training diverged; a model without a chat template, though one is to be applied.
    """
    if config.eval.harness is None:
        raise UserError("config: 'eval.harness' is null: give the tasks, eval.harness={tasks: [...]}")
    source = source_of(config, model, adapter, splits, compares=False)  # its report did
    source.refuse_diverged("to ask")
    checks.rare_lines()
    quiet_libraries()
    settings = {**config.eval.harness.model_dump(), "apply_chat_template": config.prompt.apply_chat_template}
    found = checks.version()
    if planned.lm_eval not in (None, found):
        raise UserError(f"lm-eval is {found}, and was {planned.lm_eval} when the plan was made: run again")
    refuse_changed(planned.own_code, checks.files(settings))
    asked = _asked(config, source, settings)
    results, samples = harness.results_of(asked, settings), harness.sample_rows(asked)
    if base_harness:
        harness.compare(results, samples, base_harness)
    write_whole(output / harness.FILE, json_text(finite(results.model_dump())))
    write_whole(output / harness.SAMPLES, json_lines(samples))
    for task, result in results.tasks.items():
        for name, metric in result.metrics.items():
            log.info("%s %s %.4f%s", task, name, metric.value, _beside(metric))
    return {"lm_eval": found}


def _asked(config: RunHarness, source: Source, settings: dict) -> dict:
    """What lm-eval returns of the model."""
    tokenizer, folder = _tokenizer(config, source.folder), checks.include_path(settings)
    limits = limits_of(source.folder, source.virtual_tokens)
    # lm-eval finds the context in the config, and knows nothing of virtual tokens.
    longest = limits.positions - limits.virtual_tokens if limits.positions and limits.virtual_tokens else None
    with computing_threads(config.num_threads):
        network = source.network(config.model.load.model_dump())
        return harness.measure(network, tokenizer, settings, folder, longest, {"pretrained": str(source.folder)})


def _tokenizer(config: RunHarness, model: Path):
    """The model's tokenizer, whose chat template asks as in training but for what it writes before an answer."""
    tokenizer = load_tokenizer(model)
    if config.prompt.apply_chat_template:
        if not tokenizer.chat_template:
            raise UserError(f"{model}: has no chat template: choose prompt=plain, and lm-eval asks without one")
        date, more = config.prompt.date, config.prompt.chat_template_kwargs
        tokenizer.chat_template = to_ship(tokenizer.chat_template, date, opening="", chat_template_kwargs=more)
    return tokenizer


def _beside(metric: harness.Metric) -> str:
    return "" if metric.base is None else f"; base model {metric.base:.4f}, tuning {metric.difference:+.4f}"


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
