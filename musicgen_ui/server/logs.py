"""The log: where it goes, and that no secret gets into it.

A library that could not fetch a URL logs it with its token, and an error may quote a header. So
every line is redacted as it is written, tracebacks included.
"""

from __future__ import annotations

import logging
import os
import re

SECRET_VARIABLES = re.compile(r"TOKEN$|SECRET|PASSWORD|_AUTH$|API_KEY")
MIN_CHARACTERS = 6  # characters of a secret that differ from a word
REDACTED = "…"
_TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=Bearer )\S+|(?<=Basic )\S+", re.IGNORECASE)
_QUERIES = re.compile(r"(\bhttps?://[^\s?\"'<>]+\?)[^\s\"'<>]+", re.IGNORECASE)
_LOGINS = re.compile(r"(\bhttps?://)[^\s/@\"'<>]+@", re.IGNORECASE)


def set_up() -> None:
    """Logs to stderr from level INFO on."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class RedactingFormatter(logging.Formatter):
    """Formats a record without its secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line and traceback, redacted."""
        return redacted(super().format(record))


def redacted(text: str) -> str:
    """`text` without tokens, addresses' queries and logins, and this process's own secrets."""
    for name, value in os.environ.items():
        secrets = (value, value.partition(":")[2])  # whole, and the password of NAME:PASSWORD
        for secret in secrets if SECRET_VARIABLES.search(name) else ():
            text = text.replace(secret, REDACTED) if len(secret) >= MIN_CHARACTERS else text
    text = _QUERIES.sub(rf"\1{REDACTED}", _LOGINS.sub(rf"\1{REDACTED}@", text))
    return _TOKENS.sub(REDACTED, text)
