"""A job with its event log: what every backend hands out."""

from __future__ import annotations

import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping

import numpy as np

from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.event_log import EventLog
from musicgen_ui.engine.protocol import Event, Finished, Job, Steering
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest


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
        self.log = EventLog(request.takes)
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
        """Refuses: this job cannot be changed while it runs."""
        raise RequestError("This take cannot be changed while it is made.")


def empty_take(job: LoggedJob, index: int) -> Finished:
    """The take of a variation of which nothing was made."""
    nothing = Clip(np.zeros((1, 0), np.float32), 32_000)
    return Finished(index, nothing, job.request.variation(index), 0.0, 0.0, stopped=True)


class RelayedJob(LoggedJob):
    """A job in front of another one, whose events its producer relays."""

    _behind: Job | None = None

    def set_behind(self, job: Job | None) -> None:
        """Sets the job that makes the music; it is stopped where this one is to stop."""
        self._behind = job
        if job and self.stopping.is_set():
            job.stop()

    def stop(self) -> None:
        """Ends the job behind it at its next step, or this one now where nothing was begun."""
        super().stop()
        if self._behind:
            self._behind.stop()

    def steer(self, change: Steering) -> None:
        """Steers the job behind it."""
        if self._behind is None:
            raise RequestError("This take is not being made yet: try again in a moment.")
        self._behind.steer(change)
