"""The settings of a server: one model for the environment, the command line and docs/hosting.md."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from musicgen_ui.errors import RequestError
from musicgen_ui.request import FIELDS, MAX_DURATION_S

PREFIX = "MUSICGEN_UI_"
DEVICES = ("auto", "cuda", "mps", "cpu")
BACKENDS = ("local", "ray")
PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8")
KV_CACHE_DTYPES = ("auto", "int8")
YEAR_S = 366 * 24 * 3600.0  # the longest time that every timer takes
LARGE = 1e6
RAY_DRAIN_S = 20.0  # with the rest of the end less than the 30 s that Kubernetes gives
# Spaces are public, and their own proxies have private addresses.
SPACE_DEFAULTS = {
    "host": "0.0.0.0",
    "any_checkpoint": False,
    "max_duration_s": 60.0,
    "visitor_jobs": 8,
    "visitor_seconds": 900.0,
    "trusted_proxies": "127.0.0.0/8,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10",
}


def _host(value: str) -> str:
    host = value.strip(" []")  # a URL has an IPv6 address in brackets
    if not host:
        raise ValueError("is empty: name an address.")
    return host


def _credentials(value: str) -> str:
    user, _, password = value.partition(":")
    if value and not (user and password):
        raise ValueError("must be a name and a password with a colon between them.")
    return value


def _root_path(value: str) -> str:
    path = value.strip("/")
    whole = path.startswith(("http://", "https://"))
    return f"/{path}" if path and not whole else path


def _device(value: str) -> str:
    kind, _, index = value.partition(":")
    return value if kind == "cuda" and index.isdecimal() else _one_of(DEVICES)(value)


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"cannot be {value!r}: choose {', '.join(choices)}.")
        return value

    return check


def _networks(value: str) -> str:
    for network in _items(value):
        try:
            _ = network == "*" or ipaddress.ip_network(network)
        except ValueError as error:
            raise ValueError(f"holds {network!r}, which is no network: {error}.") from error
    return value


class Settings(BaseSettings):
    """How a server runs: arguments before environment variables before the defaults.

    Raises:
        pydantic.ValidationError: a value is wrong; `settings` makes a sentence of it.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        populate_by_name=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,  # some are secret
    )

    host: Annotated[str, AfterValidator(_host)] = Field(
        "127.0.0.1",
        validation_alias="GRADIO_SERVER_NAME",
        description="address to listen on; 0.0.0.0 is every one",
    )
    port: int = Field(
        7860,
        ge=1,
        le=65535,
        validation_alias="GRADIO_SERVER_PORT",
        description="port to listen on",
    )
    auth: Annotated[str, AfterValidator(_credentials)] = Field(
        "",
        repr=False,
        description="USER:PASSWORD that visitors sign in with; empty is no sign-in",
    )
    root_path: Annotated[str, AfterValidator(_root_path)] = Field(
        "",
        validation_alias="GRADIO_ROOT_PATH",
        description="path under which a reverse proxy shows the app, such as /music",
    )
    share: bool = Field(
        False,
        validation_alias="GRADIO_SHARE",
        description="a public link through Gradio's servers, for three days",
    )
    mcp: bool = Field(
        False,
        validation_alias="GRADIO_MCP_SERVER",
        description="a tool for MCP clients; needs requirements-mcp.txt",
    )
    checkpoint: str = Field("auto", description="checkpoint chosen when the page opens")
    any_checkpoint: bool = Field(
        default_factory=lambda others: not others.get("share"),  # a shared link is public
        description="visitors may name any Hub id or folder; off, as on Spaces and with --share, "
        "only those that are on this computer or listed in --checkpoints",
    )
    checkpoints: str = Field(
        "",
        description="checkpoints that are offered in any case, with commas between them: "
        "small,melody",
    )
    device: Annotated[str, AfterValidator(_device)] = Field(
        "auto", description="auto, cuda, mps or cpu"
    )
    precision: Annotated[str, AfterValidator(_one_of(PRECISIONS))] = Field(
        "auto", description="auto, float32, bfloat16, float16 or int8"
    )
    kv_cache_dtype: Annotated[str, AfterValidator(_one_of(KV_CACHE_DTYPES))] = Field(
        "auto",
        description="on GPUs: keys and values of the music so far in the precision, auto, or in "
        "half of bfloat16's memory, int8, for many takes at once; see docs/performance.md",
    )
    memory_gb: float = Field(
        0.0, ge=0, le=LARGE, description="memory for loaded models in GB; 0 is by the device"
    )
    idle_s: float = Field(
        900.0, ge=0, le=YEAR_S, description="seconds until an idle model is unloaded; 0 is never"
    )
    backend: Annotated[str, AfterValidator(_one_of(BACKENDS))] = Field(
        "local",
        description="where music is made: local, in this process, or ray, by replicas in a Ray "
        "cluster; needs requirements-ray.txt, see docs/scaling.md",
    )
    replicas: int = Field(
        0, ge=0, le=LARGE, description="ray: replicas; 0 is one for each GPU, or one without any"
    )
    max_replicas: int = Field(
        0, ge=0, le=LARGE, description="ray: replicas while music waits; 0 keeps their number"
    )
    cpu_replicas: int = Field(
        0,
        ge=0,
        le=LARGE,
        description="ray: replicas on CPUs beside those on GPUs, for small checkpoints",
    )
    ray_address: str = Field(
        "",
        description="ray: a cluster that exists, auto or host:port; empty starts one on this "
        "computer that listens on the loopback address alone",
    )
    front_only: bool = Field(
        False, description="ray: replicas that another front deployed are used as they are"
    )
    drain_s: float = Field(
        default_factory=lambda others: RAY_DRAIN_S if others.get("backend") == "ray" else 0.0,
        ge=0,
        le=YEAR_S,
        description="seconds in which jobs may end after SIGTERM, while new ones are refused; then "
        f"they are stopped, and what they made is kept; {RAY_DRAIN_S:g} with ray",
    )
    jobs: int = Field(8, ge=1, le=LARGE, description="takes made at the same time")
    queue_length: int = Field(
        32, ge=1, le=LARGE, description="takes being made or waiting; more are turned away"
    )
    visitor_jobs: int = Field(
        0,
        ge=0,
        le=LARGE,
        description="takes of one visitor being made or waiting; 0 is any number, 8 on Spaces",
    )
    visitor_seconds: float = Field(
        0.0,
        ge=0,
        le=LARGE,
        description="seconds of music an hour for each visitor; 0 is any number, 900 on Spaces",
    )
    trusted_proxies: Annotated[str, AfterValidator(_networks)] = Field(
        "",
        validation_alias="FORWARDED_ALLOW_IPS",
        description="networks of proxies in front that say who visits: 127.0.0.1,10.0.0.0/8; on "
        "Spaces its own",
    )
    allowed_hosts: str = Field(
        "",
        description="names of this server beside localhost, with commas between them: "
        "music.example.com, or * for any; needed where a proxy shows a server that listens on "
        "this computer alone",
    )
    metrics_token: str = Field(
        "",
        repr=False,
        description="what /metrics wants as a bearer token; empty is for this computer alone",
    )
    log_prompts: bool = Field(False, description="the log's line of each job has its prompt")
    max_duration_s: float = Field(
        MAX_DURATION_S,
        ge=FIELDS["duration_s"].metadata["min"],
        le=MAX_DURATION_S,
        description="longest take, in seconds of new music; 60 on Spaces, where others wait",
    )
    max_upload_mb: float = Field(100.0, ge=0.1, le=LARGE, description="largest upload in MB")
    output_folder: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        "",
        description="where takes are kept; empty is MusicGen UI in your music folder, and where "
        "others reach the server a temporary folder, cleared after a day; temporary is such a "
        "folder in any case; a URL such as s3://bucket/takes is object storage, see "
        "docs/scaling.md",
    )
    temporary_gb: float = Field(
        5.0,
        ge=0,
        le=LARGE,
        description="temporary takes that are kept, in GB, and as much of uploads; the oldest go "
        "first",
    )

    @classmethod
    def settings_customise_sources(  # noqa: D102 - pydantic-settings' own hook
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        defaults = SPACE_DEFAULTS if os.environ.get("SPACE_ID") else {}
        return init_settings, env_settings, InitSettingsSource(settings_cls, dict(defaults))

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
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else PREFIX + name.upper()


def flag(name: str) -> str:
    """The command line's flag of a setting."""
    return "--" + name.replace("_", "-")


def label(name: str) -> str:
    """How a message names a setting: by variable and flag."""
    return f"{variable(name)} ({flag(name)})"


def _default(field: FieldInfo) -> object:
    return field.get_default(call_default_factory=True, validated_data={})


def table() -> list[tuple[str, str, str, str]]:
    """The rows of docs/hosting.md: environment variable, flag, default, what it does."""
    return [
        (variable(name), flag(name), str(_default(field)), field.description or "")
        for name, field in Settings.model_fields.items()
    ]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting; one that is not given leaves the environment's value."""
    for name, field in Settings.model_fields.items():
        what = f"{field.description} [{variable(name)}, default {_default(field)!r}]"
        action = argparse.BooleanOptionalAction if field.annotation is bool else "store"
        parser.add_argument(flag(name), action=action, help=what, default=None, dest=name)


def settings(arguments: Mapping[str, Any] | Sequence[str] = ()) -> Settings:
    """The settings from the environment, overridden by flags or by their parsed values.

    Raises:
        RequestError: a value is wrong; the sentence names its variable and flag.
    """
    if not isinstance(arguments, Mapping):
        parser = argparse.ArgumentParser()
        add_flags(parser)
        arguments = vars(parser.parse_args(list(arguments)))
    given = {name: arguments.get(name) for name in Settings.model_fields}
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise RequestError(_sentence(error)) from error


def _sentence(error: ValidationError) -> str:
    """The first mistake of a validation, in our words."""
    mistake = error.errors(include_url=False)[0]
    at = str(mistake["loc"][0])
    name = next(name for name in Settings.model_fields if at in (name, variable(name)))
    if mistake["type"] == "value_error":
        return f"{label(name)} {mistake['ctx']['error']}"
    field = Settings.model_fields[name]
    if field.annotation is bool:
        what = "give true or false"
    else:
        limits = [getattr(m, "ge", None) or getattr(m, "le", None) or 0 for m in field.metadata]
        kind = "a whole number" if field.annotation is int else "a number"
        what = f"give {kind} from {min(limits):.15g} to {max(limits):.15g}"
    return f"{label(name)} cannot be {mistake['input']!r}: {what}."
