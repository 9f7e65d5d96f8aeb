"""What a public server must not take or keep: endless bodies, given up uploads, closed pages."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import math
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

BODY_BYTES = 4_000_000  # a form with two full prompts is some 10 kB; uploads are counted apart
TAKE_KEPT_S = 24 * 3600  # a take in the temporary folder
KEPT_S = 3600  # an upload, or the copy of a take that the page shows, since it was last handed out
YOUNG_S = 300.0  # a file that no bound on bytes deletes: it may be in use
SWEEP_EVERY_S = 60.0
SESSIONS = 800  # pages that Gradio remembers, 0.2 MB each; it would remember 10,000
CLOSED_SESSIONS = 50  # among them that are closed
M_ARENA_MAX, HEAPS = -8, 2  # glibc's name for the setting, and what it becomes
FILES = 4096  # open ones that are wished for
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


class ClosedPages:
    """Lets Gradio forget the pages that were closed, but for the last ones, which may come back.

    Gradio keeps a copy of every component's description for each page and each API client. Its
    `state_session_capacity` bounds them, but drops open pages as well as closed ones.

    Args:
        demo: a `gr.Blocks`.
    """

    def __init__(self, demo: Any) -> None:
        self._demo = demo
        self._closed: OrderedDict[str, None] = OrderedDict()  # the last one closed last

    def add(self, session: str) -> None:
        """A page was closed."""
        self._closed[session] = None
        self._closed.move_to_end(session)
        while len(self._closed) > CLOSED_SESSIONS:
            oldest, _ = self._closed.popitem(last=False)
            holder = self._demo.state_holder
            if getattr(holder.session_data.get(oldest), "is_closed", False):
                holder.session_data.pop(oldest, None)
                holder.time_last_used.pop(oldest, None)


class Sweeper:
    """Deletes files in a folder that nobody changed for a while, and sooner where they are many.

    The age is what this sweeper has seen itself, on a clock that no one sets: were it the age that
    the file system states, setting the computer's clock would delete what was made just now.

    Args:
        folder: to sweep.
        kept_s: how long a file stays that nobody changes.
        kept_bytes: how much stays; the oldest go first, and none younger than `YOUNG_S`.
        skip: a folder in it that is none of its business.
    """

    def __init__(
        self, folder: Path, kept_s: float, kept_bytes: float = math.inf, skip: Path | None = None
    ) -> None:
        self._folder, self._skip = folder, skip
        self._kept_s, self._kept_bytes = kept_s, kept_bytes
        self._seen: dict[Path, tuple[int, float]] = {}  # a file's change, and when it was seen

    def sweep(self) -> int:
        """Deletes what has not changed for `kept_s` of sweeps and what is too much; how many."""
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
        return count + self._make_room(now)

    def _make_room(self, now: float) -> int:
        """Deletes the oldest files until the others are few enough; those of a take together."""
        sizes = {}
        for path in self._seen:
            with suppress(OSError):
                sizes[path] = path.stat().st_size
        over, count = sum(sizes.values()) - self._kept_bytes, 0
        oldest = sorted(sizes, key=lambda path: (self._seen[path][1], path.with_suffix("")))
        for _, files in itertools.groupby(oldest, key=lambda path: path.with_suffix("")):
            for path in files if over > 0 else ():
                if now - self._seen[path][1] < YOUNG_S:
                    return count
                with suppress(OSError):
                    path.unlink()
                    count += 1
                    over -= sizes[path]
        return count


def sweep_while(running: Callable[[], bool], folder: Path, kept_bytes: float) -> None:
    """Sweeps a server's temporary folder, and its takes apart, for as long as it runs."""
    takes = folder / "takes"
    sweepers = [
        Sweeper(folder, KEPT_S, kept_bytes, skip=takes),
        Sweeper(takes, TAKE_KEPT_S, kept_bytes),
    ]
    while running():
        time.sleep(SWEEP_EVERY_S)
        for sweeper in sweepers:
            sweeper.sweep()
        gc.collect()
        _glibc("malloc_trim", 0)  # what is free in the heaps goes back to the system


def share_heaps() -> None:
    """Gives the threads two heaps together, where glibc would give each core eight.

    Memory that is free in one heap is not for the others: in 300 jobs of the soak on two cores
    the process grew by 5.4 %, and by 0.5 % with two. Call it before there are threads.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _glibc("mallopt", M_ARENA_MAX, HEAPS)


def raise_file_limit() -> None:
    """Lets this process have more open files, as far as the system permits: macOS begins with 256.

    Each connection is one.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def file_limit() -> int:
    """How many files this process may have open."""
    if resource is None:
        return FILES
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES if soft == resource.RLIM_INFINITY else soft


def _glibc(name: str, *arguments: int) -> None:
    """Calls the C library's function where there is one."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another library than glibc
            getattr(ctypes.CDLL("libc.so.6"), name)(*arguments)
