"""The password: nothing is shown or made for those who have not signed in.

One middleware stands before all routes, the MCP tool's included, and lets strangers have the
sign-in page alone. Who signed in shows a session's cookie, or brings name and password with each
request (HTTP Basic), as MCP clients and scripts do. A wrong password is answered late, wherever and
however it was brought, and few of an address are looked at meanwhile.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from musicgen_ui.server.middleware import refuse

# Gradio asks itself for the last one; /metrics has a token of its own.
OPEN_PATHS = {"/healthz", "/metrics", "/gradio_api/startup-events"}
WRONG_S = 1.0  # until a wrong password is answered
AT_ONCE = 5  # passwords of an address that are being looked at or wait for their answer
TOO_MANY = "Too many passwords at once: wait a moment and try again."
WRONG = "Name or password is wrong."
FORM_BYTES = 20_000  # of the sign-in form
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MusicGen UI: sign in</title>
<style>
  :root { color-scheme: light dark; font-family: system-ui, sans-serif; }
  body { display: grid; place-items: center; min-height: 90vh; margin: 0; }
  form { display: grid; gap: 0.75rem; width: min(20rem, 90vw); }
  label { display: grid; gap: 0.25rem; }
  input, button { font: inherit; padding: 0.5rem; }
</style>
</head>
<body>
<form method="post" action="login">
  <h1>MusicGen UI</h1>
  <p role="alert">MESSAGE</p>
  <label>Username <input name="username" autocomplete="username" required autofocus></label>
  <label>Password
    <input name="password" type="password" autocomplete="current-password" required></label>
  <button>Sign in</button>
</form>
</body>
</html>
"""


class Attempts:
    """Bounds how many secrets an address has looked at: few at once, each wrong one for a while."""

    def __init__(self) -> None:
        self._pending: Counter[str] = Counter()  # by address

    @contextlib.contextmanager
    def one(self, scope: Scope) -> Iterator[bool]:
        """Counts an attempt until its end; False where its address has too many already."""
        address = (scope.get("client") or ("",))[0]
        self._pending[address] += 1
        try:
            yield self._pending[address] <= AT_ONCE
        finally:
            self._pending[address] -= 1
            if not self._pending[address]:
                del self._pending[address]


class SignIn:
    """Answers 401 to strangers (ASGI middleware).

    Args:
        app: what is behind it.
        user: the name.
        password: its password.
    """

    def __init__(self, app: ASGIApp, user: str, password: str) -> None:
        self.app = app
        self._credentials = f"{user}:{password}".encode()
        self._attempts = Attempts()
        self._sessions: set[str] = set()
        # Cookies are of a host whatever its port: another server there has another name.
        self.cookie = f"musicgen_ui_{secrets.token_hex(4)}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves who is known, and the open paths to all."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if (path.rstrip("/"), scope.get("method")) == ("/login", "POST"):
            await self._sign_in(scope, receive, send)
            return
        known = bool(self._session(scope))
        brought = _basic_credentials(scope)
        if not known and brought is not None:
            if status := await self._refusal(brought, scope):
                await refuse(scope, send, status, TOO_MANY if status == 429 else WRONG)
                return
            known = True
        if known and path.rstrip("/") == "/logout":
            await self._sign_out(scope, send)
        elif known or path in OPEN_PATHS:
            await self.app(scope, receive, send)
        elif path in ("/", "/login") and scope["type"] == "http":
            await _answer(send, 200, {"content-type": "text/html"}, PAGE.replace("MESSAGE", ""))
        else:
            await refuse(scope, send, 401, "Sign in first.")

    async def _refusal(self, credentials: bytes, scope: Scope) -> int:
        """0 for the right password; else the status to answer with, 401 after a while."""
        with self._attempts.one(scope) as may_try:
            if not may_try:
                return 429
            if secrets.compare_digest(credentials, self._credentials):
                return 0
            await asyncio.sleep(WRONG_S)
        return 401

    async def _sign_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Makes a session. The form is read first: only a whole one counts as an attempt."""
        form = await _read_form(receive)
        if form is None:
            await refuse(scope, send, 413, "The form is too large.")
            return
        status = await self._refusal(f"{form['username']}:{form['password']}".encode(), scope)
        browser = "text/html" in Headers(raw=scope["headers"]).get("accept", "")
        if status:
            text = TOO_MANY if status == 429 else WRONG
            if not browser:
                await refuse(scope, send, status, text)
                return
            page = PAGE.replace("MESSAGE", text)
            await _answer(send, status, {"content-type": "text/html"}, page)
            return
        self._sessions.add(session := secrets.token_urlsafe(32))
        # A Space is shown inside another site's page, which Lax cookies do not reach.
        site = "None; Secure" if os.environ.get("SPACE_ID") else "Lax"
        site += "; Secure" if scope.get("scheme") == "https" and site == "Lax" else ""
        cookie = f"{self.cookie}={session}; Path=/; HttpOnly; SameSite={site}"
        headers = {"set-cookie": cookie, "content-type": "application/json"}
        if browser:
            await _answer(send, 303, headers | {"location": "./"})
        else:
            await _answer(send, 200, headers, json.dumps({"success": True}))

    async def _sign_out(self, scope: Scope, send: Send) -> None:
        """Ends the session that asks."""
        self._sessions.discard(self._session(scope))
        gone = f"{self.cookie}=; Max-Age=0; Path=/; HttpOnly; SameSite=Lax"
        await _answer(send, 302, {"location": "./", "set-cookie": gone})

    def _session(self, scope: Scope) -> str:
        """The session that a request's cookie names; "" for none that is known."""
        try:
            sent = SimpleCookie("; ".join(Headers(raw=scope["headers"]).getlist("cookie")))
        except CookieError:
            return ""
        value = sent[self.cookie].value if self.cookie in sent else ""
        return value if value in self._sessions else ""


def _basic_credentials(scope: Scope) -> bytes | None:
    """Name and password that a request brings (HTTP Basic), right or wrong; None for none."""
    headers = Headers(raw=scope["headers"])
    # gradio_client moves what it is given for the one header to the other.
    given = headers.get("authorization") or headers.get("x-hf-authorization") or ""
    scheme, _, encoded = given.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        return b""


async def _read_form(receive: Receive) -> dict[str, str] | None:
    """The fields of a sign-in form; None for one that is too large."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > FORM_BYTES:
            return None
    fields = parse_qs(body.decode("utf-8", "replace"))
    return {name: fields.get(name, [""])[0] for name in ("username", "password")}


async def _answer(send: Send, status: int, headers: dict[str, str], text: str = "") -> None:
    body = text.encode()
    named = {"cache-control": "no-store", "content-length": str(len(body))} | headers
    raw = [(name.encode(), value.encode()) for name, value in named.items()]
    start: Message = {"type": "http.response.start", "status": status, "headers": raw}
    await send(start)
    await send({"type": "http.response.body", "body": body})
