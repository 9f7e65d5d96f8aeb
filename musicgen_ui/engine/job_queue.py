"""The line of jobs that wait for a place on a decoder: who is next, and how long it takes.

A caller's request is a `Ticket`, and each of its variations an entry of the line. Visitors stand
in a ring in the order of their arrival and take turns: the first one's oldest entry starts, and
if more of its entries wait it goes to the ring's end. So nobody is overtaken by a visitor who came
later, and somebody with many jobs takes turns with the others. While somebody waits every place is
taken and all places step together, so the waits follow from the steps left in each place and the
pace of the last steps. Any thread may add a ticket; everything else is done by the thread that
steps the batch.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable
from itertools import zip_longest

from musicgen_ui.engine.protocol import Event, Progress
from musicgen_ui.request import GenerationRequest

PACE_STEPS = 100  # the pace is that of the last ones
PACE_KNOWN_S, PACE_KNOWN_STEPS = 5.0, 25  # measured; before, a crowd arrives and no wait is told
TOLD_EVERY_S = 1.0  # place and wait: to tell a crowd takes time; newcomers are told at once


@dataclasses.dataclass(eq=False)
class Ticket:
    """A caller's request while it is open."""

    request: GenerationRequest  # with its seed
    stop: threading.Event
    deliver: Callable[[Event | Exception], None]
    open: int  # variations that are not finished
    steps: int = 0  # that each variation takes, about
    visitor: str = ""  # whose it is; one without a name is a visitor of its own
    heard: set[int] = dataclasses.field(default_factory=set)  # variations of which music came
    told: bool = False  # its place in the line
    carried: bool = False  # to another batch, when one failed

    def close(self) -> None:
        """Nobody listens any more: its jobs are dropped at the next step, without a take."""
        self.open = 0


Entry = tuple[Ticket, int]  # a ticket and the number of one of its variations


class Line:
    """Entries in the order in which they are to start."""

    def __init__(self) -> None:
        self._inbox: deque[Ticket] = deque()  # the one thing that other threads touch
        self._ring: OrderedDict[Hashable, deque[Entry]] = OrderedDict()  # by visitor
        self._pace = Pace()
        self._full = False  # every place on the decoder is taken
        self._joined = False  # somebody who was not told a place
        self._told_s = -math.inf

    def __len__(self) -> int:
        joining = sum(ticket.open for ticket in tuple(self._inbox))
        return joining + sum(map(len, tuple(self._ring.values())))

    def add(self, ticket: Ticket) -> None:
        """Queues every variation of a ticket. May be called from any thread."""
        self._inbox.append(ticket)

    def take_in(self) -> None:
        """Lets those who were added join the line."""
        while self._inbox:
            ticket = self._inbox.popleft()
            entries = self._ring.setdefault(ticket.visitor or ticket, deque())
            entries.extend((ticket, index) for index in range(ticket.request.variations))
            self._joined = True

    def drop_closed(self) -> None:
        """Lets those who closed leave the line."""
        self._pop_if(lambda ticket: not ticket.open)

    def pop_stopped(self) -> list[Entry]:
        """Takes the entries out of the line whose stop was asked for."""
        return self._pop_if(lambda ticket: ticket.stop.is_set())

    def pop_all(self) -> list[Entry]:
        """Takes everybody out of the line."""
        return self._pop_if(lambda _: True)

    def take_over(self, line: Line) -> None:
        """Lets those of another line wait here, where nobody does yet, in the same order."""
        self._ring, self._inbox = line._ring, line._inbox

    def put_back(self, entry: Entry) -> None:
        """Puts an entry that began, but must begin again, at the head of the line."""
        visitor = entry[0].visitor or entry[0]
        self._ring.setdefault(visitor, deque()).appendleft(entry)
        self._ring.move_to_end(visitor, last=False)

    def _pop_if(self, leaves: Callable[[Ticket], bool]) -> list[Entry]:
        left = [entry for entry in self.entries() if leaves(entry[0])]
        for key in list(self._ring) if left else ():
            stay = deque(entry for entry in self._ring[key] if entry not in left)
            self._ring[key] = stay
            if not stay:
                del self._ring[key]
        return left

    def entries(self) -> list[Entry]:
        """Those who wait, in the order in which they start if nobody comes or leaves."""
        turns = zip_longest(*self._ring.values())
        return [entry for turn in turns for entry in turn if entry]

    def pop(self) -> Entry | None:
        """Takes the entry whose turn it is out of the line."""
        if not self._ring:
            return None
        visitor, entries = next(iter(self._ring.items()))
        entry = entries.popleft()
        self._ring.move_to_end(visitor)
        if not entries:
            del self._ring[visitor]
        return entry

    def tell(self, running: Collection[Ticket], left: Iterable[int]) -> None:
        """Tells those who wait for their first variation their place and the wait.

        Args:
            running: those who are told how far their music is.
            left: about how many steps it takes until each place on the decoder is free.
        """
        left = list(left)
        self._full = all(left)
        now = time.monotonic()
        everybody = now - self._told_s >= TOLD_EVERY_S
        if not (everybody or self._joined):
            return
        self._joined, self._told_s = False, now if everybody else self._told_s
        told = set(running)
        starts = starts_after(left, [ticket.steps for ticket, _ in self.entries()])
        for place, ((ticket, _), steps) in enumerate(zip(self.entries(), starts, strict=True), 1):
            if ticket not in told and (everybody or not ticket.told):
                told.add(ticket)
                ticket.told = True
                wait_s = steps * self._pace.step_s
                ticket.deliver(Progress("waiting", place=place, wait_s=wait_s))

    def stepped(self) -> None:
        """Every job took a step: the pace counts while all places are taken and somebody waits.

        While a crowd fills them each step admits one, which is slow and soon over.
        """
        self._pace.stepped(bool(self._ring) and self._full)


def starts_after(left: Iterable[int], waiting: Iterable[int]) -> list[int]:
    """Steps until each of `waiting`, given by its length in steps, gets one of the places.

    `left` holds the steps until each place is free.
    """
    free = sorted(left)
    starts = []
    for steps in waiting:
        starts.append(free[0])
        heapq.heapreplace(free, free[0] + steps)
    return starts


class Pace:
    """How long a step takes, codec and audio prompts included: the mean of the last ones."""

    def __init__(self) -> None:
        self._ended_s: float | None = None  # the last step
        self._steps_s: deque[float] = deque(maxlen=PACE_STEPS)
        self._measured_s = 0.0  # none forgotten

    def stepped(self, counts: bool) -> None:
        """A step ended; the time since the one before counts if both do."""
        now = time.monotonic()
        if counts and self._ended_s is not None:
            self._steps_s.append(now - self._ended_s)
            self._measured_s += now - self._ended_s
        self._ended_s = now if counts else None

    @property
    def step_s(self) -> float:
        """Seconds a step; 0 until enough was measured."""
        known = self._measured_s >= PACE_KNOWN_S and len(self._steps_s) >= PACE_KNOWN_STEPS
        return sum(self._steps_s) / len(self._steps_s) if known else 0.0
