"""What comes back while music is made, and what the page knows of the engine.

An engine turns a request into a stream of events: `Progress` from the first moment, `Chunk`s of
new audio as they are decoded, and one `Finished` a variation. Each names its variation, so that
several can share a stream.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from musicgen_ui.audio.clip import Chroma, Clip
from musicgen_ui.request import WINDOW_S, GenerationRequest

Stage = Literal["waiting", "loading", "composing"]


@dataclass(frozen=True)
class Progress:
    """Where a variation stands."""

    stage: Stage
    variation: int = 0
    place: int = 0  # waiting: how many jobs are served before this one, itself included
    wait_s: float = 0.0  # waiting: about how long until it starts; 0 is not known yet
    note: str = ""  # loading: what is going on, in words ("downloading 0.3 of 2.4 GB")
    done_s: float = 0.0  # composing: seconds of new music so far
    total_s: float = 0.0
    speed: float = 0.0  # composing: seconds of music a second of work, since the first step


@dataclass(frozen=True, eq=False)
class Chunk:
    """New music, in order and without gaps: a variation's chunks joined are its new audio."""

    variation: int
    clip: Clip


@dataclass(frozen=True, eq=False)
class Finished:
    """A variation is done, or was stopped and holds what was made so far."""

    variation: int
    clip: Clip  # the take: the audio prompt too where the request includes it
    request: GenerationRequest  # resolved: this variation's seed, the checkpoint's name, …
    prompt_s: float  # seconds of `clip` that are the audio prompt
    speed: float  # seconds of new music a second of work
    stopped: bool = False  # before its length was reached
    notes: tuple[str, ...] = ()  # sentences about this take ("The prompt was cut after …")
    fault: str = ""  # what broke it off, in a sentence, where it was not the user
    melody: Chroma | None = None  # what the new music followed
    # int16 [codebooks, frames]: the codes that the codec decoded for this take, the last
    # `context_frames` of the audio prompt first, then all new ones. They end where `clip` ends, so
    # they are `clip.codes` too. In stereo the rows alternate, left first. None where nothing was
    # made, or where a failure ended the audio within a frame.
    codes: np.ndarray | None = None
    context_frames: int = 0  # frames of `codes` that are the audio prompt's


@dataclass(frozen=True, eq=False)
class Failed:
    """The job ended without a take; a log's last event."""

    error: Exception  # a `RequestError` holds the sentence for the user; others are faults of ours


Event = Progress | Chunk | Finished | Failed


@dataclass(frozen=True)
class Steering:
    """A change to a job that is running. None leaves a value as it is.

    Prompts are mixed by their weights: conditional logits of each, weighted, before guidance.
    """

    prompts: tuple[tuple[str, float], ...] | None = None  # words and weight, four at most
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None


class Job(Protocol):
    """A request under way: one job whatever the number of its variations."""

    id: str
    request: GenerationRequest  # resolved: its seed, its checkpoint

    def events(self, after: int = 0) -> AsyncIterator[Event]:
        """The events from number `after` on, then those to come; see `EventLog`."""
        ...

    def stop(self) -> None:
        """Ends the job at its next step; what was made comes as a take."""
        ...

    def steer(self, change: Steering) -> None:
        """Applies from the next frame on. Raises RequestError where that is not possible."""
        ...


class Backend(Protocol):
    """What makes music for the page, the API, MCP and the command line."""

    def submit(self, request: GenerationRequest, client: str = "") -> Job:
        """Queues a request and returns at once; every failure comes as an event.

        Clients take turns where jobs wait; a request without a `client` is one of its own.
        """
        ...

    def checkpoints(self) -> list[str]:
        """The names that the page offers, the default first."""
        ...

    def describe(self, checkpoint: str, adapter: str = "") -> Description:
        """What `checkpoint` can do; "auto" is the base of `adapter` if there is one.

        May read a folder or ask the Hub, so it can block for a while.

        Raises:
            RequestError: there is no such checkpoint.
        """
        ...

    def status(self) -> str:
        """A line for the page's head: what is loaded, where and in which precision."""
        ...

    def health(self) -> Health:
        """Whether the backend lives; never blocks for long."""
        ...

    def unload(self) -> None:
        """Gives the memory of every idle model back."""
        ...

    def close(self) -> None:
        """Ends the backend for good and waits for its threads, though not for ever."""
        ...


@dataclass(frozen=True)
class Description:
    """What a checkpoint can do, known before it is loaded."""

    checkpoint: str  # its name, Hub id or folder
    stereo: Literal["choice", "always", "never"]  # a sibling, stereo itself, neither
    sampling_rate: int  # Hz
    summary: str  # a line for the page: parameters, memory, licence
    melody: bool = False  # it can follow one
    window_s: float = WINDOW_S  # longer takes are made of several windows
    defaults: dict[str, Any] = field(default_factory=dict)  # of a request, where it states its own


@dataclass(frozen=True)
class Health:
    """Whether music can be made now and what that holds, for whoever watches a server."""

    trouble: str = ""  # what keeps music from being made, in words; "" is nothing
    models: dict[str, int] = field(default_factory=dict)  # bytes held, by checkpoint
    jobs: int = 0  # variations that are being made
    waiting: int = 0  # variations in line
    step_age_s: float = 0.0  # since the last step where there is something to do
    warnings: tuple[str, ...] = ()  # what works less well than it could, a sentence each


class Engine(Protocol):
    """What makes music for the page, the API and the command line. `ModelManager` is the one."""

    def stream(
        self,
        request: GenerationRequest,
        stop: threading.Event | None = None,
        visitor: str = "",
    ) -> AsyncIterator[Event]:
        """The events of a request, ending with one `Finished` a variation.

        Setting `stop` ends every variation at the next step; `Finished` still comes, with what
        was made. Closing the iterator frees the rows without a take. Visitors take turns where
        jobs wait; a request without a `visitor` is one of its own. An error for the user is a
        `RequestError`.
        """
        ...

    def checkpoints(self) -> list[str]:
        """The names that the page offers, the default first."""
        ...

    def describe(self, checkpoint: str, adapter: str = "") -> Description:
        """What `checkpoint` can do; "auto" is the base of `adapter` if there is one.

        May read a folder or ask the Hub, so it can block for a while.

        Raises:
            RequestError: there is no such checkpoint.
        """
        ...

    def status(self) -> str:
        """A line for the page's head: what is loaded, where and in which precision."""
        ...

    def health(self) -> Health:
        """Whether the engine lives; never blocks for long."""
        ...

    def unload(self) -> None:
        """Gives the memory of every idle model back."""
        ...

    def close(self) -> None:
        """Ends the engine for good and waits for its threads, though not for ever.

        Jobs should have been stopped before. Requests are refused from then on.
        """
        ...
