"""The part of a config that each stage sees: it is hashed into the stage's key and given to its step."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from temper import yaml_files
from temper.config import best
from temper.config.compose import expand, parse_overrides, to_container
from temper.config.libraries import check_library_sections, check_processes
from temper.config.schema import (
    Data,
    Eval,
    Harness,
    Method,
    ModelLoad,
    NumProcesses,
    NumThreads,
    Probe,
    Prompt,
    Quantization,
    RowsSource,
    Section,
    Seed,
    Source,
    Sweep,
    Tokenize,
)
from temper.config.validate import checked
from temper.errors import UserError
from temper.files import read_yaml
from temper.hashing import canonical_json
from temper.keys import flat

# --- what each stage may see ---------------------------------------------------------------------


class Part(Section):
    """The part of a section that its fields name."""


class DataView(Data):
    """`data` as format_prompts gets it from the workflow: the raw files' identity replaces name and source."""

    name: str | None = None  # type: ignore[assignment]
    source: RowsSource | None = None  # type: ignore[assignment]


class DataSource(Part):
    source: RowsSource


class ModelSource(Part):
    source: Source


class Loaded(Part):
    load: ModelLoad


class System(Part):
    system: str | None


class FetchData(Section):
    data: DataSource


class FetchModel(Section):
    model: ModelSource


class FormatPrompts(Section):
    data: DataView
    prompt: System


class Weighted(Section):
    """A data set of a mixture, by its name."""

    source: str
    weight: float


class Mixed(Part):
    """What of a mixture its own stage sees: the keys of the prompts stand for the rest."""

    mix: list[Weighted]
    on_overlap: Literal["warn", "drop", "error"] = "warn"


class MixPrompts(Section):
    data: Mixed


class TokenizeSplits(Section):
    prompt: Prompt
    tokenize: Tokenize


class SampleAnswers(Section):
    method: Method
    model: Loaded
    num_threads: NumThreads = 1


class ComparedBy(Part):
    name: Literal["sft", "dpo", "orpo", "simpo", "kto"] = "dpo"  # kto compares single answers, all others pairs


class ReferenceLogprobs(Section):
    method: ComparedBy = ComparedBy()
    model: Loaded
    quantization: Quantization
    num_threads: NumThreads = 1


class TrainAdapter(Section):
    method: Method
    quantization: Quantization
    adapter: dict[str, Any]
    train: dict[str, Any]
    seed: Seed
    model: Loaded
    num_threads: NumThreads = 1
    num_processes: NumProcesses = 1
    eval: Eval | None = None  # only where answers choose the checkpoint, and then what they are judged by


class Merged(Part):
    """What of `merge` decides the merged weights."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    dequantized_base: bool | None = None


class MergeAdapter(Section):
    merge: Merged
    quantization: Quantization


class ProbeView(Probe):
    """`probe` as evaluate_model gets it from the workflow: the identity of the text replaces name and source."""

    @model_validator(mode="after")
    def _no_settings_of_nothing(self):
        return self


class EvaluateModel(Section):
    eval: Eval
    probe: ProbeView = ProbeView()
    model: Loaded
    merge: Merged = Merged()
    quantization: Quantization = Quantization()
    num_threads: NumThreads = 1


class Scored(Part):
    """What of `eval` decides which rows are suspicious."""

    task: Literal["labels", "tags", "text"]
    labels: list[str] | None = None
    batch_size: int = 32
    suspects: int = 50


class ScoreRows(Section):
    eval: Scored
    model: Loaded
    merge: Merged = Merged()
    quantization: Quantization = Quantization()
    num_threads: NumThreads = 1


class Asks(Part):
    harness: Harness | None = None


class Templated(Part):
    apply_chat_template: bool = True
    date: str = Prompt.model_fields["date"].default
    chat_template_kwargs: dict[str, Any] = {}


class RunHarness(Section):
    eval: Asks
    prompt: Templated
    model: Loaded
    merge: Merged = Merged()
    quantization: Quantization = Quantization()
    num_threads: NumThreads = 1


class Chooses(Part):
    choose: Literal["best", "cheapest_of_tied"] = "best"


class RankRuns(Section):
    eval: Eval
    sweep: Chooses
    runs: list[dict[str, Any]]


class CompareRuns(Section):
    experiment: str | None = None
    eval: Eval
    sweep: Sweep
    runs: list[dict[str, Any]] = []
    overrides: list[str] = []
    conf_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the pipeline: the config it sees, where its output is, and how other stages refer to it."""

    name: str
    config: type[Section]  # its key hashes only these keys, so that no other can rerun it
    folder: str | None = None  # in results/; raw data is in data/raw
    read_as: tuple[str, ...] = ()  # the flags under which other stages read its output
    holds: tuple[str, ...] = ()  # each of its folders has one of these files
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)  # its flags, and what each is; ? may be left out
    on_gpu: bool = False  # whether a job of it computes on a GPU, if there is one


START = "folder of fetch_model, or of merge_adapter when supervised fine-tuning came first"
ASKED = "what the adapter was trained on, or the folder of merge_adapter"

# In the order of the pipeline.
STAGES = {
    stage.name: stage
    for stage in (
        Stage("fetch_data", FetchData),
        Stage("fetch_model", FetchModel, "models", ("model",), ("config.json",)),
        Stage(
            "format_prompts",
            FormatPrompts,
            "prompts",
            ("prompts",),
            ("train.jsonl",),
            {"raw": "data folder, its pin, or one file of rows"},
        ),
        Stage(
            "mix_prompts",
            MixPrompts,
            "mixtures",
            ("prompts",),
            ("train.jsonl",),
            {"prompts+": "folders of format_prompts, in the order of data.mix"},
        ),
        Stage(
            "tokenize_splits",
            TokenizeSplits,
            "splits",
            ("splits",),
            ("dataset_dict.json",),
            {"prompts": "folder of format_prompts or mix_prompts", "model": "folder of fetch_model"},
        ),
        Stage(
            "sample_answers",
            SampleAnswers,
            "pairs",
            ("splits",),
            ("dataset_dict.json",),
            {"splits": "folder of tokenize_splits", "model": START},
            on_gpu=True,
        ),
        Stage(
            "reference_logprobs",
            ReferenceLogprobs,
            "references",
            ("references",),
            ("references.json",),
            {"splits": "folder of tokenize_splits, with preference pairs or labelled answers", "model": START},
            on_gpu=True,
        ),
        Stage(
            "train_adapter",
            TrainAdapter,
            "adapters",
            ("adapter",),
            ("training.json",),
            {
                "splits": "folder of tokenize_splits",
                "model": "folder of fetch_model, or of merge_adapter to start from a trained model",
                "references?": "folder of reference_logprobs, for method=dpo and method=kto",
            },
            on_gpu=True,
        ),
        Stage(
            "merge_adapter",
            MergeAdapter,
            "merged",
            ("model",),
            ("config.json", "diverged.json"),
            {
                "model": "folder of fetch_model",
                "adapter": "folder of train_adapter",
                "splits?": "folder of tokenize_splits, for the rows that the merged model is checked on",
            },
            on_gpu=True,
        ),
        Stage(
            "evaluate_model",
            EvaluateModel,
            "reports",
            ("base_report", "start_report"),
            ("metrics.json",),
            {
                "model": f"{ASKED}, or the untouched model",
                "splits": "folder of tokenize_splits",
                "adapter?": "folder of train_adapter: what was trained, and the training's curves and times",
                "base_report?": "report of the untouched model on the same splits, to compare with",
                "references?": "folder of reference_logprobs, after preference optimization",
                "probe?": "general text as config section probe describes it: its folder, its pin, or one file",
                "start_report?": "report of the model that the training started from, when that was trained itself",
                "first_report?": "report of the training on documents that came first (method.first)",
            },
            on_gpu=True,
        ),
        Stage("rank_runs", RankRuns, "rankings", holds=("ranking.json",)),
        Stage(
            "score_rows",
            ScoreRows,
            "suspects",
            holds=("suspects.json",),
            inputs={
                "model": ASKED,
                "splits": "folder of tokenize_splits",
                "adapter?": "folder of train_adapter: what was trained on the model",
                "prompts": "folder of format_prompts, or of mix_prompts, that the splits were made of",
                "raw?": "the raw data that the prompts were made of, named as it was then; a mixture knows it itself",
            },
            on_gpu=True,
        ),
        Stage(
            "run_harness",
            RunHarness,
            "harness",
            ("base_harness",),
            ("harness.json",),
            {
                "model": f"{ASKED}, or the untouched model",
                "adapter?": "folder of train_adapter: what was trained on the model",
                "splits?": "folder of tokenize_splits, for the rows that the merged model is checked on",
                "base_harness?": "folder of run_harness of the untouched model, to compare with",
            },
            on_gpu=True,
        ),
        Stage("compare_runs", CompareRuns, "sweeps"),
    )
}
FOLDERS = {name: stage.folder for name, stage in STAGES.items() if stage.folder}


def flag_of(name: str) -> str:
    """The flag of a step's input: ``--base-report``."""
    return "--" + name.replace("_", "-")


def flag_words(inputs: dict[str, str]) -> list[str]:
    """Inputs as words of a step's command. Of several for one flag (``prompts.1``, ``prompts.2``) it comes once."""
    words: list[str] = []
    for name, value in inputs.items():
        flag, _, number = name.partition(".")
        words += [value] if number not in ("", "1") else [flag_of(flag), value]
    return words


def numbered(name: str, paths: Sequence) -> dict[str, Any]:
    """Several inputs for one flag, in their order: ``{"prompts.1": ..., "prompts.2": ...}``."""
    return {f"{name}.{number}": path for number, path in enumerate(paths, 1)}


def makers_of(flag: str) -> list[Stage]:
    """The stages whose output is read under this flag."""
    return [stage for stage in STAGES.values() if flag in stage.read_as]


@dataclasses.dataclass(frozen=True)
class Planned:
    """What the planner tells a stage besides its config. By hand, `--config` may give it too."""

    raw: dict | None = None  # format_prompts: the identity of the raw data; in the key
    probe_text: dict | None = None  # evaluate_model: the identity of the probe's text; in the key
    files: dict[str, str] | None = None  # fetch_model: name -> sha256 of your own model's files; in the key
    own_code: dict[str, str] | None = None  # file -> hash, of eval.metrics or of eval.harness; in the key
    lm_eval: str | None = None  # run_harness: version of lm-eval; in the key
    judging_code: str | None = None  # train_adapter: of what judges answers, where they choose a checkpoint; in the key
    trunk: str | None = None  # this and all below for train_adapter: the name of its checkpoints' folder
    part: str | None = None  # PLATEAU: stop where the decay begins, which is another job
    plateau: str | None = None  # the folder of the plateau that it continues
    keep: str | None = None  # what of them stays when the training is complete; None: all
    follow: dict | None = None  # the MLflow run for its curves
    evaluations: tuple | list = ()  # config sections `eval` of the runs that share it
    max_new_tokens: int | None = None  # the longest answer that these allow

    @classmethod
    def apart(cls, view: dict) -> tuple[dict, dict]:
        """Split into (the sections of a stage's config, what the planner adds)."""
        names = {field.name for field in dataclasses.fields(cls)}
        planned = {name: value for name, value in view.items() if name in names}
        return {name: value for name, value in view.items() if name not in names}, planned


NOT_PLANNED = Planned()
PLATEAU = "plateau"

# --- what a stage sees ---------------------------------------------------------------------------


def stage_config(stage: str, config: dict) -> dict:
    """The part of a whole config that a stage may see, with the same nesting."""
    if stage in ("fetch_data", "format_prompts") and "mix" in config["data"]:
        names = ", ".join(f"data={part['data']['name']}" for part in config["data"]["mix"])
        raise UserError(
            f"config: 'data.mix': {stage} takes one data set: run it for each ({names}), and then steps.mix_prompts"
        )
    view: dict[str, Any] = {}
    for name, field in STAGES[stage].config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Part):
            view[name] = {key: config[name][key] for key in kind.model_fields if key in config[name]}
        else:
            view[name] = config[name]
    if stage == "mix_prompts":
        if "mix" not in config["data"]:
            raise UserError(
                f"config: 'data.mix' is missing: {config['data']['name']} is one data set, which needs no mixing"
            )
        parts = config["data"]["mix"]
        view["data"]["mix"] = [{"source": part["data"]["name"], "weight": part["weight"]} for part in parts]
    if stage == "train_adapter":
        judging = best.judging_settings(config["train"], view.pop("eval"))
        view |= {} if judging is None else {"eval": judging}
    return json.loads(canonical_json(view))


def typed(stage: str, view: dict) -> Section:
    """The config of one stage as its class in `STAGES`, checked, with defaults filled in."""
    return checked(STAGES[stage].config, view, "")


def validated_stage(stage: str, view: dict) -> dict:
    """The same as plain values, with what the planner adds. The libraries check their sections, too."""
    sections, planned = Planned.apart(view)
    found = typed(stage, sections)
    if isinstance(found, TrainAdapter):
        check_library_sections(found.train, found.adapter, found.method.name)
        check_processes(found.num_processes, found.train, found.adapter, found.quantization.model_dump())
        best.check(found.train, None if found.eval is None else found.eval.model_dump())
        if found.eval and best.judged_metric(found.train) is None:
            raise UserError("config: 'eval' does nothing here: no metric of it is train.metric_for_best_model")
    return {**found.model_dump(), **planned}


def stored_config(folder: Path) -> dict[str, str]:
    """The `config.yaml` of an artefact as flat keys and texts."""
    return flat(read_yaml(folder / "config.yaml"))


def load_stage_config(stage: str, given: str | None, overrides: list[str]) -> dict:
    """A step's config: JSON text or a file from ``--config``, or composed from Hydra overrides."""
    if given and overrides:
        raise UserError(f"--config and overrides ({overrides[0]} ...) exclude each other: leave one out")
    if given:
        return validated_stage(stage, config_given(given))
    parsed = parse_overrides(["sweep=none", *overrides])
    axes, points = expand(parsed)
    if len(points) != 1:
        raise UserError(
            f"a step makes one run, but {', '.join(axes)} is swept: give one value each, e.g. {_first(axes)}"
        )
    for name in STAGES[stage].config.model_fields:
        if name not in points[0][1]:
            raise UserError(
                f"--config is missing: the {name} of {stage}, which no override can give, are in its config.yaml"
            )
    return stage_config(stage, points[0][1])


def config_given(given: str) -> dict:
    """What ``--config`` gives, JSON text or a file; not checked."""
    return _config_text(given) if given.lstrip().startswith("{") else _config_file(given)


def _config_text(text: str) -> dict:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config: not JSON: {error}; give a file, or JSON text as the workflow does") from None


def _first(axes: dict[str, list[str]]) -> str:
    return " ".join(f"{key}={values[0]}" for key, values in axes.items())


def _config_file(path: str) -> dict:
    """The mapping in a YAML (or JSON) file."""
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file")
    found = to_container(yaml_files.load(Path(path), f"--config {path}"))
    if not isinstance(found, dict):
        raise UserError(f"--config {path}: holds no config, which is keys and values")
    return found


# Fields that a stage needs but that do not affect its output.
NOT_IN_KEY: dict[str, frozenset[str]] = {
    # Which runs are judged there, not how; which rows are listed; what is done with the figures; another stage's.
    "eval": frozenset({"test", "suspects", "gate", "harness"}),
    "probe": frozenset({"name", "source"}),  # as of data
    "data": frozenset({"name", "source"}),  # the raw files' identity represents the source
    "tokenize": frozenset({"max_share"}),  # of what more is refused; it changes no row
    "method": frozenset({"sft", "first"}),  # the resulting model represents it
    "train": frozenset(
        [
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "logging_nan_inf_filter",
            "log_level",
            "disable_tqdm",
            "report_to",
            "run_name",
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
        ]
    ),
}


@functools.cache
def keys_hidden(stage: str, section: str) -> frozenset[str]:
    """The fields of a config section that are in no key of a stage. What a `Part` names, its stage needs."""
    kind = STAGES[stage].config.model_fields[section].annotation
    named = kind.model_fields if isinstance(kind, type) and issubclass(kind, Part) else {}
    return NOT_IN_KEY.get(section, frozenset()) - set(named)
