"""Secrets stay out of what is stored and shown: the config is refused with one, a message is printed without it.

Config values go into plans, logs, pages, MLflow and model cards, so no login may ever stand in one. Where a login is
needed, the libraries read it from the environment (HF_TOKEN, MLFLOW_TRACKING_USERNAME, ...), job by job.
"""

import os
import re

SECRET_VARIABLE = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_?KEY|SECRET_?KEY)$")
SHORTEST = 12  # characters; shorter values of such variables (postgres, password) stand in texts by chance
LOGIN_IN_URL = re.compile(r"(?<=://)[^\s'\"]*@")
SECRET_IN_QUERY = re.compile(r"(?i)([?&][^=&\s'\"]*(?:token|passw|secret|key|auth|sig)[^=&\s'\"]*=)[^&\s'\"]+")
DATABASE_FILES = ("sqlite", "file")


def redacted(text: str) -> str:
    """The text without the logins of URLs and without the values of variables that are secret by their name."""
    text = SECRET_IN_QUERY.sub(r"\1***", LOGIN_IN_URL.sub("***@", text))
    for value in secret_variables().values():
        text = text.replace(value, "***")
    return text


def secret_variables() -> dict[str, str]:
    """Environment variables whose name says that their value is a secret."""
    return {
        name: value
        for name, value in os.environ.items()
        if SECRET_VARIABLE.search(name.upper()) and len(value) >= SHORTEST
    }


def has_login(uri: str) -> bool:
    """Whether an address may hold a password or a token: in front of an @, or in a query.

    The user's name alone is no secret in a database's address (``postgresql://me@host/runs``), but before a server it
    may be a token.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:  # user:password@host, http:/user:password@host
        return ":" in uri.partition("@")[0] and "@" in uri
    kind = scheme.lower().partition("+")[0]
    if kind in ("http", "https"):
        return any(sign in rest for sign in "@?#")
    if kind in DATABASE_FILES:
        return "@" in rest.partition("/")[0]
    return "?" in rest or ":" in rest.rpartition("@")[0]
