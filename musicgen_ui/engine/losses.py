"""What becomes of jobs that break, so that nobody loses more than what broke.

A job that finds no memory and was not heard yet waits until fewer run beside it, and begins again
from its seed; one that was heard ends there, and what was heard is its take. A device that failed
takes every job on it along: those that were not heard begin again on the next batch, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import traceback
from collections.abc import Callable, Iterator

from musicgen_ui.engine import faults
from musicgen_ui.engine.job import Job
from musicgen_ui.engine.job_queue import Entry, Line, Ticket
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.errors import RequestError

log = logging.getLogger(__name__)


class Losses:
    """Ends a batch's jobs when they break.

    Args:
        line: of the batch.
        jobs: that run, with their tickets.
        places: for jobs on the decoder.
        leave: frees a job's place.
        heard: what a job made so far, as a take; of an entry without a job, an empty one.
    """

    def __init__(
        self,
        line: Line,
        jobs: dict[Job, Ticket],
        places: int,
        leave: Callable[[Job], object],
        heard: Callable[[Entry, Job | None], Finished],
    ) -> None:
        self._line = line
        self._jobs = jobs
        self._leave = leave
        self._heard = heard
        self._all_places = self._places = places

    @property
    def places(self) -> int:
        """For jobs: fewer while the memory does not suffice for more, until all have ended."""
        if not self._jobs:
            self._places = self._all_places
        return self._places

    @contextlib.contextmanager
    def alone(self, job: Job) -> Iterator[None]:
        """What breaks inside is this job's loss alone, unless it is everybody's."""
        entry = self._jobs[job], job.variation
        try:
            yield
        except BaseException as error:
            self.lose(entry, error, job)

    def lose(self, entry: Entry, error: BaseException, job: Job | None = None) -> None:
        """Lets a job that found no memory wait until there are fewer, or ends it.

        Raises what is everybody's loss; `end_all` then ends this job too, or carries it on.
        """
        ticket, index = entry
        if faults.of_everybody(error):
            if job is None:  # on its way to a place: `end_all` would know nothing of it
                self._begin_again(entry)
            raise error
        if job in self._jobs:
            self._leave(job)
        if faults.out_of_memory(error) and self._jobs and index not in ticket.heard:
            self._places = len(self._jobs)
            self._line.put_back(entry)
        else:
            self._end(entry, error, job)
        traceback.clear_frames(error.__traceback__)  # they hold on to the memory

    def _begin_again(self, entry: Entry) -> None:
        """Lets a job that was not heard yet begin again on the next batch, once."""
        if entry[0].carried:
            self._end(entry, RequestError(faults.DEVICE))
            return
        self._line.put_back(entry)
        entry[0].carried = True

    def _end(self, entry: Entry, error: BaseException, job: Job | None = None) -> None:
        """Ends a job with what was heard of it; tells the error where that was nothing."""
        ticket, index = entry
        if not ticket.open:
            return
        if not isinstance(error, RequestError):
            log.error("A job broke off", exc_info=error)
        if ticket.open == 1 and not ticket.heard:
            ticket.close()
            ticket.deliver(faults.told(error))
            return
        try:
            take = self._heard(entry, job if index in ticket.heard else None)
        except Exception as failure:  # such as no memory for it
            log.error("What was heard of a job is lost", exc_info=failure)
            take = self._heard(entry, None)
        fault = faults.sentence(error)
        notes = (*take.notes, f"It broke off: {fault}")
        ticket.open -= 1
        ticket.deliver(dataclasses.replace(take, stopped=True, notes=notes, fault=fault))

    def end_all(self, error: Exception, carry: bool = False) -> None:
        """Ends every job with what was heard of it, and everybody's wait.

        With `carry` those who wait stay in the line, and jobs that were not heard yet are put
        back, once: for the batch that comes after this one.
        """
        self._line.take_in()
        jobs = dict(self._jobs)
        self._jobs.clear()
        for job, ticket in reversed(jobs.items()):
            entry = (ticket, job.variation)
            if carry and ticket.open and not ticket.carried and job.variation not in ticket.heard:
                self._line.put_back(entry)
            else:
                self._end(entry, error, job)
        for ticket in jobs.values():
            ticket.carried = True
        for entry in () if carry else self._line.pop_all():
            self._end(entry, error)
