"""Find a finished run by its name, key or folder, and load its model.

A run has no file of its own. It is a chain of folders (splits, adapter, merged model, report), each of which records
its inputs in provenance.json. From the folder that was named, the inputs are followed down; what was made from it is
found by searching for folders that record it as their input. So any part names the run, also outside a sweep.
"""

import dataclasses
from pathlib import Path

from temper.config.stages import FOLDERS, makers_of, typed
from temper.config.stages import STAGES as ALL_STAGES
from temper.errors import UserError, suggest
from temper.files import read_json, read_yaml
from temper.folders import made_again, refuse_damaged
from temper.model import serving
from temper.model.adapters import DIVERGED, is_adapter, load_for_training, put_on
from temper.model.limits import virtual_tokens_of
from temper.model.loading import BUNDLED, load_model
from temper.model.merging import Merging, Source
from temper.planning.plan import RESULTS

STAGES = ("evaluate_model", "merge_adapter", "train_adapter")  # stages whose folders can name a run, the last one first
BEST = "best"


@dataclasses.dataclass
class FinishedRun:
    """The folders of a run. Parts may be missing, or deleted since."""

    asked: Path  # the folder that was named, or found by name
    # stage -> folder; `model`: what training started from; `base_report`: the untouched model's; `test_report`: the
    # report on the test split where there is one beside that of `evaluate_model`, by which runs are ranked;
    # `base_harness`: what lm-eval measured of the untouched model
    parts: dict[str, Path]

    @property
    def name(self) -> str:
        return self.asked.name

    def part(self, stage: str, purpose: str) -> Path:
        """A part's folder.

        Args:
            purpose: what it is needed for, for the message if the part is missing.
        """
        folder = self.parts.get(stage)
        if folder is None or not folder.is_dir():
            where = folder or f"the folder of {stage}"
            raise UserError(f"{self.asked}: {where} is not there, {purpose}; {_make(folder)}")
        refuse_damaged(folder, may_be_edited=True)
        return folder

    def has(self, stage: str) -> bool:
        return stage in self.parts and self.parts[stage].is_dir()

    def config(self, stage: str, purpose: str) -> dict:
        """The config that a part was made with."""
        return read_config(self.part(stage, purpose))

    def made(self) -> list[tuple[str, Path]]:
        """(stage, folder or pin) of all parts that are there, in the order of the pipeline."""
        found = [(_stage_of(part, path), path) for part, path in self.parts.items() if path.exists()]
        order = list(ALL_STAGES)
        return sorted(found, key=lambda made: (order.index(made[0]), made[1].name))

    @property
    def judged(self) -> Path | None:
        """The report that says how good the run is: on the test split, if it was judged on that."""
        return next((self.parts[part] for part in ("test_report", "evaluate_model") if self.has(part)), None)

    @property
    def prompt(self) -> dict:
        """How a conversation became text in training: the config section `prompt`, and the template's `opening`."""
        prompt = self.config("tokenize_splits", "and only it knows the format of the run's prompts")["prompt"]
        made = read_provenance(self.parts["tokenize_splits"])
        return {**prompt, "opening": made.get("opening", ""), "rich": made.get("rich", False)}

    @property
    def load(self) -> dict:
        """How the model was loaded for training or evaluation: the config section `model.load`."""
        stage = "train_adapter" if self.has("train_adapter") else "evaluate_model"
        return self.config(stage, "and only it knows how the model is loaded")["model"]["load"]

    @property
    def uses_merged(self) -> bool:
        """Whether the run's model is the merged one: if it exists, and the adapter itself was not asked for."""
        return self.has("merge_adapter") and self.parts.get("train_adapter") != self.asked


def read_config(folder: Path) -> dict:
    """The config.yaml of an artefact."""
    return read_yaml(folder / "config.yaml")


def read_provenance(folder: Path) -> dict:
    """The provenance.json of an artefact; {} for a folder that no step wrote."""
    path = folder / "provenance.json"
    return read_json(path, {"stage": str, "inputs": dict[str, str]}) if path.is_file() else {}


def _stage_of(part: str, path: Path) -> str:
    """The stage that made a part; of what was put there by hand, without provenance, the one that would have."""
    recorded = "fetch_data" if part == "probe" else read_provenance(path).get("stage")
    part = part.partition(".")[0]
    return recorded or (part if part in ALL_STAGES else makers_of(part)[0].name)


# --- finding -------------------------------------------------------------------------------------


def find(word: str, sweep: str | None = None) -> FinishedRun:
    """The run that `word` names.

    Args:
        word: the path of a folder below reports/, merged/ or adapters/; such a folder's name; the key at the end of the
            name; or ``best``, the first line of a sweep's leaderboard.
        sweep: the sweep whose best run is meant; not needed if there is only one.

    Raises:
        UserError: there is no such run; the message suggests the closest name.
    """
    if sweep is not None and word != BEST:
        raise UserError(f"--sweep {sweep}: goes with --run best, not with --run {word}; leave it out")
    if word == BEST:
        return _from_folder(_best(sweep))
    return _from_folder(Path(word) if Path(word).is_dir() else _named(word))


def _best(sweep: str | None) -> Path:
    boards = {path.parent.name: path for path in sorted((RESULTS / "sweeps").glob("*/leaderboard.json"))}
    sweeps = [name for name in boards if "@" not in name]  # <sweep>@<experiment>: a kept one, used only if named
    if not sweeps:
        raise UserError(f"--run best: there is no leaderboard in {RESULTS}/sweeps; run snakemake first")
    if sweep is None and len(sweeps) > 1:
        raise UserError(f"--run best: of which sweep? add --sweep with one of {', '.join(sweeps)}")
    name = sweep or sweeps[0]
    if name not in boards:
        raise UserError(f"--sweep {name}: no such sweep in {RESULTS}/sweeps; {suggest(name, sweeps)}")
    remedy = f"delete {boards[name].parent} and run snakemake again, which compares anew"
    board = read_json(boards[name], {"rows": list[dict], "chosen": str}, remedy)
    report = next((row.get("report") for row in board["rows"] if row.get("run") == board["chosen"]), None)
    if not isinstance(report, str):
        raise UserError(f"{boards[name]}: damaged (the row of the chosen run names no report); {remedy}")
    return Path(report)


def _named(word: str) -> Path:
    """The folder called `word`, whole or by the key at its end."""
    names: dict[str, Path] = {}
    by_key: dict[str, Path] = {}
    for stage in STAGES:
        for path in _made(stage):
            folder = path.parent
            names[folder.name] = folder
            by_key[folder.name.rpartition("-")[2]] = folder

    found = names.get(word) or by_key.get(word)
    if found:
        return found

    if not names:
        raise UserError(f"--run {word}: no such folder, and no run in {RESULTS}; run snakemake first")
    reports = [path.parent.name for path in _made(STAGES[0])] or list(names)
    hint = suggest(Path(word).name, [BEST, *reports, *(name.rpartition("-")[2] for name in reports)])
    if not hint.startswith("did you mean"):
        hint = suggest("", [BEST, *reports])
    raise UserError(f"--run {word}: no run of this name or key in {RESULTS}; {hint}")


def _made(stage: str) -> list[Path]:
    return sorted((RESULTS / FOLDERS[stage]).glob("*/provenance.json"))


def _from_folder(folder: Path) -> FinishedRun:
    stage = read_provenance(folder).get("stage")
    if stage not in STAGES:
        what = f"a folder of {stage}" if stage else "not a folder that a step wrote"
        raise UserError(f"--run {folder}: is {what}; name one of {', '.join(FOLDERS[name] for name in STAGES)}")

    parts: dict[str, Path] = {}
    _add(parts, _part_at(stage, folder), folder)

    # A folder does not know what was made from it. Several may have been: an adapter merged in two precisions, a model
    # evaluated twice. The newest is taken; the others are found by their own keys.
    for above, name, below in MADE_FROM:
        newest = _newest(above, name, below, parts) if below in parts and above not in parts else None
        if newest:
            _add(parts, above, newest)

    if "evaluate_model" not in parts:  # ranked by the test split itself
        parts |= {name: parts.pop(other) for other, name in OF_TEST.items() if other in parts}
    _refuse_diverged(parts)
    return FinishedRun(folder, parts)


# (part, name of its input, part that is), from the adapter up. A report of the merged folder has the adapter as well.
MADE_FROM = (
    ("evaluate_model", "adapter", "train_adapter"),
    ("test_report", "adapter", "train_adapter"),
    ("merge_adapter", "adapter", "train_adapter"),
    ("run_harness", "adapter", "train_adapter"),
    ("run_harness", "model", "merge_adapter"),
)
# Reports on the test split -> what the one on the split that ranks is called.
OF_TEST = {
    "test_report": "evaluate_model",
    "test_base_report": "base_report",
    "test_start_report": "start_report",
}


def _part_at(stage: str, folder: Path) -> str:
    """The part of a run that a folder of `stage` is."""
    if stage != "evaluate_model" or not (folder / "config.yaml").is_file():
        return stage
    return "test_report" if read_config(folder)["eval"].get("split") == "test" else stage


# Input name -> the part it is. What `model` is depends on the stage that reads it.
INPUTS = {"adapter": "train_adapter", "splits": "tokenize_splits", "prompts": "format_prompts", "raw": "fetch_data"}
READ_ON = (
    *STAGES,
    "test_report",
    "run_harness",
    "sample_answers",
    "tokenize_splits",
    "mix_prompts",
    "format_prompts",
)  # parts whose inputs are followed


def _add(parts: dict[str, Path], part: str, folder: Path) -> None:
    """Add a part and everything that it was made from."""
    parts[part] = folder
    inputs = read_provenance(folder).get("inputs", {}) if part.partition(".")[0] in READ_ON else {}
    for name, value in inputs.items():
        path = _moved(folder, Path(value))
        below = _part(part, name, path, _is_of_merged_folder(folder))

        # Stages before the training read a model only for its tokenizer, or to sample answers. The base model is the
        # one that the training read: after fine-tuning, DPO starts from another model than its splits were made with.
        if below not in parts and (name != "model" or part in (*STAGES, "test_report")):
            _add(parts, below, path)


def _is_of_merged_folder(report: Path) -> bool:
    """Whether the model that a report is of is a run's merged folder, and not the base of what was merged in memory."""
    made = read_provenance(report)
    return "adapter" in made.get("inputs", {}) and "merged" not in made


def _part(reader: str, name: str, path: Path, of_merged: bool) -> str:
    """The part that the input `name` of the part `reader` is."""
    if name == "model":
        return "merge_adapter" if reader in ("evaluate_model", "test_report") and of_merged else "model"
    if reader == "test_report" and f"test_{name}" in OF_TEST:
        return f"test_{name}"
    if name in ("splits", "prompts"):  # of tokenize_splits or of sample_answers; of format_prompts or of mix_prompts
        return read_provenance(path).get("stage", INPUTS[name])
    name, dot, number = name.partition(".")  # of a mixture there are several, each with its raw data
    number = number or reader.partition(".")[2]
    return f"{INPUTS.get(name, name)}.{number}" if number else INPUTS.get(name, name)


def _moved(folder: Path, recorded: Path) -> Path:
    """Where an input is now: beside `folder`, if all of results/ was moved or is read from another directory."""
    results = folder.parent.parent
    places = (results.joinpath(*recorded.parts[-2:]), results.parent / recorded)
    return next((path for path in places if path.exists()), recorded)


def _newest(part: str, name: str, below: str, parts: dict[str, Path]) -> Path | None:
    """The newest folder that is this part and has the part `below` as its input `name`, merged as the other parts."""
    stage, found, made_from = OF_TEST.get(part, part), [], parts[below]
    known = [merge for other in MERGED if other in parts and (merge := _merge_of(parts[other]))]
    for path in (made_from.parent.parent / FOLDERS[stage]).glob("*/provenance.json"):
        recorded = read_provenance(path.parent).get("inputs", {}).get(name)
        of_it = recorded and Path(recorded).parts[-2:] == made_from.absolute().parts[-2:]
        fits = name == "model" or not known or _merge_of(path.parent) in (None, known[0])
        if of_it and fits and _part_at(stage, path.parent) == part:
            found.append(path)
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


MERGED = ("evaluate_model", "test_report", "merge_adapter")  # parts that know how a run was merged


def _merge_of(folder: Path) -> dict | None:
    """How what a report or a merged folder is of was merged; None where nothing says so any more."""
    if _is_of_merged_folder(folder) and read_provenance(folder)["stage"] != "merge_adapter":
        folder = _moved(folder, Path(read_provenance(folder)["inputs"]["model"]))
    if not (folder / "config.yaml").is_file():
        return None
    config = read_config(folder)
    return {name: config[name] for name in ("merge", "quantization") if name in config} or None


def _refuse_diverged(parts: dict[str, Path]) -> None:
    for stage in ("merge_adapter", "train_adapter"):
        folder = parts.get(stage)
        for name, key in ((DIVERGED, "step"), ("training.json", "diverged_at_step")):
            if folder and (folder / name).is_file():
                step = read_json(folder / name, {key: int | None})[key]
                if step is not None:
                    raise UserError(
                        f"{folder}: the training diverged at step {step}, so there is no model; name another"
                    )


# --- loading -------------------------------------------------------------------------------------


def base_folder(run: FinishedRun) -> Path:
    """The model that training started from. For preference optimization after fine-tuning, it is a merged model."""
    return run.part("model", "and it holds the base model")


def untouched_folder(run: FinishedRun) -> Path:
    """The original model: follows merged models down to one that no training made."""
    folder = base_folder(run)
    passed = []
    while (made := read_provenance(folder)).get("stage") == "merge_adapter":
        passed.append(folder)
        folder = _moved(folder, Path(made["inputs"].get("model", folder)))
        if folder in passed:
            raise UserError(f"{folder}: damaged (its provenance.json names itself); {made_again(folder)}")
    if not folder.is_dir():
        raise UserError(f"{run.asked}: {folder} is not there, and it holds the base model; {_make(folder)}")
    return folder


def _make(folder: Path | None) -> str:
    """How to get a deleted folder back: Snakemake makes a folder only if it is asked for."""
    if folder is None:
        return "name another run"
    return f"make it again with snakemake --cores all {folder} --config ... (as for its sweep)"


def check_serving(run: FinishedRun) -> None:
    """Say, or refuse, what of the run's tokenizer and template is no longer as in training."""
    answering = (
        "merge_adapter" if run.uses_merged else "train_adapter" if run.has("train_adapter") else "tokenize_splits"
    )
    serving.check(run.part(answering, "and it knows how the model is prompted"), model_folder(run))


def model_folder(run: FinishedRun) -> Path:
    """The folder with the tokenizer and the config of the run's model."""
    return run.part("merge_adapter", "and it answers") if run.uses_merged else base_folder(run)


def virtual_tokens(run: FinishedRun) -> int:
    """Number of virtual tokens before each text, not counting those in the model's folder."""
    adapter = run.parts.get("train_adapter")
    return virtual_tokens_of(adapter) if adapter and is_adapter(adapter) and not run.uses_merged else 0


def refuse_bundled(folder: Path, instead: str) -> None:
    """Refuse a "merged" folder that is the base model with an adapter beside it: virtual tokens cannot be merged."""
    if (folder / BUNDLED).is_dir():
        raise UserError(
            f"{folder}: virtual tokens cannot be merged, so this is the base model and an adapter: {instead}"
        )


def load_network(run: FinishedRun):
    """The run's model, ready to answer: merged, as it was evaluated, or the base model with the adapter on it."""
    if run.uses_merged:
        return load_model(model_folder(run), run.load).eval()
    if "train_adapter" not in run.parts:  # the report of an untouched model
        return load_model(base_folder(run), run.load).eval()
    adapter = run.part("train_adapter", "and it answers")
    merged = read_provenance(run.parts["evaluate_model"]).get("merged") if run.has("evaluate_model") else None
    if merged and adapter != run.asked:
        serving.refuse_other_weights(adapter, base_folder(run))
        config = typed("evaluate_model", read_config(run.parts["evaluate_model"]))
        return Source(base_folder(run), Merging(config, base_folder(run), adapter, None), merged).network(run.load)
    if not is_adapter(adapter):
        return load_model(adapter, load_for_training(read_config(adapter)["adapter"], run.load)).eval()
    serving.refuse_other_weights(adapter, base_folder(run))
    return put_on(load_model(base_folder(run), run.load), adapter).eval()
