r"""Open MLflow's UI on the project's store, results/mlflow.db.

    temper ui
    make ui

It serves http://127.0.0.1:5000, to this machine only, until Ctrl-C. In a copied or moved project it first corrects the
addresses of the artifacts. Of the newest sweeps it says the addresses of the pages that show their runs, best first.
"""

import os
import sys

from temper import tracking

NAMED = 5  # sweeps whose pages are named


def arguments(parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--port", type=int, default=5000, help="port on this machine; default: 5000")


def run(arguments) -> None:
    """Replace this process by the server of MLflow's UI."""
    store = tracking.open_own_store()
    for sweep, page in tracking.newest_sweeps(NAMED).items():
        print(f"sweep {sweep}: http://127.0.0.1:{arguments.port}/{page}", flush=True)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # two processes instead of fifteen
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--workers",
        "1",
        "--host",
        "127.0.0.1",
        "--port",
        str(arguments.port),
    ]
    os.execv(sys.executable, [*command, "--backend-store-uri", store])
