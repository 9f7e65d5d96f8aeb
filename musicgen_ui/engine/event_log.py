"""The events of a job, kept in order: any number of readers, from any point, on any thread.

A job's producer appends; the page, the API, the command line, metrics and a page that comes back
after a lost connection each read the same log at their own pace. A reader that starts late replays
what it missed, then follows. Readers cannot take events from each other, and the producer never
waits for a reader. Nothing is taken out, but of an endless piece the oldest events.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator

from musicgen_ui.engine.protocol import Event, Failed, Finished

WAIT_S = 1.0  # at most without a look: on Windows Ctrl+C does not end an endless wait


class EventLog:
    """An append-only list of events that ends by itself.

    It ends after `Failed`, or after one `Finished` for each variation. Every method may be called
    from any thread.

    Args:
        variations: how many `Finished` end it.
        kept: events that stay, of an endless piece; None is all. Up to twice as many may be there.
    """

    def __init__(self, variations: int = 1, kept: int | None = None) -> None:
        self._events: list[Event] = []  # from number `_dropped` on
        self._dropped = 0
        self._kept = kept
        self._unfinished = variations
        self._changed = threading.Condition()
        self._wakers: set[Callable[[], None]] = set()

    def __len__(self) -> int:
        return self._dropped + len(self._events)

    @property
    def ended(self) -> bool:
        """No event follows those that are here."""
        return self._unfinished <= 0

    @property
    def unfinished(self) -> int:
        """Variations whose `Finished` is to come."""
        return self._unfinished

    def so_far(self) -> tuple[Event, ...]:
        """The events that are here."""
        return tuple(self._events)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for the end; whether it has come."""
        with self._changed:
            return self._changed.wait_for(lambda: self.ended, timeout_s)

    def append(self, event: Event) -> None:
        """Adds an event and wakes every reader; events after the end are dropped."""
        with self._changed:
            if self.ended:
                return
            if isinstance(event, Failed):
                self._unfinished = 0
            elif isinstance(event, Finished):
                self._unfinished -= 1
            self._events.append(event)
            if self._kept and len(self._events) >= 2 * self._kept:
                gone = len(self._events) - self._kept
                self._events, self._dropped = self._events[gone:], self._dropped + gone
            self._changed.notify_all()
            wakers = tuple(self._wakers)
        for wake in wakers:
            with contextlib.suppress(RuntimeError):  # its event loop has ended
                wake()

    def rewrite(self, change: Callable[[Event], Event]) -> None:
        """Replaces each event of a log that has ended, as by one without its audio."""
        self._events[:] = map(change, self._events)

    def _read(self, after: int) -> tuple[int, tuple[Event, ...]]:
        """The number behind the last event, and the events from `after` on that are still here."""
        with self._changed:
            return max(after, len(self)), tuple(self._events[max(after - self._dropped, 0) :])

    async def events(self, after: int = 0) -> AsyncGenerator[Event, None]:
        """The events from number `after` on: those that are here, then those to come."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        self._wakers.add(wake)
        try:
            while True:
                changed.clear()
                ended = self.ended  # before the list is read: what ends it is read as well
                after, new = self._read(after)
                for event in new:
                    yield event
                if not new and ended:
                    return
                if not new:
                    await changed.wait()
        finally:
            self._wakers.discard(wake)

    def follow(self, after: int = 0, poll: Callable[[], object] | None = None) -> Iterator[Event]:
        """`events` for a thread without an event loop.

        Args:
            after: the number of the first event.
            poll: is called instead of a wait while nothing is new: a caller that produces the
                events itself makes the next one here.
        """
        while True:
            ended = self.ended
            after, new = self._read(after)
            yield from new
            if new:
                continue
            if ended:
                return
            if poll:
                poll()
                continue
            with self._changed:
                while len(self) == after and not self.ended:
                    self._changed.wait(WAIT_S)
