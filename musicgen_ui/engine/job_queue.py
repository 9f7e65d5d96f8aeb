"""The queue of a scheduler: which variation is next, and how long the others wait.

The queue holds the `Specification` of each variation. Clients stand in a ring in the order of their
arrival and take turns: the first client's oldest variation starts, and if more of its variations
wait the client goes to the end of the ring. So no client is overtaken by one that came later, and a
client with many jobs takes turns with the others. While anything waits every place on the decoder
is taken and all places step together, so the waits follow from the steps left in each place and the
duration of the last steps. Any thread may add a job; everything else is done by the thread that
steps.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable
from itertools import zip_longest

from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.protocol import Progress, Stage
from musicgen_ui.engine.variation import ENDLESS_STEPS, Specification

PACE_STEPS = 100  # the pace is that of the last ones
PACE_KNOWN_S, PACE_KNOWN_STEPS = 5.0, 25  # measured; before that a crowd arrives: no estimate
REPORT_EVERY_S = 1.0  # place and wait; newcomers get theirs at once


class JobQueue:
    """Variations in the order in which they are to start."""

    def __init__(self) -> None:
        self._added: deque[list[Specification]] = deque()  # the one thing other threads touch
        self._ring: OrderedDict[Hashable, deque[Specification]] = OrderedDict()  # by client
        self._pace = Pace()
        self._full = False  # every place on the decoder is taken
        self._reported: set[LoggedJob] = set()  # jobs that know their place
        self._has_new = False
        self._reported_s = -math.inf
        self.retried: set[LoggedJob] = set()  # jobs that began on a device that failed

    def __len__(self) -> int:
        joining = sum(map(len, tuple(self._added)))
        return joining + sum(map(len, tuple(self._ring.values())))

    def add(self, variations: list[Specification]) -> None:
        """Queues the variations of a job. May be called from any thread."""
        self._added.append(variations)

    def take_in(self) -> None:
        """Lets those that were added join the ring."""
        while self._added:
            variations = self._added.popleft()
            self._ring.setdefault(_client(variations[0].job), deque()).extend(variations)
            self._has_new = True

    def pop_stopped(self) -> list[Specification]:
        """Takes out the variations of jobs that are to stop."""
        return self._pop_if(lambda job: job.stopping.is_set())

    def drop_ended(self) -> None:
        """Takes out what is left of jobs that have ended, by a failure."""
        self._pop_if(lambda job: job.ended)

    def pop_all(self) -> list[Specification]:
        """Takes everything out."""
        return self._pop_if(lambda _: True)

    def take_over(self, queue: JobQueue) -> None:
        """Takes the variations of another queue in the same order; this one must be empty."""
        self._ring, self._added, self.retried = queue._ring, queue._added, queue.retried

    def put_back(self, variation: Specification) -> None:
        """Puts a variation that began, but must begin again, at the head."""
        client = _client(variation.job)
        self._ring.setdefault(client, deque()).appendleft(variation)
        self._ring.move_to_end(client, last=False)

    def _pop_if(self, leaves: Callable[[LoggedJob], bool]) -> list[Specification]:
        left = [variation for variation in self.waiting() if leaves(variation.job)]
        for client in list(self._ring) if left else ():
            stay = deque(each for each in self._ring[client] if each not in left)
            self._ring[client] = stay
            if not stay:
                del self._ring[client]
        return left

    def waiting(self) -> list[Specification]:
        """Those in the ring, in the order in which they start if none comes or leaves."""
        turns = zip_longest(*self._ring.values())
        return [variation for turn in turns for variation in turn if variation]

    def pop(self, fits: Callable[[Specification], bool] = lambda _: True) -> Specification | None:
        """Takes out the variation whose turn it is, of those that have a place now.

        A client whose next one has none keeps its turn.
        """
        client = next((each for each, waiting in self._ring.items() if fits(waiting[0])), None)
        if client is None:
            return None
        variations = self._ring[client]
        variation = variations.popleft()
        self._ring.move_to_end(client)
        if not variations:
            del self._ring[client]
        return variation

    def report(self, running: Collection[LoggedJob], left: Iterable[int]) -> None:
        """Reports place and wait to the jobs that wait for their first variation.

        Args:
            running: jobs that report how far their music is.
            left: about how many steps it takes until each place on the decoder is free.
        """
        left = list(left)
        self._full = all(left)
        if not self._ring:
            self._reported.clear()  # it holds their jobs
        now = time.monotonic()
        to_all = now - self._reported_s >= REPORT_EVERY_S
        if not (to_all or self._has_new):
            return
        self._has_new, self._reported_s = False, now if to_all else self._reported_s
        waiting = self.waiting()
        starts = starts_after(left, [variation.steps for variation in waiting])
        passed = set(running)
        for place, (variation, steps) in enumerate(zip(waiting, starts, strict=True), 1):
            job = variation.job
            if job not in passed and (to_all or job not in self._reported):
                passed.add(job)
                wait_s = steps * self._pace.step_s if steps < ENDLESS_STEPS else 0.0
                job.log.append(Progress(Stage.WAITING, place=place, wait_s=wait_s))
        self._reported = {variation.job for variation in waiting}

    def stepped(self) -> None:
        """A step ended: the pace counts while all places are taken and something waits.

        While a crowd fills them each step admits one, which is slow and soon over.
        """
        self._pace.stepped(bool(self._ring) and self._full)


def _client(job: LoggedJob) -> Hashable:
    return job.client or job


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
