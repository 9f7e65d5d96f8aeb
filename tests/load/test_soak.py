"""A day of visitors in minutes: afterwards the server is as it was, but for the takes it keeps."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client, handle_file

from tests.helpers.local import wait_for
from tests.helpers.visits import Server, Tab, client_of, server, submit, tone

VISITORS = 5  # at once
IDEAS = ("techno with a hard kick", "slow piano", "80s rock", "", "orchestral, heroic strings")
PARTIAL = (".part", ".tmp", ".incomplete")


class Soak:
    """Visitors who come, and now and then break something, until all jobs are done."""

    def __init__(self, server: Server, folder: Path, seed: int = 6) -> None:
        self.server = server
        self.folder = folder
        self.done: Counter[str] = Counter()
        self.memory: list[float] = []  # bytes, every second or so
        self.grown = 0.0  # memory from the first quarter to the last, as a share
        self._random = random.Random(seed)
        self._over = threading.Event()

    def run(self, jobs: int) -> None:
        watch = threading.Thread(target=self._watch)
        watch.start()
        with ThreadPoolExecutor(VISITORS) as pool:
            work = pool.map(self._visit, [self._random.random() for _ in range(jobs)])
            try:
                list(work)  # raises what a visitor ran into
            finally:
                self._over.set()
                watch.join()
        self.server.settle()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            self.memory.append(self.server.process.memory_info().rss)

    def _visit(self, draw: float) -> None:
        kinds = {
            0.45: self.makes, 0.60: self.continues, 0.75: self.changes_mind, 0.85: self.closes,
            0.93: self.uploads_nonsense, 0.97: self.gives_up_an_upload, 1.00: self.asks_nonsense,
        }  # fmt: skip
        kind = next(kind for share, kind in kinds.items() if draw < share)
        kind(random.Random(draw))
        self.done[kind.__name__] += 1

    def _asks(self, draw: random.Random, **settings: Any) -> dict[str, Any]:
        return {
            "prompt": draw.choice(IDEAS),
            "duration_s": round(draw.uniform(0.5, 2.5), 2),
            "guidance_scale": draw.choice((1, 3, 5)),
            "seed": draw.randrange(2**31),
        } | settings

    def _client(self) -> Client:
        return client_of(self.server)

    def makes(self, draw: random.Random) -> None:
        visit = submit(self._client(), self._asks(draw, variations=draw.choice((1, 1, 2))))
        assert visit.ended_well, visit

    def continues(self, draw: random.Random) -> None:
        clip = tone(self.folder / f"{draw.random()}.wav", draw.uniform(100, 900), 2.0)
        visit = submit(self._client(), self._asks(draw, audio_prompt=handle_file(clip)))
        assert visit.ended_well, visit

    def changes_mind(self, draw: random.Random) -> None:
        visit = submit(self._client(), self._asks(draw, duration_s=20), draw.uniform(0, 2))
        assert visit.cancelled or visit.ended_well, visit

    def closes(self, draw: random.Random) -> None:
        Tab(self.server).generate_and_leave(draw.uniform(0, 2))

    def uploads_nonsense(self, draw: random.Random) -> None:
        good = tone(self.folder / f"{draw.random()}.wav", 440).read_bytes()
        noise = draw.randbytes(2000)
        broken = draw.choice([b"", b"<html>", good[:60], good[:20] + noise, good[44:]])
        clip = self.folder / f"broken {draw.random()}.wav"
        clip.write_bytes(broken)
        visit = submit(self._client(), self._asks(draw, audio_prompt=handle_file(clip)))
        assert visit.take or ("Traceback" not in visit.error and visit.error), visit

    def gives_up_an_upload(self, draw: random.Random) -> None:
        host, port = self.server.url.removeprefix("http://").split(":")
        head = "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n"
        head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        head += 'Content-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\n'
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + draw.randbytes(draw.randrange(200_000)))

    def asks_nonsense(self, draw: random.Random) -> None:
        wrong = draw.choice([{"temperature": 99}, {"seed": 1.5}, {"checkpoint": "\x00nonsense"}])
        assert submit(self._client(), self._asks(draw, **wrong)).error


def soak(server: Server, folder: Path, jobs: int) -> Soak:
    """Visits, and what they leave behind, which is nothing but takes and whole uploads."""
    warm = Soak(server, folder, seed=1)
    warm.run(jobs=max(6, jobs // 5))  # pools and caches fill up
    before = _held(server)
    long = Soak(server, folder)
    began = time.monotonic()
    long.run(jobs)
    with contextlib.suppress(AssertionError):  # pools and timers give their threads back
        wait_for(lambda: _grown(before, _held(server)) <= 0, 80)
    after = _held(server)
    quarter = len(long.memory) // 4 or 1
    early, late = np.median(long.memory[:quarter]), np.median(long.memory[-quarter:])
    grown = late / early - 1
    print(f"\n{dict(long.done)} in {time.monotonic() - began:.0f} s")
    print(f"memory {early / 1e6:.0f} MB, at the end {late / 1e6:.0f} MB ({grown:+.1%})")
    print(f"threads and files open: {before} before, {after} after")
    assert _grown(before, after) <= 0
    _check_files(server)
    log = (server.folder / "log").read_text(encoding="utf-8")
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
    assert server.metrics()["musicgen_jobs_total failed"] == 0
    long.grown = grown
    return long


def _held(server: Server) -> tuple[int, int]:
    """Threads and open files; connections are the clients', who keep theirs for a while."""
    process = server.process
    return process.num_threads(), process.num_fds() - len(process.net_connections("all"))


def _grown(before: tuple[int, int], after: tuple[int, int]) -> int:
    """Threads or files beyond what may come and go."""
    return max(after[0] - before[0] - 2, after[1] - before[1] - 4)


def _check_files(server: Server) -> None:
    """Takes are whole, WAV and FLAC of each; nothing is half written."""
    kept = [path for path in server.files() if "takes" in path.parts]
    names = Counter(path.suffix for path in kept)
    assert names[".wav"] == names[".flac"], names
    assert not [path for path in server.files() if path.suffix in PARTIAL]
    made = sum(int(j.values["takes"]) for j in server.jobs if j.values["outcome"] == "finished")
    assert names[".wav"] >= made
    print(f"{len(server.files())} files, {names['.wav']} takes among them")


def test_a_few_visits_leave_nothing_behind(few_places: Server, tmp_path: Path) -> None:
    soak(few_places, tmp_path, jobs=8)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_many_visits_leave_nothing_behind(tmp_path: Path) -> None:
    jobs = int(os.environ.get("SOAK_JOBS", "500"))
    (tmp_path / "server").mkdir()
    with server(tmp_path / "server") as running:
        assert soak(running, tmp_path, jobs).grown < 0.05
