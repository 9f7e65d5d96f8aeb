"""Servers in processes of their own, over a real Ray cluster on this computer.

`python -m pytest -m ray tests/backends/test_ray_servers.py`; see also test_ray_cluster.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import soundfile
from gradio_client import Client

from musicgen_ui.backends.ray_cluster import LOOPBACK, NO_STATISTICS, STARTS
from tests.helpers.backends import REAL
from tests.helpers.local import free_port, wait_for
from tests.helpers.object_storage import needs_s3, s3_server
from tests.helpers.pages import Page
from tests.helpers.ray_cluster import START_S, others_reach
from tests.helpers.requirements import ROOT

pytestmark = REAL
SOME_MUSIC = re.compile(r'"done_s"[\]:, ]+(0\.[1-9]|[1-9])')  # in an update of a page


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
def test_cluster_grows_while_music_waits_and_shrinks(head, tmp_path):
    front = Front(head, tmp_path, "--device", "cpu", "--max-replicas", "2", "--jobs", "1")

    def replicas() -> int:
        time.sleep(1.0)  # asking costs the front time
        text = httpx.get(f"{front.url}/metrics", timeout=60).text
        return len(re.findall(r"^musicgen_replica_up\{.*\} 1", text, re.MULTILINE))

    assert replicas() == 1
    pages = [Page(front.url, front.config, duration_s=60.0, prompt=str(n)) for n in range(6)]
    wait_for(lambda: replicas() == 2, START_S)
    for page in pages:
        page.thread.join(START_S)
        assert '"finished"' in page.told
    wait_for(lambda: replicas() == 1, START_S)  # after `ray_scaling.IDLE_S`
    assert front.end(signal.SIGTERM) == 128 + signal.SIGTERM


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
        urls = [f"{front.url}/takes/{Path(found[0]).name}" for front in (first, second)]
        for url in urls:
            wait_for(lambda url=url: httpx.get(url, timeout=60).status_code == 200, START_S)
        sounds = {httpx.get(url, timeout=60).content for url in urls}
        assert len(sounds) == 1 and soundfile.info(io.BytesIO(*sounds)).duration == 1.0
        assert not others_reach()  # the address of `ray start` alone
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
