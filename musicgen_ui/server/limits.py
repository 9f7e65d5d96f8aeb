"""What a public server must not take or keep: endless bodies and names, given up uploads, closed
pages."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import json
import math
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

NAME_CHARACTERS = 64  # Gradio's own names have 36 at most
NAMES = ("session_hash", "event_id")
WITH_NAMES = ("queue", "call", "run", "api", "cancel", "reset")  # routes whose body has them
UNREAD = 1000  # names of uploads and of sessions without a reader that Gradio may keep
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


class NameLimit:
    """Refuses long names of sessions, events and uploads (ASGI middleware).

    Clients choose them, and Gradio keeps each one, whatever its length, with what belongs to it.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Serves a request whose names are short, else answers 400."""
        _, api, route = scope["path"].rpartition("/gradio_api/")
        if scope["type"] != "http" or not api or route.startswith("file="):
            await self.app(scope, receive, send)
            return
        names: list[Any] = route.split("/")
        names += [value for _, value in parse_qsl(scope["query_string"].decode("latin-1"))]
        if scope["method"] == "POST" and route.split("/")[0] in WITH_NAMES:
            body, receive = await _whole(receive)
            with suppress(ValueError, RecursionError):  # Gradio says what is wrong with those
                held = json.loads(body)
                names += [held.get(key) for key in NAMES] if isinstance(held, dict) else []
        if any(isinstance(name, str) and len(name) > NAME_CHARACTERS for name in names):
            await refuse(send, 400, f"A name in it is longer than {NAME_CHARACTERS} characters.")
            return
        await self.app(scope, receive, send)


async def _whole(receive: Callable) -> tuple[bytes, Callable]:
    """A body, and a `receive` that gives it once more."""
    messages: list[dict] = []
    parts: list[bytes] = []
    while not messages or messages[-1].get("more_body"):
        messages.append(await receive())
        parts.append(messages[-1].get("body", b""))
    messages.reverse()

    async def again() -> dict:
        return messages.pop() if messages else await receive()

    return b"".join(parts), again


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


def keep_no_values() -> None:
    """Has Gradio keep no value that a page sends: it would, for links that this app does not have,
    megabytes of each field of each page."""
    from gradio.state_holder import SessionState

    SessionState._update_value_in_config = lambda *_: None  # type: ignore[method-assign]


def forget_names(demo: Any) -> None:
    """Lets Gradio forget names that clients chose and nobody reads from; it keeps them for ever."""
    from gradio.routes import file_upload_statuses as uploads

    for kept in (uploads._signals, uploads._statuses):
        for name in list(kept)[:-UNREAD]:
            kept.pop(name, None)
    unread = demo._queue.pending_messages_per_session
    for session in list(demo._queue.pending_event_ids_session):
        if session not in unread:
            demo._queue.pending_event_ids_session.pop(session, None)
    if len(demo.upload_file_set) > UNREAD:  # the paths of uploads, most of which are deleted
        demo.upload_file_set -= {
            path for path in list(demo.upload_file_set) if not Path(path).exists()
        }


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


def sweep_while(demo: Any, folder: Path, kept_bytes: float) -> None:
    """Sweeps a server's temporary folder, and its takes apart, for as long as it runs."""
    takes = folder / "takes"
    sweepers = [
        Sweeper(folder, KEPT_S, kept_bytes, skip=takes),
        Sweeper(takes, TAKE_KEPT_S, kept_bytes),
    ]
    while demo.is_running:
        time.sleep(SWEEP_EVERY_S)
        for sweeper in sweepers:
            sweeper.sweep()
        forget_names(demo)
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
