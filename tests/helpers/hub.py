"""A Hub on this computer: enough of the Hugging Face Hub's API for the real client to download.

It serves folders as repositories, with ranges, and can misbehave: break a transfer off, damage or
stall it, answer nothing at all, refuse whatever it is asked, or say that there is no such
repository. It records what it was asked for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "5" * 40


@dataclass
class Hub:
    """The server's state: what it holds, how it misbehaves, what it was asked."""

    url: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    break_after: dict[str, list[int]] = field(default_factory=dict)  # a file: bytes before each cut
    slow: threading.Event | None = None  # transfers wait for it half-way
    silent: threading.Event | None = None  # all answers wait for it
    damaged: dict[str, int] = field(default_factory=dict)  # a file: how often it comes damaged
    refusal: tuple[int, dict[str, str]] | None = None  # every answer's status, and headers
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range

    def fetched(self) -> list[str]:
        """The files whose contents were asked for, in order."""
        return [p.rpartition("/")[2] for m, p, _ in self.asked if m == "GET" and "/resolve/" in p]


@contextmanager
def serve(**repositories: Path):
    """Runs a Hub; a keyword `owner__name` names a repository."""
    hub = Hub(repositories={k.replace("__", "/"): v for k, v in repositories.items()})

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(patch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Points the Hub's client at a server, and at a cache."""
    from huggingface_hub import constants

    from musicgen_ui.checkpoints import hub

    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    hub._reachable.cache_clear()


class _Handler(BaseHTTPRequestHandler):
    state: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.state.silent:
            self.state.silent.wait(10)
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append((self.command, path, self.headers.get("Range", "")))
        if self.state.refusal:
            self._json({"error": "refused"}, *self.state.refusal)
            return
        if path.startswith("/api/models/"):
            name, _, rest = path.removeprefix("/api/models/").partition("/tree/")
            folder = self.state.repositories.get(name.partition("/revision/")[0])
            if folder:
                self._json(_tree(folder) if rest else _info(name, folder))
                return
        elif "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            folder, file = self.state.repositories.get(name), rest.partition("/")[2]
            if folder and (folder / file).is_file():
                self._file(folder / file)
                return
        self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _json(self, value: object, status: int = 200, headers: dict | None = None) -> None:
        self._send(status, json.dumps(value).encode(), headers or {})

    def _file(self, file: Path) -> None:
        body = file.read_bytes()
        headers = {"ETag": f'"{_hash(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if _is_lfs(file):
            headers |= {"X-Linked-ETag": f'"{_hash(file)}"', "X-Linked-Size": str(len(body))}
        if self.command == "GET" and self.state.damaged.get(file.name):
            self.state.damaged[file.name] -= 1
            body = body[:-9] + bytes(255 - byte for byte in body[-9:])
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if not wanted:
            self._send(200, body, headers, self.state.break_after.get(file.name))
            return
        first, _, last = wanted.partition("-")
        start, end = int(first), int(last or len(body) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
        self._send(206, body[start:end], headers, self.state.break_after.get(file.name))

    def _send(self, status: int, body: bytes, headers: dict, cuts: list[int] | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.close_connection = True
            return
        if self.state.slow and len(body) > 100_000:
            self.wfile.write(body[:100_000])
            self.state.slow.wait(10)
            body = body[100_000:]
        self.wfile.write(body)


def _is_lfs(file: Path) -> bool:
    return file.stat().st_size > 100_000


def _hash(file: Path) -> str:
    """As the Hub names contents: SHA-256 of large files, git's hash of small ones."""
    content = file.read_bytes()
    if _is_lfs(file):
        return hashlib.sha256(content).hexdigest()
    whole = f"blob {len(content)}\0".encode() + content
    return hashlib.sha1(whole, usedforsecurity=False).hexdigest()


def _info(name: str, folder: Path) -> dict:
    siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
    return {"id": name.partition("/revision/")[0], "sha": COMMIT, "siblings": siblings}


def _tree(folder: Path) -> list[dict]:
    return [_entry(file) for file in sorted(folder.iterdir())]


def _entry(file: Path) -> dict:
    size = file.stat().st_size
    entry = {"type": "file", "path": file.name, "size": size, "oid": _hash(file)[:40]}
    lfs = {"oid": _hash(file), "size": size, "pointerSize": 134}
    return entry | {"lfs": lfs} if _is_lfs(file) else entry
