"""A cluster in this process: real replicas and a front, with a handle in place of Ray's."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.backends.ray_replica import Item, Replica
from musicgen_ui.backends.ray_serve import RayBackend
from musicgen_ui.request import GenerationRequest
from tests.helpers.jobs import read

START_S = 800.0  # of real replicas, on a computer that does other things too
ORDER = list(inspect.signature(Replica.compose).parameters).index("order") - 1


class KilledError(Exception):
    """What a stream raises whose replica died."""


class Answers:
    """A broadcast's: asked when they are read, as Ray's."""

    def __init__(self, ask: Callable[[], list[Any]]) -> None:
        self._ask = ask

    def results(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s and return_exceptions
        return self._ask()


class Stream:
    """The stream of one variation."""

    def __init__(self, cluster: FakeCluster, arguments: tuple[Any, ...]) -> None:
        self._cluster, self._arguments = cluster, arguments
        self._replica: Replica | None = None
        self._items: Any = None

    async def __anext__(self) -> Item:
        while self._replica is None:  # the router waits for one with a free row
            free = {r._name: r for r in self._cluster.replicas if len(r._jobs) < r._rows}
            if free:
                named = [name for name in self._arguments[ORDER] if name in free]
                self._replica = free[(named or list(free))[0]]
                self._items = self._replica.compose(*self._arguments)
            else:
                await asyncio.sleep(0.01)
        upcoming = asyncio.ensure_future(anext(self._items))
        try:
            while not upcoming.done():
                await asyncio.wait({upcoming}, timeout=0.01)
                self._check()
            self._check()
            return upcoming.result()
        finally:
            upcoming.cancel()

    def _check(self) -> None:
        if self._replica not in (*self._cluster.replicas, *self._cluster.draining):
            raise KilledError("The replica died")

    def cancel(self) -> None:
        """The replica's generator is closed by asyncio."""


class FakeCluster:
    """Replicas of a checkpoint that can be killed; `handle` methods as of Serve's handle."""

    def __init__(
        self, checkpoint: Path, replicas: int = 2, rows: int = 2, most_bytes: int = 0
    ) -> None:
        self._checkpoint, self._rows, self._most_bytes = checkpoint, rows, most_bytes
        self.replicas: list[Replica] = []
        self.draining: list[Replica] = []
        self.calls: list[tuple[Any, ...]] = []
        for _ in range(replicas):
            self.add()
        self.compose = self

    def add(self) -> Replica:
        options = {"device": "cpu", "precision": "float32", "max_jobs": self._rows}
        name = f"replica-{self._most_bytes}-{len(self.calls)}-{len(self.replicas)}"
        checkpoint, most = str(self._checkpoint), self._most_bytes
        replica = Replica(options, checkpoint, name, most_bytes=most)
        self.replicas.append(replica)
        return replica

    def kill(self, replica: Replica) -> None:
        self.replicas.remove(replica)

    def drain(self, replica: Replica) -> None:
        """Gives it no more calls, as Serve does with one that is replaced; its streams go on."""
        self.replicas.remove(replica)
        self.draining.append(replica)

    def forget_fronts(self) -> bool:
        """Ends the leases of all jobs on replicas that no front asks any more; none is left."""
        for replica in self.draining:
            replica._seen_s = dict.fromkeys(replica._seen_s, -math.inf)
        return not any(replica._jobs for replica in self.draining)

    def options(self, stream: bool) -> FakeCluster:
        assert stream
        return self

    def remote(self, *arguments: Any) -> Stream:
        self.calls.append(arguments)
        return Stream(self, arguments)

    def broadcast(self, method: str, *arguments: Any) -> Answers:
        def call(replica: Replica) -> Any:
            answer = getattr(replica, method)(*arguments)
            return asyncio.run(answer) if asyncio.iscoroutine(answer) else answer

        return Answers(lambda: [call(replica) for replica in self.replicas])

    def front(self) -> RayBackend:
        return RayBackend([self])

    def close(self) -> None:
        for replica in (*self.replicas, *self.draining):
            replica._backend.close()


@functools.cache
def _backend_of_process() -> LocalBackend:
    return LocalBackend(device="cpu", precision="float32", max_jobs=4)


def make_in_process(requests: list[GenerationRequest]) -> int:
    """Makes takes together in this process, as one replica does, but for no front; its id."""
    for job in [_backend_of_process().submit(request) for request in requests]:
        read(job)
    return os.getpid()


def others_reach() -> list[str]:
    """Processes that listen on another address than that of loopback, and which one."""
    loopback = ("127.0.0.1", "::ffff:127.0.0.1", "::1")
    return [
        f"{process.name()} {each.laddr.ip}"
        for process in psutil.Process().children(recursive=True)
        for each in process.net_connections()
        if each.status == psutil.CONN_LISTEN and each.laddr.ip not in loopback
    ]
