"""The password at the door: nothing is shown or made for those who have not signed in.

Gradio asks for a password on most of its routes; this middleware stands before all of them, our
own and the MCP tool's included, and lets strangers have the sign-in page and what draws it. Who is
known shows Gradio's cookie, or brings name and password with each request (HTTP Basic), as MCP
clients and scripts do. A wrong password is answered late.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import secrets
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any

OPEN = {  # a stranger's: the sign-in page, what a browser and whoever watches the server ask for
    *("/", "/login", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json"),
    *("/gradio_api/theme.css", "/gradio_api/startup-events"),  # Gradio asks itself for the latter
    *("/healthz", "/metrics"),  # /metrics has a token of its own
}
OPEN_FOLDERS = ("/static/", "/assets/", "/svelte/")  # Gradio's own files
API = re.compile(rb"window\.gradio_api_info = .*?</script>", re.DOTALL)
WRONG_S = 1.0  # until a wrong password is answered


class Gate:
    """Answers 401 to strangers (ASGI middleware).

    Args:
        app: what is behind it; Gradio's with `auth` of the same name and password.
        user: the name.
        password: its password.
    """

    def __init__(self, app: Any, user: str, password: str) -> None:
        self.app = app
        self.user = user
        self._credentials = f"{user}:{password}".encode()
        self._token = secrets.token_urlsafe(32)  # the session of those who bring the password

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Serves who is known, and the open paths to all."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        gradio = scope["app"]
        if not self._known(gradio, scope) and self._brings_password(scope):
            gradio.tokens[self._token] = self.user
            cookie = f"{_cookies(gradio)[0]}={self._token}".encode()
            others = [(name, value) for name, value in scope["headers"] if name != b"cookie"]
            scope = {**scope, "headers": [*others, (b"cookie", cookie)]}
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        known = self._known(gradio, scope)
        if not known and path not in OPEN and not path.startswith(OPEN_FOLDERS):
            await _refuse(scope, send)
            return
        if path == "/" and not known:
            send = _without_api(send)
        elif path.rstrip("/") == "/login":
            send = _late_when_wrong(send)
        await self.app(scope, receive, send)

    def _known(self, gradio: Any, scope: dict) -> bool:
        try:
            sent = SimpleCookie(_header(scope, b"cookie").decode("latin-1"))
        except CookieError:
            return False
        return any(n in sent and sent[n].value in gradio.tokens for n in _cookies(gradio))

    def _brings_password(self, scope: dict) -> bool:
        # gradio_client moves what it is given for the one header to the other.
        told = _header(scope, b"authorization") or _header(scope, b"x-hf-authorization")
        scheme, _, encoded = told.partition(b" ")
        try:
            brought = base64.b64decode(encoded.strip(), validate=True)
        except binascii.Error:
            return False
        return scheme.lower() == b"basic" and secrets.compare_digest(brought, self._credentials)


def _cookies(gradio: Any) -> tuple[str, str]:
    """The names of Gradio's cookies, over HTTPS and without."""
    names = ("access-token", "access-token-unsecure")
    return f"{names[0]}-{gradio.cookie_id}", f"{names[1]}-{gradio.cookie_id}"


def _header(scope: dict, name: bytes) -> bytes:
    return b"; ".join(value for key, value in scope["headers"] if key == name)


async def _refuse(scope: dict, send: Callable) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    if _header(scope, b"authorization"):
        await asyncio.sleep(WRONG_S)
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": b"Sign in first.\n"})


def _without_api(send: Callable) -> Callable:
    """The sign-in page, less the description of the API that Gradio puts into it."""
    start: dict = {}
    page: list[bytes] = []

    async def less(message: dict) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        page.append(message.get("body", b""))
        if not message.get("more_body"):
            body = API.sub(b"window.gradio_api_info = {};</script>", b"".join(page))
            headers = [h for h in start["headers"] if h[0] != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await send({**start, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    return less


def _late_when_wrong(send: Callable) -> Callable:
    async def late(message: dict) -> None:
        if message.get("status", 200) >= 400:
            await asyncio.sleep(WRONG_S)
        await send(message)

    return late
