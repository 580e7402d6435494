"""A hub on this machine: as much of its HTTP interface as downloads and uploads need, served from folders."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

from temper.hashing import file_sha256

COMMIT = "0123456789abcdef0123456789abcdef01234567"
USER, TOKEN = "acme", "hf_good"
LFS = re.compile(r".*\.(safetensors|bin|gguf)")  # what the hub wants by LFS; the rest comes inside the commit


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories acme/<name>, each a folder below `folders`; `created` has the payloads of new ones.

    `moved` takes the place of COMMIT as that of main, once a test has set it.
    """

    moved: str | None = None
    folders: Path
    created: list[dict]

    # --- reading ---------------------------------------------------------------------------------

    def do_GET(self):  # noqa: N802
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            self._send_json({"name": USER}) if self._authorised() else self._refuse("", 401)
        elif info := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(*info.groups())
        elif tree := re.fullmatch(r"/api/(?:datasets|models)/acme/([^/]+)/tree/[^/]+", path):
            self._send_json([self._entry(file) for file in self._files(tree[1])])
        elif file := re.fullmatch(r"/(?:datasets/)?acme/([^/]+)/resolve/[^/]+/(.+)", path):
            self._file(self.folders / file[1] / file[2])
        else:
            self._refuse("EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _files(self, name: str) -> list[Path]:
        return sorted((self.folders / name).iterdir())

    def _info(self, repository: str, revision: str | None):
        user, _, name = repository.partition("/")
        if name == "gated":
            self._refuse("GatedRepo", 403)
        elif user != USER or not (self.folders / name).is_dir():
            self._refuse("RepoNotFound", 404 if self._authorised() or not self.headers.get("Authorization") else 401)
        elif revision not in (None, "main", COMMIT, self.moved):
            self._refuse("RevisionNotFound")
        else:
            siblings = [{"rfilename": file.name} for file in self._files(name)]
            commit = revision if revision in (COMMIT, self.moved) else self.moved or COMMIT
            self._send_json({"id": repository, "sha": commit, "siblings": siblings})

    def _entry(self, file: Path) -> dict:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file_sha256(file)[:40]}

    def _file(self, file: Path):
        if not file.is_file():
            return self._refuse("EntryNotFound")
        content = file.read_bytes()
        return self._send(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    # --- writing ---------------------------------------------------------------------------------

    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
        if not self._authorised():
            self._refuse("", 401)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/acme/[^/]+/preupload/main", self.path):
            self._send_json({"files": [self._upload_mode(file) for file in json.loads(body)["files"]]})
        elif lfs := re.fullmatch(r"/acme/([^/]+)\.git/info/lfs/objects/batch", self.path):
            self._lfs_batch(lfs[1], json.loads(body)["objects"])
        elif commit := re.fullmatch(r"/api/models/acme/([^/]+)/commit/main", self.path):
            self._commit(commit[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse("EntryNotFound")

    def _create(self, payload: dict):
        if payload["organization"] != USER:
            return self._refuse("", 403)
        self.created.append(payload)
        (self.folders / payload["name"]).mkdir()
        return self._send_json({"url": f"{self._url}/{USER}/{payload['name']}"})

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _upload_mode(self, file: dict) -> dict:
        mode = "lfs" if LFS.fullmatch(file["path"]) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _lfs_batch(self, name: str, objects: list[dict]):
        where = f"{self._url}/lfs/{name}"
        actions = [{**entry, "actions": {"upload": {"href": f"{where}/{entry['oid']}"}}} for entry in objects]
        self._send_json({"transfer": "basic", "objects": actions})

    def do_PUT(self):  # noqa: N802
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != name:
            return self._refuse("", 400)
        (self.folders / f".{name}").write_bytes(content)
        return self._send(b"")

    def _commit(self, name: str, lines: list[dict]):
        folder = self.folders / name
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (folder / value["path"]).write_bytes((self.folders / f".{value['oid']}").read_bytes())
        url = f"{self._url}/acme/{name}/commit/{COMMIT}"
        self._send_json({"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})

    # --- answers ---------------------------------------------------------------------------------

    def _send_json(self, content):
        self._send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, content: bytes, headers=()):
        self.send_response(200)
        for name, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, code: str, status: int = 404):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(folders: Path):
    """Serve the folders in `folders` as acme/<name>. Gives the server's url and its handler (see Hub)."""
    handler = type("ThisHub", (Hub,), {"folders": folders, "created": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


def environment(url: str, cache: Path) -> dict[str, str]:
    """Variables with which a command uses this hub."""
    return {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def use(monkeypatch, url: str) -> None:
    """What HF_ENDPOINT and HF_HUB_OFFLINE=0 do in a new process, in this one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
