"""What went wrong between here and the Hub, in words: by status, by errno and by class."""

from __future__ import annotations

import errno
import json
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from musicgen_ui.errors import RequestError

E = TypeVar("E", bound=BaseException)


class _Request(Protocol):
    """httpx's."""

    headers: Mapping[str, str]


class _Response(Protocol):
    """httpx's."""

    status_code: int
    headers: Mapping[str, str]
    request: _Request


_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENOENT, errno.ENAMETOOLONG, errno.EIO),
)
_BUNDLED = 'choose the checkpoint "bundled", which needs no network'
_LONGEST_DETAIL = 200  # characters of another program's message

Explanation = tuple[str, str]  # what is wrong, and what to do


class HubError(RequestError):
    """The Hub, or the way there, failed.

    Args:
        why: a clause without its full stop.
        remedy: what to do, as a clause.
        field: of the request.
    """

    def __init__(self, why: str, remedy: str, field: str) -> None:
        super().__init__(f"{why}: {remedy}.", field)
        self.why = why
        self.remedy = remedy


def explained(error: Exception, name: str, field: str, what: str = "") -> HubError:
    """The sentence for what the Hub's client raised about the repository `name`.

    The client wraps most failures in others, "cannot find the file on the local disk" among them,
    so the chain of causes is searched for the one that a user can do something about.
    """
    chain, what = list(_chain(error)), what or name
    explanation = (
        _by_mode(chain, what)
        or _by_status(chain, name, field)
        or _by_errno(chain, name)
        or _by_answer(chain)
        or _by_connection(chain, what)
        or (f"{what} could not be downloaded ({_detail(error)})", f"try again, or {_BUNDLED}")
    )
    return HubError(*explanation, field)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first(chain: list[BaseException], kind: type[E] | tuple[type[E], ...]) -> E | None:
    return next((error for error in chain if isinstance(error, kind)), None)


def _detail(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".replace("\n", " ")
    return text if len(text) <= _LONGEST_DETAIL else text[:_LONGEST_DETAIL] + " …"


def _by_mode(chain: list[BaseException], name: str) -> Explanation | None:
    if _first(chain, OfflineModeIsEnabled):
        return (
            f"{name} is not on this computer and the Hub's offline mode is on",
            f"unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE and start the app again, or {_BUNDLED}",
        )
    if _first(chain, HFValidationError):
        return f'"{name[:80]}" cannot be an id on the Hub', "an id is OWNER/NAME; check it"
    return None


def _by_status(chain: list[BaseException], name: str, field: str) -> Explanation | None:
    failed = next((e for e in chain if getattr(e, "response", None) is not None), None)
    response: _Response | None = getattr(failed, "response", None)
    if response is None:
        return None
    if isinstance(failed, GatedRepoError):
        return (
            f"{name} is gated",
            "accept its terms on the Hub, set HF_TOKEN to your access token and start the app "
            "again",
        )
    if isinstance(failed, DisabledRepoError):
        return f"{name} was disabled on the Hub", "choose another one"
    status, signed = response.status_code, "authorization" in response.request.headers
    if status == 401 and (signed or not isinstance(failed, RepositoryNotFoundError)):
        return (
            "The Hub does not accept your access token, which may have expired",
            "make a new one in your settings on the Hub and set HF_TOKEN to it (or run `hf auth "
            "login`), or remove it: public checkpoints need none. Then start the app again",
        )
    if isinstance(failed, RepositoryNotFoundError):
        return (
            f'The Hub has no {field} "{name}" that can be read from here',
            "check the name; for a private one set HF_TOKEN to an access token that may read it",
        )
    if isinstance(failed, EntryNotFoundError):
        return f"{name} on the Hub is no {field} that this app knows", "choose another one"
    return _by_number(response, status, signed, name)


def _by_number(response: _Response, status: int, signed: bool, name: str) -> Explanation:
    if status == 403:
        who = "Your access token may not read" if signed else "The Hub refuses access to"
        return (
            f"{who} {name}",
            "set HF_TOKEN to an access token that may read it and start the app again, or choose "
            "another one",
        )
    if status == 429:
        wait = response.headers.get("retry-after", "")
        when = f"in {wait} s" if wait.isdigit() else "in some minutes"
        return (
            "The Hub had too many requests from this address",
            f"try again {when}; with an access token in HF_TOKEN it allows more",
        )
    if status >= 500:
        return (
            f"The Hub has a fault of its own (status {status})",
            f"try again later, or {_BUNDLED}",
        )
    return f"The Hub refused to send {name} (status {status})", f"choose another one, or {_BUNDLED}"


def _by_errno(chain: list[BaseException], name: str) -> Explanation | None:
    for error in chain:
        number, file = getattr(error, "errno", None), getattr(error, "filename", None)
        if not isinstance(error, OSError):  # the client's part in Rust has it in its text
            found = re.search(r"os error (\d+)", str(error))
            number, file = (int(found[1]), constants.HF_HUB_CACHE) if found else (None, None)
        if number in _FULL:
            return (
                "The disk is full",
                f"free some room for {constants.HF_HUB_CACHE}, or set HF_HUB_CACHE to a folder on "
                f"another disk, and ask for {name} again",
            )
        # Without a file it is about a connection.
        if number in _NOT_WRITABLE and file:
            what = getattr(error, "strerror", None) or _detail(error)
            return (
                f"The Hub's cache cannot be written: {file} ({what})",
                f"let this user write there, or set HF_HUB_CACHE to another folder than "
                f"{constants.HF_HUB_CACHE}, and start the app again",
            )
    return None


def _by_connection(chain: list[BaseException], name: str) -> Explanation | None:
    certificate = _first(chain, ssl.SSLCertVerificationError)
    if certificate:
        return (
            "The Hub's certificate cannot be verified "
            f"({getattr(certificate, 'verify_message', certificate)})",
            "where a company's proxy or a virus scanner reads along, set SSL_CERT_FILE to a file "
            "with its certificate; else check the computer's clock",
        )
    if broken := _first(chain, ssl.SSLError):
        return (
            f"No secure connection to the Hub can be made ({_detail(broken)})",
            "check HF_ENDPOINT and the proxy settings",
        )
    # An ImportError: for SOCKS the client needs one more package.
    named = (e for e in chain if "proxy" in f"{type(e).__name__} {e}".lower())
    proxy = next((e for e in named if not isinstance(e, OSError)), None)
    if proxy:
        return (
            f"The proxy to the network cannot be used ({_detail(proxy)})",
            "check HTTPS_PROXY, HTTP_PROXY and ALL_PROXY in the environment",
        )
    reasons: list[tuple[type[BaseException], str]] = [
        (socket.gaierror, "its name cannot be looked up"),
        (ConnectionRefusedError, "the connection is refused"),
        (TimeoutError, "there is no answer"),
    ]
    said = [reason for kind, reason in reasons if _first(chain, kind)]
    names = {base.__name__ for error in chain for base in type(error).__mro__}
    if "TimeoutException" in names:
        said.append("there is no answer")
    if said or "TransportError" in names or _first(chain, ConnectionError):
        return (
            f"{name} is not on this computer and cannot be downloaded now, since the Hub cannot be "
            f"reached ({said[0] if said else 'the connection broke off'})",
            f"check the network and try again, or {_BUNDLED}",
        )
    return None


def _by_answer(chain: list[BaseException]) -> Explanation | None:
    odd = {"InvalidURL", "UnsupportedProtocol", "DecodingError"}
    if _first(chain, (FileMetadataError, json.JSONDecodeError)) or any(
        type(error).__name__ in odd for error in chain
    ):
        return (
            f"What answers at {constants.ENDPOINT} is not the Hub",
            "check HF_ENDPOINT; a network that wants a sign-in first answers so as well",
        )
    return None
