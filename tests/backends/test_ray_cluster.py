"""A real Ray cluster on this computer: `pytest -m ray tests/backends/test_ray_cluster.py`.

Those that take minutes are marked long too: `-m "ray and not long"` leaves them out. Each
replica is a process of 700 MB.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from musicgen_ui.backends.ray_cluster import APPLICATION, Cluster, connect
from musicgen_ui.backends.ray_serve import RayBackend
from musicgen_ui.engine.protocol import Chunk, Failed, Finished
from musicgen_ui.request import GenerationRequest
from tests.helpers.jobs import read, takes
from tests.helpers.local import wait_for
from tests.helpers.requirements import ROOT

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("ray") is None, reason="needs requirements-ray.txt"),
]
START_S = 400.0  # of replicas, on a computer that does other things too
FLOAT32 = {"device": "cpu", "precision": "float32", "max_jobs": 4}


def ask(**settings) -> GenerationRequest:
    asked = {"prompt": "80s pop", "checkpoint": "bundled", "duration_s": 1.0, "seed": 7}
    return GenerationRequest(**asked | settings)


@pytest.fixture(scope="module")
def front() -> Iterator[RayBackend]:
    """Two replicas; afterwards no process and no file of the cluster is left."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
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
    addresses = set()
    for process in psutil.Process().children(recursive=True):
        found = process.net_connections()
        addresses |= {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, addresses


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


def test_kubernetes_sample_fits_rays_schema():
    from ray.serve.schema import ServeDeploySchema

    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    sample = yaml.safe_load(text.split("```yaml\n")[-1].split("```")[0])
    serve = ServeDeploySchema.model_validate(yaml.safe_load(sample["spec"]["serveConfigV2"]))
    (application,) = serve.applications
    assert application.name == APPLICATION
    module, _, name = application.import_path.partition(":")
    assert module in sys.modules and hasattr(sys.modules[module], name)


def music_s(front: RayBackend, jobs: int, duration_s: float) -> float:
    """Seconds of music a second for so many jobs at once."""
    began_s = time.monotonic()
    for job in [front.submit(ask(duration_s=duration_s, seed=seed)) for seed in range(jobs)]:
        read(job)
    return jobs * duration_s / (time.monotonic() - began_s)


@pytest.mark.long
def test_two_replicas_make_almost_twice_the_music(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    speeds = []
    for replicas in (1, 2):
        front = connect(Cluster(replicas=replicas), FLOAT32, "bundled")
        try:
            wait_for(lambda r=replicas, f=front: len(f._fresh()) == r, START_S)
            music_s(front, 2 * replicas, 2.0)
            speeds.append(music_s(front, 4 * replicas, 20.0))
        finally:
            front.close()
    print(f"one replica {speeds[0]:.2f}, two {speeds[1]:.2f} s of music a second")
    assert speeds[1] >= 1.8 * speeds[0]


@pytest.mark.long
def test_front_adds_little_to_the_first_audio(front):
    from musicgen_ui.backends.local import LocalBackend

    local = LocalBackend(**FLOAT32)
    first_s = {}
    for backend in (local, front):
        times = []
        for seed in range(30):
            began_s = time.monotonic()
            job = backend.submit(ask(seed=seed))
            next(event for event in job.follow() if isinstance(event, Chunk))
            times.append(time.monotonic() - began_s)
            read(job)
        first_s[backend] = float(np.median(times[5:]))
    local.close()
    print(f"first audio: here {first_s[local]:.4f} s, through the front {first_s[front]:.4f} s")
    assert first_s[front] - first_s[local] < 0.015


@pytest.mark.long
def test_sixty_clients_while_replicas_are_killed(front):
    """One is killed every 20 s for three minutes: every job ends in its take."""
    two_replicas(front)
    threads, ends_s, wrong, counts = threading.active_count(), time.monotonic() + 180, [], [0]

    def client(number: int) -> None:
        while time.monotonic() < ends_s:
            job = front.submit(ask(seed=number, duration_s=5.0), str(number))
            last = list(job.follow())[-1]
            counts[0] += 1
            if not isinstance(last, Finished) or last.stopped:
                wrong.append(last.error if isinstance(last, Failed) else last.notes)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(60)]
    for each in clients:
        each.start()
    while time.monotonic() < ends_s:
        time.sleep(20)
        if len(well := front._fresh()) > 1:
            os.kill(max(well, key=lambda report: len(report.jobs)).pid, signal.SIGKILL)
    for each in clients:
        each.join(300)
    assert not any(each.is_alive() for each in clients) and not wrong and counts[0] >= 60
    wait_for(lambda: not (front._rows or front._made), 30)
    wait_for(lambda: threading.active_count() <= threads + 5, 60)


FRONT = """
import sys, threading
from musicgen_ui.backends.ray_cluster import Cluster, connect
from musicgen_ui.request import GenerationRequest
front = connect(Cluster(sys.argv[1], 1), {"device": "cpu", "max_jobs": 20}, "bundled")
jobs = [front.submit(GenerationRequest(checkpoint="bundled", duration_s=120.0)) for _ in range(20)]
for job in jobs:
    next(event for event in job.follow() if type(event).__name__ == "Chunk")
print("streaming", flush=True)
threading.Event().wait()
"""


@pytest.mark.long
def test_replicas_outlive_a_front_and_stop_its_jobs(tmp_path):
    """A front is killed while 20 clients stream; the next one finds replicas without jobs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [str(Path(sys.executable).with_name("ray"))]
    head = [*command, "start", "--head", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    options = [f"--port={address.rpartition(':')[2]}", "--include-dashboard=false", "--block"]
    options += ["--object-store-memory=100000000", f"--temp-dir={tmp_path}"]
    cluster = subprocess.Popen([*head, *options], stdout=subprocess.DEVNULL)
    try:
        first = subprocess.Popen(
            [sys.executable, "-c", FRONT, address], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert first.stdout and "streaming\n" in iter(first.stdout.readline, "")
        first.kill()
        first.wait()
        front = connect(Cluster(address, front_only=True), {}, "bundled")
        wait_for(lambda: front._fresh() and not any(r.jobs for r in front._fresh()), 60)
        assert not takes(read(front.submit(ask())))[0].stopped
        front.close()
    finally:
        for process in psutil.Process(cluster.pid).children(recursive=True):
            process.kill()
        cluster.kill()
        cluster.wait()
