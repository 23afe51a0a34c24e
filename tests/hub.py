"""A local HTTP server with the parts of the Hugging Face hub's API that uploads and downloads of a repository need.

Each request is as huggingface_hub sends it. Repositories and blobs are in memory. Whoever has no token sees no private
repository, and writes nothing. Sources: https://huggingface.co/docs/hub/api, git-lfs' batch API, huggingface_hub 2.4.
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
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import ModelCard

TOKEN = "hf_PlantedTokenOfTheTests0123456789"
LFS = (".safetensors",)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """A repository: files by path of every commit, in order, and whether it is private."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.head if revision == "main" else revision)

    def commit(self, files: dict[str, bytes], message: str) -> str:
        self.commits[f"{len(self.commits):040x}"] = files
        self.messages.append(message)
        return self.head


@dataclass
class Hub:
    """The state of the server. `refuse`: whether to answer a request (method, path) with status 400."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    refuse: Callable[[str], bool] = lambda _: False
    cas: str | None = None
    """Address of xet's storage, if it has one."""

    def sent(self, pattern: str) -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def answer(self, value: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str, status: int = 404) -> None:
        self.answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        body = self.body()
        if self.hub.refuse(self.hub.log[-1]):
            return self.answer({"error": "broken"}, 400)
        may_write = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not may_write and ("/commit/" in path or path == "/api/repos/create"):  # blobs go to signed addresses
            return self.refuse("Unauthorized", 401)
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                groups = match.groupdict()
                if (name := groups.pop("repo", None)) is not None:
                    repo = self.hub.repositories.get(name)
                    if repo is None or (repo.private and not may_write):
                        return self.refuse("RepoNotFound", 401 if not may_write else 404)
                    groups |= {"repo": repo, "name": name}
                return method(self, body, **groups)
        return self.refuse("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *_: object) -> None:
        pass

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        exists = name in self.hub.repositories
        self.hub.repositories.setdefault(name, Repository(private=asked["visibility"] == "private"))
        self.answer({"url": f"{self.hub.url}/{name}", "name": name}, 409 if exists else 200)

    def validate(self, body: bytes) -> None:
        ModelCard(json.loads(body)["content"])  # raises for a broken model-index
        self.answer({"errors": [], "warnings": []})

    def info(self, _: bytes, repo: Repository, name: str, revision: str = "main") -> None:
        commit = repo.head if revision == "main" else revision
        if commit not in repo.commits:
            return self.refuse("RevisionNotFound")
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        return self.answer({"id": name, "sha": commit, "private": repo.private, "siblings": siblings})

    def tree(self, _: bytes, repo: Repository, name: str, revision: str) -> None:
        files = repo.files(revision)
        if files is None:
            return self.refuse("RevisionNotFound")
        return self.answer([self.entry(path, data) for path, data in files.items()])

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        sha256 = hashlib.sha256(data).hexdigest()
        lfs = {"lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}} if path.endswith(LFS) else {}
        return {"type": "file", "path": path, "size": len(data), "oid": git_oid(data), **lfs}

    def preupload(self, body: bytes, repo: Repository, name: str, revision: str) -> None:
        there = repo.files(revision) or {}
        oids = {
            path: hashlib.sha256(data).hexdigest() if path.endswith(LFS) else git_oid(data)
            for path, data in there.items()
        }
        self.answer({
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                    "oid": oids.get(file["path"]),
                }
                for file in json.loads(body)["files"]
            ]
        })  # fmt: skip

    def batch(self, body: bytes, repo: Repository, name: str) -> None:
        objects = [
            {
                **wanted,
                **(
                    {}
                    if wanted["oid"] in self.hub.blobs
                    else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
                ),
            }
            for wanted in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self.answer()

    def commit(self, body: bytes, repo: Repository, name: str, revision: str) -> None:
        files, message = dict(repo.commits[repo.head]), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs.get(value["oid"], b"")
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = repo.commit(files, message)
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, _: bytes, repo: Repository, name: str, revision: str, path: str) -> None:
        files = repo.files(revision)
        if files is None or path not in files:
            return self.refuse("RevisionNotFound" if files is None else "EntryNotFound")
        data = files[path]
        etag = hashlib.sha256(data).hexdigest() if path.endswith(LFS) else git_oid(data)
        commit = repo.head if revision == "main" else revision
        return self.answer(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "none"})

    def xet(self, _: bytes, repo: Repository, name: str, revision: str) -> None:
        found = {"casUrl": self.hub.cas, "accessToken": "token", "exp": 4102444800}
        headers = {"X-Xet-Cas-Url": str(self.hub.cas), "X-Xet-Access-Token": "token"}
        self.answer(found, headers={**headers, "X-Xet-Token-Expiration": "4102444800"})


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES: dict[str, Callable[..., None]] = {
    r"POST /api/repos/create": Handler.create,
    r"POST /api/validate-yaml": Handler.validate,
    rf"GET /api/models/{REPO}": Handler.info,
    rf"GET /api/models/{REPO}/revision/(?P<revision>[^/]+)": Handler.info,
    rf"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)": Handler.tree,
    rf"GET /api/models/{REPO}/xet-write-token/(?P<revision>[^/]+)": Handler.xet,
    rf"POST /api/models/{REPO}/preupload/(?P<revision>[^/]+)": Handler.preupload,
    rf"POST /api/models/{REPO}/commit/(?P<revision>[^/]+)": Handler.commit,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": Handler.batch,
    r"PUT /lfs/(?P<oid>[0-9a-f]+)": Handler.put,
    rf"(?:GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": Handler.resolve,
}


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve an empty hub on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path, *, token: str | None = TOKEN) -> None:
    """Let huggingface_hub in this process use the hub at `url`, an empty cache and this token, without xet."""
    from huggingface_hub import close_session, constants

    close_session()  # a session that was opened offline refuses everything
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
