"""The champion: a sweep's chosen run as a model of MLflow, registered under the data set's name.

A run takes the alias ``champion`` only from a worse one on the same rows, judged by the same figure, or from one whose
weights are gone. Figures on other rows do not say which of two is better, so then the champion stays, and the new run
is registered with the alias ``challenger``; whoever knows better moves the alias. The line that `register` returns and
the tags of the version say so.
"""

import contextlib
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from temper.evaluation.metrics import lower_is_better
from temper.files import read_json_lines
from temper.hashing import digest
from temper.reports import model_card
from temper.runs import find as runs
from temper.runs import served

if TYPE_CHECKING:
    from temper.reports.leaderboard import Board

CHAMPION, CHALLENGER = "champion", "challenger"
KEY_TAG, MEASURED_TAG, SCORE_TAG = "temper.key", "temper.measured", "temper.score"
SHOWN_TAG, WHY_TAG = "temper.measured_on", "temper.why"
LONGEST_DESCRIPTION = 5000  # characters, of a version in MLflow's stores
DROPPED = ("How it was made", "Training", "Limits", "Use")  # sections, the first one first, of a longer description
OTHER_ROWS = "the two were measured on other rows, so their figures do not say which is better"


def register(api, plan, board: "Board", ids: dict[str, str]) -> str:
    """Register the chosen run of a sweep; returns a line that says what became of it.

    Args:
        api: an `mlflow.MlflowClient`.
        plan: a `temper.planning.plan.Plan`.
        ids: run name -> MLflow run.
    """
    best, figure = board.chosen_row, f"{board.split}_{board.metric}"
    if best[figure] is None:  # a diverged run is never the champion
        return "no run has figures, so there is no new champion"
    if board.gate:
        return "the chosen run does not keep the bounds of eval.gate, so there is no new champion"
    run = next(run for run in plan.runs if run.name == best["run"])
    name = name_of(plan, run)
    _create_name(api, name)
    finished = runs.find(run.artefacts["evaluate_model"])
    rows = _rows(finished)
    tags = {
        KEY_TAG: run.key,
        MEASURED_TAG: f"{figure} on rows {_identity(rows)}",
        SHOWN_TAG: f"{figure} {best[figure]:.3f} on {len(rows)} rows of {run.artefacts['tokenize_splits']}",
        SCORE_TAG: str(best[figure]),
    }
    alias, rival, why = _place(api, name, tags)
    if rival and _holds(rival.tags, tags, board.metric):
        return f"{alias} of '{name}' is still version {rival.version}{why}"
    version = _version(api, name, ids[best["run"]], finished, rows, plan.tracking["tracking_uri"] is None, tags)
    if why:
        api.set_model_version_tag(name, version, WHY_TAG, why.lstrip("; ,"))
    api.set_registered_model_alias(name, alias, version)
    return f"{alias} of '{name}' is version {version}{why}"


def name_of(plan, run) -> str:
    """The name under which a run of a plan is registered."""
    return plan.tracking["registered_model_name"] or run.config["data"]["name"]


def _create_name(api, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        api.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


# --- who holds the title -------------------------------------------------------------------------


def _place(api, name: str, tags: dict) -> tuple:
    """(the alias that the new run may take, the version that it has to beat or None, what to say about it)."""
    champion = _holder(api, name, CHAMPION)
    if champion is None:
        return CHAMPION, None, ""
    if not _is_there(champion.source):
        return CHAMPION, None, f", in place of version {champion.version}, which does not load any more"
    if _comparable(champion.tags, tags):
        return CHAMPION, champion, ""
    stays = f"champion is still version {champion.version} ({_said(champion.tags)}): {OTHER_ROWS}"
    challenger = _holder(api, name, CHALLENGER)
    rival = challenger if challenger and _comparable(challenger.tags, tags) and _is_there(challenger.source) else None
    return CHALLENGER, rival, f"; {stays} (this one: {_said(tags)})"


def _holder(api, name: str, alias: str):
    from mlflow.exceptions import MlflowException

    try:
        return api.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _comparable(held: dict, tags: dict) -> bool:
    """Whether two versions were judged by the same figure on the same rows."""
    return held.get(MEASURED_TAG) == tags[MEASURED_TAG]


def _holds(held: dict, tags: dict, metric: str) -> bool:
    """Whether the version with the tags `held` is at least as good."""
    theirs, ours = float(held[SCORE_TAG]), float(tags[SCORE_TAG])
    return theirs <= ours if lower_is_better(metric) else theirs >= ours


def _said(tags: dict) -> str:
    """A version's figure and what it was measured on, for people; that of an older Temper as that wrote it."""
    return tags.get(SHOWN_TAG) or f"{tags.get(MEASURED_TAG)}: {tags.get(SCORE_TAG)}"


def _rows(run: runs.FinishedRun) -> list[dict]:
    """The rows that a run was judged on."""
    return read_json_lines(run.parts["evaluate_model"] / "predictions.jsonl", {"prompt": str, "reference": str})


def _identity(rows: list[dict]) -> str:
    """A hash of prompts and right answers: other training rows, tokens or places in the file do not change it."""
    return digest(sorted([row["prompt"], row["reference"]] for row in rows))


def _local(source: str) -> Path | None:
    """The folder of a registered model; None if it is not on this machine's disk."""
    return Path(unquote(urlsplit(source).path)) if source.startswith("file:") else None


def _is_there(source: str) -> bool:
    """Whether a registered model still loads; assumed if it is not on this machine's disk."""
    folder = _local(source)
    return folder is None or served.is_there(folder)


# --- what is registered --------------------------------------------------------------------------


def _version(api, name: str, run_id: str, run: runs.FinishedRun, rows: list[dict], refers: bool, tags: dict) -> str:
    """The version of a run. Made once: a command that was killed after it only missed to set the alias."""
    for version in api.search_model_versions(f"run_id = '{run_id}'"):
        made = version.name == name and version.tags.get(KEY_TAG) == tags[KEY_TAG]
        if made and _comparable(version.tags, tags) and _is_there(version.source):
            return version.version
    model, card = _logged_model(api, run_id, run, rows, refers, tags)
    version = api.create_model_version(
        name,
        model.artifact_location,
        run_id=run_id,
        tags=tags,
        description=description(card),
        model_id=model.model_id,
    ).version
    api.set_logged_model_tags(
        model.model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": version}])}
    )
    return version


def _logged_model(api, run_id: str, run: runs.FinishedRun, rows: list[dict], refers: bool, tags: dict) -> tuple:
    """(the run as a LoggedModel of MLflow, its card)."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    experiment = api.get_run(run_id).info.experiment_id
    for left in api.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if str(left.status) != "READY":  # a command was killed while it sent it
            api.delete_logged_model(left.model_id)
    title = re.sub(r"[/:.%\"']", "_", run.name)  # MLflow takes no such characters in it
    logged = api.create_logged_model(experiment, title, run_id, tags=tags, model_type="temper")
    card = _card(run, logged.model_id)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            model = Model(run_id=run_id, model_id=logged.model_id, model_uuid=logged.model_id)
            served.save(run, folder, model, card, rows[0]["prompt"], refers)
            api.log_model_artifacts(logged.model_id, str(folder))
        for weights, place in [] if refers else served.copied(run):  # gigabytes: sent from where they are
            api.log_model_artifacts(logged.model_id, str(weights), place)
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong first is to be told
            api.finalize_logged_model(logged.model_id, "FAILED")
        raise
    api.finalize_logged_model(logged.model_id, "READY")
    api.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged, card


def _card(run: runs.FinishedRun, model_id: str) -> str:
    """The model card, with code that loads the model through MLflow."""
    usage = "\n".join(
        [
            "import mlflow",
            "",
            "# with MLFLOW_TRACKING_URI set to the address of the store",
            f'model = mlflow.pyfunc.load_model("models:/{model_id}")',
            'print(model.predict([{"prompt": "Your prompt here."}]))',
        ]
    )
    base = model_card.untouched_origin(run, None)
    return model_card.model_card(run, model_card.Card(run.name, base, merged=True, usage=usage))


def description(card: str) -> str:
    """The card as a version's description: as many of its sections as fit."""
    parts = re.split(r"^(?=## )", card, flags=re.MULTILINE)
    note = "\nThe whole card is README.md among the model's files.\n"
    for dropped in DROPPED:
        if sum(map(len, parts)) <= LONGEST_DESCRIPTION:
            return "".join(parts)
        kept = [part for part in parts if not part.startswith(f"## {dropped}\n")]
        parts = kept if note in kept else [*kept, note]
    return "".join(parts)[:LONGEST_DESCRIPTION]
