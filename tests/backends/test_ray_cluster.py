"""A real Ray cluster on this computer: `pytest -m ray tests/backends/test_ray_cluster.py`.

Those that take minutes are marked long too: `-m "ray and not long"` leaves them out. Each
replica is a process of 700 MB.
"""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import soundfile
import yaml
from gradio_client import Client

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.backends.ray_cluster import (
    APPLICATION,
    FRUGAL,
    LOOPBACK,
    NO_STATISTICS,
    STARTS,
    Cluster,
    build,
    connect,
)
from musicgen_ui.backends.ray_serve import RayBackend
from musicgen_ui.engine.protocol import Chunk, Failed, Finished
from musicgen_ui.request import GenerationRequest
from tests.helpers.backends import REAL
from tests.helpers.jobs import read, takes
from tests.helpers.local import free_port, wait_for
from tests.helpers.object_storage import needs_s3, s3_server
from tests.helpers.pages import Page
from tests.helpers.ray_cluster import make_in_process
from tests.helpers.requirements import ROOT

pytestmark = REAL
SOME_MUSIC = re.compile(r'"done_s"[\]:, ]+(0\.[1-9]|[1-9])')  # in an update of a page
START_S = 800.0  # of replicas, on a computer that does other things too
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
    serve.run(build(settings | {"loopback": True}), name=APPLICATION, route_prefix=None)
    for job in jobs:
        events = read(job)
        (take,) = takes(events)
        chunks = [event.clip.samples for event in events if isinstance(event, Chunk)]
        assert np.array_equal(np.concatenate(chunks, axis=1), take.clip.samples)
        assert not (take.stopped or take.fault) and take.clip.duration_s == 120.0
    wait_for(lambda: not any(map(psutil.pid_exists, old)), START_S)
    two_replicas(front)


@pytest.fixture
def head(tmp_path) -> Iterator[str]:
    """A cluster without the app; its address."""
    address = f"127.0.0.1:{free_port()}"
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += ["--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}"]
    command += ["--num-cpus=2", "--include-dashboard=false", "--object-store-memory=100000000"]
    folder = tempfile.mkdtemp(prefix="h-", dir="/tmp")  # a socket's path is short
    written, log = tmp_path / "head.log", (tmp_path / "head.log").open("wb")
    environment = os.environ | LOOPBACK | NO_STATISTICS
    command.append(f"--temp-dir={folder}")
    for _ in range(STARTS):
        cluster = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        # Ray gives its processes 30 s, and ends where a busy computer needs more.
        wait_for(
            lambda end=cluster.poll: b"--block" in written.read_bytes() or end() is not None,
            START_S,
        )
        if cluster.poll() is None:
            break
    try:
        assert cluster.poll() is None, written.read_text()
        yield address
    finally:
        if cluster.poll() is None:
            for process in psutil.Process(cluster.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        cluster.kill()
        cluster.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


class Front:
    """A front's process, and its pages."""

    def __init__(self, address: str, folder: Path, *flags: str) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "musicgen_ui", "serve", "--backend", "ray"]
        command += ["--ray-address", address, "--port", str(port), "--checkpoint", "bundled"]
        command += ["--output-folder", str(folder / "takes"), "--queue-length", "40", *flags]
        self._log = folder / f"{port}.log"
        with self._log.open("wb") as log:
            environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"} | LOOPBACK
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env=environment
            )
        wait_for(self._is_ready, START_S)
        self.config = httpx.get(f"{self.url}/config", timeout=60).json()

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log
        with contextlib.suppress(httpx.HTTPError):
            health = httpx.get(f"{self.url}/healthz", timeout=60)
            return health.status_code == 200 and "starting" not in health.json()["engine"]
        return False

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def streaming(self, duration_s: float) -> list[Page]:
        """Twenty pages that hear music."""
        pages = [
            Page(self.url, self.config, duration_s=duration_s, prompt=f"techno {n}")
            for n in range(20)
        ]
        for page in pages:
            wait_for(lambda page=page: SOME_MUSIC.search(page.told) or page.lost, START_S)
            assert not page.lost, page.lost
        return pages

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(2 * START_S)


def lengths_s(folder: Path) -> list[float]:
    return [soundfile.info(path).duration for path in (folder / "takes").glob("*.wav")]


@pytest.mark.long
@pytest.mark.timeout(3000)  # four fronts start, one after the other
def test_front_ends_and_begins_anew_while_pages_stream(head, tmp_path):
    """By SIGTERM its jobs end as whole takes, by SIGTERM without time as the takes so far; by
    SIGKILL its replicas stop them. Pages are told, and the next front serves.
    """
    device = ("--device", "cpu", "--replicas", "1", "--jobs", "20")
    front = Front(head, tmp_path, *device, "--drain-s", "1000")
    pages = front.streaming(5.0)
    assert front.end(signal.SIGTERM) == 128 + signal.SIGTERM, front.log
    assert lengths_s(tmp_path) == [5.0] * 20
    for page in pages:
        page.thread.join(START_S)
        assert not page.thread.is_alive() and "process_completed" in page.told

    front = Front(head, tmp_path, "--front-only", "--drain-s", "0")
    pages = front.streaming(280.0)
    assert front.end(signal.SIGTERM) == 128 + signal.SIGTERM, front.log
    stopped = [length for length in lengths_s(tmp_path) if length != 5.0]
    assert len(stopped) == 20 and all(0 < length < 280 for length in stopped)

    front = Front(head, tmp_path, "--front-only")
    pages += front.streaming(280.0)
    front.end(signal.SIGKILL)
    for page in pages:
        page.thread.join(START_S)
        assert not page.thread.is_alive()

    front = Front(head, tmp_path, "--front-only")
    wait_for(lambda: not httpx.get(f"{front.url}/healthz").json()["jobs"], START_S)
    for page in front.streaming(2.0):
        page.thread.join(START_S)
        assert '"finished"' in page.told
    assert len(lengths_s(tmp_path)) == 60
    assert front.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert "Traceback" not in front.log


@pytest.mark.long
@needs_s3
def test_moved_visitor_finds_the_takes_in_object_storage(head, tmp_path, monkeypatch):
    """Two fronts with s3:// share nothing but the cluster and a bucket."""
    import fsspec

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        folder = ("--output-folder", "s3://visitors/takes")
        first = Front(head, tmp_path, "--replicas", "1", "--device", "cpu", *folder)
        second = Front(head, tmp_path, "--front-only", *folder)
        client = Client(first.url, verbose=False, download_files=tmp_path)
        client.predict(prompt="a waltz", duration_s=1.0, api_name="/generate")
        storage = fsspec.filesystem("s3", skip_instance_cache=True)
        found = list[str]()

        def is_stored() -> bool:
            storage.invalidate_cache()
            found[:] = storage.glob("visitors/takes/*.wav")
            return bool(found)

        wait_for(is_stored, START_S)
        path = f"/takes/{Path(found[0]).name}"
        moved = httpx.get(first.url + path, timeout=60)
        wait_for(lambda: httpx.get(second.url + path, timeout=60).status_code == 200, START_S)
        assert httpx.get(second.url + path, timeout=60).content == moved.content
        for front in (second, first):
            assert front.end(signal.SIGTERM) == 128 + signal.SIGTERM
    mirrors = [path for path in tmp_path.rglob("mirrors/*") if path.is_dir()]
    assert len(mirrors) == 2, mirrors


@pytest.mark.parametrize(
    ("number", "when"),
    [(signal.SIGTERM, "up"), (signal.SIGTERM, "starting"), (signal.SIGKILL, "up")],
)
def test_server_that_ends_leaves_no_process_and_no_file(number, when):
    """With a cluster of its own; after SIGKILL its folders go at the next start."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # a socket's path is short
    environment = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, "-m", "musicgen_ui", "serve", "--backend", "ray", "--replicas", "1"]
    command += ["--device", "cpu", "--port", str(port := free_port()), "--checkpoint", "bundled"]
    log = folder.with_suffix(".log")
    with log.open("wb") as file:
        front = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def is_ready() -> bool:
        assert front.poll() is None, log.read_text()
        if when == "starting":
            return len(psutil.Process(front.pid).children(recursive=True)) > 1
        with contextlib.suppress(httpx.HTTPError):
            health = httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=60)
            return health.status_code == 200 and "bundled" in health.json()["engine"]
        return False

    try:
        wait_for(is_ready, START_S)
        started = psutil.Process(front.pid).children(recursive=True)
        assert started
        front.send_signal(number)
        code = front.wait(START_S)
        assert code == (-number if number == signal.SIGKILL else 128 + number), log.read_text()
        # Ray's agents try for a minute to say that the cluster is gone before they end.
        _, left = psutil.wait_procs(started, timeout=START_S)
        assert not left
        if number == signal.SIGKILL:
            assert list(folder.glob("mg-ray-*"))
            leftovers = "from musicgen_ui import files; files.delete_leftovers(None)"
            subprocess.run([sys.executable, "-c", leftovers], cwd=ROOT, env=environment, check=True)
        assert not list(folder.iterdir())
    finally:
        front.kill()
        front.wait()
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink()
