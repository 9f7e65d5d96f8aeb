"""The settings of a server: one table for the environment, the command line and docs/hosting.md."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from musicgen_ui.errors import RequestError
from musicgen_ui.request import FIELDS, MAX_DURATION_S

PREFIX = "MUSICGEN_UI_"
DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8")
YEAR_S = 366 * 24 * 3600.0  # timers take no more than some of them
# Spaces are public, and their own proxies have private addresses.
ON_SPACES = {
    "host": "0.0.0.0",
    "any_checkpoint": False,
    "max_duration_s": 60.0,
    "visitor_jobs": 8,
    "visitor_seconds": 900.0,
    "trusted_proxies": "127.0.0.0/8,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10",
}


def _setting(
    default: Any,
    help: str,
    env: str | None = None,
    *,
    least: float = 0,
    most: float = 1e6,
    choices: Sequence[str] = (),
) -> Any:
    about = {"help": help, "env": env, "least": least, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata=about)


def _secret(help: str) -> Any:
    return dataclasses.field(default="", repr=False, metadata={"help": help, "env": None})


@dataclass(frozen=True)
class Settings:
    """How a server runs. `help` is a field's text in docs/hosting.md, `variable` its name there."""

    host: str = _setting(
        "127.0.0.1", "address to listen on; 0.0.0.0 is every one", "GRADIO_SERVER_NAME"
    )
    port: int = _setting(7860, "port to listen on", "GRADIO_SERVER_PORT", least=1, most=65535)
    auth: str = _secret("USER:PASSWORD that visitors sign in with; empty is no sign-in")
    root_path: str = _setting(
        "", "path under which a reverse proxy shows the app, such as /music", "GRADIO_ROOT_PATH"
    )
    share: bool = _setting(
        False, "a public link through Gradio's servers, for three days", "GRADIO_SHARE"
    )
    mcp: bool = _setting(
        False, "a tool for MCP clients; needs requirements-mcp.txt", "GRADIO_MCP_SERVER"
    )
    checkpoint: str = _setting("auto", "checkpoint chosen when the page opens")
    any_checkpoint: bool = _setting(
        True,
        "visitors may name any Hub id or folder; off, as on Spaces, only those that are on this "
        "computer or listed in --checkpoints",
    )
    checkpoints: str = _setting(
        "", "checkpoints that are offered in any case, with commas between them: small,melody"
    )
    device: str = _setting("auto", "auto, cuda, mps or cpu", choices=DEVICES)
    precision: str = _setting(
        "auto", "auto, float32, bfloat16, float16 or int8", choices=PRECISIONS
    )
    memory_gb: float = _setting(0.0, "memory for loaded models in GB; 0 is by the device")
    idle_s: float = _setting(
        900.0, "seconds until an idle model is unloaded; 0 is never", most=YEAR_S
    )
    jobs: int = _setting(8, "takes made at the same time", least=1)
    queue_length: int = _setting(32, "takes being made or waiting; more are turned away", least=1)
    visitor_jobs: int = _setting(
        0, "takes of one visitor being made or waiting; 0 is any number, 8 on Spaces"
    )
    visitor_seconds: float = _setting(
        0.0, "seconds of music an hour for each visitor; 0 is any number, 900 on Spaces"
    )
    trusted_proxies: str = _setting(
        "",
        "networks of proxies in front that say who visits: 127.0.0.1,10.0.0.0/8; on Spaces its own",
        "FORWARDED_ALLOW_IPS",
    )
    allowed_hosts: str = _setting(
        "",
        "names of this server beside localhost, with commas between them: music.example.com, or * "
        "for any; needed where a proxy shows a server that listens on this computer alone",
    )
    metrics_token: str = _secret(
        "what /metrics wants as a bearer token; empty is for this computer alone"
    )
    log_prompts: bool = _setting(False, "the log's line of each job tells its prompt")
    max_duration_s: float = _setting(
        MAX_DURATION_S,
        "longest take, in seconds of new music; 60 on Spaces, where others wait",
        least=FIELDS["duration_s"].metadata["min"],
        most=MAX_DURATION_S,
    )
    max_upload_mb: float = _setting(100.0, "largest upload in MB", least=0.1)
    output_folder: str = _setting(
        "", "where takes are kept; empty is a temporary folder, cleared after a day"
    )
    temporary_gb: float = _setting(
        5.0,
        "temporary takes that are kept, in GB, and as much of uploads; the oldest go first",
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _coerce(spec, getattr(self, spec.name))
            _check(spec, value)
            object.__setattr__(self, spec.name, value)
        object.__setattr__(self, "host", self.host.strip(" []"))  # "[::1]" is for addresses
        folder = os.path.expanduser(self.output_folder)  # noqa: PTH111 - raises nothing
        object.__setattr__(self, "output_folder", folder)
        if not self.host:
            raise RequestError(f"{variable('host')} ({flag('host')}) is empty: name an address.")
        _check_networks(self.trusted_proxies)
        if self.auth and not all(self.credentials):
            raise RequestError(
                f"{variable('auth')} ({flag('auth')}) must be a name and a password with a colon "
                "between them."
            )
        path = self.root_path.strip("/")
        whole = path.startswith(("http://", "https://"))
        object.__setattr__(self, "root_path", f"/{path}" if path and not whole else path)

    @property
    def max_upload_bytes(self) -> int:
        """The largest upload."""
        return round(self.max_upload_mb * 1e6)

    @property
    def listed_checkpoints(self) -> list[str]:
        """The checkpoints that the host offers by name, the chosen one first."""
        return [self.checkpoint, *_items(self.checkpoints)]

    @property
    def host_names(self) -> list[str]:
        """The names of `allowed_hosts`, and that of a whole `root_path`, in lower case."""
        names = _items(self.allowed_hosts.lower())
        whole = urlsplit(self.root_path).hostname
        return [*names, whole] if whole else names

    @property
    def credentials(self) -> tuple[str, str]:
        """The user's name and the password of `auth`."""
        user, _, password = self.auth.partition(":")
        return user, password


def _items(text: str) -> list[str]:
    return [item for part in text.split(",") if (item := part.strip())]


def variable(name: str) -> str:
    """The environment variable of a setting."""
    spec = {f.name: f for f in dataclasses.fields(Settings)}[name]
    return spec.metadata["env"] or PREFIX + name.upper()


def table() -> list[tuple[str, str, str, str]]:
    """The rows of docs/hosting.md: environment variable, flag, default, what it does."""
    return [
        (variable(f.name), flag(f.name), str(f.default), f.metadata["help"])
        for f in dataclasses.fields(Settings)
    ]


def flag(name: str) -> str:
    """The command line's flag of a setting."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting; one that is not given leaves the environment's value."""
    for spec in dataclasses.fields(Settings):
        what = f"{spec.metadata['help']} [{variable(spec.name)}, default {spec.default!r}]"
        options: dict[str, Any] = {"help": what, "default": None, "dest": spec.name}
        if isinstance(spec.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        parser.add_argument(flag(spec.name), **options)


def settings(
    arguments: Mapping[str, Any] | Sequence[str] = (), environment: Mapping[str, str] = os.environ
) -> Settings:
    """The settings from the environment, overridden by flags or by their parsed values.

    Raises:
        RequestError: a value that cannot be understood or had; names the variable.
    """
    if not isinstance(arguments, Mapping):
        parser = argparse.ArgumentParser()
        add_flags(parser)
        arguments = vars(parser.parse_args(list(arguments)))
    names = [spec.name for spec in dataclasses.fields(Settings)]
    values: dict[str, Any] = dict(ON_SPACES) if environment.get("SPACE_ID") else {}
    told = {n: environment[variable(n)] for n in names if environment.get(variable(n))}
    told |= {n: arguments[n] for n in names if arguments.get(n) is not None}
    values |= {"any_checkpoint": False} if _on(told.get("share")) else {}  # public too
    return Settings(**values | told)


def _check(spec: dataclasses.Field, value: Any) -> None:
    about = spec.metadata
    name = f"{variable(spec.name)} ({flag(spec.name)})"
    if choices := about.get("choices"):
        kind, _, index = value.partition(":")
        numbered = kind == "cuda" and index.isdecimal() and kind in choices
        if value not in choices and not numbered:
            raise RequestError(f"{name} cannot be {value!r}: choose {', '.join(choices)}.")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        least, most = about["least"], about["most"]
        if not least <= value <= most:  # nan too
            limits = f"{least:.15g} to {most:.15g}"
            raise RequestError(f"{name} cannot be {value}: give a number from {limits}.")


def _check_networks(text: str) -> None:
    for network in filter(None, (item.strip() for item in text.split(","))):
        try:
            _ = network == "*" or ipaddress.ip_network(network)
        except ValueError as error:
            raise RequestError(
                f"{variable('trusted_proxies')} ({flag('trusted_proxies')}) holds {network!r}, "
                f"which is no network: {error}."
            ) from error


def _on(value: Any) -> bool:
    return str(value).lower() in ("1", "true", "on", "yes")


def _coerce(spec: dataclasses.Field, value: Any) -> Any:
    kind: Any = type(spec.default)
    if kind is bool and isinstance(value, str):
        words = {"1": True, "true": True, "on": True, "yes": True}
        words |= {"0": False, "false": False, "off": False, "no": False}
        if value.lower() in words:
            return words[value.lower()]
    elif kind is not bool or isinstance(value, bool):
        try:
            return kind(value)
        except (TypeError, ValueError):
            pass
    raise RequestError(
        f"{variable(spec.name)} ({flag(spec.name)}) cannot be {value!r}: {spec.metadata['help']}."
    )
