"""Tracking stores that cannot be: addresses with logins, names that MLflow refuses, folders and files in the way."""

import json
import os

from tests.bad_inputs import Bad, World

LOGIN = r"^error: (?!.*s3cret)config: 'tracking\.tracking_uri' holds a login or a query .*MLFLOW_TRACKING_URI.*=env$"
NO_NAME = r"'tracking\.registered_model_name': MLflow takes no such name for a model: write one without / and :"


def _plan(name: str, says: str, *overrides: str) -> Bad:
    return Bad(name, says, "plan", lambda world: ["--experiment", "smoke", *overrides])


def _address(name: str, uri: str, says: str = LOGIN) -> Bad:
    return _plan(name, says, f"tracking.tracking_uri='{uri}'")


def _no_variable(world: World) -> list[str]:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    return ["--experiment", "smoke", "tracking.tracking_uri=env"]


def _in_a_folder_with_a_question_mark(*arguments: str):
    def made(world: World) -> list[str]:
        (world.folder / "what?").mkdir()
        os.chdir(world.folder / "what?")
        return list(arguments)

    return made


def _damaged_store(world: World) -> list[str]:
    world.write("results/mlflow.db", "this is no database, " * 100)
    return []


def _store_that_is_a_folder(world: World) -> list[str]:
    (world.folder / "results/mlflow.db").mkdir(parents=True)
    return []


def _board_of_another_sweep(world: World) -> list[str]:
    mine = {"sweep": {"name": "mine", "axes": {}}, "eval": {"task": "text"}, "runs": []}
    world.write("results/sweeps/mine/config.yaml", json.dumps(mine))
    report = world.project / "results/reports"
    report = next(folder for folder in report.iterdir() if folder.name.startswith("reviews"))
    config = json.loads(json.dumps(mine)) | {"sweep": {"name": "other", "axes": {}}}
    config["eval"] = {"task": "labels", "labels": ["negative", "positive"]}
    config["runs"] = [{"name": "r", "point": {}, "report": str(report)}]
    return ["--config", json.dumps(config), "--output", "results/sweeps/mine"]


CASES = [
    _address("password in a server's address", "http://alice:s3cret@127.0.0.1:5000"),
    _address("token in a server's address", "https://s3cret@host"),
    _address("empty user in a server's address", "http://:s3cret@host"),
    _address("password with a slash", "http://alice:s3/s3cret@host"),
    _address("password with an at sign", "http://alice:a@s3cret@host"),
    _address("capital scheme", "HTTP://alice:s3cret@host"),
    _address("token in a server's query", "http://host/?token=s3cret"),
    _address("token in a server's fragment", "http://host/#s3cret"),
    _address("one slash", "http:/alice:s3cret@host"),
    _address("no scheme", "alice:s3cret@host"),
    _address("password in a database's address", "postgresql://me:s3cret@host/runs"),
    _address("password and driver in a database's address", "mysql+pymysql://me:s3cret@host/runs"),
    _address("password in a database's query", "postgresql://host/runs?user=me&password=s3cret"),
    _address("login in the address of a file", "file://alice:s3cret@host/runs"),
    _address("no address", "", r"'tracking\.tracking_uri': string should have at least 1 character"),
    _plan(
        "login among several addresses",
        r"^error: (?!.*s3cret).*'tracking\.tracking_uri'",
        "tracking.tracking_uri=['http://alice:s3cret@host']",
    ),
    _plan("login in a choice", r"^error: (?!.*s3cret).*conf/tracking/", "tracking=http://alice:s3cret@host"),
    Bad(
        "address from a variable that is not set",
        r"tracking\.tracking_uri=env: the environment variable MLFLOW_TRACKING_URI is not set",
        "plan",
        _no_variable,
    ),
    _plan("model name with a slash", NO_NAME, "tracking.registered_model_name=a/b"),
    _plan("model name with a colon", NO_NAME, "tracking.registered_model_name='a:b'"),
    _plan("blank model name", NO_NAME, "tracking.registered_model_name=' '"),
    _plan("model name that is a path", NO_NAME, "tracking.registered_model_name='..'"),
    _plan("long model name", r"registered_model_name'.*256", f"tracking.registered_model_name={'x' * 257}"),
    _plan("blank experiment name", r"'tracking\.experiment_name': must not be blank", "tracking.experiment_name=' '"),
    _plan("long experiment name", r"'tracking\.experiment_name'.*256", f"tracking.experiment_name={'x' * 257}"),
    _plan("no pause between batches", r"'tracking\.flush_seconds'.*greater than 0", "tracking.flush_seconds=0"),
    _plan("sweep over stores", r"tracking\.tracking_uri cannot be an axis", "tracking.tracking_uri=http://a,http://b"),
    _plan("misspelt key", r"'tracking\.tracking_url'; did you mean 'tracking_uri'", "tracking.tracking_url=http://a"),
    Bad(
        "a folder's name that ends an address, planning",
        r"results/mlflow\.db cannot be a database's address, for a '\?' ends it: rename the folder",
        "plan",
        _in_a_folder_with_a_question_mark("--experiment", "smoke"),
    ),
    Bad(
        "a folder's name that ends an address, looking",
        r"results/mlflow\.db cannot be a database's address, for a '\?' ends it: rename the folder",
        "ui",
        _in_a_folder_with_a_question_mark(),
    ),
    Bad("damaged store", r"mlflow\.db: .*move the damaged file away", "ui", _damaged_store),
    Bad("a folder where the store should be", r"mlflow\.db.*(writable|move it away)", "ui", _store_that_is_a_folder),
    Bad(
        "another sweep's folder",
        r"results/sweeps/mine: has the sweep 'mine', not 'other': name another folder",
        "compare_runs",
        _board_of_another_sweep,
    ),
]
