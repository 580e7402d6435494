"""Add a user to the MLflow server, who may do what Temper does: write runs and models, and delete runs.

    python add_user.py alice

Asks for the new user's password, of 12 characters at least, which is not shown; without a terminal it is the first line
of the input. Where the variables MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD do not say
otherwise, the server is the one on this machine, and the login the administrator's with which it first started.
"""

import getpass
import os
import sys

from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client

ROLE, WORKSPACE = "temper", "default"
# The creator of an experiment may do all with it, the others EDIT (auth.ini), which is all but deleting. Temper deletes
# a run that was made twice or whose parameters changed, and a model that was sent in part.
MANAGED = ("run", "logged_model")


def role(server) -> int:
    """The id of the role that Temper's users have, made on first use."""
    for known in server.list_roles(WORKSPACE):
        if known.name == ROLE:
            return known.id
    made = server.create_role(WORKSPACE, ROLE, "what Temper needs beyond EDIT").id
    for kind in MANAGED:
        server.add_role_permission(made, kind, "*", "MANAGE")
    return made


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("error: name one user: python add_user.py alice")
    os.environ.setdefault("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", "admin")
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", ""))
    if not os.environ["MLFLOW_TRACKING_PASSWORD"]:
        sys.exit("error: set MLFLOW_TRACKING_PASSWORD: the administrator's password")
    name = sys.argv[1]
    asked = f"Password for {name}: "
    password = getpass.getpass(asked) if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    server = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    try:
        server.create_user(name, password)
        server.assign_role(name, role(server))
    except MlflowException as error:
        sys.exit(f"error: {error.message.splitlines()[0]}")
    print(f"{name} may log in, and write runs and models")


if __name__ == "__main__":
    main()
