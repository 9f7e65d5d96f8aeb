"""A job with its event log: what every backend hands out."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.event_log import EventLog
from musicgen_ui.engine.protocol import Event, Finished, Job
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.steering import Steering

LIVE_EVENTS = 2500  # kept in a live piece's log: some five minutes
EXTRAPOLATED_S = 0.5  # that a listener is taken to go on for after a report
RECORDED_S = (0.5, 300.0)  # the shortest and the longest stretch


@dataclass(eq=False)
class Listener:
    """What the listener of a live piece does. Any thread writes, the stepping thread reads."""

    changes: deque[Steering] = field(default_factory=deque)
    recordings: deque[tuple[float, float]] = field(default_factory=deque)  # start and end in s
    samples: int = 0  # of each channel that it has reported
    underruns: int = 0
    moved_s: float = field(default_factory=time.monotonic)  # when it last heard something new
    _moving: bool = False

    def played(self, samples: int, underruns: int) -> None:
        """See `protocol.Job.played`."""
        self._moving = samples > self.samples
        if samples != self.samples:
            self.moved_s = time.monotonic()
        self.samples, self.underruns = samples, underruns

    def heard_s(self, sampling_rate: int) -> float:
        """What the listener has reported, in seconds of new music."""
        return self.samples / sampling_rate

    def at_s(self, sampling_rate: int) -> float:
        """About where the listener is now, in seconds of new music."""
        since_s = min(time.monotonic() - self.moved_s, EXTRAPOLATED_S) if self._moving else 0.0
        return self.heard_s(sampling_rate) + since_s


class LoggedJob:
    """A `protocol.Job` whose producer appends to `log` and looks at `stopping`.

    Args:
        request: what to make; a seed is drawn where it has none.
        client: who takes turns with others; "" is a client of its own.
        made: for a job that may move between machines: the codes of new frames that another
            machine made before, int16 [codebooks, frames], by variation. The job goes on after
            them, and its chunks carry their codes. None is a job that stays here.
    """

    def __init__(
        self,
        request: GenerationRequest,
        client: str = "",
        made: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        self.id = secrets.token_urlsafe(16)
        self.request = request.with_seed()
        self.client = client
        self.made = made
        self.log = EventLog(request.takes, LIVE_EVENTS if request.live else None)
        self.listener = Listener()
        self.stopping = threading.Event()
        self._begun = False
        self._lock = threading.RLock()  # guards `_begun` and `stopping` together

    @property
    def ended(self) -> bool:
        """No event follows."""
        return self.log.ended

    def events(self, after: int = 0) -> AsyncGenerator[Event, None]:
        """The events from number `after` on, then those to come."""
        return self.log.events(after)

    def follow(self, after: int = 0, poll: Callable[[], object] | None = None) -> Iterator[Event]:
        """`events` for a thread without an event loop."""
        return self.log.follow(after, poll)

    def begin(self) -> bool:
        """Called once by what makes the music: from now on it ends the job when it is to stop.

        False where the job was stopped before, which has ended it.
        """
        with self._lock:
            self._begun = self._begun or not self.stopping.is_set()
            return self._begun

    def stop(self) -> None:
        """Ends the job: at its next step, or now where nothing was begun."""
        with self._lock:
            self.stopping.set()
            begun = self._begun
        if not begun:
            for index in range(self.request.takes):
                self.log.append(empty_take(self, index))

    def steer(self, change: Steering) -> None:
        """Changes a live piece from the next frame on; refuses for any other."""
        self._require_live()
        self.listener.changes.append(change)

    def played(self, samples: int, underruns: int = 0) -> None:
        """The listener has heard so many samples of a live piece, of each channel."""
        self.listener.played(samples, underruns)

    def record_stretch(self, start_s: float, end_s: float) -> None:
        """Makes a take of a stretch of a live piece; refuses for any other job."""
        self._require_live()
        shortest_s, longest_s = RECORDED_S
        if not shortest_s <= end_s - start_s <= longest_s or start_s < 0:
            raise RequestError(
                f"A recording is {shortest_s:g} to {longest_s:g} s long: this one would be "
                f"{end_s - start_s:.1f} s."
            )
        self.listener.recordings.append((start_s, end_s))

    def _require_live(self) -> None:
        if not self.request.live:
            raise RequestError("Only a live piece can be changed while it is made.")
        if self.ended:
            raise RequestError("The live piece has ended: start another one.")


def empty_take(job: LoggedJob, index: int) -> Finished:
    """The take of a variation of which nothing was made."""
    nothing = Clip(np.zeros((1, 0), np.float32), 32_000)
    return Finished(index, nothing, job.request.variation(index), 0.0, 0.0, stopped=True)


class RelayedJob(LoggedJob):
    """A job in front of another one, whose events its producer relays."""

    _behind: Job | None = None

    def set_behind(self, job: Job | None) -> None:
        """Sets the job that makes the music; it is stopped where this one is to stop."""
        with self._lock:
            self._behind = job
        while job and self.listener.changes:
            job.steer(self.listener.changes.popleft())
        if job and self.stopping.is_set():
            job.stop()

    def stop(self) -> None:
        """Ends the job behind it at its next step, or this one now where nothing was begun."""
        super().stop()
        if behind := self._behind:  # read once: it may be taken away meanwhile
            behind.stop()

    def steer(self, change: Steering) -> None:
        """Changes the job behind it, as soon as it is there."""
        with self._lock:
            behind = self._behind
            if behind is None:
                super().steer(change)
        if behind:
            behind.steer(change)

    def played(self, samples: int, underruns: int = 0) -> None:
        """The listener has heard so much of the job behind it."""
        super().played(samples, underruns)
        if behind := self._behind:
            behind.played(samples, underruns)

    def record_stretch(self, start_s: float, end_s: float) -> None:
        """Makes a take of a stretch of the job behind it."""
        if (behind := self._behind) is None:
            raise RequestError("This piece is not being made yet: try again in a moment.")
        behind.record_stretch(start_s, end_s)
