"""The front of a cluster, over replicas in this process: failover, stops, health, fairness."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends import ray_replica, ray_serve
from musicgen_ui.backends.ray_serve import RayBackend, RayJob
from musicgen_ui.engine.protocol import (
    Chunk,
    Event,
    Failed,
    Finished,
    Progress,
    Stage,
    Trouble,
)
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers.jobs import read, takes
from tests.helpers.local import wait_for
from tests.helpers.ray_cluster import ORDER, Answers, FakeCluster

LONG_S = 200.0  # what a busy computer does in less than that


@pytest.fixture(scope="module")
def whole(tiny_mono) -> Iterator[Callable[[GenerationRequest], Finished]]:
    """The undisturbed take of a request."""
    from musicgen_ui.backends.local import LocalBackend

    backend = LocalBackend(device="cpu", precision="float32")
    yield lambda request: takes(read(backend.submit(request)))[0]
    backend.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch) -> None:
    """On a busy computer neither a front nor a replica is taken for lost that is just slow."""
    monkeypatch.setattr(ray_replica, "LEASE_S", 1000.0)
    monkeypatch.setattr(ray_serve, "SILENT_S", 1000.0)


@pytest.fixture
def cluster(tiny_mono) -> Iterator[FakeCluster]:
    made = FakeCluster(tiny_mono)
    yield made
    made.close()


@pytest.fixture
def front(cluster) -> Iterator[RayBackend]:
    backend = cluster.front()
    yield backend
    backend.close()


def ask(checkpoint, **settings) -> GenerationRequest:
    asked = {"prompt": "80s pop", "duration_s": 0.5, "seed": 7, **settings}
    return GenerationRequest(checkpoint=str(checkpoint), **asked)


def audio(events: list[Event], variation: int = 0) -> np.ndarray:
    chunks = [e for e in events if isinstance(e, Chunk) and e.variation == variation]
    samples = 0
    for chunk in chunks:
        assert chunk.start_sample == samples
        samples += chunk.clip.samples.shape[1]
    return np.concatenate([chunk.clip.samples for chunk in chunks], axis=1)


def until_audio(job: RayJob) -> list[Event]:
    """The events up to the first audio."""
    found = []
    for event in job.follow():
        found.append(event)
        if isinstance(event, Chunk):
            break
    return found


def replica_of(cluster: FakeCluster) -> ray_replica.Replica:
    return next(replica for replica in cluster.replicas if replica._jobs)


def test_killed_replica_leaves_the_undisturbed_take(front, cluster, tiny_mono, whole):
    request = ask(tiny_mono, duration_s=6, do_sample=False)
    job = front.submit(request)
    before = audio(until_audio(job))
    cluster.kill(replica_of(cluster))
    events = read(job)
    (take,) = takes(events)
    alone = whole(request)
    assert np.array_equal(take.codes, alone.codes) and not take.stopped
    assert np.array_equal(audio(events), take.clip.samples)
    assert np.array_equal(take.clip.samples[:, : before.shape[1]], before)
    assert np.allclose(take.clip.samples, alone.clip.samples, atol=1e-4)
    assert [len(call[ORDER]) for call in cluster.calls] == [2, 1]
    assert cluster.calls[1][4].shape[1] >= 10  # the codes that had arrived


def test_job_that_loses_two_replicas_ends_with_a_sentence(front, cluster, tiny_mono, monkeypatch):
    monkeypatch.setattr(cluster, "compose", Poison())
    for asked in (ask(tiny_mono), ask(tiny_mono, variations=2)):
        with pytest.raises(RequestError, match="machines that made this failed"):
            read(front.submit(asked))
    assert cluster.compose.calls == 2 * 1 + 2 * 2


class Poison:
    """A deployment whose every stream dies."""

    calls = 0

    def remote(self, *_: object) -> Poison:
        self.calls += 1
        return self

    async def __anext__(self) -> None:
        raise RuntimeError("The actor died")

    def cancel(self) -> None:
        pass


def test_take_that_broke_off_keeps_its_audio(front, cluster, tiny_mono):
    job = front.submit(ask(tiny_mono, duration_s=30))
    before = audio(until_audio(job))
    cluster.compose = Poison()
    cluster.kill(replica_of(cluster))
    (take,) = takes(read(job))
    assert take.stopped and take.fault == ray_serve.LOST
    assert np.array_equal(take.clip.samples[:, : before.shape[1]], before)


def test_stop_reaches_the_replica_and_keeps_the_music(front, cluster, tiny_mono, monkeypatch):
    """Also where it comes before the call that begins the job, and is lost."""
    broadcast, lost = cluster.broadcast, list[object]()

    def losing(method: str, *arguments: object) -> Answers:
        if method == "stop" and not lost:
            lost.append(arguments)
            return Answers(list)
        return broadcast(method, *arguments)

    monkeypatch.setattr(cluster, "broadcast", losing)
    job = front.submit(ask(tiny_mono, duration_s=300))
    until_audio(job)
    job.stop()
    (take,) = takes(read(job))
    assert take.stopped and 0 < take.clip.duration_s < 300 and take.codes is not None and lost
    wait_for(lambda: not any(replica._jobs for replica in cluster.replicas), LONG_S)


def test_jobs_wait_at_the_front_until_a_row_is_free(tiny_mono):
    cluster = FakeCluster(tiny_mono, replicas=1, rows=1)
    front = cluster.front()
    first = front.submit(ask(tiny_mono, duration_s=100), "a")
    until_audio(first)
    second, third = (front.submit(ask(tiny_mono), client) for client in "ab")
    places = [next(e for e in job.follow() if isinstance(e, Progress)) for job in (second, third)]
    assert all(progress.stage is Stage.WAITING for progress in places)
    assert len(cluster.calls) == 1 and front.health().waiting == 2
    third.stop()  # before it began
    assert takes(read(third))[0].stopped
    cluster.add()  # a new replica helps at once
    assert not takes(read(second))[0].stopped and not first.ended
    front.close()
    assert takes(read(first))[0].stopped
    cluster.close()


def test_front_that_is_silent_loses_its_jobs(front, cluster, tiny_mono):
    front.submit(ask(tiny_mono, duration_s=300))
    wait_for(lambda: any(replica._jobs for replica in cluster.replicas), LONG_S)
    for replica in list(cluster.replicas):
        cluster.drain(replica)
    wait_for(cluster.forget_fronts, LONG_S)
    front.close()


def test_replaced_replica_hands_its_jobs_on(front, cluster, tiny_mono, monkeypatch):
    """In a rolling update: the music goes on where it was."""
    monkeypatch.setattr(ray_replica, "HEARTBEAT_S", 0.05)
    job = front.submit(ask(tiny_mono, duration_s=60))
    until_audio(job)
    for replica in list(cluster.replicas):
        cluster.drain(replica)
    wait_for(cluster.forget_fronts, LONG_S)
    cluster.add()
    events = read(job)
    (take,) = takes(events)
    assert len(cluster.calls) == 2 and not take.stopped and not take.fault
    assert np.array_equal(audio(events), take.clip.samples) and take.clip.duration_s == 60


def test_live_piece_ends_with_its_replica(front, cluster, tiny_mono):
    job = front.submit(ask(tiny_mono, live=True))
    until_audio(job)
    cluster.kill(replica_of(cluster))
    (take,) = takes(read(job))
    assert take.fault == ray_serve.LIVE_LOST and not take.clip.duration_s
    assert not front._made and len(cluster.calls) == 1


def raiser(*_: object) -> None:
    raise ConnectionError


def test_health_names_the_replica_that_is_ill(front, cluster):
    wait_for(lambda: len(front.health().replicas) == 2, LONG_S)
    assert front.health().trouble is None
    gone = cluster.replicas[0]
    cluster.kill(gone)
    wait_for(lambda: not front.health().replicas[gone._name].up, LONG_S)
    health = front.health()
    assert health.trouble is None and any(gone._name in text for text in health.warnings)
    cluster.kill(cluster.replicas[0])
    wait_for(lambda: front.health().trouble is Trouble.NO_REPLICA, LONG_S)


def test_closed_front_takes_no_jobs_and_leaves_no_thread(cluster, tiny_mono):
    front = cluster.front()
    job = front.submit(ask(tiny_mono, duration_s=300))
    until_audio(job)
    began_s = time.monotonic()
    front.close()
    assert time.monotonic() - began_s < ray_serve.CLOSE_S and not front._thread.is_alive()
    assert takes(read(job))[0].stopped
    assert isinstance(list(front.submit(ask(tiny_mono)).follow())[-1], Failed)


def test_events_after_audio_go_together(cluster, tiny_mono, monkeypatch):
    """The first audio goes at once; nothing waits longer than until the job ends."""

    def hold_s(events: Sequence[Event]) -> float:
        return 1000.0 if any(isinstance(event, Chunk) for event in events) else 0.0

    monkeypatch.setattr(ray_replica, "_hold_s", hold_s)

    async def streamed() -> list[ray_replica.Item]:
        request = ask(tiny_mono, duration_s=3)
        return [item async for item in cluster.replicas[0].compose("front", "job", request, "")]

    items = [item for item in asyncio.run(streamed()) if item.events]
    chunks = [sum(isinstance(event, Chunk) for event in item.events) for item in items]
    first = next(number for number, count in enumerate(chunks) if count)
    assert first == len(items) - 2 and chunks[-1] > 1
    assert [item.sequence for item in items] == sorted({item.sequence for item in items})
    assert isinstance(items[-1].events[-1], Finished)


def test_gathering_never_takes_longer_than_the_audio_plays():
    def chunk(duration_s: float) -> Chunk:
        return Chunk(0, Clip(np.zeros((1, round(duration_s * 32_000)), np.float32), 32_000), 0)

    assert ray_replica._hold_s([Progress(Stage.COMPOSING)]) == 0
    assert ray_replica._hold_s([Progress(Stage.COMPOSING), chunk(0.2)]) == 0.1
    assert ray_replica._hold_s([chunk(0.5), chunk(30)]) == ray_replica.GATHER_S


def test_small_checkpoints_go_to_the_replicas_for_them(tiny_mono):
    """And to the others while those are full, or while its size is not known."""
    gpus, cpus = FakeCluster(tiny_mono, 1, 1), FakeCluster(tiny_mono, 1, 1, most_bytes=10**9)
    front = RayBackend([gpus, cpus])
    wait_for(lambda: len(front.health().replicas) == 2, LONG_S)
    read(front.submit(ask(tiny_mono)))
    assert (len(gpus.calls), len(cpus.calls)) == (1, 0)
    first = front.submit(ask(tiny_mono, duration_s=300))
    until_audio(first)
    assert (len(gpus.calls), len(cpus.calls)) == (1, 1)
    read(front.submit(ask(tiny_mono)))
    assert (len(gpus.calls), len(cpus.calls)) == (2, 1)
    first.stop()
    assert takes(read(first))[0].stopped
    front.close()
    for cluster in (gpus, cpus):
        cluster.close()
