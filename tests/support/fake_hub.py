"""A Hub on the loopback that the real `huggingface_hub` client can download models from, and count its requests.

It speaks what `snapshot_download` asks for: a revision's commit, a commit's files, and each file's bytes. As the Hub
does, it serves a small file itself, with the git blob's sha1 as ETag, and sends the client elsewhere for a large one,
with its sha256 in `X-Linked-ETag`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """`refs` names commits; `files` are a commit's, by path."""

    refs: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Put a commit on a branch; returns its hash."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False).hexdigest()
        self.files[commit] = dict(files)
        self.refs[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a hash stands for."""
        return revision if revision in self.files else self.refs.get(revision)


class FakeHub:
    """The server. Every answer has the status `broken` if that is set; large files end early if `cut_short`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.broken: int | None = None
        self.cut_short = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        # Another name than the endpoint's, as the Hub's large files come from another host.
        self._large_files = f"http://localhost:{self._server.server_address[1]}/lfs"
        self._up = True
        self._thread.start()

    def stop(self) -> None:
        """Answer no more: connections are refused."""
        if self._up:
            self._up = False
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def repository(self, name: str) -> Repository:
        """The repository of that name, made if need be."""
        return self.repositories.setdefault(name, Repository())

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for, by name or by sha256, in the order of their names."""
        gets = [line.removeprefix("GET ") for line in self.requests if line.startswith("GET ")]
        return sorted(path.rsplit("/", 1)[-1] for path in gets if "/resolve/" in path or path.startswith("/lfs/"))

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805  `self` is the handler's
        class Handler(BaseHTTPRequestHandler):  # HTTP/1.0: a connection kept alive would outlive `stop`
            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                hub._answer(self, unquote(urlsplit(self.path).path))

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler, path: str) -> None:
        if self.broken:
            return _send(request, self.broken, b"out of order")
        if path.startswith("/lfs/"):
            return self._send_large(request, path.removeprefix("/lfs/"))
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            kind, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        else:
            parts = path.removeprefix("/").split("/")
            if len(parts) < 5 or parts[2] != "resolve":
                return _send(request, 404)
            owner, name, kind, revision = *parts[:3], parts[3]
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None:
            # The Hub does not tell strangers which repositories exist.
            return _send(request, 401, headers={"X-Error-Code": "RepoNotFound"})
        commit = repository.resolve(revision)
        if commit is None:
            return _send(request, 404, headers={"X-Error-Code": "RevisionNotFound"})
        if kind == "revision":
            content = {"id": f"{owner}/{name}", "sha": commit, "siblings": []}
            return _send(request, 200, json.dumps(content).encode(), headers={"Content-Type": "application/json"})
        if kind == "tree":
            listing = [_entry(path, content) for path, content in repository.files[commit].items()]
            return _send(request, 200, json.dumps(listing).encode(), headers={"Content-Type": "application/json"})
        if repository.gated:
            return _send(request, 401, headers={"X-Error-Code": "GatedRepo"})
        return self._send_file(request, repository, commit, path.split("/", 5)[5])

    def _send_file(self, request: BaseHTTPRequestHandler, repository: Repository, commit: str, file: str) -> None:
        content = repository.files[commit].get(file)
        if content is None:
            return _send(request, 404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if not is_large(file):
            return _send(request, 200, content, headers={"ETag": f'"{git_sha1(content)}"', "X-Repo-Commit": commit})
        digest = hashlib.sha256(content).hexdigest()
        linked = {
            "Location": f"{self._large_files}/{digest}",
            "X-Linked-ETag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": commit,
        }
        return _send(request, 302, headers=linked)

    def _send_large(self, request: BaseHTTPRequestHandler, digest: str) -> None:
        contents = [
            content
            for repository in self.repositories.values()
            for files in repository.files.values()
            for content in files.values()
        ]
        content = next(content for content in contents if hashlib.sha256(content).hexdigest() == digest)
        if self.cut_short:
            length = str(len(content))
            return _send(request, 200, content[: len(content) // 2], headers={"Content-Length": length})
        return _send(request, 200, content)


def is_large(name: str) -> bool:
    """True if a file is kept as the Hub keeps weights, outside git."""
    return name.endswith((".safetensors", ".bin"))


def git_sha1(content: bytes) -> str:
    """The name that git gives a blob."""
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
    if is_large(path):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry


def _send(
    request: BaseHTTPRequestHandler, status: int, content: bytes = b"", headers: Mapping[str, str] | None = None
) -> None:
    request.send_response(status)
    for name, value in ({"Content-Length": str(len(content))} | dict(headers or {})).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
