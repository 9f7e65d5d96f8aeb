"""The line of jobs that wait for a place on a decoder.

A caller's request is a `Ticket`, and each of its variations an entry of the line. Any thread may
add a ticket; everything else is done by the thread that steps the batch.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Collection

from musicgen_ui.engine.events import Event, Progress
from musicgen_ui.request import GenerationRequest


@dataclasses.dataclass(eq=False)
class Ticket:
    """A caller's request while it is open."""

    request: GenerationRequest  # with its seed
    stop: threading.Event
    deliver: Callable[[Event | Exception], None]
    open: int  # variations that are not finished
    place: int = 0  # last told

    def close(self) -> None:
        """Nobody listens any more: its jobs are dropped at the next step, without a take."""
        self.open = 0


Entry = tuple[Ticket, int]  # a ticket and the number of one of its variations


class Line:
    """Entries in the order in which they are to start."""

    def __init__(self) -> None:
        self._inbox: deque[Ticket] = deque()  # the one thing that other threads touch
        self._waiting: deque[Entry] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._inbox)

    def add(self, ticket: Ticket) -> None:
        """Queues every variation of a ticket. May be called from any thread."""
        self._inbox.append(ticket)

    def take_in(self) -> None:
        """Lets those who were added join the line."""
        while self._inbox:
            ticket = self._inbox.popleft()
            self._waiting.extend((ticket, index) for index in range(ticket.request.variations))

    def drop_closed(self) -> None:
        """Lets those who closed leave the line."""
        if any(not ticket.open for ticket, _ in self._waiting):
            self._waiting = deque(entry for entry in self._waiting if entry[0].open)

    def tickets(self) -> list[Ticket]:
        """Those who wait with at least one variation, in the order of their first."""
        return list(dict.fromkeys(ticket for ticket, _ in self._waiting))

    def pop_stopped(self) -> list[Entry]:
        """Takes the entries out of the line whose stop was asked for."""
        stopped = [entry for entry in self._waiting if entry[0].stop.is_set()]
        if stopped:
            self._waiting = deque(entry for entry in self._waiting if entry not in stopped)
        return stopped

    def pop(self) -> Entry | None:
        """Takes the first entry out of the line."""
        return self._waiting.popleft() if self._waiting else None

    def tell(self, running: Collection[Ticket]) -> None:
        """Tells those who wait for their first variation their new places."""
        waiting = (ticket for ticket in self.tickets() if ticket not in running)
        for place, ticket in enumerate(waiting, start=1):
            if ticket.place != place:
                ticket.place = place
                ticket.deliver(Progress("waiting", place=place))
