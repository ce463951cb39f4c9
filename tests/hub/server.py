"""A stand-in for the Hub: create, branch, validate-yaml, preupload, NDJSON commit, resolve, model info, tree. In memory, on localhost.

It answers as the Hub does where huggingface_hub looks: ETag, X-Repo-Commit, X-Error-Code, commit hashes that depend on the content.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

TOKEN = "hf_" + "x" * 34


@dataclass
class Repo:
    """commits: files of each; branches: name -> commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr((self.branches.get(branch), sorted(files.items()))).encode()).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        return digest

    def resolve(self, revision: str) -> str | None:
        known = self.branches.get(revision, revision)
        return known if known in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class FakeHub:
    """url: the endpoint. Faults: fail_commit (an HTTP status), truncate (files arrive short, headers to match), cut (the connection
    breaks in the middle of a file)."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    fail_commit: int | None = None
    truncate: str | None = None
    cut: str | None = None

    def repo(self, name: str) -> Repo:
        if name not in self.repos:
            self.repos[name] = Repo()
            self.repos[name].commit("main", {})
        return self.repos[name]


@contextmanager
def serve() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, code: int, body: Any = None, **headers: str) -> None:
        payload = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(code)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(payload)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def _missing(self, code: str) -> None:
        self._send(404, {"error": "not found"}, X_Error_Code=code)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        body, path = self._body(), unquote(self.path.split("?")[0])
        self.hub.log.append(("POST", self.path))
        self.hub.bodies.append(body)
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            values = json.loads(body)
            name = (values.get("organization") or "me") + "/" + values["name"]
            known = name in self.hub.repos
            self.hub.repo(name)
            self._send(409 if known else 200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        elif match := re.fullmatch(r"/api/models/(.+?)/branch/(.+)", path):
            repo = self.hub.repo(match[1])
            known = match[2] in repo.branches
            repo.branches.setdefault(match[2], repo.branches["main"])
            self._send(409 if known else 200, {})
        elif re.fullmatch(r"/api/models/.+?/preupload/.+", path):
            names = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self._send(200, {"files": modes})
        elif match := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            self._commit(match[1], match[2], body)
        else:
            self._missing("RepoNotFound")

    def _validate(self, content: str) -> None:
        """The Hub's rules that matter here: a front matter of known types."""
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        values = yaml.safe_load(match[1]) if match else None
        errors = []
        if not isinstance(values, dict):
            errors.append({"message": "no metadata"})
        elif not isinstance(values.get("license", ""), str):
            errors.append({"message": '"license" must be a string'})
        elif not isinstance(values.get("tags", []), list):
            errors.append({"message": '"tags" must be an array'})
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        if self.hub.fail_commit is not None:
            self._send(self.hub.fail_commit, {"error": "broken"})
            return
        repo = self.hub.repo(name)
        files = dict(repo.files(branch))
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        oid = repo.commit(branch, files)
        address = f"{self.hub.url}/{name}/commit/{oid}"
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": address})

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0]).rstrip("/")
        self.hub.log.append((self.command, self.path))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
            self._info(match[1], match[2], match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self.hub.repos.get(name)
        commit = None if repo is None else repo.resolve(revision)
        if repo is None or commit is None:
            self._missing("RepoNotFound" if repo is None else "RevisionNotFound")
            return None
        return commit, repo.commits[commit]

    def _info(self, name: str, kind: str | None, revision: str) -> None:
        found = self._found(name, revision)
        if found is None:
            return
        commit, files = found
        if kind == "tree":
            self._send(
                200,
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ],
            )
            return
        siblings = [{"rfilename": p} for p in files]
        self._send(
            200,
            {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "private": False},
        )

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self._found(name, revision)
        if found is None:
            return
        commit, files = found
        if path not in files:
            self._send(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        content = files[path]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": commit}
        if self.hub.truncate == path.rsplit("/")[-1]:
            content = content[: len(content) // 2]
        if self.hub.cut == path.rsplit("/")[-1] and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", headers["ETag"])
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self._send(200, content, **headers)
