"""What a request passes before Gradio sees it (ASGI middleware), in the order of `app.middleware`.

A browser sends requests for every website that it shows, also to servers on its own computer, and
DNS rebinding gives such a server's address another name: `OriginCheck` refuses both. Gradio brings
more routes than this page needs, among them one that fetches any address for whoever asks and one
that runs FFmpeg on a body: `RouteAllowList` lets through those that page, API and MCP use. Files
are served from the cache alone, where Gradio names a file by its content's hash, so nobody finds
another visitor's take by guessing its prompt and seed. Slow clients and their number are a reverse
proxy's business, see docs/hosting.md.
"""

from __future__ import annotations

import contextlib
import fnmatch
import ipaddress
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)


# Gradio's routes, by what follows /gradio_api/: page, clients, MCP.
OPEN_ROUTES = {
    *("info", "openapi.json", "config", "startup-events", "theme.css", "app_id"),
    *("queue", "run", "call", "cancel", "reset", "heartbeat", "upload", "upload_progress"),
    *("token", "user", "login_check", "mcp"),
}
USUAL_PORTS = (80, 443)
WRONG_HOST = (
    "This server does not answer to that name: open it as localhost, or start it with "
    "--allowed-hosts and the name."
)
WRONG_ORIGIN = (
    "Pages of other websites may not use this server: open its own page, or start it with "
    "--allowed-hosts and the website's name."
)
NOT_UNDERSTOOD = "The request could not be understood: “Use via API” on the page lists the calls."
BODY_BYTES = 4_000_000  # a form with two full prompts is some 10 kB; uploads are counted apart
SPARE_BYTES = 500_000_000  # of the disk are left to the takes
ID_CHARACTERS = 64  # Gradio's own have 36 at most
ID_FIELDS = ("session_hash", "event_id")
ROUTES_WITH_IDS = ("queue", "call", "run", "api", "cancel", "reset")  # in their bodies
# The headers of a part of a file (206). Gradio adds those of the request, cookies included.
PART_HEADERS = {
    *(b"cache-control", b"content-disposition", b"content-encoding"),
    *(b"content-length", b"content-range", b"content-type", b"date", b"etag", b"last-modified"),
    *(b"vary", b"access-control-allow-origin"),
}


async def refuse(
    scope: Scope, send: Send, status: int, text: str, headers: Mapping[str, str] | None = None
) -> None:
    """Answers with a sentence; closes a websocket."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    named = {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store"}
    named |= {"connection": "close"} | dict(headers or {})
    raw = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})


def is_loopback(host: str) -> bool:
    """Whether an address is one of this computer's own, which no other computer reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host_and_port(address: str) -> tuple[str, int]:
    """An address's host in lower case, and its port; 0 for the usual one. ("", 0) for nonsense."""
    try:
        parts = urlsplit(address)
        port = parts.port or 0
    except ValueError:
        return "", 0
    return (parts.hostname or ""), (0 if port in USUAL_PORTS else port)


class OriginCheck:
    """Refuses requests that other websites send by way of a visitor's browser.

    Args:
        app: what is behind it.
        names: of this server, as `fnmatch` patterns in lower case. Pages of these may call it.
        local: whether it listens on loopback alone: then it has no other names but localhost.
        public: whether pages of every website may call it.
    """

    def __init__(
        self, app: ASGIApp, names: Collection[str], local: bool, public: bool = False
    ) -> None:
        self.app = app
        self.names = names
        self._local, self._public = local, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves who calls this server by its name, and not from another website."""
        if scope["type"] in ("http", "websocket"):
            headers = Headers(raw=scope["headers"])
            if self._local and not self._is_named(headers.getlist("host")):
                await refuse(scope, send, 403, WRONG_HOST)
                return
            if not self._public and self._is_foreign(headers, scope):
                await refuse(scope, send, 403, WRONG_ORIGIN)
                return
        await self.app(scope, receive, send)

    def _is_named(self, hosts: list[str]) -> bool:
        name = _host_and_port(f"//{hosts[0]}")[0] if len(hosts) == 1 else ""
        return is_loopback(name) or self._knows(name)

    def _knows(self, name: str) -> bool:
        return bool(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.names)

    def _is_foreign(self, headers: Headers, scope: Scope) -> bool:
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
            host_name, host_port = _host_and_port(f"//{host or ''}")
            # A proxy may leave the port out, a browser only where it is the usual one.
            by_proxy = host_port == 0 and served_port not in USUAL_PORTS
            if name and name == host_name and (port == host_port or by_proxy):
                return False
        return not self._knows(name)


class RouteAllowList:
    """Answers 404 for Gradio's routes that nothing here uses, and for files outside the cache.

    Args:
        app: what is behind it.
        cache: the folder whose files are served.
    """

    def __init__(self, app: ASGIApp, cache: Path) -> None:
        self.app = app
        self.cache = cache.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves what is open."""
        if scope["type"] in ("http", "websocket") and not self._is_open(scope["path"]):
            await refuse(scope, send, 404, "Not found.")
            return
        await self.app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        found = re.search(r"/gradio_api/(.+)", path, re.DOTALL)  # behind any root path
        if not found:
            return True
        route = found[1]
        if route.startswith("file="):
            return self._is_in_cache(route.removeprefix("file="))
        return route.partition("/")[0] in OPEN_ROUTES

    def _is_in_cache(self, file: str) -> bool:
        try:
            return Path(os.path.realpath(file)).is_relative_to(self.cache)
        except (OSError, ValueError):  # too long, a null byte
            return False


class ErrorResponses:
    """Answers 400 where Gradio raises: it trusts what its own page sends, whoever sends it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request that Gradio understands, and a part of a file with its own headers."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        started = False

        async def forward(message: Message) -> None:
            nonlocal started
            started = True
            if message.get("status") == 206:
                headers = [h for h in message["headers"] if h[0].lower() in PART_HEADERS]
                message = {**message, "headers": [*headers, (b"accept-ranges", b"bytes")]}
            await send(message)

        try:
            await self.app(scope, receive, forward)
        except Exception as error:
            log.warning("A request was not understood: %s", type(error).__name__)
            log.debug("It was", exc_info=error)
            if not started:
                await refuse(scope, send, 400, NOT_UNDERSTOOD)
            elif scope["type"] == "http":  # what was begun is ended, as far as it goes
                with contextlib.suppress(Exception):
                    await send({"type": "http.response.body", "body": b""})


class BodyLimit:
    """Refuses request bodies that are too large, counted as they come, and uploads to a full disk.

    Gradio limits uploaded files, but reads a form field or a JSON body of any size into memory.

    Args:
        app: what is behind it.
        upload_bytes: the largest body of an upload.
        body_bytes: the largest body of any other request.
        folder: where uploads are written.
    """

    def __init__(
        self, app: ASGIApp, upload_bytes: int, body_bytes: int = BODY_BYTES, folder: Path = Path()
    ) -> None:
        self.app = app
        self.upload_bytes, self.body_bytes, self.folder = upload_bytes, body_bytes, folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request whose body stays within its limit, else answers 413 or 507."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = scope["path"].rstrip("/").endswith("/upload")
        if upload and shutil.disk_usage(self.folder).free < SPARE_BYTES:
            text = "The server's disk has no room for files at the moment."
            await refuse(scope, send, 507, text)
            return
        limit = self.upload_bytes if upload else self.body_bytes
        seen, started = 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _TooLargeError
            return message

        async def forward(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if content_length(scope) > limit:
                raise _TooLargeError
            await self.app(scope, counted, forward)
        except _TooLargeError:
            if started:
                raise
            await refuse(scope, send, 413, f"The request is larger than {limit // 1_000_000} MB.")


class _TooLargeError(Exception):
    """A body passed its limit."""


def content_length(scope: Scope) -> int:
    """The body's length as its sender states it; 0 where nothing can be made of that."""
    text = Headers(raw=scope["headers"]).get("content-length", "")
    return int(text) if text.isdecimal() and text.isascii() else 0


class IdentifierLimit:
    """Refuses long identifiers of sessions, events and uploads.

    Clients choose them, and Gradio keeps each one, whatever its length, with what belongs to it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request whose identifiers are short, else answers 400."""
        api, route = "", ""
        if scope["type"] == "http":
            _, api, route = scope["path"].rpartition("/gradio_api/")
        if not api or route.startswith("file="):
            await self.app(scope, receive, send)
            return
        ids: list[object] = [*route.split("/")]
        ids += [value for _, value in parse_qsl(scope["query_string"].decode("latin-1"))]
        if scope["method"] == "POST" and route.split("/")[0] in ROUTES_WITH_IDS:
            body, receive = await read_body(receive)
            with contextlib.suppress(ValueError, RecursionError):  # Gradio says what is wrong
                fields = json.loads(body)
                ids += [fields.get(key) for key in ID_FIELDS] if isinstance(fields, dict) else []
        if any(isinstance(each, str) and len(each) > ID_CHARACTERS for each in ids):
            text = f"An identifier in it is longer than {ID_CHARACTERS} characters."
            await refuse(scope, send, 400, text)
            return
        await self.app(scope, receive, send)


async def read_body(receive: Receive) -> tuple[bytes, Receive]:
    """A body, and a `receive` that gives it once more."""
    messages: list[Message] = []
    body = b""
    while not messages or messages[-1].get("more_body"):
        messages.append(await receive())
        body += messages[-1].get("body", b"")
    messages.reverse()

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return body, again


class ServerRoutes:
    """This server's own routes, which come before Gradio's.

    Gradio's page answers every path, so a route that is added to its app is found too late, and
    not before the page is launched.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self.app = app
        self._router = Router(routes, redirect_slashes=False, default=app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one of the routes, else what is behind."""
        of_a_path = scope["type"] in ("http", "websocket")
        await (self._router if of_a_path else self.app)(scope, receive, send)
