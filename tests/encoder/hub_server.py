"""A small model hub on this machine: the part of its HTTP API that pushing and downloading a model use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "t" * 34
START = "0" * 40


class Repo:
    """One repository: branches that name commits, and commits that are whole trees."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {START: {".gitattributes": b""}}
        self.branches = {"main": START}

    def commit(self, branch: str, lines: list[dict[str, Any]], objects: dict[str, bytes]) -> str:
        tree = dict(self.commits[self.branches[branch]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        oid = hashlib.sha1(repr((len(self.commits), sorted(tree.items()))).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        return oid


class Hub(ThreadingHTTPServer):
    """What it holds, what was asked, and what it shall refuse or die of."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        #: a part of a path -> the status that answers it; 0 breaks the connection off
        self.failing: dict[str, int] = {}
        #: a part of a path -> called before it is answered
        self.on: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that serves until the end of the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{self.command} {path}")
        for part, call in self.server.on.items():
            if part in path:
                call()
        status = next((status for part, status in self.server.failing.items() if part in path), None)
        if status == 0:
            self.close_connection = True
            self.connection.close()
        elif status is not None:
            self._answer(status, {"error": f"refused, token was {self.headers.get('Authorization')}"})
        elif "/lfs-store/" not in path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"})
        else:
            self._route(path, body)

    def _route(self, path: str, body: bytes) -> None:
        for pattern, handle in _ROUTES:
            if found := re.fullmatch(pattern, path):
                handle(self, body, **found.groupdict())
                return
        self._answer(404, {"error": f"no route {path}"})

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repo(self, repo: str) -> Repo | None:
        found = self.server.repos.get(repo)
        if found is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        there = name in self.server.repos
        if not there:
            self.server.repos[name] = Repo(bool(asked.get("private") or asked.get("visibility") == "private"))
        self._answer(409 if there else 200, {"url": f"{self.server.url}/{name}", "name": name})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if (found := self._repo(repo)) is not None:
            oid = found.branches.get(revision, revision)
            if oid not in found.commits:
                self._answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": name} for name in found.commits[oid]]
            self._answer(200, {"id": repo, "sha": oid, "private": found.private, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._repo(repo)) is not None:
            files = found.commits[found.branches.get(revision, revision)]
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self._answer(200, entries)

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._repo(repo)) is not None:
            there = revision in found.branches
            found.branches.setdefault(revision, found.branches["main"])
            self._answer(409 if there else 200, {"error": "Reference already exists"} if there else {})

    def validate(self, body: bytes) -> None:
        """The hub's rules for a model's card, as far as they are written down."""
        text = json.loads(body)["content"]
        wrong = faults(text)
        found = {"errors": [{"message": line} for line in wrong], "warnings": []}
        self._answer(400 if wrong else 200, found)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = json.loads(body)["files"]
        large = (".safetensors", ".pt", "tokenizer.json")
        modes = {file["path"]: "lfs" if file["path"].endswith(large) else "regular" for file in files}
        answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self._answer(200, {"files": answer})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.url}/lfs-store/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._answer(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._repo(repo)) is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"].get("parentCommit") != found.branches[revision]:
            self._answer(412, {"error": "A commit has happened since."})
            return
        oid = found.commit(revision, lines, self.server.objects)
        self._answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        if (found := self._repo(repo)) is not None:
            oid = found.branches.get(revision, revision)
            data = found.commits[oid].get(file)
            if data is None:
                self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
                return
            etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": oid}
            self._answer(200, data, etag)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_REPO}", _Handler.info),
    (rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/.*)?", _Handler.tree),
    (rf"/api/models/{_REPO}/branch/(?P<revision>[^/]+)", _Handler.branch),
    (rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/lfs-store/(?P<oid>[0-9a-f]{64})", _Handler.store),
    (rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
]


#: Of the hub's list of licences, those of the models that we know; "other" needs license_name.
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "gemma", "llama3", "other"}
TASKS = {"sentence-similarity", "text-ranking", "feature-extraction"}


def faults(card: str) -> list[str]:
    """What the hub's documentation of model cards would call wrong in a card's front matter."""
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not card.startswith("---\n") or "\n---\n" not in card[4:]:
        return ["no front matter"]
    data = yaml.safe_load(card[4:].partition("\n---\n")[0])
    wrong = [f"{name} is empty" for name, value in data.items() if value in (None, "", [])]
    try:
        ModelCard(card)  # reads the model index, and raises for one that is not of its form
    except Exception as error:
        wrong.append(f"model-index: {error}")
    for name in ("base_model", "datasets"):
        for repo in _listed(data.get(name)):
            try:
                validate_repo_id(repo)
            except HFValidationError as error:
                wrong.append(f"{name}: {error}")
    wrong += [f"language {code}" for code in _listed(data.get("language")) if not re.fullmatch("[a-z]{2,3}", code)]
    if data.get("license") not in {None, *LICENSES}:
        wrong.append(f"license {data['license']}")
    if data.get("license") == "other" and not data.get("license_name"):
        wrong.append("license other needs license_name")
    if data.get("pipeline_tag") not in {None, *TASKS}:
        wrong.append(f"pipeline_tag {data['pipeline_tag']}")
    if not all(isinstance(tag, str) for tag in _listed(data.get("tags"))):
        wrong.append("tags are texts")
    return wrong


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
