"""A connection that can be lost: a TCP proxy on loopback."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Proxy:
    """Passes bytes on to a port of this computer until it is cut, and again when it is mended."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._whole = True
        self._open: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends every connection and lets none come about."""
        self._whole = False
        for side in tuple(self._open):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Lets connections come about again."""
        self._whole = True

    def close(self) -> None:
        """Ends it."""
        self.cut()
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            if not self._whole:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._to))
            self._open |= {near, far}
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                sink.sendall(piece)
        for side in (source, sink):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            self._open.discard(side)
            side.close()
