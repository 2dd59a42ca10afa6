"""A Hugging Face Hub for tests: an HTTP server of this machine that speaks its protocol for fetching."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@dataclass
class Hub:
    """What the server has, and what it was asked for.

    Attributes:
      models: `org/name` -> its directory.
      gated: names that want a token.
      cut: a file that breaks off in the middle, the next time.
      asked: requests so far, `GET /path`.
    """

    url: str = ""
    models: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: str | None = None
    asked: list[str] = field(default_factory=list)

    def files(self, repo: str) -> dict[str, bytes]:
        root = self.models[repo]
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    def commit(self, repo: str) -> str:
        """Another one whenever a file changes."""
        return hashlib.sha1(repr(self.files(repo)).encode()).hexdigest()

    def fetched(self, name: str) -> int:
        """How often a file was sent."""
        return sum(line.startswith("GET") and line.endswith(f"/{name}") for line in self.asked)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        found = re.fullmatch(
            r"(?:/api/models)?/(?P<repo>[\w.-]+/[\w.-]+)"
            r"(?:/(?P<what>revision|resolve|tree)/(?P<rev>[\w.-]+)(?:/(?P<file>.+))?)?",
            path,
        )
        repo = found["repo"] if found else ""
        if repo not in self.hub.models:
            return self._error(404, "RepoNotFound")
        if repo in self.hub.gated and "Authorization" not in self.headers:
            return self._error(403, "GatedRepo")
        commit = self.hub.commit(repo)
        if found["rev"] not in (None, "main", "v1", commit):
            return self._error(404, "RevisionNotFound")
        files = self.hub.files(repo)
        if found["what"] == "resolve":
            if found["file"] not in files:
                return self._error(404, "EntryNotFound", commit)
            return self._file(found["file"], files[found["file"]], commit)
        if found["what"] == "tree":
            listed = [{"type": "file", "oid": _etag(d), "size": len(d), "path": n} for n, d in files.items()]
            return self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        siblings = [{"rfilename": name} for name in files]
        info = {
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "siblings": siblings,
            "private": False,
            "tags": [],
        }
        return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, data: bytes, commit: str) -> None:
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int(re.sub(r"\D", "", self.headers.get("Range", "").split("-")[0]) or 0)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and self.hub.cut == name:
            self.hub.cut = None
            self._send(200, data[: len(data) // 2], headers | {"Content-Length": str(len(data))})
            self.close_connection = True
            return
        self._send(206 if start else 200, data[start:], headers)

    def _error(self, code: int, name: str, commit: str = "") -> None:
        self._send(code, b"{}", {"X-Error-Code": name, **({"X-Repo-Commit": commit} if commit else {})})

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """The server, as long as the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
