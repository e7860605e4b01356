"""A hub on this machine: as much of the HTTP API as pushing and pulling a model repository uses.

    POST /api/repos/create                            GET  /api/models/{id}[/revision/{revision}]
    POST /api/models/{id}/branch/{branch}             GET  /api/models/{id}/tree/{revision}
    POST /api/models/{id}/preupload/{revision}        HEAD /{id}/resolve/{revision}/{path}
    POST /api/models/{id}/commit/{revision}           GET  /{id}/resolve/{revision}/{path}
    POST /{id}.git/info/lfs/objects/batch             PUT  /lfs/{oid}

Repositories live in memory. Every request is written down with its headers and body, so that tests can ask what arrived.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

ID = r"(?P<repo>[^/]+/[^/]+?)"

Files = dict[str, bytes]


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    path: str
    query: dict[str, list[str]]
    token: str | None
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines of a commit."""
        return [json.loads(line) for line in self.body.splitlines()]


@dataclass
class Repository:
    """Commits by hash, and the commit that each branch points to."""

    private: bool
    commits: dict[str, Files] = field(default_factory=lambda: {_sha({}): {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": _sha({})})

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def commit(self, branch: str, files: Files) -> str:
        sha = _sha(files)
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


@dataclass(frozen=True)
class Answer:
    """What the hub answers."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """A request that the hub answers with an error."""

    def __init__(self, status: int, code: str) -> None:
        self.answer = Answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})


class FakeHub:
    """The hub's state and its answers.

    Args:
        lfs: store `.safetensors` files apart, as the real hub does, instead of inside the commit.
    """

    def __init__(self, lfs: bool = False) -> None:
        self.lfs = lfs
        self.endpoint = ""
        self.repositories: dict[str, Repository] = {}
        self.large: Files = {}
        self.requests: list[Request] = []

    def sent_to(self, pattern: str, method: str = "POST") -> list[Request]:
        """The requests whose path matches."""
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        method = "GET" if request.method == "HEAD" else request.method
        for verb, pattern, reply in self._routes():
            match = re.fullmatch(pattern, request.path)
            if verb == method and match:
                try:
                    return reply(
                        request, **{name: unquote(value) for name, value in match.groupdict(default="main").items()}
                    )
                except Refusal as refusal:
                    return refusal.answer
        return Answer(501)

    def _routes(self) -> list[tuple[str, str, Callable[..., Answer]]]:
        return [
            ("POST", "/api/repos/create", self._create),
            ("POST", f"/api/models/{ID}/branch/(?P<branch>[^/]+)", self._branch),
            ("POST", f"/api/models/{ID}/preupload/(?P<revision>[^/]+)", self._preupload),
            ("POST", f"/api/models/{ID}/commit/(?P<revision>[^/]+)", self._commit),
            ("GET", f"/api/models/{ID}/tree/(?P<revision>[^/]+)", self._tree),
            ("GET", f"/api/models/{ID}(?:/revision/(?P<revision>[^/]+))?", self._info),
            ("GET", f"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self._resolve),
            ("POST", f"/{ID}\\.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", "/lfs/(?P<oid>.+)", self._lfs_store),
        ]

    def _create(self, request: Request) -> Answer:
        if request.token is None:
            raise Refusal(401, "Unauthorized")
        repo = f"{request.json['organization']}/{request.json['name']}"
        exists = repo in self.repositories
        if not exists:
            self.repositories[repo] = Repository(private=request.json.get("visibility") == "private")
        return _json({"url": f"{self.endpoint}/{repo}"}, 409 if exists else 200)

    def _branch(self, request: Request, repo: str, branch: str) -> Answer:
        repository = self._repository(request, repo)
        if branch in repository.branches:
            return Answer(409)
        repository.branches[branch] = repository.branches["main"]
        return _json({})

    def _preupload(self, request: Request, repo: str, revision: str) -> Answer:
        self._found(request, repo, revision)
        modes = {file["path"]: self._is_large(file["path"]) for file in request.json["files"]}
        files = [
            {"path": p, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} for p, large in modes.items()
        ]
        return _json({"files": files})

    def _commit(self, request: Request, repo: str, revision: str) -> Answer:
        repository, sha = self._found(request, repo, revision)
        files = dict(repository.commits[sha])
        for line in request.lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        is_pull_request = "create_pr" in request.query
        sha = repository.commit("refs/pr/1" if is_pull_request else revision, files)
        pull_request = f"{self.endpoint}/{repo}/discussions/1" if is_pull_request else None
        return _json({"commitUrl": f"{self.endpoint}/{repo}/commit/{sha}", "commitOid": sha, "pullRequestUrl": pull_request})

    def _tree(self, request: Request, repo: str, revision: str) -> Answer:
        repository, sha = self._found(request, repo, revision)
        return _json([self._entry(path, content) for path, content in repository.commits[sha].items()])

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
        if self._is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def _info(self, request: Request, repo: str, revision: str) -> Answer:
        repository, sha = self._found(request, repo, revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        return _json({"id": repo, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings})

    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        repository, sha = self._found(request, repo, revision)
        if path not in repository.commits[sha]:
            raise Refusal(404, "EntryNotFound")
        content = repository.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_git_oid(content)}"'}
        if self._is_large(path):
            headers |= {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        return Answer(200, content, headers)

    def _lfs_batch(self, request: Request, repo: str) -> Answer:
        self._repository(request, repo)
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}", "header": {}}}}
            for wanted in request.json["objects"]
        ]
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_store(self, request: Request, oid: str) -> Answer:
        assert hashlib.sha256(request.body).hexdigest() == oid
        self.large[oid] = request.body
        return Answer()

    def _is_large(self, path: str) -> bool:
        return self.lfs and path.endswith(".safetensors")

    def _repository(self, request: Request, repo: str) -> Repository:
        repository = self.repositories.get(repo)
        if repository is None or (repository.private and request.token is None):
            raise Refusal(404, "RepoNotFound")
        return repository

    def _found(self, request: Request, repo: str, revision: str) -> tuple[Repository, str]:
        repository = self._repository(request, repo)
        sha = repository.resolve(revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound")
        return repository, sha


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub at `hub.endpoint`, for as long as the context lasts."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def connected(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """huggingface_hub takes a running hub for the only one, with an empty cache below `folder` and no token."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        huggingface_hub.close_session()  # no connection outlives its hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def _serve(self) -> None:
        url = urlsplit(self.path)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        answer = self.hub.answer(Request(self.command, url.path, parse_qs(url.query), token, body))
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _json(data: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"})


def _sha(files: Files) -> str:
    parts = (f"{path}:{hashlib.sha1(content).hexdigest()}" for path, content in sorted(files.items()))
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
