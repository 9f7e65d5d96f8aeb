"""The contract between what makes music and what shows it: backends, jobs and their events.

A `Backend` turns a request into a `Job`. Everything that happens to the job is an event in its log:
`Progress` from the first moment, `Chunk`s of new audio as they are decoded, and one `Finished` a
variation, or `Failed` for the whole job. The page, the API, MCP, the command line and metrics read
that log.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from musicgen_ui.audio.clip import Chroma, Clip
from musicgen_ui.request import WINDOW_S, GenerationRequest
from musicgen_ui.steering import Steering


class Stage(StrEnum):
    """How far a job is."""

    WAITING = "waiting"  # in the queue
    LOADING = "loading"  # its checkpoint is downloaded or read, or the device is recovered
    COMPOSING = "composing"


class Trouble(StrEnum):
    """What keeps a backend from making music."""

    NOT_STARTED = "not_started"  # it could not be built
    RELOADING = "reloading"  # the device failed and the model is loaded again
    DEVICE_LOST = "device_lost"  # only a new process can use the device again
    STUCK = "stuck"  # a step does not end
    THREAD_ENDED = "thread_ended"  # nothing steps any more
    NO_REPLICA = "no_replica"  # no machine of the cluster answers and can make music
    STOPPING = "stopping"  # the server takes no new jobs, and ends when those under way have ended


@dataclass(frozen=True)
class Progress:
    """Where a variation stands."""

    stage: Stage
    variation: int = 0
    place: int = 0  # waiting: its place in the queue, 1 is next
    wait_s: float = 0.0  # waiting: about how long until it starts; 0 is not known yet
    note: str = ""  # loading: a detail for the user ("downloading 0.3 of 2.4 GB")
    done_s: float = 0.0  # composing: seconds of new music so far
    total_s: float = 0.0
    speed: float = 0.0  # composing: seconds of music a second of work, since the first step
    ahead_s: float = 0.0  # of a live piece: music that is made and not played yet
    underruns: int = 0  # of a live piece: how often its player had nothing to play

    @property
    def work_ms(self) -> float:
        """Milliseconds of work a second of music; 0 is not known yet."""
        return 1000.0 / self.speed if self.speed else 0.0


@dataclass(frozen=True, eq=False)
class Chunk:
    """New music, in order and without gaps: a variation's chunks joined are its new audio.

    Of a take that was drawn again, they are that of the dropped take; see `backends.ranking`.
    """

    variation: int
    clip: Clip
    start_sample: int = 0  # samples of new audio before this chunk


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
    fault: str = ""  # why it ended early, in a sentence, where the user did not stop it
    melody: Chroma | None = None  # what the new music followed
    score: float | None = None  # by which the variations of a job were ranked; higher is better
    redrawn: bool = False  # in place of an unusable take, whose music the chunks are
    # int16 [codebooks, frames]: the codes that the codec decoded for this take, the last
    # `context_frames` of the audio prompt first, then all new ones. They end where `clip` ends, so
    # they are `clip.codes` too. In stereo the rows alternate, left first. None where nothing was
    # made, or where a failure ended the audio within a frame.
    codes: np.ndarray | None = None
    context_frames: int = 0  # frames of `codes` that are the audio prompt's

    @property
    def frame_samples(self) -> int:
        """Samples a frame of the codes; 0 without codes that end where `clip` does."""
        if self.codes is None:
            return 0
        before = round(self.prompt_s * self.clip.sampling_rate)  # samples
        new_frames = self.codes.shape[1] - self.context_frames
        samples, rest = divmod(self.clip.samples.shape[1] - before, max(new_frames, 1))
        return 0 if rest or new_frames < 1 else samples


@dataclass(frozen=True, eq=False)
class Recorded:
    """A stretch of a live piece, as a take; the piece goes on."""

    take: Finished


@dataclass(frozen=True, eq=False)
class Failed:
    """The job ended without a take; the last event of its log."""

    error: Exception  # a `RequestError` holds the sentence for the user; others are bugs


Event = Progress | Chunk | Recorded | Finished | Failed


NO_LIVE_MODE = (
    "There is no live mode on ZeroGPU: a GPU is lent for one take at a time. Run MusicGen UI on a "
    "computer of your own for it."
)


class Job(Protocol):
    """A request that is being served, with all its variations.

    The end of its log is the end of the job: `Failed`, or a `Finished` for each take: of every
    variation, or of the best ones where the request keeps fewer.
    """

    id: str
    request: GenerationRequest  # with its seed
    client: str  # who takes turns with others; "" is a client of its own

    @property
    def ended(self) -> bool:
        """No event follows."""
        ...

    def events(self, after: int = 0) -> AsyncGenerator[Event, None]:
        """The events from number `after` on, then those to come; see `EventLog`."""
        ...

    def follow(self, after: int = 0, poll: Callable[[], object] | None = None) -> Iterator[Event]:
        """`events` for a thread without an event loop; see `EventLog`."""
        ...

    def stop(self) -> None:
        """Ends the job at its next step; what was made comes as a take."""
        ...

    def steer(self, change: Steering) -> None:
        """Changes a live piece from the next frame on.

        Raises:
            RequestError: this job is none, or the change is not possible.
        """
        ...

    def played(self, samples: int, underruns: int = 0) -> None:
        """The listener has heard so many samples of a live piece, of each channel.

        No more than `live.LOOK_AHEAD_S` is made beyond what was heard, so that changes come soon.
        """
        ...

    def record_stretch(self, start_s: float, end_s: float) -> None:
        """Makes a take of a stretch of a live piece, which comes as `Recorded`.

        Raises:
            RequestError: this job is none, or the stretch is too short or too long ago.
        """
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

    def describe(self, checkpoint: str, adapter: str = "") -> CheckpointInfo:
        """What `checkpoint` can do; "auto" is the base of `adapter` if there is one.

        May read a folder or ask the Hub, so it can block for a while.

        Raises:
            RequestError: there is no such checkpoint.
        """
        ...

    def status(self) -> Status:
        """What is loaded, where and in which precision."""
        ...

    def health(self) -> Health:
        """Whether music can be made; never blocks for long."""
        ...

    def unload(self) -> None:
        """Frees the memory of every idle model."""
        ...

    def close(self) -> None:
        """Ends the backend for good and waits for its threads, for a bounded time.

        Jobs should have been stopped before. Requests are refused from then on.
        """
        ...


@runtime_checkable
class Preloads(Protocol):
    """A backend that can load a checkpoint before a request asks for it."""

    def preload(
        self, checkpoint: str = "auto", report: Callable[[str], object] | None = None
    ) -> None:
        """Downloads a checkpoint where it is not here, and loads it; returns when it is loaded.

        Args:
            checkpoint: to load.
            report: is called a few times a second with how far it is, in words. What it raises
                gives the load up, unless a job waits for it too.

        Raises:
            RequestError: there is no such checkpoint, it cannot be had, or memory is short.
        """
        ...


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint can do, known before it is loaded."""

    checkpoint: str  # its name, Hub id or folder
    stereo: Literal["choice", "always", "never"]  # a sibling, stereo itself, neither
    sampling_rate: int  # Hz
    summary: str  # a line for the page: parameters, memory, licence
    melody: bool = False  # it can follow one
    style: bool = False  # it can take on that of a clip
    window_s: float = WINDOW_S  # longer takes are made of several windows
    nbytes: int = 0  # of memory that it needs here; 0 is not known
    download_bytes: int = 0  # before it can be used; 0 where it is on this computer
    fits: bool = True  # its weights fit the memory for models
    defaults: dict[str, object] = field(default_factory=dict)  # of a request, where it has any


@dataclass(frozen=True)
class Status:
    """What a backend holds in memory."""

    loaded: tuple[str, ...] = ()  # names of checkpoints
    loading: tuple[str, ...] = ()  # a detail of each load under way ("reading 0.3 of 2.4 GB")
    device: str = ""  # "CPU (AVX-512)"
    precision: str = ""  # "int8"
    reason: str = ""  # why this device or precision, where the choice may surprise
    nbytes: int = 0  # of the loaded models and their jobs
    starting: bool = False  # the backend itself is not ready yet


@dataclass(frozen=True)
class ReplicaHealth:
    """One machine of a backend that has several."""

    up: bool  # it answers and can make music
    rows: int  # variations that it steps together, at most
    jobs: int  # variations that are being made
    waiting: int  # variations that it was handed and that wait
    models: int  # in memory
    music_s: float  # made since it started


@dataclass(frozen=True)
class Health:
    """Whether music can be made now and what that holds, for whoever watches a server."""

    trouble: Trouble | None = None
    models: dict[str, int] = field(default_factory=dict)  # bytes held, by checkpoint
    jobs: int = 0  # variations that are being made
    waiting: int = 0  # variations in the queue
    step_age_s: float = 0.0  # since the last step where there is something to do
    warnings: tuple[str, ...] = ()  # what works less well than it could, a sentence each
    replicas: dict[str, ReplicaHealth] = field(default_factory=dict)  # by name, of a cluster
