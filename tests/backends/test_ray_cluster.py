"""A real Ray cluster on this computer: `pytest -m ray tests/backends/test_ray_cluster.py`.

Those that take minutes are marked long too: `-m "ray and not long"` leaves them out. Each
replica is a process of 700 MB.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.backends.ray_cluster import (
    APPLICATION,
    FRUGAL,
    LOOPBACK,
    Cluster,
    build,
    connect,
)
from musicgen_ui.backends.ray_serve import RayBackend
from musicgen_ui.engine.protocol import Chunk, Failed, Finished
from musicgen_ui.request import GenerationRequest
from tests.helpers.backends import REAL
from tests.helpers.jobs import read, takes
from tests.helpers.local import wait_for
from tests.helpers.ray_cluster import START_S, make_in_process, others_reach
from tests.helpers.requirements import ROOT

pytestmark = REAL
FLOAT32 = {"device": "cpu", "precision": "float32", "max_jobs": 4}


def ask(**settings) -> GenerationRequest:
    asked = {"prompt": "80s pop", "checkpoint": "bundled", "duration_s": 1.0, "seed": 7}
    return GenerationRequest(**asked | settings)


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def front(environment: pytest.MonkeyPatch) -> Iterator[RayBackend]:
    """Two replicas; afterwards no process and no file of the cluster is left."""
    resource_tracker.ensure_running()  # Python's own process, which stays
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    environment.setenv("OMP_NUM_THREADS", "1")  # of each replica
    backend = connect(Cluster(replicas=2), FLOAT32, "bundled")
    wait_for(lambda: len(backend._fresh()) == 2, START_S)
    folders = set(Path(tempfile.gettempdir()).glob("mg-ray-*"))
    yield backend
    backend.close()
    wait_for(lambda: not {p.pid for p in psutil.Process().children(recursive=True)} - before, 60)
    assert folders and not any(folder.exists() for folder in folders)


def two_replicas(front: RayBackend) -> None:
    wait_for(lambda: sum(h.up for h in front.health().replicas.values()) == 2, START_S)


def test_cluster_listens_on_the_loopback_address_alone(front):
    assert not others_reach()


def test_killed_replica_leaves_the_undisturbed_take(front):
    two_replicas(front)
    request = ask(duration_s=20.0, do_sample=False)
    (whole,) = takes(read(front.submit(request)))
    job = front.submit(request)
    heard = []
    for event in job.follow():
        if isinstance(event, Chunk):
            heard.append(event.clip.samples)
            if len(heard) == 3:
                break
    wait_for(lambda: any(report.jobs for report in front._fresh()))
    os.kill(next(report.pid for report in front._fresh() if report.jobs), signal.SIGKILL)
    (take,) = takes(read(job))
    before = np.concatenate(heard, axis=1)
    assert np.array_equal(take.codes, whole.codes) and not take.stopped
    assert np.array_equal(take.clip.samples[:, : before.shape[1]], before)
    assert np.allclose(take.clip.samples, whole.clip.samples, atol=1e-4)
    two_replicas(front)


def test_stop_ends_the_job_on_its_replica(front):
    job = front.submit(ask(duration_s=300.0))
    next(event for event in job.follow() if isinstance(event, Chunk))
    job.stop()
    assert takes(read(job))[0].stopped
    wait_for(lambda: not any(report.jobs for report in front._fresh()), 30)


def test_checkpoint_stays_where_it_is_loaded(front, tiny_mono):
    two_replicas(front)
    name = str(tiny_mono)
    for seed in range(6):
        read(front.submit(ask(checkpoint=name, seed=seed)))
        time.sleep(0 if seed else 6.0)  # Serve looks every two seconds which models there are
    wait_for(lambda: any(name in report.health.models for report in front._fresh()))
    assert sum(name in report.health.models for report in front._fresh()) == 1


def test_kubernetes_sample_fits_rays_schema():
    from ray.serve.schema import ServeDeploySchema

    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    sample = yaml.safe_load(text.split("```yaml\n")[-1].split("```")[0])
    serve = ServeDeploySchema.model_validate(yaml.safe_load(sample["spec"]["serveConfigV2"]))
    (application,) = serve.applications
    assert application.name == APPLICATION
    module, _, name = application.import_path.partition(":")
    assert getattr(sys.modules[module], name) is build
    inspect.signature(LocalBackend).bind(**application.args["options"])
    groups = sample["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert sum(group["replicas"] for group in groups) == application.args["replicas"]


def test_settings_for_rays_processes_are_still_rays():
    import ray

    folder = Path(ray.__file__).parent
    modules = ("_private/ray_constants", "serve/_private/constants")
    modules += ("dashboard/modules/reporter/reporter_consts",)
    files = [*folder.glob("_raylet.*"), *(folder / f"{module}.py" for module in modules)]
    text = b"".join(path.read_bytes() for path in files)
    missing = [n for n in FRUGAL | LOOPBACK if n.removeprefix("RAY_").encode() not in text]
    assert not missing


@pytest.mark.long
def test_two_replicas_make_almost_twice_the_music(front):
    """A job, which one of them makes, and two, which both make, with a thread each.

    All is measured in turns, and the best counts, so that what else the computer does matters less.
    Two cores share caches, memory and heat: what two processes make without a cluster is measured
    too, and no more is asked for.
    """
    pids, speeds = set[int](), dict[str, list[float]]()
    requests = [ask(duration_s=20.0, seed=seed) for seed in range(2)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:

        def apart(some: list[GenerationRequest]) -> None:
            pids.update(processes.map(make_in_process, [[request] for request in some]))

        def through(some: list[GenerationRequest]) -> None:
            for job in [front.submit(request) for request in some]:
                read(job)

        two_replicas(front)
        through(requests * 2)
        wait_for(lambda: apart([ask(), ask(seed=8)]) or len(pids) == 2, START_S)
        for _ in range(6):
            for name, make in (("processes", apart), ("replicas", through)):
                for count in (1, 2):
                    began_s = time.monotonic()
                    make(requests[:count])
                    speed = count * 20.0 / (time.monotonic() - began_s)
                    speeds.setdefault(f"{count} {name}", []).append(speed)
    best = {name: max(found) for name, found in speeds.items()}
    for name in ("processes", "replicas"):
        one, two = best[f"1 {name}"], best[f"2 {name}"]
        print(f"{name}: one {one:.2f}, two {two:.2f} s of music a second, {two / one:.2f} times")
    assert best["2 replicas"] >= min(1.8 * best["1 replicas"], 0.94 * best["2 processes"])


@pytest.mark.long
def test_front_adds_little_to_the_first_audio(front):
    """Measured in turns with a single process."""
    local = LocalBackend(**FLOAT32)
    first_s: dict[object, list[float]] = {local: [], front: []}
    for seed in range(40):
        for backend, times in first_s.items():
            began_s = time.monotonic()
            job = backend.submit(ask(seed=seed))
            next(event for event in job.follow() if isinstance(event, Chunk))
            times.append(time.monotonic() - began_s)
            read(job)
    local.close()
    here, through = (np.array(times[5:]) for times in first_s.values())
    added_s = float(np.median(through - here))
    print(
        f"first audio: here {np.median(here) * 1000:.1f} ms, through the front "
        f"{np.median(through) * 1000:.1f} ms, {added_s * 1000:.1f} ms more"
    )
    assert added_s < 0.015


@pytest.mark.long
def test_sixty_clients_while_replicas_are_killed(front):
    """One is killed every 20 s for three minutes: every job ends in its undisturbed take."""
    two_replicas(front)
    threads, wrong, counts = threading.active_count(), list[str](), list[int]()
    requests = [
        ask(prompt=f"{word} {n}", seed=n, duration_s=3.0, do_sample=False)
        for n, word in enumerate(["techno", "slow piano", "80s pop", "a string quartet"] * 15)
    ]
    jobs = [front.submit(request, str(n)) for n, request in enumerate(requests)]
    whole = [takes(read(job))[0].codes for job in jobs]
    ends_s, killed = time.monotonic() + 180, list[int]()

    def client(number: int) -> None:
        while time.monotonic() < ends_s:
            events = list(front.submit(requests[number], str(number)).follow())
            take = events[-1]
            counts.append(number)
            if not isinstance(take, Finished) or take.stopped:
                wrong.append(f"{number}: {take.error if isinstance(take, Failed) else take}")
                continue
            chunks = [e.clip.samples for e in events if isinstance(e, Chunk)]
            if not np.array_equal(np.concatenate(chunks, axis=1), take.clip.samples):
                wrong.append(f"{number}: the take is not what was sent")
            if not np.array_equal(take.codes, whole[number]):
                wrong.append(f"{number}: other codes than undisturbed")

    clients = [threading.Thread(target=client, args=(number,)) for number in range(60)]
    for each in clients:
        each.start()
    while time.monotonic() < ends_s:
        time.sleep(20)
        if len(well := front._fresh()) > 1:
            killed.append(max(well, key=lambda report: len(report.jobs)).pid)
            os.kill(killed[-1], signal.SIGKILL)
    for each in clients:
        each.join(300)
    print(f"{len(counts)} takes, {len(killed)} replicas killed")
    assert not any(each.is_alive() for each in clients) and not wrong, wrong
    assert set(counts) == set(range(60)) and len(killed) >= 3
    wait_for(lambda: not (front._rows or front._made), 30)
    wait_for(lambda: threading.active_count() <= threads + 5, 60)
    two_replicas(front)
    names = [process.name() for process in psutil.Process().children(recursive=True)]
    assert sum("ServeReplica" in name for name in names) == 2, names


@pytest.mark.long
def test_rolling_update_loses_no_take(front):
    """New replicas take the place of all old ones while they make takes."""
    from ray import serve

    two_replicas(front)
    old = {report.pid for report in front._fresh()}
    jobs = [front.submit(ask(duration_s=120.0, seed=seed)) for seed in range(4)]
    for job in jobs:
        next(event for event in job.follow() if isinstance(event, Chunk))
    settings = {"options": FLOAT32 | {"idle_s": 1000.0}, "checkpoint": "bundled", "replicas": 2}
    serve.run(build(settings), name=APPLICATION, route_prefix=None)
    for job in jobs:
        events = read(job)
        (take,) = takes(events)
        chunks = [event.clip.samples for event in events if isinstance(event, Chunk)]
        assert np.array_equal(np.concatenate(chunks, axis=1), take.clip.samples)
        assert not (take.stopped or take.fault) and take.clip.duration_s == 120.0
    wait_for(lambda: not any(map(psutil.pid_exists, old)), START_S)
    two_replicas(front)
