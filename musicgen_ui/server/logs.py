"""The log: where it goes, and that no secret gets into it.

Tokens come into a log by the back door: in an address that a library could not fetch, in an error
that quotes a header. So every line is cleaned as it is written, tracebacks included.
"""

from __future__ import annotations

import logging
import os
import re
import time

SECRET_VARIABLES = re.compile(r"TOKEN$|SECRET|PASSWORD|_AUTH$|API_KEY")
SHORTEST = 6  # characters of a secret that can be told from a word
HIDDEN = "…"
_TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=Bearer )\S+|(?<=Basic )\S+", re.IGNORECASE)
_QUERIES = re.compile(r"(\bhttps?://[^\s?\"'<>]+\?)[^\s\"'<>]+", re.IGNORECASE)
_LOGINS = re.compile(r"(\bhttps?://)[^\s/@\"'<>]+@", re.IGNORECASE)


def set_up() -> None:
    """Writes what is worth knowing to stderr, a line an event."""
    handler = logging.StreamHandler()
    handler.setFormatter(Cleaned("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(Repeats())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class Repeats(logging.Filter):
    """Drops warnings and errors that come again and again.

    A server without a file to open for the next connection tells so 2,000 times a second.
    """

    def __init__(self, most: int = 20, within_s: float = 10.0) -> None:
        super().__init__()
        self._most, self._within_s = most, within_s
        self._seen: dict[tuple, tuple[float, int]] = {}  # since when and how often, by what it says

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is among the first of its kind within some seconds."""
        if record.levelno < logging.WARNING:
            return True
        kind = record.exc_info[0] if record.exc_info else None
        key = (record.name, record.lineno, str(record.msg)[:80], kind)
        now_s = time.monotonic()
        since_s, count = self._seen.get(key, (now_s, 0))
        if now_s - since_s > self._within_s:
            if count > self._most:
                record.msg = f"{record.msg} (and {count - self._most} times more before)"
            since_s, count = now_s, 0
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[key] = (since_s, count + 1)
        return count < self._most


class Cleaned(logging.Formatter):
    """Formats a record without its secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line and traceback, cleaned."""
        return cleaned(super().format(record))


def cleaned(text: str) -> str:
    """`text` without tokens, addresses' queries and logins, and this process's own secrets."""
    for name, value in os.environ.items():
        secrets = (value, value.partition(":")[2])  # whole, and the password of NAME:PASSWORD
        for secret in secrets if SECRET_VARIABLES.search(name) else ():
            text = text.replace(secret, HIDDEN) if len(secret) >= SHORTEST else text
    text = _QUERIES.sub(rf"\1{HIDDEN}", _LOGINS.sub(rf"\1{HIDDEN}@", text))
    return _TOKENS.sub(HIDDEN, text)
