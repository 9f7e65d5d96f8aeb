"""Admission: a backend around the real one, with the limits of a server.

It refuses what the queue or a client's share of it does not hold, keeps the job log, saves takes to
files once for all readers, and knows whose job is whose.

A client is known by two names: the session that Gradio gives to a page or an API client, and the
network address. A session costs nothing, so both names count, and whichever limit is reached first
holds. The address is the peer's, or what a trusted proxy in front says: uvicorn reads
X-Forwarded-For from the networks of `Settings.trusted_proxies` alone, from the right, so a client
cannot invent one. Loopback addresses distinguish nobody and are no names.
"""

from __future__ import annotations

import contextvars
import dataclasses
import ipaddress
import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from musicgen_ui import takes
from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.job_log import JobLog, JobRecord
from musicgen_ui.backends.wrapping import WrappingBackend
from musicgen_ui.engine.job import RelayedJob
from musicgen_ui.engine.protocol import (
    Backend,
    Chunk,
    Event,
    Failed,
    Finished,
    Health,
    Progress,
    Recorded,
    Stage,
    Trouble,
)
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

HOUR_S = 3600.0
SLOT_S = 60.0  # what a client was given within so long is one entry of its quota
CLIENTS = 5000  # whose quotas are kept: the one longest unseen goes first
NAME_CHARACTERS = 64  # of a session's name, which the client chooses
NEW_AT_LEAST_S = 0.02  # a take with less new music than a frame is not saved
KEPT_BYTES = 256_000_000  # of audio in the logs of jobs that have ended

Complete = Callable[[GenerationRequest], tuple[GenerationRequest, tuple[str, ...]]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Client:
    """Who is asking."""

    session: str  # one page in a browser, or one API client
    address: str = ""  # "" where it distinguishes nobody

    @classmethod
    def of(cls, request: object) -> Client:
        """The client behind a `gr.Request`, or one of Starlette, which has no session."""
        peer = getattr(request, "client", None)
        session = (getattr(request, "session_hash", None) or "")[:NAME_CHARACTERS]
        return cls(session, address_name(getattr(peer, "host", None) or ""))

    @property
    def name(self) -> str:
        """Who takes turns with others: an address, however many sessions it has."""
        return self.address or self.session

    @property
    def names(self) -> list[str]:
        """Under which names a job counts."""
        names = [f"session {self.session}"] * bool(self.session)
        names += [f"at {self.address}"] * bool(self.address)
        return names or ["nameless"]


def address_name(host: str) -> str:
    """The address that stands for a client: of IPv6 the network of 64 bits; "" for loopback."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if address.is_loopback:
        return ""
    if address.version == 6:
        return str(ipaddress.ip_network((int(address), 64), strict=False).network_address)
    return str(address)


class HourlyQuota:
    """Seconds of music that each client was given within the last hour.

    Args:
        limit_s: what each may have; 0 is no limit.
        clock: seconds that never go back.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        # By name: [when it does not count any more, seconds of music], the oldest first.
        self._given: OrderedDict[str, deque[list[float]]] = OrderedDict()
        self._under_way: dict[str, float] = {}  # seconds that are being made
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._given)

    @contextmanager
    def reserve(self, client: Client, record: JobRecord) -> Iterator[None]:
        """Reserves the seconds that a job asks for until its end, when those it made count.

        Raises:
            RequestError: the hour's quota does not hold it; says when it will.
        """
        if not self.limit_s:
            yield
            return
        with self._lock:
            for name in client.names:
                self._check(name, record.asked_s)
            for name in client.names:
                self._under_way[name] = self._under_way.get(name, 0.0) + record.asked_s
        try:
            yield
        finally:
            with self._lock:
                for name in client.names:
                    self._under_way[name] -= record.asked_s
                    if self._under_way[name] < 1e-6:
                        del self._under_way[name]
                    self._add(name, record.made_s)

    def _check(self, name: str, asked_s: float) -> None:
        if asked_s > self.limit_s:
            raise RequestError(
                f"A visitor may have {self.limit_s:g} s of music an hour here: choose a shorter "
                "length or fewer variations."
            )
        under_way_s, given = self._under_way.get(name, 0.0), self._current(name)
        left_s = self.limit_s - under_way_s - sum(seconds for _, seconds in given)
        if asked_s <= left_s + 1e-6:
            return
        wait_s = HOUR_S  # what is being made counts for an hour from its end
        for until_s, seconds in given:
            left_s += seconds
            if asked_s <= left_s + 1e-6:
                wait_s = until_s - self._clock()
                break
        raise RequestError(
            f"Your share of {self.limit_s:g} s of music an hour is used up: come back in "
            f"{about_time(wait_s)}."
        )

    def _current(self, name: str) -> deque[list[float]]:
        """What a client was given and still counts, the oldest first."""
        given = self._given.get(name, deque())
        while given and given[0][0] <= self._clock():
            given.popleft()
        return given

    def _add(self, name: str, seconds: float) -> None:
        if not seconds:
            return
        given, until_s = self._current(name), self._clock() + HOUR_S
        if given and given[-1][0] > until_s - SLOT_S:
            given[-1] = [until_s, given[-1][1] + seconds]
        else:
            given.append([until_s, seconds])
        self._given[name] = given
        self._given.move_to_end(name)
        while len(self._given) > CLIENTS or not self._current(next(iter(self._given))):
            self._given.popitem(last=False)


@dataclass(frozen=True, eq=False)
class Saved(Finished):
    """A finished variation with its files. Without `take` there are none, and `error` says why,
    or there was nothing new to keep.
    """

    take: takes.Take | None = None
    error: takes.UnsavedError | None = None


class AdmittedJob(RelayedJob):
    """A job of a client. Its log has `Saved` in place of `Finished`."""

    def __init__(
        self, request: GenerationRequest, client: Client, origin: takes.Origin | None = None
    ) -> None:
        super().__init__(request, client.name)
        self.origin = origin  # of its takes, where they are made from another one
        self.owner = client
        self.left = False  # the client went away: its takes are not kept
        self.record = JobRecord(self.id[:8])
        self.record.set_request(request)

    def leave(self) -> None:
        """Stops it for a client that went away: no take is saved."""
        self.left = True
        self.stop()


class Admission(WrappingBackend):
    """A `protocol.Backend` in front of `backend`.

    Args:
        backend: what makes the music.
        folder: of the takes; None saves none.
        spare: the folder of takes where `folder` does not take them.
        queue_length: takes that are being made or wait, at most.
        client_jobs: takes of one client among them; 0 is as many as there is room for.
        quota: each client's seconds of music an hour.
        job_log: of the server.
    """

    def __init__(
        self,
        backend: Backend,
        folder: Path | None,
        spare: Path | None = None,
        queue_length: int = 32,
        client_jobs: int = 0,
        quota: HourlyQuota | None = None,
        job_log: JobLog | None = None,
    ) -> None:
        super().__init__(backend)
        self.folder, self.spare = folder, spare
        self.queue_length, self.client_jobs = queue_length, client_jobs
        self.quota = HourlyQuota(0) if quota is None else quota
        self.job_log = job_log or JobLog()
        self._lock = threading.Lock()  # guards what follows
        self._jobs: dict[str, AdmittedJob] = {}  # under way, by id
        self._ended: OrderedDict[str, AdmittedJob] = OrderedDict()  # the last ones
        self._closed = False

    def __len__(self) -> int:
        """Takes that are being made or wait."""
        return sum(job.record.takes for job in tuple(self._jobs.values()))

    def submit(
        self,
        request: GenerationRequest,
        client: Client | str = "",
        complete: Complete | None = None,
        origin: takes.Origin | None = None,
    ) -> AdmittedJob:
        """See `Backend.submit`; a refusal is a `Failed` event.

        Args:
            request: what to make, as far as it is known.
            client: whose job it is.
            complete: makes of the request, with its seed, the one to be made and notes for its
                takes; called on a thread of the job, since it may read clips and wait for the
                backend. None where the request is complete.
            origin: what its takes say that they were made from.
        """
        owner = Client(client) if isinstance(client, str) else client
        job = AdmittedJob(request, owner, origin)
        self.job_log.begin(job.record)
        try:
            with self._lock:
                self._check(owner, request)
                self._jobs[job.id] = job
        except RequestError as error:
            self._end(job, Failed(error))
            return job
        # In the context of the request: ZeroGPU counts by the visitor whom Gradio names there.
        run = contextvars.copy_context().run
        work = threading.Thread(target=run, args=(self._run, job, complete), daemon=True)
        work.start()
        return job

    def refuse(self, error: RequestError) -> None:
        """Logs a request that was wrong before it could become a job."""
        record = JobRecord(secrets.token_hex(4))
        record.note(Failed(error))
        self.job_log.end(record)

    def _check(self, client: Client, request: GenerationRequest) -> None:
        takes = request.variations
        if self._closed:
            raise RequestError("The server is being stopped: try again when it is back.")
        if request.live and self.quota.limit_s:
            raise RequestError(
                "Live mode is off on this server: it limits each visitor's music by the hour."
            )
        most = min(self.queue_length, self.client_jobs or self.queue_length)
        if takes > most:
            raise RequestError(
                f"This server makes at most {most} takes at once for a visitor: choose fewer.",
                "variations",
            )
        for name in client.names if self.client_jobs else ():
            jobs = [job for job in self._jobs.values() if name in job.owner.names]
            count = sum(job.record.takes for job in jobs)
            if count + takes > self.client_jobs:
                raise RequestError(
                    f"{count} of your takes are being made or waiting, and {self.client_jobs} are "
                    "a visitor's share: try again when one of them is finished."
                )
        if len(self) + takes > self.queue_length:
            raise RequestError(
                f"The queue is full: {len(self)} takes are being made or waiting. "
                "Try again in a minute."
            )

    def job(self, id: str) -> AdmittedJob | None:
        """A job under way, or one of the last that ended. Its id is a secret of its page."""
        with self._lock:
            return self._jobs.get(id) or self._ended.get(id)

    def stop(self, session: str) -> int:
        """Stops the jobs of a session; how many there were."""
        jobs = self._jobs_of(session)
        for job in jobs:
            job.stop()
        return len(jobs)

    def leave(self, session: str) -> None:
        """Stops the jobs of a session that is gone; their takes are not kept."""
        for job in self._jobs_of(session):
            job.leave()

    def _jobs_of(self, session: str) -> list[AdmittedJob]:
        with self._lock:
            return [job for job in self._jobs.values() if job.owner.session == session]

    def refuse_all(self) -> None:
        """Refuses further jobs; those under way go on."""
        with self._lock:
            self._closed = True

    def stop_all(self) -> None:
        """Stops every job, and refuses further ones."""
        with self._lock:
            self._closed, jobs = True, list(self._jobs.values())
        for job in jobs:
            job.stop()

    # On the job's thread

    def _run(self, job: AdmittedJob, complete: Complete | None) -> None:
        try:
            last = self._all_but_the_last(job, complete)
        except Exception as error:
            last = Failed(error)
        self._end(job, last)

    def _all_but_the_last(self, job: AdmittedJob, complete: Complete | None) -> Event | None:
        """Appends the events of the job but the last one, which it returns."""
        if self.backend.status().starting:
            job.log.append(Progress(Stage.LOADING, note="starting the engine"))
        notes: tuple[str, ...] = ()
        if complete:
            job.request, notes = complete(job.request)
            job.record.set_request(job.request)
        with self.quota.reserve(job.owner, job.record):
            if not job.begin():
                return None
            behind = self.backend.submit(job.request, job.client)
            job.set_behind(behind)
            for event in behind.follow():
                job.record.note(event)
                if isinstance(event, Recorded):
                    event = Recorded(self._saved(job, event.take, notes))
                elif isinstance(event, Finished):
                    event = self._saved(job, event, notes)
                last = isinstance(event, Finished) and job.log.unfinished == 1
                if last or isinstance(event, Failed):
                    return event
                job.log.append(event)
        return None

    def _saved(self, job: AdmittedJob, finished: Finished, notes: tuple[str, ...]) -> Saved:
        """Saves the take, which never fails the job: its client was sent the music already.

        The log is kept for readers that come back, who need no clips of the request.
        """
        values = {f.name: getattr(finished, f.name) for f in dataclasses.fields(Finished)}
        values |= {"notes": (*notes, *finished.notes), "request": finished.request.without_clips()}
        new_s = finished.clip.duration_s - finished.prompt_s
        if self.folder is None or job.left or new_s < NEW_AT_LEAST_S:
            return Saved(**values)
        finished = dataclasses.replace(finished, notes=(*notes, *finished.notes))
        try:
            take = takes.save(finished, self.folder, spare=self.spare, origin=job.origin)
        except takes.UnsavedError as error:
            log.error("A take could not be saved", exc_info=error)
            return Saved(**values, error=error)
        return Saved(**values, take=take)

    def _end(self, job: AdmittedJob, last: Event | None) -> None:
        """Frees the job's place and logs it; then its readers learn of the end."""
        if isinstance(last, Failed):
            job.record.note(last)
        job.set_behind(None)
        job.request = job.request.without_clips()
        with self._lock:
            if self._jobs.pop(job.id, None):
                self._ended[job.id] = job
            self._drop_audio()
        self.job_log.end(job.record, job.left)
        if last:
            job.log.append(last)

    def _drop_audio(self) -> None:
        """Frees the audio of the jobs that ended longest ago, so that memory is bounded."""
        held = {id: _nbytes(job) for id, job in self._ended.items()}
        while len(self._ended) > 1 and sum(held.values()) > KEPT_BYTES:
            id, job = self._ended.popitem(last=False)
            del held[id]
            job.log.rewrite(_without_audio)

    # As the backend

    def health(self) -> Health:
        """See `Backend.health`; a server that ends says so, for load balancers."""
        health = self.backend.health()
        if self._closed and not health.trouble:
            return dataclasses.replace(health, trouble=Trouble.STOPPING)
        return health

    def close(self) -> None:
        """See `Backend.close`."""
        self.stop_all()
        self.backend.close()


def _nbytes(job: AdmittedJob) -> int:
    events = job.log.so_far()
    held = [e.take if isinstance(e, Recorded) else e for e in events]
    return sum(e.clip.samples.nbytes for e in held if isinstance(e, (Chunk, Finished)))


def _without_audio(event: Event) -> Event:
    if isinstance(event, Recorded):
        silent = _without_audio(event.take)
        assert isinstance(silent, Finished)
        return Recorded(silent)
    if isinstance(event, Saved) and event.take:
        take = dataclasses.replace(event.take, clip=_silence(event.take.clip))
        event = dataclasses.replace(event, take=take)
    if isinstance(event, Chunk):
        return dataclasses.replace(event, clip=_silence(event.clip))
    if isinstance(event, Finished):
        return dataclasses.replace(event, clip=_silence(event.clip), codes=None)
    return event


def _silence(clip: Clip) -> Clip:
    return Clip(np.zeros((clip.channels, 0), np.float32), clip.sampling_rate)


def about_time(seconds: float) -> str:
    """A time to come, as exact as it can be known: "about 40 s", "about 12 minutes"."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} minutes"
