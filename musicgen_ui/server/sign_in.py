"""The password at the door: nothing is shown or made for those who have not signed in.

Gradio asks for a password on most of its routes; this middleware stands before all of them, our
own and the MCP tool's included, and lets strangers have the sign-in page and what draws it. Who is
known shows Gradio's cookie, or brings name and password with each request (HTTP Basic), as MCP
clients and scripts do. A wrong password is answered late, wherever and however it was brought, and
few of an address are looked at meanwhile. Signing out ends the session of the browser that asks for
it alone.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
AT_ONCE = 5  # passwords of an address that are being looked at or wait for their answer
TOO_MANY = "Too many passwords at once: wait a moment and try again."
NO_SITE = re.compile(rb"samesite=\w+", re.IGNORECASE)
FORM_BYTES = 20_000  # of the sign-in form
FORM_S = 30.0  # until it is there


class Attempts:
    """Bounds how many secrets an address has looked at: few at once, each wrong one for a while."""

    def __init__(self) -> None:
        self._under_way: Counter[str] = Counter()  # by address

    @contextlib.contextmanager
    def one(self, scope: Mapping[str, Any]) -> Iterator[bool]:
        """Counts an attempt until its end; False where its address has too many under way."""
        address = (scope.get("client") or ("",))[0]
        self._under_way[address] += 1
        try:
            yield self._under_way[address] <= AT_ONCE
        finally:
            self._under_way[address] -= 1
            if not self._under_way[address]:
                del self._under_way[address]


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
        self._attempts = Attempts()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Serves who is known, and the open paths to all."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        gradio = scope["app"]
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        known = self._known(gradio, scope)
        if not known and (brought := _brought(scope)) is not None:
            if not await self._is_right(brought, scope, send):
                return
            scope, known = self._signed_in(gradio, scope), True
        if not known and path not in OPEN and not path.startswith(OPEN_FOLDERS):
            await _refuse(scope, send, 401, "Sign in first.")
        elif path.rstrip("/") == "/logout":
            await self._sign_out(gradio, scope, send)
        elif path.rstrip("/") == "/login":
            await self._sign_in(scope, receive, send)
        else:
            await self.app(scope, receive, send if known or path != "/" else _without_api(send))

    async def _is_right(self, brought: bytes, scope: dict, send: Callable) -> bool:
        """Whether it is the password; answers late where it is not."""
        with self._attempts.one(scope) as may_try:
            if not may_try:
                await _refuse(scope, send, 429, TOO_MANY)
                return False
            if secrets.compare_digest(brought, self._credentials):
                return True
            await asyncio.sleep(WRONG_S)
        await _refuse(scope, send, 401, "Name or password is wrong.")
        return False

    def _signed_in(self, gradio: Any, scope: dict) -> dict:
        gradio.tokens[self._token] = self.user
        cookie = f"{_cookies(gradio)[0]}={self._token}".encode()
        others = [(name, value) for name, value in scope["headers"] if name != b"cookie"]
        return {**scope, "headers": [*others, (b"cookie", cookie)]}

    async def _sign_in(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Gradio's sign-in. Its form is read first: only a whole one counts as an attempt."""
        form = await _read(receive)
        if form is None:
            await _refuse(scope, send, 413, "The form is too large, or came too slowly.")
            return
        with self._attempts.one(scope) as may_try:
            if may_try:
                await self.app(scope, _replay(form, receive), _sent_sign_in(send))
            else:
                await _refuse(scope, send, 429, TOO_MANY)

    async def _sign_out(self, gradio: Any, scope: dict, send: Callable) -> None:
        """Ends the session that asks, where Gradio would end everybody's."""
        for token in self._tokens(gradio, scope) - {self._token}:
            gradio.tokens.pop(token, None)
        gone = [f"{name}=; Max-Age=0; Path=/; HttpOnly; SameSite=Lax" for name in _cookies(gradio)]
        headers = [(b"location", b"./"), *((b"set-cookie", c.encode()) for c in gone)]
        await send({"type": "http.response.start", "status": 302, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _known(self, gradio: Any, scope: dict) -> bool:
        return bool(self._tokens(gradio, scope))

    def _tokens(self, gradio: Any, scope: dict) -> set[str]:
        """The sessions that a request's cookies are of."""
        try:
            sent = SimpleCookie(_header(scope, b"cookie").decode("latin-1"))
        except CookieError:
            return set()
        values = {sent[name].value for name in _cookies(gradio) if name in sent}
        return {value for value in values if value in gradio.tokens}


def _brought(scope: dict) -> bytes | None:
    """Name and password that a request brings (HTTP Basic), right or wrong; None for none."""
    # gradio_client moves what it is given for the one header to the other.
    told = _header(scope, b"authorization") or _header(scope, b"x-hf-authorization")
    scheme, _, encoded = told.partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        return base64.b64decode(encoded.strip(), validate=True)
    except binascii.Error:
        return b""


def _cookies(gradio: Any) -> tuple[str, str]:
    """The names of Gradio's cookies, over HTTPS and without."""
    names = ("access-token", "access-token-unsecure")
    return f"{names[0]}-{gradio.cookie_id}", f"{names[1]}-{gradio.cookie_id}"


def _header(scope: dict, name: bytes) -> bytes:
    return b"; ".join(value for key, value in scope["headers"] if key == name)


async def _refuse(scope: dict, send: Callable, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})


async def _read(receive: Callable) -> bytes | None:
    """A small form; None for what is none."""
    form, end_s = b"", time.monotonic() + FORM_S
    while len(form) <= FORM_BYTES:
        try:
            message = await asyncio.wait_for(receive(), max(end_s - time.monotonic(), 0))
        except TimeoutError:
            return None
        form += message.get("body", b"")
        if not message.get("more_body"):
            return form if len(form) <= FORM_BYTES else None
    return None


def _replay(body: bytes, receive: Callable) -> Callable:
    """`receive` for an app behind, that gives `body` first."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> dict:
        return left.pop() if left else await receive()

    return replayed


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


def _sent_sign_in(send: Callable) -> Callable:
    """The answer to a sign-in: late where it was wrong, its cookies for this site alone.

    A Space is shown inside another site's page, which such cookies do not reach.
    """

    async def sent(message: dict) -> None:
        if message.get("status", 200) >= 400:
            await asyncio.sleep(WRONG_S)
        if message["type"] == "http.response.start" and "SPACE_ID" not in os.environ:
            headers = [
                (name, NO_SITE.sub(b"SameSite=Lax", value) if name == b"set-cookie" else value)
                for name, value in message["headers"]
            ]
            message = {**message, "headers": headers}
        await send(message)

    return sent
