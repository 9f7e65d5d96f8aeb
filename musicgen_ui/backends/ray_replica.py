"""A replica of a Ray cluster: a `LocalBackend` in a process of its own, behind a Serve deployment.

One call of `compose` makes one variation and streams `Item`s: the events, their codes with them,
and a heartbeat each second. A message costs some milliseconds of a core, whatever is in it, so
events that come soon after audio go together. Fronts call `beat` on every replica each second: it
renews the lease of a front's jobs and brings back a `Report`. A replica drops the jobs of a front
that is silent for `LEASE_S`: a front that is still there has them made elsewhere. Serve asks a
replica that is to be replaced nothing any more, so that is how its jobs move. The engine steps in a
thread of its own, so neither a long load nor a step holds up the event loop that Serve asks for the
replica's health.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.protocol import (
    CheckpointInfo,
    Chunk,
    Event,
    Failed,
    Finished,
    Health,
    Recorded,
    Status,
    Trouble,
)
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.steering import Steering

if TYPE_CHECKING:  # torch
    from musicgen_ui.backends.local import EngineOptions

HEARTBEAT_S = 1.0
GATHER_S = 0.25  # after audio, for what goes with the next message; at most half of what plays
LEASE_S = 10.0  # a front that is silent for so long has gone
# What a further row adds to a step, of a step with one: about as assets/bench has it, on CPUs for
# the bundled checkpoints too.
CPU_ROW, GPU_ROW = 0.5, 0.1
FATAL = (Trouble.STUCK, Trouble.THREAD_ENDED, Trouble.DEVICE_LOST)  # a new process helps


class Item(NamedTuple):
    """What a replica streams."""

    sequence: int  # 0, 1, 2 …
    events: tuple[Event, ...]  # none is a heartbeat


@dataclass(frozen=True)
class Report:
    """How a replica is."""

    replica: str  # its name in the cluster
    pid: int
    rows: int  # variations that it steps together
    most_bytes: int  # of a checkpoint that should come here while others can take it; 0 is any
    budget_bytes: int  # for all models together
    row_cost: float  # what a further row adds to a step, of a step with one
    jobs: tuple[str, ...]  # ids of those that are under way
    music_s: float  # made since it started
    status: Status
    health: Health


class Replica:
    """What Serve deploys.

    Args:
        options: of `LocalBackend`.
        checkpoint: loaded before the replica takes jobs.
        name: in reports; None is what Serve calls it.
        most_bytes: of a checkpoint that should come here while others can take it; 0 is any.
    """

    def __init__(
        self,
        options: EngineOptions,
        checkpoint: str = "auto",
        name: str | None = None,
        most_bytes: int = 0,
    ) -> None:
        if name is None:
            _listen_on_node_address()
        from musicgen_ui.backends.local import LocalBackend  # torch, in the replica alone

        self._backend = LocalBackend(**options)
        self._rows = int(options.get("max_jobs", 8))
        self._most_bytes = most_bytes
        self._name = name or _replica_name()
        self._jobs: dict[str, LoggedJob] = {}
        self._fronts: dict[str, str] = {}  # of each job
        self._seen_s: dict[str, float] = {}  # when each front was last heard of
        self._waiting_s: dict[str, float] = {}  # music in each front's queue
        self._made_s = self._busy_s = 0.0  # music, and the time that it took
        threading.Thread(target=self._end_leases, name="leases", daemon=True).start()
        self._backend.preload(checkpoint)

    async def compose(
        self,
        front: str,
        job_id: str,
        request: GenerationRequest,
        client: str,
        made: np.ndarray | None = None,
        order: Sequence[str] = (),
    ) -> AsyncGenerator[Item, None]:
        """Makes one variation.

        Args:
            front: whose job it is.
            job_id: for `stop`; unique in the cluster.
            request: of one variation, with its seed.
            client: who takes turns with others.
            made: int16 [codebooks, new frames] that another replica made before.
            order: names of the replicas that should take it, the best one first: for the router.
        """
        self._seen_s[front] = time.monotonic()
        job = self._backend.submit(request, client, {} if made is None else {0: made})
        self._jobs[job_id], self._fronts[job_id] = job, front
        pending, changed, sequence = list[Event](), asyncio.Event(), 0
        reading = asyncio.ensure_future(self._collect(job, pending, changed))
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), HEARTBEAT_S)
                if job_id not in self._jobs:  # its lease has ended
                    return
                changed.clear()
                events = tuple(pending)
                pending.clear()
                if reading.done() and not events:
                    reading.result()  # raises what it raised
                    return
                yield Item(sequence, events)
                sequence += 1
                if (hold_s := _hold_s(events)) and not request.live:
                    await asyncio.wait({reading}, timeout=hold_s)
        finally:
            job.stop()
            reading.cancel()
            self._jobs.pop(job_id, None)
            self._fronts.pop(job_id, None)

    async def _collect(self, job: LoggedJob, pending: list[Event], changed: asyncio.Event) -> None:
        """Moves the job's events to `pending` until it ends."""
        try:
            async for event in job.events():
                pending.append(self._packed(event))
                changed.set()
        finally:
            changed.set()

    def _packed(self, event: Event) -> Event:
        """The event without what the front has: clips of the request, new audio in chunks."""
        if isinstance(event, Chunk):
            self._made_s += event.clip.duration_s
        if isinstance(event, Finished):
            clip = event.clip
            prompt = clip.samples[:, : round(event.prompt_s * clip.sampling_rate)]
            clip = Clip(np.ascontiguousarray(prompt), clip.sampling_rate, None, clip.codec)
            return dataclasses.replace(event, clip=clip, request=event.request.without_clips())
        if isinstance(event, Recorded):
            request = event.take.request.without_clips()
            return Recorded(dataclasses.replace(event.take, request=request))
        if isinstance(event, Failed) and not isinstance(event.error, RequestError):
            # Not every error can be sent to another process.
            return Failed(RuntimeError(f"{type(event.error).__name__}: {event.error}"))
        return event

    def beat(self, front: str, waiting_s: float = 0.0) -> Report:
        """A front is there, with so many seconds of music in its queue; how the replica is."""
        self._seen_s[front] = time.monotonic()
        self._waiting_s[front] = waiting_s
        return Report(
            self._name,
            os.getpid(),
            self._rows,
            self._most_bytes,
            self._backend.budget_bytes,
            CPU_ROW if self._backend.place.device == "cpu" else GPU_ROW,
            tuple(self._jobs),
            self._made_s,
            self._backend.status(),
            self._backend.health(),
        )

    def stop(self, job_id: str) -> None:
        """Stops a job at its next step, if it is here; what was made comes as a take."""
        if job := self._jobs.get(job_id):
            job.stop()

    def control(
        self,
        job_id: str,
        changes: Sequence[Steering],
        stretches: Sequence[tuple[float, float]],
        played: tuple[int, int],
    ) -> None:
        """What the listener of a live piece did, if the piece is here.

        Args:
            job_id: of the piece.
            changes: in their order.
            stretches: that become takes, each from a second to another one.
            played: samples that were heard, and underruns.
        """
        if not (job := self._jobs.get(job_id)):
            return
        job.played(*played)
        with contextlib.suppress(RequestError):  # it has just ended
            for change in changes:
                job.steer(change)
            for stretch in stretches:
                job.record_stretch(*stretch)

    def checkpoints(self) -> list[str]:
        """See `Backend.checkpoints`."""
        return self._backend.checkpoints()

    async def describe(self, checkpoint: str, adapter: str) -> CheckpointInfo | RequestError:
        """See `Backend.describe`; a refusal is returned, since Ray wraps what is raised.

        In a thread: the Hub may be slow, and the streams of all jobs share this event loop.
        """
        try:
            return await asyncio.to_thread(self._backend.describe, checkpoint, adapter)
        except RequestError as error:
            return error

    async def unload(self) -> None:
        """See `Backend.unload`."""
        await asyncio.to_thread(self._backend.unload)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `ray_scaling.policy`, by way of Serve."""
        return {
            "waiting_s": sum(self._waiting_s.values()),
            "busy": float(len(self._jobs)),
            "rows": float(self._rows),
            "speed": self._made_s / self._busy_s if self._busy_s else 1.0,
        }

    def check_health(self) -> None:
        """For Serve, which replaces a replica that raises.

        Raises:
            RuntimeError: only a new process can make music again.
        """
        trouble = self._backend.health().trouble
        if trouble in FATAL:
            raise RuntimeError(f"the engine cannot go on: {trouble}")

    def _end_leases(self) -> None:
        while True:
            time.sleep(HEARTBEAT_S)
            now = time.monotonic()
            self._busy_s += HEARTBEAT_S * bool(self._jobs)
            for job_id, front in list(self._fronts.items()):
                if now - self._seen_s.get(front, now) <= LEASE_S:
                    continue
                if job := self._jobs.pop(job_id, None):
                    job.stop()
            for front, seen_s in list(self._seen_s.items()):
                if now - seen_s > LEASE_S and front not in self._fronts.values():
                    self._seen_s.pop(front, None)
                    self._waiting_s.pop(front, None)


def _hold_s(events: Sequence[Event]) -> float:
    """How long to wait for what goes with the next message: not at all before any audio."""
    return min(GATHER_S, sum(e.clip.duration_s for e in events if isinstance(e, Chunk)) / 2)


def _listen_on_node_address() -> None:
    """Has Serve open this process's port for other deployments on the node's address alone.

    That is the loopback address in a cluster of a front's own, else what `ray start` was given. It
    is opened on every address, and Serve has no setting for it. An upgrade that moves it ends the
    replica here.
    """
    import ray
    from ray.serve._private import replica

    add_port, node = replica.add_port_to_grpc_server, ray.util.get_node_ip_address()
    node = f"[{node}]" if ":" in node else node

    def add_node_port(server: object, address: str) -> int:
        return int(add_port(server, address.replace("[::]", node)))

    replica.add_port_to_grpc_server = add_node_port


def _replica_name() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_tag)
