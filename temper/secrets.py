"""Keep secrets out of everything stored and shown: a config that holds one is refused, messages are redacted.

Config values go into plans, logs, pages, MLflow and model cards, so they must not hold a login. If one is needed, the
libraries read it from the environment (HF_TOKEN, MLFLOW_TRACKING_USERNAME, ...) in each job.
"""

import os
import re

SECRET_VARIABLE = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_?KEY|SECRET_?KEY)$")
SHORTEST = 12  # characters; shorter values (postgres, password) may occur in texts by chance
LOGIN_IN_URL = re.compile(r"(?<=://)[^\s'\"]*@")
SECRET_IN_QUERY = re.compile(r"(?i)([?&][^=&\s'\"]*(?:token|passw|secret|key|auth|sig)[^=&\s'\"]*=)[^&\s'\"]+")
DATABASE_FILES = ("sqlite", "file")


def redacted(text: str) -> str:
    """The text without logins in URLs and without the values of secret environment variables."""
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
    """Whether an address may hold a password or a token: before an @, or in a query.

    In a database's address, a user name alone is not a secret (``postgresql://me@host/runs``); in a server's address it
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
