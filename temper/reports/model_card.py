"""The model card of a run: what it is, how good it is, how to use it, and how it was made.

A card is public, so it holds nothing private: no absolute path, no row of the data.
"""

import dataclasses
import math
import shlex
from pathlib import Path
from urllib.parse import quote

from temper.config.licences import licence_of
from temper.config.stages import FOLDERS, flag_words
from temper.errors import visible
from temper.evaluation.figures import FILE, Figures, read_figures
from temper.evaluation.harness import read_harness
from temper.evaluation.metrics import with_own
from temper.files import read_json
from temper.keys import flat
from temper.model.loading import is_encoder_decoder
from temper.reports import markdown, vllm
from temper.reports.markdown import Markdown, code, fill
from temper.runs import find as runs
from temper.runs.prompting import Generation
from temper.sources.pins import by_split, is_pin, read_pin

SHOWN = ("method", "quantization", "adapter", "train", "seed")  # config sections that are hyperparameters
CONFIGS = ("format_prompts", "mix_prompts", "tokenize_splits", "train_adapter", "merge_adapter", "evaluate_model")
TASKS = {
    "labels": "text-classification",
    "tags": "text-generation",
    "text": "text-generation",
    "documents": "text-generation",
}


@dataclasses.dataclass
class Origin:
    """Where data or a model comes from, in words; with `repository` and `commit` if it is on the hub."""

    text: Markdown
    repository: str | None = None
    commit: str | None = None
    name: str | None = None


@dataclasses.dataclass
class Card:
    """What a card needs besides the run.

    `usage`: code that uses the model; None: for a `repository` on the hub, which also reads the front matter.
    """

    repository: str
    base: Origin
    merged: bool
    license: str | None = None
    usage: str | None = None
    intended: str | None = None  # what it is for and what not, in the author's words
    receipt: str | None = None  # sha256 of the receipt that goes along


def base_origin(run: runs.FinishedRun, base_model: str | None) -> Origin:
    """The model that the adapter was trained on. `base_model`: its name on the hub, if the user gave one."""
    folder = run.parts.get("model")
    source = _source(folder)
    if base_model:
        also = fill(" (the copy in {})", _words(source)) if source.get("kind") == "package" else ""
        return Origin(fill("{}{}", _link(base_model), also), base_model)
    if folder and runs.read_provenance(folder).get("stage") == "merge_adapter":
        return Origin(fill("{}, itself tuned from {}", code(folder.name), _origin(runs.untouched_folder(run)).text))
    return _origin(folder)


def untouched_origin(run: runs.FinishedRun, base_model: str | None) -> Origin:
    """The original model that the merged one comes from."""
    return base_origin(run, base_model) if base_model else _origin(runs.untouched_folder(run))


def _origin(folder: Path | None) -> Origin:
    source = _source(folder)
    if folder and source.get("kind") == "hub":
        commit, name = runs.read_provenance(folder).get("commit"), source["repository"]
        return Origin(fill("{} at {}", _link(name), commit or source["revision"]), name, commit)
    return Origin(_words(source) if source else Markdown("a local model"))


def _link(name: str, kind: str = "") -> Markdown:
    return fill("[{}](https://huggingface.co/{}{})", name, Markdown(kind), Markdown(quote(name)))


def data_origin(run: runs.FinishedRun) -> Origin:
    """The data set."""
    if run.has("mix_prompts"):
        mixed = runs.read_config(run.parts["mix_prompts"])["data"]["mix"]
        names = ", ".join(f"{part['source']} (weight {part['weight']:g})" for part in mixed)
        return Origin(fill("a mixture of {}", names), name=", ".join(part["source"] for part in mixed))
    pin = run.parts.get("fetch_data")
    if pin is None or not pin.is_file() or not is_pin(pin):  # by hand, or from Python
        return Origin(Markdown("the author's own rows"))
    recorded, name = read_pin(pin), pin.parent.name
    edited = _edited(run)
    parts = list(by_split(recorded["source"]).values())
    source = parts[0]  # where each split has its own, of train
    if source["kind"] == "hub" and len({part.get("repository") for part in parts}) == 1:
        names = ", ".join(part["split"] for part in parts)
        what = "split" if len(parts) == 1 else "splits"
        text = fill("{} ({} {}{})", _link(source["repository"], "datasets/"), what, names, edited)
        commit = recorded.get("commit") or recorded.get("parts", {}).get("train", {}).get("commit")
        return Origin(text, source["repository"], commit, source["repository"])
    if len(parts) > 1:
        return Origin(fill("{}, put together from a source for each split{}", code(name), edited), name=name)
    if source["kind"] == "package":
        return Origin(fill("{}, {}{}", code(name), _words(source), edited), name=name)
    return Origin(fill("{}, the author's own data set", code(name)), name=name)


def _edited(run: runs.FinishedRun) -> str:
    """A remark if the raw files were edited after they were fetched."""
    raw = runs.read_config(run.parts["format_prompts"]).get("raw", {})
    return "" if all("pin" in part for part in raw.get("splits", {"": raw}).values()) else ", edited by hand"


def _source(folder: Path | None) -> dict:
    if folder is None or not (folder / "config.yaml").is_file():
        return {}
    return runs.read_config(folder).get("model", {}).get("source", {})


def _words(source: dict) -> Markdown:
    if source["kind"] != "package":
        return Markdown("a local model folder")
    member = source["member"] if isinstance(source["member"], str) else source["member"][-1]
    return fill("{} of the PyPI package {}", code(Path(member).name), code(source["requirement"]))


def model_card(run: runs.FinishedRun, card: Card) -> str:
    """The card, for the hub with its front matter."""
    from yaml import safe_dump

    made = {stage: run.parts[stage] for stage in CONFIGS if run.has(stage)}
    made = {stage: folder for stage, folder in made.items() if (folder / "config.yaml").is_file()}
    configs = {stage: runs.read_config(folder) for stage, folder in made.items()}
    figures = _figures(run.judged)
    training = configs.get("train_adapter", {})
    latest = runs.read_provenance(next(made[stage] for stage in reversed(CONFIGS) if stage in made))
    data = data_origin(run)
    hyperparameters = {name: training.get(name) for name in SHOWN if name in training}
    return markdown.render(
        "model_card.md",
        card_data=None if card.usage else Markdown(_metadata(card, data, figures, training).to_yaml()),
        title=card.repository.partition("/")[2] or card.repository,
        what=f"A {_peft_type(training)} adapter" if not card.merged else "A model",
        base=card.base,
        data=data,
        method=training.get("method", {}).get("name", "sft"),
        figures=figures,
        probe=ranked.probe if (ranked := _figures(run.parts.get("evaluate_model"))) else None,  # not on the test split
        metrics=with_own(figures.task, figures.values) if figures else {},
        harness=read_harness(run.parts["run_harness"]) if run.has("run_harness") else None,
        with_error=_with_error,
        span=_span,
        number=_number,
        code=code,
        usage=markdown.block(card.usage or usage(run, card), "python"),
        vllm=markdown.block(served) if (served := None if card.usage else _vllm(run, card)) else None,
        adapter=not card.merged,
        intended=markdown.own(card.intended) if card.intended else None,
        licences=_licences(run, card),
        receipt=card.receipt,
        rows=_rows(made.get("mix_prompts") or made.get("format_prompts")),
        prompt=configs["tokenize_splits"]["prompt"],
        train=_json(made.get("train_adapter"), "training.json"),
        hyperparameters=flat(hyperparameters),
        key=run.name.rpartition("-")[2],
        commit=latest.get("git"),
        commands=markdown.block("\n".join(_command(stage, folder) for stage, folder in made.items())),
        config=markdown.block(safe_dump(_without_sources(configs), sort_keys=False, allow_unicode=True), "yaml"),
        merging=_merging(run) if card.merged else "",
        packages=", ".join(f"{name} {version}" for name, version in latest.get("packages", {}).items()),
        limits=_limits(run, card, figures, data),
    )


def _metadata(card: Card, data: Origin, figures: Figures | None, training: dict):
    from huggingface_hub import ModelCardData

    kind = _peft_type(training).lower()
    return ModelCardData(
        base_model=card.base.repository,
        datasets=[data.repository] if data.repository else None,
        library_name="transformers" if card.merged else "peft",
        license=card.license,
        pipeline_tag="text-generation",
        tags=[*([] if card.merged else [kind, "peft"]), training.get("method", {}).get("name", "sft"), "temper"],
        model_name=card.repository.partition("/")[2] or card.repository,
        eval_results=_eval_results(data, figures) if figures else None,
    )


def _eval_results(data: Origin, figures: Figures) -> list:
    """The figures in the hub's own form."""
    from huggingface_hub import EvalResult

    name, metrics = data.name or "own data", with_own(figures.task, figures.values)
    return [
        EvalResult(
            task_type=TASKS[figures.task],
            dataset_type=name,
            dataset_name=name,
            dataset_split=figures.split,
            metric_type=metric,
            metric_value=round(value, 6),
            metric_name=metrics[metric].title,
            metric_args={"interval_95": interval} if (interval := figures.intervals.get(metric)) else None,
        )
        for metric, value in figures.values.items()
        if value is not None and metrics[metric].ranks
    ]


def usage(run: runs.FinishedRun, card: Card) -> str:
    """Python code that loads the published model and prompts it in the format of training."""
    prompt, adapter, in_decoder = run.prompt, not card.merged, is_encoder_decoder(runs.base_folder(run))
    kind = "AutoModelForSeq2SeqLM" if in_decoder else "AutoModelForCausalLM"
    lines = ["from peft import PeftModel"] if adapter else []
    lines += [f"from transformers import {kind}, AutoTokenizer", "", f"repository = {card.repository!r}"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(repository)"]
    if adapter:
        at = f", revision={card.base.commit!r}" if card.base.commit else ""
        lines += [f"base = {kind}.from_pretrained({card.base.repository!r}{at})"]
        lines += ["model = PeftModel.from_pretrained(base, repository)"]
    else:
        lines += [f"model = {kind}.from_pretrained(repository)"]
    lines += ["", *(_chat_lines(prompt) if prompt["apply_chat_template"] else _template_lines(prompt))]
    evaluated = runs.read_config(run.parts["evaluate_model"])["eval"] if run.has("evaluate_model") else {}
    tokens = evaluated.get("max_new_tokens", Generation.max_new_tokens)
    lines += [f"output = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)"]
    answer = "output[0]" if in_decoder else 'output[0, inputs["input_ids"].shape[1] :]'
    lines += [f"print(tokenizer.decode({answer}, skip_special_tokens=True))"]
    return "\n".join(lines)


def _vllm(run: runs.FinishedRun, card: Card) -> str | None:
    """vLLM's command; None where it does not serve such a model."""
    if is_encoder_decoder(runs.base_folder(run)):
        return None
    adapter = None if card.merged else run.parts.get("train_adapter")
    return vllm.command(adapter, card.repository, card.base.repository, card.base.commit)


def _licences(run: runs.FinishedRun, card: Card) -> dict[str, str | None]:
    """What has a licence -> the one that the config gives for it, or the author for this model."""
    found: dict[str, str | None] = {"this model": card.license}
    model = _source(runs.untouched_folder(run)) if "model" in run.parts else {}
    found["base model"] = licence_of("model", model) if model else None
    pins = [path for part, path in run.parts.items() if part.partition(".")[0] == "fetch_data"]
    sources = [read_pin(pin)["source"] for pin in pins if pin.is_file() and is_pin(pin)]
    named = [licence_of("data", source) for source in sources]
    found["data"] = ", ".join(dict.fromkeys(filter(None, named))) if named and all(named) else None
    return found


def _chat_lines(prompt: dict) -> list[str]:
    system = [f'    {{"role": "system", "content": {prompt["system"]!r}}},'] if prompt["system"] else []
    return [
        "messages = [",
        *system,
        '    {"role": "user", "content": "Your prompt here."},',
        "]",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
    ]


def _template_lines(prompt: dict) -> list[str]:
    return [
        "from jinja2 import Template",
        "",
        f"template = Template({prompt['template']!r}, keep_trailing_newline=True)",
        f'prompt = template.render(system={prompt["system"]!r}, prompt="Your prompt here.")',
        'inputs = tokenizer(prompt, return_tensors="pt")',
    ]


def _limits(run: runs.FinishedRun, card: Card, figures: Figures | None, data: Origin) -> list[str]:
    limits: list[str] = []
    if figures:
        limits.append(
            f"The figures come from one {figures.split} split ({figures.rows} rows) of the data set it was trained on. "
            "On other texts they may be quite different."
        )
    if figures and figures.task == "labels":
        labels = runs.read_config(run.parts["evaluate_model"])["eval"]["labels"]
        limits.append(f"It was trained and evaluated to answer with one of these labels: {', '.join(labels)}.")
    limits.append("The base model's biases and gaps in knowledge apply to this model as well.")
    source = _source(run.parts.get("model"))
    if not card.merged and source.get("kind") != "hub":
        copy = _words(source) if source else "a local copy"
        limits.append(
            fill(
                "The adapter was trained on {}. The author states that {} is the same model; with it the figures "
                "may differ slightly.",
                *(copy, card.base.repository),
            )
        )
    if not data.repository:
        limits.append("The training data is not on the hub.")
    return limits


def _figures(report: Path | None) -> Figures | None:
    """None without a report, or where the training diverged."""
    found = read_figures(report) if report and (report / FILE).is_file() else None
    return found if isinstance(found, Figures) else None


def _json(folder: Path | None, name: str) -> dict:
    path = folder / name if folder else None
    return read_json(path) if path and path.is_file() else {}


def _peft_type(training: dict) -> str:
    return training.get("adapter", {}).get("peft_type") or "full"


def _merging(run: runs.FinishedRun) -> str:
    """How far the merged model is from the trained network; empty where nothing was merged."""
    made = runs.read_provenance(run.parts["merge_adapter"]) if run.has("merge_adapter") else {}
    if not made and run.has("evaluate_model"):
        made = runs.read_provenance(run.parts["evaluate_model"]).get("merged", {})
    if "layers_compared" in made:
        return (
            f"merged in {made['dtype']}, shard by shard: the outputs of {made['layers_compared']} layers, each "
            f"compared alone, differ from before by at most {made['largest_layer_difference']:.2g} of their spread"
        )
    if "logit_difference" not in made:
        return ""
    said = (
        f"merged in {made['dtype']}: logits differ from those before by {made['logit_difference']:.2g} of their "
        f"spread, {made['answers_alike']} of {made['answers']} greedy answers are the same"
    )
    distances = made.get("distances", {})
    if distances:
        said += f"; into the base {made['base']}. Beside the network trained over the quantized base: " + ", ".join(
            f"{base} {each['logit_difference']:.2g} ({each['answers_alike']} of {each['answers']} answers)"
            for base, each in distances.items()
        )
    return said


def _span(interval, form: str = "%.3f") -> str:
    return f"{form % interval[0]} to {form % interval[1]}" if interval else ""


def _with_error(value, stderr, form: str = "%.3f") -> str:
    if value is None or not math.isfinite(value):
        return ""
    return form % value + ("" if stderr is None else f" ± {stderr:.3f}")


def _number(value) -> str:
    return "" if value is None else f"{value:.3f}"


def _rows(prompts: Path | None) -> str:
    splits = _json(prompts, "stats.json").get("splits", {})
    return ", ".join(f"{split['rows']} {name}" for name, split in splits.items()) + " rows" if splits else ""


def _command(stage: str, folder: Path) -> str:
    """The stage's command, with folders named as in results/."""
    inputs = runs.read_provenance(folder).get("inputs", {})
    words = flag_words({name: _place(name, Path(value)) for name, value in inputs.items()})
    return visible(shlex.join(["python", "-m", f"steps.{stage}", *words, "--output", _place(stage, folder)]))


def _place(name: str, path: Path) -> str:
    """A folder named as in results/. Elsewhere only its last name, and for raw data by hand not even that."""
    if name in ("raw", "probe") and not is_pin(path):
        return "FILE"
    parent = path.absolute().parent.name
    return f"{parent}/{path.name}" if name in ("raw", "probe") or parent in FOLDERS.values() else path.name


def _without_sources(configs: dict[str, dict]) -> dict:
    """All configs as one, without the source of the data, which may be a local path."""
    merged: dict = {}
    for config in configs.values():
        for section, value in config.items():
            merged[section] = {**(merged.get(section) or {}), **value} if isinstance(value, dict) else value
    merged.pop("raw", None)
    for name in ("name", "source"):
        merged.get("data", {}).pop(name, None)
    return merged
