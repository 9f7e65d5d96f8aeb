"""A small reverse proxy that shows a server on this computer under /music, as nginx would."""

from __future__ import annotations

import contextlib
import http.server
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any


class PassRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to the browser."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Proxy(http.server.BaseHTTPRequestHandler):
    """A reverse proxy that shows the app under /music and nothing elsewhere."""

    protocol_version = "HTTP/1.1"
    upstream = ""

    def forward(self) -> None:
        if not self.path.startswith("/music"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("content-length") or 0)) or None
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        headers |= {"Host": self.headers["host"], "X-Forwarded-For": "203.0.113.7"}
        path = self.path.removeprefix("/music") or "/"
        asked = urllib.request.Request(self.upstream + path, body, headers, method=self.command)
        try:
            answer = OPENER.open(asked, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            while piece := answer.read1(65536):
                self.wfile.write(piece)
                self.wfile.flush()
        self.close_connection = True

    do_GET = do_POST = do_HEAD = forward  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


OPENER = urllib.request.build_opener(PassRedirects)


@contextlib.contextmanager
def under_music(port: int) -> Iterator[str]:
    """The address at which the proxy shows the server of `port`."""
    handler = type("Mine", (Proxy,), {"upstream": f"http://127.0.0.1:{port}"})
    front = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=front.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{front.server_port}/music"
    front.shutdown()
    front.server_close()
