"""A backend of many machines: replicas in a Ray cluster behind one front.

The front is an ordinary process with the page. It keeps the queue and hands a variation to the
cluster only while a replica that may make it has a free row, so that a new replica helps at once.
Replicas that are alike are a `Pool`, such as those on GPUs and those on CPUs. Everything here
runs in the event loop of one thread: the dispatcher, a task for each variation that is being made,
and a beat each second that asks all replicas how they are and renews the lease of this front's
jobs.

Failover: the stream of a variation brings the codes of its frames. When a replica dies, or is
silent, the variation goes to the head of the queue with the codes that arrived; the next replica
goes on from there with the same random numbers. What was delivered is never sent again, so the
audio before the loss stays as it is to the sample. A variation that is lost twice without any new
music in between ends. A live piece ends with its replica, which alone has its KV caches.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.ray_job import Made, RayJob, take_so_far, with_clips
from musicgen_ui.backends.ray_pool import Placement, Pool, pool_for
from musicgen_ui.backends.ray_replica import HEARTBEAT_S, Report
from musicgen_ui.engine.job import LoggedJob, empty_take
from musicgen_ui.engine.job_queue import JobQueue
from musicgen_ui.engine.protocol import (
    CheckpointInfo,
    Chunk,
    Event,
    Failed,
    Finished,
    Health,
    Progress,
    Recorded,
    ReplicaHealth,
    Status,
    Trouble,
)
from musicgen_ui.engine.variation import ENDLESS_STEPS, Specification
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

if TYPE_CHECKING:  # Ray need not be installed
    from ray.serve.handle import DeploymentHandle

SILENT_S = 8.0  # a stream without a heartbeat for so long is lost
MOST_LOST = 2  # replicas that a variation loses in a row without any new music
CONTROL_S = 30.0  # for an answer to what a page asks
CLOSE_S = 10.0
FRAME_RATE = 50  # about: for the waits that the queue estimates
LOST = "The machines that made this failed: try once more, or with other settings."
LIVE_LOST = "The machine that made this piece is gone: start another one. Your recordings are kept."

log = logging.getLogger(__name__)


class LostError(Exception):
    """A stream ended before its take, or is silent."""


class RayBackend:
    """`protocol.Backend` over the replicas of a cluster. Methods may be called from any thread.

    Args:
        handles: Serve's, of the deployments of `Replica`; what all of them know is asked of the
            first one, which takes every checkpoint.
        shut_down: ends what was started for it.
    """

    def __init__(
        self, handles: Sequence[DeploymentHandle], shut_down: Callable[[], object] = lambda: None
    ) -> None:
        self._pools = [Pool(handle) for handle in handles]
        self._shut_down = shut_down
        self._front = secrets.token_hex(8)
        self._queue = JobQueue()
        self._rows: dict[Specification, asyncio.Task[None]] = {}  # handed to the cluster
        self._made: dict[Specification, Made] = {}
        self._stops_s: dict[str, float] = {}  # when a replica was last asked to stop, by id
        self._models: dict[tuple[str, bool], tuple[str, int]] = {}  # by checkpoint and stereo
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="ray-front", daemon=True)
        self._thread.start()

    # Any thread

    def submit(self, request: GenerationRequest, client: str = "") -> RayJob:
        """See `Backend.submit`."""
        job = RayJob(request, client, self._changed)
        if self._closed:
            job.log.append(Failed(RequestError("The server is being stopped: try again soon.")))
            return job
        steps = ENDLESS_STEPS if request.live else round(request.duration_s * FRAME_RATE)
        self._queue.add(
            [
                Specification(job, index, job.request.variation(index), None, steps)
                for index in range(job.request.variations)
            ]
        )
        self._changed()
        return job

    def _changed(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._wake.set)

    def checkpoints(self) -> list[str]:
        """See `Backend.checkpoints`; those of the replica that answers first."""
        return list(self._ask("checkpoints"))

    def describe(self, checkpoint: str, adapter: str = "") -> CheckpointInfo:
        """See `Backend.describe`."""
        answer: CheckpointInfo | RequestError = self._ask("describe", checkpoint, adapter)
        if isinstance(answer, RequestError):
            raise answer
        if not adapter:
            self._models[checkpoint, False] = answer.checkpoint, answer.nbytes
        return answer

    def unload(self) -> None:
        """See `Backend.unload`; every replica's."""
        for pool in self._pools:
            with contextlib.suppress(Exception):  # none is there
                pool.ask(CONTROL_S, "unload")

    def _ask(self, method: str, *arguments: object) -> Any:
        """What a replica answers, of the first pool that does.

        Raises:
            RequestError: none answers.
        """
        for pool in self._pools:
            try:
                answers = pool.ask(CONTROL_S, method, *arguments)
            except Exception as error:
                log.debug("No replica answers", exc_info=error)
                continue
            for answer in answers:
                if not isinstance(answer, Exception) or isinstance(answer, RequestError):
                    return answer
        raise RequestError("No machine of this server answers: try again soon.")

    def _fresh(self) -> list[Report]:
        """The reports of replicas that answer."""
        return [report for pool in self._pools for report in pool.fresh()]

    def status(self) -> Status:
        """See `Backend.status`; of all replicas together."""
        reports = self._fresh()
        states = [report.status for report in reports]
        devices = [state.device for state in states]
        counts = [f"{devices.count(name)} × {name}" for name in dict.fromkeys(devices)]
        first = states[0] if states else Status()
        return Status(
            loaded=tuple(dict.fromkeys(name for state in states for name in state.loaded)),
            loading=tuple(dict.fromkeys(note for state in states for note in state.loading)),
            device=" + ".join(counts),
            precision=first.precision,
            reason=first.reason,
            nbytes=sum(state.nbytes for state in states),
            starting=not states,
        )

    def health(self) -> Health:
        """See `Backend.health`; a replica that is ill is named in the warnings."""
        replicas, warnings, models = dict[str, ReplicaHealth](), list[str](), dict[str, int]()
        for pool in self._pools:
            found, ill = pool.health()
            replicas |= found
            warnings += ill
        fresh = self._fresh()
        for report in fresh:
            for checkpoint, nbytes in report.health.models.items():
                models[checkpoint] = models.get(checkpoint, 0) + nbytes
        well = [report for report in fresh if not report.health.trouble]
        return Health(
            None if well else Trouble.NO_REPLICA,
            models,
            jobs=sum(report.health.jobs for report in fresh),
            waiting=len(self._queue) + sum(report.health.waiting for report in fresh),
            step_age_s=max((report.health.step_age_s for report in fresh), default=0.0),
            warnings=tuple(warnings),
            replicas=replicas,
        )

    def close(self) -> None:
        """See `Backend.close`."""
        self._closed = True
        self._changed()
        self._thread.join(CLOSE_S)
        shut_down, self._shut_down = self._shut_down, lambda: None  # once: Serve would begin anew
        shut_down()

    # The front's thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._dispatch_until_closed())
        except Exception:
            log.critical("The front's thread ended", exc_info=True)
        finally:
            self._loop.close()

    async def _dispatch_until_closed(self) -> None:
        self._start(self._beat_until_closed())
        while not self._closed:
            self._dispatch()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), HEARTBEAT_S)
            self._wake.clear()
        self._queue.take_in()
        for specification in (*self._queue.pop_all(), *self._rows):
            specification.job.stopping.set()
            self._end(specification)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, work: Coroutine[object, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _dispatch(self) -> None:
        """Hands out what there is a row for, passes stops on, and reports the others' places."""
        self._queue.take_in()
        for specification in self._queue.pop_stopped():
            self._end(specification)
        self._queue.drop_ended()
        for specification in self._rows:
            made, job = self._made[specification], specification.job
            if job.stopping.is_set() or job.ended:
                self._stop(made.place.id)
            if job.request.live:
                self._pass_on(job, made)
        while upcoming := self._next():
            if upcoming.job.begin():
                self._rows[upcoming] = self._loop.create_task(self._compose(upcoming))
        jobs = {specification.job for specification in self._rows}
        self._queue.report(jobs, [each.steps for each in self._rows] or [0])

    def _stop(self, id: str) -> None:
        """Asks for a stop, each second anew: a call may overtake the one that begins the job."""
        now = time.monotonic()
        if now - self._stops_s.get(id, -math.inf) >= HEARTBEAT_S:
            self._stops_s[id] = now
            for pool in self._pools:
                self._start(pool.tell("stop", id))

    def _pass_on(self, job: LoggedJob, made: Made) -> None:
        """Tells the replica of a live piece what its listener did; one message at a time."""
        listener = job.listener
        played = listener.samples, listener.underruns
        new = listener.changes or listener.recordings or played != made.played
        if made.controlling or not made.at_replica or not new:
            return
        changes, stretches = (
            [each.popleft() for _ in range(len(each))]
            for each in (listener.changes, listener.recordings)
        )
        made.played, made.controlling = played, True

        async def tell() -> None:
            if made.place.pool:
                await made.place.pool.tell("control", made.place.id, changes, stretches, played)
            made.controlling = False
            self._wake.set()

        self._start(tell())

    def _next(self) -> Specification | None:
        """Takes the next variation for which a replica has a free row from the queue."""
        places = [self._made[specification].place for specification in self._rows]
        jobs = {
            pool: pool.jobs(self._front, [each for each in places if each.pool is pool])
            for pool in self._pools
        }
        free = [pool for pool in self._pools if pool.free_rows(jobs[pool])]

        def place(specification: Specification) -> Pool | None:
            return pool_for(self._pools, free, *self._model(specification.request))

        upcoming = self._queue.pop(lambda each: place(each) is not None) if free else None
        if upcoming and (pool := place(upcoming)):
            request, (name, nbytes) = upcoming.request, self._model(upcoming.request)
            order = pool.order(jobs[pool], name, nbytes, request.duration_s)
            # An id for each try: the one before may run on where only the connection was lost.
            id = f"{self._front}-{secrets.token_hex(8)}"
            made = self._made.setdefault(upcoming, Made())
            made.place = Placement(pool, id, name, order)
        return upcoming

    def _model(self, request: GenerationRequest) -> tuple[str, int]:
        """Name and bytes of a request's checkpoint, as far as they are known."""
        return self._models.get((request.checkpoint, request.stereo), (request.checkpoint, 0))

    def _waiting_s(self, pool: Pool) -> float:
        """Seconds of music in the queue that a pool may make."""
        requests = [each.request for each in self._queue.waiting()]
        return sum(r.duration_s for r in requests if pool.suits(self._model(r)[1]))

    async def _beat_until_closed(self) -> None:
        while not self._closed:
            began_s = time.monotonic()
            beats = [pool.beat(self._front, self._waiting_s(pool)) for pool in self._pools]
            await asyncio.gather(*beats)
            self._wake.set()
            await asyncio.sleep(max(0.1, HEARTBEAT_S - (time.monotonic() - began_s)))

    async def _compose(self, specification: Specification) -> None:
        """Has a variation made on a replica; puts it back where the replica is lost."""
        made = self._made[specification]
        samples, place = made.samples, made.place
        try:
            await self._read(specification, made)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # Ray has many for a replica that died
            log.warning("A replica was lost: %s", str(error).partition("\n")[0])
            made.lost = 1 if made.samples > samples else made.lost + 1
            if place.pool:
                place.pool.lost(place)
            live = specification.request.live and made.at_replica
            if live or specification.job.stopping.is_set() or made.lost >= MOST_LOST:
                self._end(specification)
            elif not specification.job.ended:
                self._queue.put_back(specification)
        finally:
            self._rows.pop(specification, None)
            self._stops_s.pop(place.id, None)
            if specification.job.ended or made.lost == 0:
                self._made.pop(specification, None)
            self._wake.set()

    async def _read(self, specification: Specification, made: Made) -> None:
        """Appends the events of a replica's stream to the job's log.

        Raises:
            LostError: the stream ended too early or is silent.
            Exception: whatever Ray raises.
        """
        job, request = specification.job, specification.request
        name, nbytes = self._model(request)
        if nbytes and len(self._pools) > 1:  # "auto" is what the first pool calls so
            request = dataclasses.replace(request, checkpoint=name)
        place = made.place
        response = (place.pool or self._pools[0]).compose(
            self._front, place.id, request, job.client, made.known(), place.order
        )
        frames, expected, heard_s, made.at_replica = 0, 0, time.monotonic(), False
        upcoming = asyncio.ensure_future(anext(response))
        try:
            while True:
                await asyncio.wait({upcoming}, timeout=HEARTBEAT_S)
                if not upcoming.done():
                    silent_s = time.monotonic() - heard_s
                    waits = expected == 0 and not job.stopping.is_set()  # for a row
                    if silent_s > SILENT_S and not waits:
                        raise LostError(f"silent for {silent_s:.0f} s")
                    continue
                try:
                    item = upcoming.result()
                except StopAsyncIteration as error:
                    raise LostError("the stream ended early") from error
                if item.sequence != expected:
                    raise LostError(f"item {item.sequence} came instead of {expected}")
                upcoming = asyncio.ensure_future(anext(response))
                expected, heard_s, made.at_replica = expected + 1, time.monotonic(), True
                for event in item.events:
                    self._append(specification, made, event, frames)
                    if isinstance(event, Chunk) and event.clip.codes is not None:
                        frames += event.clip.codes.shape[1]
                    if isinstance(event, (Finished, Failed)):
                        made.lost = 0
                        return
        finally:
            upcoming.cancel()
            # Ray makes an error of it, which asyncio would log if nobody looked at it.
            upcoming.add_done_callback(lambda end: end.cancelled() or end.exception())
            response.cancel()

    def _append(self, specification: Specification, made: Made, event: Event, frames: int) -> None:
        """Appends an event of a replica, with what it leaves out, to the job's log."""
        job, index = specification.job, specification.index
        if isinstance(event, Progress):
            job.log.append(dataclasses.replace(event, variation=index))
        elif isinstance(event, Chunk):
            start = made.samples
            if job.request.live:  # its take is none, so nothing is kept for it
                job.log.append(dataclasses.replace(event, variation=index))
            elif new := made.new_part(event, frames):
                job.log.append(Chunk(index, new, start))
        elif isinstance(event, Recorded):
            job.log.append(Recorded(with_clips(event.take, specification)))
        elif isinstance(event, Finished):
            clip = event.clip
            samples = made.joined(clip.samples) if made.clips else clip.samples
            clip = Clip(samples, clip.sampling_rate, event.codes, clip.codec)
            self._learn(specification.request, event.request.checkpoint)
            event = with_clips(event, specification)
            job.log.append(dataclasses.replace(event, clip=clip))
        elif isinstance(event, Failed):
            job.log.append(event)

    def _learn(self, request: GenerationRequest, name: str) -> None:
        """Keeps which model a request meant, and its size, for the next ones."""
        sizes = [report.health.models.get(name, 0) for report in self._fresh()]
        size = max(sizes, default=0) or self._model(request)[1]
        self._models[request.checkpoint, request.stereo] = name, size

    def _end(self, specification: Specification) -> None:
        """Ends a variation with the audio that arrived; a job without any has failed."""
        job, index = specification.job, specification.index
        made = self._made.pop(specification, None) or Made()
        stopped = job.stopping.is_set()
        if job.ended:
            return
        chunks = any(isinstance(event, Chunk) for event in job.log.so_far())
        if not (stopped or chunks) and job.log.unfinished == 1:
            job.log.append(Failed(RequestError(LOST)))
            return
        take = take_so_far(specification, made) if made.clips else empty_take(job, index)
        if not stopped:
            fault = LIVE_LOST if job.request.live else LOST
            notes = (*take.notes, f"It broke off: {fault}")
            take = dataclasses.replace(take, notes=notes, fault=fault)
        job.log.append(take)
