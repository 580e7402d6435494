"""A finished run as a model of MLflow: `mlflow.pyfunc.load_model(...).predict` answers as `temper predict` does.

`save` writes the folder (MLmodel, requirements, this package's code, a small run.json), and MLflow calls
`_load_pyfunc` of this module to load it. A folder in the project's own store refers to results/, which it finds however
the project is moved; one for another store gets the weights as well (`copied`), in a small results/ of its own. Either
way the run is found, prompted and loaded by the code of `temper predict`.

Input: a column `prompt` (text) or `messages` (role and content, the user's last). Parameters: the generation settings,
by default those of the run's evaluation. Output: the columns `prediction` and `finished`, as `temper predict` has them.
"""

import dataclasses
import importlib.metadata
import json
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from temper.commands import predict
from temper.config.stages import FOLDERS
from temper.errors import UserError
from temper.files import json_text, read_json
from temper.keys import PACKAGE_ROOT
from temper.model.loading import is_quantized
from temper.runs import find as runs
from temper.runs import prompting

if TYPE_CHECKING:
    import pandas

DATA = "data/run"  # what the loader reads: MLflow puts the folder `run` into data/
FILE, COPY = "run.json", "results"  # in it: what the model is; the results/ of one that has all it needs
# Packages that answering imports, beside what they need themselves.
NEEDED = ("mlflow", "torch", "transformers", "peft", "safetensors", "jinja2", "pydantic", "pyyaml", "filelock")
QUANTIZED = ("bitsandbytes", "accelerate")  # for a base in 4 or 8 bits
# Parts of a run that say how to ask it; of these a copy has no more than config and provenance.
DESCRIBING = ("evaluate_model", "merge_adapter", "train_adapter", "sample_answers", "tokenize_splits")
SEED, BATCH_SIZE = "seed", "batch_size"


# --- saving --------------------------------------------------------------------------------------


def save(run: runs.FinishedRun, folder: Path, model, card: str, example: str, refers: bool) -> None:
    """Write a run as a model of MLflow.

    Args:
        folder: a new folder.
        model: the `mlflow.models.Model` to write.
        card: text of its README.md.
        example: a prompt.
        refers: whether it refers to results/; otherwise `copied` must be added.
    """
    import mlflow.pyfunc
    import pandas

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / Path(DATA).name
        data.mkdir()
        report = run.parts["evaluate_model"]
        results = str(report.parent.parent.absolute()) if refers else None
        content = {"report": f"{FOLDERS['evaluate_model']}/{report.name}", "results": results}
        (data / FILE).write_text(json_text(content), encoding="utf-8")
        if not refers:
            _describe(run, data / COPY)
        mlflow.pyfunc.save_model(
            path=str(folder),
            loader_module=__name__,
            data_path=str(data),
            code_paths=[str(PACKAGE_ROOT / "temper")],
            mlflow_model=model,
            signature=signature(run),
            input_example=pandas.DataFrame({"prompt": [example]}),
            pip_requirements=requirements(run),
        )
    (folder / "README.md").write_text(card, encoding="utf-8")


def weights(run: runs.FinishedRun) -> list[Path]:
    """The folders that the run's model is loaded from.

    Raises:
        UserError: one is not there, or damaged.
    """
    if run.uses_merged:
        return [runs.model_folder(run)]
    return [run.part("train_adapter", "and it answers"), runs.base_folder(run)]


def copied(run: runs.FinishedRun) -> list[tuple[Path, str]]:
    """(folder, its place in the model) of the weights, for a store that does not reach results/."""
    return [(folder, f"{DATA}/{COPY}/{_place(folder)}") for folder in weights(run)]


def _describe(run: runs.FinishedRun, copy: Path) -> None:
    """Add config and provenance of the parts that are not copied whole."""
    whole = weights(run)
    for part in DESCRIBING:
        folder = run.parts.get(part)
        if folder is None or folder in whole or not folder.is_dir():
            continue
        place = copy / _place(folder)
        place.mkdir(parents=True)
        (place / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
        facts = runs.read_provenance(folder) | {"files": {}}  # nothing is missing here
        (place / "provenance.json").write_text(json_text(facts), encoding="utf-8")


def _place(folder: Path) -> str:
    """A folder's path in results/."""
    return "/".join(folder.absolute().parts[-2:])


def requirements(run: runs.FinishedRun) -> list[str]:
    """What answering needs, in the versions that the run was evaluated with."""
    from packaging.version import Version

    recorded = runs.read_provenance(run.parts["evaluate_model"]).get("packages", {})
    names = NEEDED + (QUANTIZED if _is_quantized(run) else ())
    versions = {name: recorded.get(name) or importlib.metadata.version(name) for name in names}
    # What is after a + names a build (2.13.0+cpu), which PyPI does not have.
    return [f"{name}=={Version(version).public}" for name, version in versions.items()]


def _is_quantized(run: runs.FinishedRun) -> bool:
    for folder in weights(run):
        config = folder / "config.json"
        if config.is_file() and read_json(config).get("quantization_config"):
            return True
    if run.uses_merged:
        return False
    stored = run.config("train_adapter", "and only it knows how the base was loaded")["quantization"]
    return is_quantized(stored)  # it may be merged into as it was then


def signature(run: runs.FinishedRun):
    """Input, output and parameters, as MLflow checks them."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    settings, batch_size = predict.settings_of(run, {})
    kinds = {bool: DataType.boolean, int: DataType.long, float: DataType.double}
    given = {**dataclasses.asdict(settings), BATCH_SIZE: batch_size, SEED: 0}
    message = Object([Property("role", DataType.string), Property("content", DataType.string)])
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.string, "prompt", required=False),
                ColSpec(Array(message), "messages", required=False),
            ]
        ),
        outputs=Schema([ColSpec(DataType.string, "prediction"), ColSpec(DataType.boolean, "finished")]),
        params=ParamSchema([ParamSpec(name, kinds[type(value)], value) for name, value in given.items()]),
    )


# --- loading and answering -----------------------------------------------------------------------


def _load_pyfunc(data_path: str) -> "Served":
    """Called by MLflow, with the model's data/run."""
    return Served(finished_run(Path(data_path)))


def finished_run(data: Path) -> runs.FinishedRun:
    """The run of a model.

    Raises:
        UserError: it refers to results/, and these are not there any more.
    """
    said = read_json(data / FILE, {"report": str, "results": str | None})
    # The model's own results/, or else those that the store lies in: where they are now is surer than where they were.
    places = [data / COPY, *data.absolute().parents, *([Path(said["results"])] if said["results"] else [])]
    report = next((path for place in places if (path := place / said["report"]).is_dir()), None)
    if report is None:
        raise UserError(
            f"{data.parent.parent}: refers to {said['results']}/{said['report']}, which is not there: make it again "
            "with snakemake, or register the model with a server (tracking.tracking_uri), which gets all it needs"
        )
    return runs.find(str(report))


def is_there(folder: Path) -> bool:
    """Whether a saved model has, or finds, its weights."""
    try:
        return (folder / "MLmodel").is_file() and bool(weights(finished_run(folder / DATA)))
    except UserError:
        return False


class Served:
    """A run that is asked by MLflow, with the prompts, batches and settings of `temper predict`."""

    def __init__(self, run: runs.FinishedRun):
        self.settings, self.batch_size = predict.settings_of(run, {})
        self.prompter = prompting.prompter_of(run)
        self.network = runs.load_network(run)
        self.one_at_a_time = threading.Lock()  # a server asks from several threads

    def predict(self, model_input: "pandas.DataFrame", params: dict | None = None) -> "pandas.DataFrame":
        """`prediction` and `finished` for each row.

        Raises:
            MlflowException: a row or a parameter that `temper predict` refuses, for the same reason.
        """
        import pandas
        from mlflow.exceptions import MlflowException

        try:
            answers = self._answer(_records(model_input), params or {})
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pandas.DataFrame({"prediction": answers.texts, "finished": answers.finished}, index=model_input.index)

    def _answer(self, rows: list[dict], params: dict):
        """As `temper predict`; MLflow fills in the defaults of `signature`, which are not given then."""
        defaults = dataclasses.asdict(self.settings)
        given = {name: value for name, value in params.items() if name in defaults and value != defaults[name]}
        settings = prompting.generation_settings(self.settings, given)
        batch_size = predict.checked_batch_size(params.get(BATCH_SIZE, self.batch_size))
        ids = []
        for number, columns in enumerate(rows, 1):
            row = predict.row(f"row {number}", columns)
            ids.append(predict.ids_of(row, self.prompter, settings.max_new_tokens))
        if not ids:
            raise UserError("there is no prompt in the input: a row has a column 'prompt' or 'messages'")
        with self.one_at_a_time:
            return prompting.answer_all(
                self.network, self.prompter, ids, settings, batch_size, seed=params.get(SEED, 0)
            )


def _records(table: "pandas.DataFrame") -> list[dict]:
    """The rows as they would be in a file: without the columns that other rows have, which MLflow fills with null."""
    records = json.loads(table.to_json(orient="records", double_precision=15))
    return [{name: value for name, value in record.items() if value is not None} for record in records]
