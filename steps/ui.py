r"""Open MLflow's UI on the project's own store, results/mlflow.db.

    python -m steps.ui
    make ui

It serves http://127.0.0.1:5000, to this machine only, until Ctrl-C. A project that was copied or moved first gets the
addresses of its artifacts right.
"""

import argparse
import os
import sys

from steps.lib import tracking
from steps.lib.errors import one_line_errors


def main(argv=None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m steps.ui", description=__doc__, formatter_class=form)
    parser.add_argument("--port", type=int, default=5000)
    port = parser.parse_args(argv).port
    with one_line_errors():
        store = tracking.open_own_store()
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # two processes instead of fifteen
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [*command, "--backend-store-uri", store])


if __name__ == "__main__":
    main()
