"""What outsiders may reach and hold open: routes, files, addresses, connections.

A browser sends requests for every website that it shows, also to servers on its own computer, and
DNS rebinding gives such a server's address another name. `SameOrigin` refuses both.
Gradio brings more routes than this page needs, among them one that fetches any address for whoever
asks and one that runs FFmpeg on a body; `Doors` lets through those that page, API and MCP use. It
serves files from the cache alone, where Gradio names a file by its content's hash, so nobody finds
another visitor's take by guessing its prompt and seed. Clips come as uploads: an address in their
place is refused before anything is looked up. Connections are counted, and one that does not get
to the end of a request's head is closed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import ipaddress
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio import route_utils, routes
from gradio.blocks import Block
from starlette.datastructures import FormData, Headers
from starlette.formparsers import MultiPartException

from musicgen_ui.server.limits import file_limit

log = logging.getLogger(__name__)

# Gradio's routes, by what follows /gradio_api/: page, clients, sign-in, MCP.
OPEN = {
    *("info", "openapi.json", "config", "startup-events", "theme.css", "app_id"),
    *("queue", "run", "call", "cancel", "reset", "heartbeat", "upload", "upload_progress"),
    *("token", "user", "login_check", "mcp"),
}
MAX_CONNECTIONS = 800  # fewer where a process may have fewer files open
SPARE_FILES = 100  # for models, takes, uploads and the libraries' own
MAX_OF_AN_ADDRESS = 100  # where it is a public one: behind a proxy, all visitors share the proxy's
HEAD_S = 20.0  # for a request's head
MAX_FILES = 8  # in one upload
SPARE_BYTES = 500_000_000  # of the disk are left to the takes
USUAL_PORTS = (80, 443)
WRONG_HOST = (
    "This server does not answer to that name: open it as localhost, or start it with "
    "--allowed-hosts and the name."
)
WRONG_ORIGIN = (
    "Pages of other websites may not use this server: open its own page, or start it with "
    "--allowed-hosts and the website's name."
)
# Of a file's part. Gradio adds the headers of the request to them, cookies and passwords included.
OF_A_PART = {
    *(b"cache-control", b"content-disposition", b"content-encoding"),
    *(b"content-length", b"content-range", b"content-type", b"date", b"etag", b"last-modified"),
    *(b"vary", b"access-control-allow-origin"),
}
TOO_MANY = b"There are too many connections to this server: try again in a minute.\n"
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Retry-After: 60\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(TOO_MANY)
)
NOT_FETCHED = "Clips are uploaded, not fetched: download it and hand over the file."


class SameOrigin:
    """Refuses requests that other websites send by way of a visitor's browser (ASGI middleware).

    Args:
        app: what is behind it.
        names: of this server, as `fnmatch` patterns in lower case. Pages of these may call it.
        local: whether it listens on loopback alone: then it has no other names but localhost.
        open_to_pages: whether pages of every website may call it.
    """

    def __init__(
        self, app: Any, names: Collection[str], local: bool, open_to_pages: bool = False
    ) -> None:
        self.app = app
        self.names = names
        self._local, self._open = local, open_to_pages

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Serves who calls this server by its name, and not from another website."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._has_name(headers.getlist("host")):
            await _answer(scope, send, 403, WRONG_HOST)
            return
        if not self._open and self._is_foreign(headers, scope):
            await _answer(scope, send, 403, WRONG_ORIGIN)
            return
        await self.app(scope, receive, send)

    def _has_name(self, hosts: list[str]) -> bool:
        if not self._local:
            return True
        name = _host_and_port(f"//{hosts[0]}")[0] if len(hosts) == 1 else ""
        return is_loopback(name) or self._knows(name)

    def _knows(self, name: str) -> bool:
        return bool(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.names)

    def _is_foreign(self, headers: Headers, scope: dict) -> bool:
        """Whether a request comes from a page of another origin, as far as a browser says so."""
        origin = headers.get("origin")
        if origin is None:  # pictures, scripts and frames have none
            asked = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
            followed_link = asked == ("navigate", "document")
            return headers.get("sec-fetch-site") == "cross-site" and not followed_link
        name, port = _host_and_port(origin)
        served_port = (scope.get("server") or ("", None))[1]
        # No page can set the second of them without asking first, and then it is refused.
        for host in (headers.get("host"), headers.get("x-forwarded-host")):
            own_name, own_port = _host_and_port(f"//{host or ''}")
            # A proxy may leave the port out, a browser only where it is the usual one.
            by_proxy = own_port == 0 and served_port not in USUAL_PORTS
            if name and name == own_name and (port == own_port or by_proxy):
                return False
        return not self._knows(name)


def _host_and_port(address: str) -> tuple[str, int]:
    """An address's host in lower case, and its port; 0 for the usual one. ("", 0) for nonsense."""
    try:
        parts = urlsplit(address)
        port = parts.port or 0
    except ValueError:
        return "", 0
    return (parts.hostname or ""), (0 if port in USUAL_PORTS else port)


def is_loopback(host: str) -> bool:
    """Whether an address is one of this computer's own, which no other computer reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Doors:
    """Answers 404 for what is not open and 400 for what Gradio stumbles over (ASGI middleware).

    Args:
        app: what is behind it.
        cache: the folder whose files are served.
    """

    def __init__(self, app: Any, cache: Path) -> None:
        self.app = app
        self.cache = cache.resolve()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Serves what is open."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        started = False

        async def noted(message: dict) -> None:
            nonlocal started
            started = True
            if message.get("status") == 206:
                headers = [h for h in message["headers"] if h[0].lower() in OF_A_PART]
                message = {**message, "headers": [*headers, (b"accept-ranges", b"bytes")]}
            await send(message)

        if not self._is_open(scope["path"]):
            await _answer(scope, send, 404, "There is nothing here.")
            return
        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            # Gradio trusts what its own page sends: anything else is the sender's mistake.
            log.warning("A request was not understood: %s", type(error).__name__)
            log.debug("It was", exc_info=error)
            if not started:
                text = "The request could not be understood."
                if isinstance(error, route_utils.FnIndexInferError):
                    text = "There is no call of that name: “Use via API” on the page lists them."
                await _answer(scope, send, 400, text)
            elif scope["type"] == "http":  # what was begun is ended, as far as it goes
                with contextlib.suppress(Exception):
                    await send({"type": "http.response.body", "body": b""})

    def _is_open(self, path: str) -> bool:
        found = re.search(r"/gradio_api/(.+)", path, re.DOTALL)  # behind any root path
        if not found:
            return True
        route = found[1]
        if route.startswith("file="):
            return self._is_shown(route.removeprefix("file="))
        return route.partition("/")[0] in OPEN

    def _is_shown(self, file: str) -> bool:
        try:
            return Path(os.path.realpath(file)).is_relative_to(self.cache)
        except (OSError, ValueError):  # too long, a null byte
            return False


async def _answer(scope: dict, send: Callable, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})


class NoSharing:
    """Takes the place of Gradio's middleware, which gives nearly every website credentials."""

    def __init__(self, app: Any, **_: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Passes everything on; see `SameOrigin`."""
        await self.app(scope, receive, send)


def guard_origins() -> None:
    """Has `SameOrigin` alone decide about other websites. Call it before Gradio's app is made."""
    routes.CustomCORSMiddleware = NoSharing  # type: ignore[misc, assignment]


def guard_files() -> None:
    """Bounds uploads, see `Uploads`, and makes components refuse an address instead of a file.

    Gradio fetches addresses, public ones only, but a body of any size and into memory. On the
    class: Gradio makes a page's components anew, and what was set on an instance is lost.
    """
    route_utils.GradioMultiPartParser = Uploads  # type: ignore[misc]
    Block.async_move_resource_to_block_cache = _only_files  # type: ignore


_take_in = Block.async_move_resource_to_block_cache


async def _only_files(component: Any, file: Any) -> Any:
    if re.match(r"\s*[a-z][a-z0-9+.-]+:", str(file or ""), re.IGNORECASE):
        raise gr.Error(NOT_FETCHED, print_exception=False)
    return await _take_in(component, file)


class Uploads(route_utils.GradioMultiPartParser):
    """Gradio's reader of uploads that takes files alone and leaves nothing of what breaks off.

    Gradio reads a form's other fields into memory, whatever their size, and keeps what was written
    of a file when its sender goes away.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"max_files": MAX_FILES, "max_fields": 0})

    async def parse(self) -> FormData:
        """The files of a form, written to the cache.

        Raises:
            MultiPartException: it is no such form, or too much for this server; Gradio answers 400.
        """
        if shutil.disk_usage(self.upload_dir or ".").free < SPARE_BYTES:
            raise MultiPartException("The server has no room for files at the moment.")
        try:
            form = await super().parse()
            if not all(name == "files" for name, _ in self.items):
                raise MultiPartException("A form of files named “files” was expected.")
            return form
        except BaseException:
            for file in self._files_to_close_on_error:
                file.close()
                Path(file.name).unlink(missing_ok=True)
            raise


def bound_connections(server: Any) -> None:
    """Bounds the connections of a running uvicorn server, and the wait for a request's head."""
    plain = server.config.http_protocol_class

    class Bounded(plain):  # type: ignore[misc, valid-type]
        """A connection that has to get on."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._unfinished: Any = None  # the request that was over when it was last looked at
            self._look_again = self.loop.call_later(HEAD_S, self._look)
            if is_too_many(self.connections, self.client):
                transport.write(FULL + TOO_MANY)
                transport.close()

        def connection_lost(self, error: Exception | None) -> None:
            self._look_again.cancel()
            super().connection_lost(error)

        def _look(self) -> None:
            over = self.cycle is None or self.cycle.response_complete
            if over and self.cycle is self._unfinished:
                self.transport.close()
                return
            self._unfinished = self.cycle if over else self
            self._look_again = self.loop.call_later(HEAD_S, self._look)

    server.config.http_protocol_class = Bounded


def hang_up(server: Any, within_s: float = 5.0) -> None:
    """Ends a running uvicorn server and breaks its connections off.

    A page takes that for a lost connection, and loads itself anew when the server is back. Gradio's
    own end would tell it that its job failed, or wait for pages that stay open.
    """
    server.should_exit = True
    end_s = time.monotonic() + within_s
    while server.thread.is_alive() and time.monotonic() < end_s:
        for connection in tuple(server.server_state.connections):
            with contextlib.suppress(RuntimeError):  # its loop has ended by now
                connection.loop.call_soon_threadsafe(connection.transport.abort)
        server.thread.join(0.05)


def most_connections() -> int:
    """How many connections there may be at once."""
    return min(MAX_CONNECTIONS, max(SPARE_FILES // 10, file_limit() - SPARE_FILES))


def is_too_many(connections: Iterable[Any], client: tuple[str, int] | None) -> bool:
    """Whether the newest of `connections`, `client`'s, is one more than there may be."""
    connections = list(connections)
    if len(connections) > most_connections():
        return True
    host = client[0] if client else ""
    same = [connection for connection in connections if (connection.client or [""])[0] == host]
    return len(same) > MAX_OF_AN_ADDRESS and _is_public(host)


def _is_public(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False
