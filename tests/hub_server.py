"""A Hub on this machine: repositories on disk behind the HTTP calls that huggingface_hub's client makes.

    with HubServer(folder) as hub:      # hub.url is the HF_ENDPOINT, hub.token a token that may write
        ...                             # push; then hub.files("user/name") is what landed

It keeps what a push is made of (repositories, LFS objects, commits, branches), checks tokens, and refuses cards whose
metadata the Hub's documentation does not allow. `hub.fail(method, path, how, times)` makes it misbehave: `how` is a
status, or "drop" for a connection that is lost in the middle of the request's body.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import transformers.utils.hub
import yaml
from huggingface_hub import constants, file_download, hf_api

REPOSITORY = r"([^/]+/[^/]+)"


class HubServer:
    """One user's Hub; a context manager that serves while it is open."""

    user = "someone"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = "hf_writes"
        self.requests: list[tuple[str, str]] = []
        self.faults: list[dict] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, path: str, how: int | str, times: int = 1_000) -> None:
        """Answer the next `times` requests whose path contains `path` with a status, or lose their connection."""
        self.faults.append({"method": method, "path": path, "how": how, "times": times})

    def fault(self, method: str, path: str) -> int | str | None:
        with self._lock:
            for fault in self.faults:
                if fault["times"] > 0 and fault["method"] == method and fault["path"] in path:
                    fault["times"] -= 1
                    return fault["how"]
        return None

    def create(self, name: str, private: bool) -> bool:
        """Make an empty repository; False when it is there already."""
        with self._lock:
            state = self._state_file(name)
            if state.exists():
                return False
            state.parent.mkdir(parents=True)
            state.write_text(json.dumps({"private": private, "branches": {"main": _sha(name)}, "commits": {}}))
            return True

    def add(self, name: str, folder: Path) -> None:
        """Put a folder's files into a new repository."""
        self.create(name, private=False)
        changes = {}
        for file in folder.iterdir():
            content = file.read_bytes()
            oid = hashlib.sha256(content).hexdigest()
            self.store(oid, content)
            changes[file.name] = {"oid": oid, "git": oid, "size": len(content), "lfs": True}
        self.commit(name, "main", "Files of a folder", changes)

    def state(self, name: str) -> dict | None:
        file = self._state_file(name)
        return json.loads(file.read_text()) if file.exists() else None

    def tree(self, name: str, revision: str = "main") -> dict[str, dict] | None:
        """path -> {oid, size, lfs} at a branch or commit; None when there is no such revision."""
        state = self.state(name)
        assert state is not None
        commit = state["branches"].get(revision, revision)
        if commit in state["commits"]:
            return state["commits"][commit]["tree"]
        return {} if commit in state["branches"].values() else None

    def files(self, name: str) -> dict[str, bytes]:
        """What is in the main branch."""
        return {path: self.content(entry["oid"]) for path, entry in (self.tree(name) or {}).items()}

    def messages(self, name: str) -> list[str]:
        """Commit messages, oldest first."""
        return [commit["message"] for commit in (self.state(name) or {"commits": {}})["commits"].values()]

    def commit(self, name: str, branch: str, message: str, changes: dict[str, dict | None]) -> str:
        with self._lock:
            state = self.state(name)
            assert state is not None
            parent = state["branches"][branch]
            tree = dict(state["commits"].get(parent, {"tree": {}})["tree"]) | changes
            commit = _sha(f"{parent}{message}{sorted(tree)}{len(state['commits'])}")
            kept = {path: entry for path, entry in tree.items() if entry is not None}
            state["commits"][commit] = {"message": message, "tree": kept}
            state["branches"][branch] = commit
            self._state_file(name).write_text(json.dumps(state))
            return commit

    def store(self, oid: str, content: bytes) -> None:
        self._object(oid).parent.mkdir(parents=True, exist_ok=True)
        self._object(oid).write_bytes(content)

    def has(self, oid: str) -> bool:
        return self._object(oid).exists()

    def content(self, oid: str) -> bytes:
        return self._object(oid).read_bytes()

    def _object(self, oid: str) -> Path:
        return self.folder / "objects" / oid

    def _state_file(self, name: str) -> Path:
        return self.folder / "repositories" / name / "state.json"


def take_for_the_hub(server: HubServer, monkeypatch: Any) -> None:
    """Point huggingface_hub's client in this process to the server, without xet, which the server does not speak.

    A new process does the same with HF_ENDPOINT, HF_HUB_OFFLINE=0 and HF_HUB_DISABLE_XET=1.
    """
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    url_template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url_template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # behind the functions of the package
    # where versions of 2025 keep copies of these
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", url_template, raising=False)
    monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", False, raising=False)
    if hasattr(transformers.utils.hub, "_hf_api"):  # transformers keeps one client
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((method, path))
        length = int(self.headers.get("Content-Length", 0))
        fault = self.hub.fault(method, path)
        if fault == "drop":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = (
            self.rfile.read(length) if "chunked" not in self.headers.get("Transfer-Encoding", "") else self.chunks()
        )
        if fault is not None:
            self.answer(fault, {"error": "the server has a fault"}, {"Retry-After": "0"})
            return
        for verb, pattern, action, needs_token in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and (verb == method or (verb, method) == ("GET", "HEAD")):
                if (needs_token or "Authorization" in self.headers) and not self.is_user():
                    message = "Invalid credentials in Authorization header"
                    self.answer(401, {"error": message}, {"X-Error-Message": message})
                else:
                    action(self, *match.groups())
                return
        self.answer(404, {"error": f"no route for {method} {path}"}, {"X-Error-Code": "RepoNotFound"})

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def is_user(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass

    def found(self, name: str) -> dict | None:
        """The repository, if there is one that the caller may read; a 404 otherwise."""
        state = self.hub.state(name)
        if state is None or (state["private"] and not self.is_user()):
            self.answer(404 if self.is_user() else 401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return state

    def who_am_i(self) -> None:
        self.answer(200, {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        wish = json.loads(self.body)
        name = f"{wish.get('organization') or self.hub.user}/{wish['name']}"
        private = wish.get("private") or wish.get("visibility") == "private"
        made = self.hub.create(name, private=bool(private))
        self.answer(200 if made else 409, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate_card(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        self.answer(400 if errors else 200, {"errors": [{"message": one} for one in errors], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if self.found(name) is None:
            return
        files = json.loads(self.body)["files"]
        tree = self.hub.tree(name, revision) or {}
        answer = [
            {
                "path": file["path"],
                "uploadMode": "lfs"
                if file["path"].endswith((".safetensors", ".bin", ".pt", ".pth", ".png"))
                else "regular",
                "shouldIgnore": False,
                "oid": tree.get(file["path"], {}).get("git"),
            }
            for file in files
        ]
        self.answer(200, {"files": answer})

    def lfs_batch(self, name: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            if not self.hub.has(one["oid"])
            else one
            for one in json.loads(self.body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.answer(400, {"error": "content does not fit its hash"})
            return
        self.hub.store(oid, self.body)
        self.answer(200, {})

    def commit(self, name: str, branch: str) -> None:
        if self.found(name) is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        changes: dict[str, dict | None] = {}
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                content = base64.b64decode(value["content"])
                git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.hub.store(git, content)
                changes[value["path"]] = {"oid": git, "git": git, "size": len(content), "lfs": False}
            elif kind == "lfsFile":
                if not self.hub.has(value["oid"]):
                    self.answer(400, {"error": f"{value['path']} was not uploaded"})
                    return
                size = len(self.hub.content(value["oid"]))
                changes[value["path"]] = {"oid": value["oid"], "git": value["oid"], "size": size, "lfs": True}
            elif kind == "deletedFile":
                changes[value["path"]] = None
        commit = self.hub.commit(name, branch, lines[0]["value"]["summary"], changes)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def info(self, name: str, revision: str = "main") -> None:
        state = self.found(name)
        if state is None:
            return
        tree = self.hub.tree(name, revision)
        if tree is None:
            self.answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": path} for path in tree]
        sha = state["branches"].get(revision, revision)
        answer = {
            "id": name,
            "modelId": name,
            "sha": sha,
            "private": state["private"],
            "tags": [],
            "siblings": siblings,
        }
        self.answer(200, answer)

    def list_tree(self, name: str, revision: str, *_: str) -> None:
        if self.found(name) is None:
            return
        entries = [
            {
                "type": "file",
                "path": path,
                "oid": entry["git"],
                "size": entry["size"],
                **({"lfs": {"oid": entry["oid"], "size": entry["size"], "pointerSize": 130}} if entry["lfs"] else {}),
            }
            for path, entry in (self.hub.tree(name, revision) or {}).items()
        ]
        self.answer(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        state = self.found(name)
        if state is None:
            return
        tree = self.hub.tree(name, revision)
        commit = {"X-Repo-Commit": state["branches"].get(revision, revision)}
        if tree is None or path not in tree:
            code = "RevisionNotFound" if tree is None else "EntryNotFound"
            self.answer(404, {"error": code}, {"X-Error-Code": code, **commit})
            return
        oid = tree[path]["oid"]
        self.answer(200, self.hub.content(oid), {"ETag": f'"{oid}"', **commit})


ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.who_am_i, True),
    ("POST", "/api/repos/create", _Handler.create, True),
    ("POST", "/api/validate-yaml", _Handler.validate_card, False),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/([^/]+)", _Handler.preupload, True),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", _Handler.lfs_batch, True),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_put, False),  # as at the Hub, the address itself is the permission
    ("POST", rf"/api/models/{REPOSITORY}/commit/([^/]+)", _Handler.commit, True),
    ("GET", rf"/api/models/{REPOSITORY}", _Handler.info, False),
    ("GET", rf"/api/models/{REPOSITORY}/revision/([^/]+)", _Handler.info, False),
    ("GET", rf"/api/models/{REPOSITORY}/tree/([^/]+)(/.*)?", _Handler.list_tree, False),
    ("GET", rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", _Handler.resolve, False),
]


def card_errors(card: str) -> list[str]:
    """What the Hub's documentation of card metadata forbids in this card."""
    match = re.match(r"---\n(.*?)\n---\n", card, flags=re.S)
    data = yaml.safe_load(match[1]) if match else {}
    errors = [
        f'"{key}" must be a {kind.__name__}'
        for key, kind in (
            ("tags", list),
            ("datasets", list),
            ("metrics", list),
            ("library_name", str),
            ("license", str),
        )
        if key in data and not isinstance(data[key], kind)
    ]
    ids = [data["base_model"]] if isinstance(data.get("base_model"), str) else data.get("base_model", [])
    for key, values in (("base_model", ids), ("datasets", data.get("datasets", []))):
        errors += [f'"{key}": {one!r} is no id' for one in values if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(one))]
    if "language" in data and not re.fullmatch(r"[a-z]{2,3}", str(data["language"])):
        errors.append('"language" must be an ISO 639 code')
    for model in data.get("model-index", []):
        if not model.get("name"):
            errors.append('"model-index[].name" is required')
        for result in model["results"]:
            required = {
                "task.type": result.get("task", {}).get("type"),
                "dataset.type": result.get("dataset", {}).get("type"),
                "dataset.name": result.get("dataset", {}).get("name"),
                "metrics": result.get("metrics"),
            }
            errors += [
                f'"model-index[].results[].{name}" is required' for name, value in required.items() if not value
            ]
            for metric in result.get("metrics", []):
                if not metric.get("type") or not isinstance(metric.get("value"), int | float | str):
                    errors.append('"model-index[].results[].metrics[]" needs a type and a value')
    return errors


def _sha(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()
