"""Variables of the environment that libraries read when they are imported: proxies, cache folders.

Gradio asks its own server whether it answers, and httpx, which Gradio and the Hub's client use,
sends that through a proxy too unless NO_PROXY excludes it. httpx also raises for kinds of proxies
that it does not know and for some spellings.
"""

from __future__ import annotations

import atexit
import os
from contextlib import suppress
from urllib.parse import urlsplit
from urllib.request import getproxies

from musicgen_ui import files
from musicgen_ui.errors import RequestError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
KINDS = ("http", "https", "socks5", "socks5h")
SCHEMES = ("http", "https", "all")  # of the addresses that go through a proxy


def prepare_proxies(*hosts: str) -> None:
    """Excludes this computer and `hosts` from the proxies. Call it before gradio is imported.

    Raises:
        RequestError: a variable names a proxy that cannot be used; names the variable.
    """
    found = getproxies()  # the environment's; without any, those of macOS or Windows
    proxies = {scheme: found[scheme] for scheme in SCHEMES if found.get(scheme)}
    if not proxies:
        return
    for scheme, address in proxies.items():
        os.environ[f"{scheme}_proxy"] = _checked(f"{scheme.upper()}_PROXY", address)
    excluded = [name.strip(" []") for name in found.get("no", "").split(",")]
    if "*" not in excluded:
        names = dict.fromkeys(name for name in (*excluded, *LOOPBACK, *hosts) if name)
        os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(names))


def _checked(variable: str, address: str) -> str:
    """A proxy's address as httpx takes it."""
    kind, _, rest = address.strip().rpartition("://")
    kind = kind.lower() or "http"
    if kind == "socks":  # as desktops write it
        kind = "socks5"
    if kind not in KINDS:
        raise RequestError(
            f"{variable} names a proxy of the kind {kind}://, which cannot be used: change it to "
            f"{', '.join(f'{known}://' for known in KINDS)}, or unset it."
        )
    try:
        parts = urlsplit(f"//{rest}")
        complete = bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        complete = False
    if not complete:
        raise RequestError(
            f"{variable} is not the address of a proxy: change it to one such as "
            "http://proxy.example.com:3128, or unset it."
        )
    if kind.startswith("socks"):
        try:
            import socksio  # noqa: F401 - httpx speaks SOCKS through it
        except ImportError as error:
            raise RequestError(
                f"{variable} names a SOCKS proxy, which needs the package socksio: run pip install "
                "-r requirements.txt, or unset it."
            ) from error
    return f"{kind}://{rest}"


def ensure_cache_folder() -> None:
    """Gives libraries a private cache folder where the user has none, as in some containers.

    They compile, measure fonts and download into it, so call this before they are imported.
    """
    own = files.expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with suppress(OSError):
        if own.is_absolute():
            own.mkdir(parents=True, exist_ok=True)
            if os.access(own, os.W_OK | os.X_OK):
                return
    folder = files.private_folder()
    os.environ |= {"XDG_CACHE_HOME": str(folder), "MPLCONFIGDIR": str(folder / "matplotlib")}
    atexit.register(files.delete, folder)
