"""The command line's standard streams: what is printed never ends a run.

A terminal may not know a character, the reader of a pipe may have gone, a disk may be full. None
of that may cost a take, so such a stream goes quiet, and the exit code tells it in the end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

FAILED = 1
CLOSED = 141  # what shells show of a program that SIGPIPE ended


class Stream:
    """`stream`, but what is printed to it does not raise; `error` is the first that went wrong.

    A stream that was closed before the start (None) is replaced by `nowhere`. Characters that its
    encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO | None, nowhere: TextIO) -> None:
        self._closed = stream is None
        self._stream = stream or nowhere
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> object:
        found: object = getattr(self._stream, name)
        return found

    def write(self, text: str) -> int:
        """Writes what can be written."""
        encoding = self._stream.encoding or "utf-8"
        known = text.encode(encoding, "backslashreplace").decode(encoding)
        with self._guarded():
            self._stream.write(known)
        return len(text)

    def write_bytes(self, content: bytes) -> None:
        """Writes and hands on bytes, such as a file's."""
        with self._guarded():
            if self._closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._stream.buffer.write(content)
            self._stream.buffer.flush()

    def flush(self) -> None:
        """Hands on what was written."""
        with self._guarded():
            self._stream.flush()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            # What is still to come goes nowhere, and so does what is left at the exit.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def exit_code(self, code: int) -> int:
        """`code`, or what says that not all of a run's output arrived."""
        self.flush()
        if code or not self.error:
            return code
        if self.error.errno in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
            return CLOSED
        print(f"The output could not be written: {self.error.strerror}.", file=sys.stderr)
        return FAILED


@contextlib.contextmanager
def guarded() -> Iterator[Stream]:
    """Puts `Stream`s in place of sys.stdout, which it yields, and of sys.stderr."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        out, err = Stream(sys.stdout, nowhere), Stream(sys.stderr, nowhere)
        streams = cast(TextIO, out), cast(TextIO, err)  # what is used of one
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            yield out
            err.flush()
