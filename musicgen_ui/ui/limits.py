"""What a public server must not take or keep: bodies without end, uploads that were given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BODY_BYTES = 4_000_000  # a form with two full prompts is some 10 kB; uploads are counted apart
TAKE_KEPT_S = 24 * 3600  # a take in the temporary folder
KEPT_S = 3600  # an upload, or the copy of a take that the page shows, since it was last handed out
SWEEP_EVERY_S = 600.0
STALLED_S, SLOW_BYTES_S = 30.0, 5_000  # a body's pause, and its pace from then on


class BodyLimit:
    """Refuses request bodies that are too large, counted as they come (ASGI middleware).

    Gradio limits uploaded files, but reads a form field or a JSON body of any size into memory.
    """

    def __init__(self, app: Any, upload_bytes: int, body_bytes: int = BODY_BYTES) -> None:
        self.app = app
        self.upload_bytes = upload_bytes
        self.body_bytes = body_bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Serves a request whose body stays within its limit, else answers 413."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = scope["path"].rstrip("/").endswith("/upload")
        limit = self.upload_bytes if upload else self.body_bytes
        headers = dict(scope["headers"])
        seen, started, unfinished, began_s = 0, False, True, time.monotonic()

        async def counted() -> dict:
            nonlocal seen, unfinished
            left_s = STALLED_S + seen / SLOW_BYTES_S - (time.monotonic() - began_s)
            message = await asyncio.wait_for(receive(), max(left_s, 0) if unfinished else None)
            unfinished = message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _TooLargeError
            return message

        async def noted(message: dict) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            if announced(headers) > limit:
                raise _TooLargeError
            await self.app(scope, counted, noted)
        except (_TooLargeError, TimeoutError) as error:
            if started:
                raise
            if isinstance(error, TimeoutError):
                await refuse(send, 408, "The request came too slowly.")
            else:
                await refuse(send, 413, f"The request is larger than {limit // 1_000_000} MB.")


class _TooLargeError(Exception):
    """A body passed its limit."""


def announced(headers: Mapping[bytes, bytes]) -> int:
    """The body's length as its sender states it; 0 where nothing can be made of that."""
    text = headers.get(b"content-length", b"")
    return int(text) if text.isdigit() else 0


async def refuse(send: Callable, status: int, text: str) -> None:
    """Answers with a sentence."""
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Sweeper:
    """Deletes files in a folder that nobody changed for a while; `skip` is none of its business.

    The age is what this sweeper has seen itself, on a clock that no one sets: were it the age that
    the file system states, setting the computer's clock would delete what was made just now.
    """

    def __init__(self, folder: Path, kept_s: float, skip: Path | None = None) -> None:
        self._folder, self._skip = folder, skip
        self._kept_s = kept_s
        self._seen: dict[Path, tuple[int, float]] = {}  # a file's change, and when it was seen

    def sweep(self) -> int:
        """Deletes what has not changed for `kept_s` of sweeps; how many files."""
        count, now, seen = 0, time.monotonic(), self._seen
        self._seen = {}
        for path in sorted(self._folder.rglob("*"), reverse=True):
            if self._skip and path.is_relative_to(self._skip):
                continue
            try:
                if path.is_dir():
                    path.rmdir()  # only an empty one goes
                    continue
                changed = path.stat().st_mtime_ns
                before = seen.get(path, (changed, now))
                since_s = before[1] if before[0] == changed else now
                if now - since_s >= self._kept_s:
                    path.unlink()
                    count += 1
                else:
                    self._seen[path] = (changed, since_s)
            except OSError:
                continue
        return count


def sweep_while(running: Callable[[], bool], folder: Path) -> None:
    """Sweeps a server's temporary folder, its takes apart, for as long as it runs."""
    takes = folder / "takes"
    sweepers = [Sweeper(folder, KEPT_S, skip=takes), Sweeper(takes, TAKE_KEPT_S)]
    while running():
        time.sleep(SWEEP_EVERY_S)
        for sweeper in sweepers:
            sweeper.sweep()
