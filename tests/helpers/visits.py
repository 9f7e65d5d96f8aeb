"""A real server in a process of its own, and the ways in which a crowd uses it.

Start and end of every job are read off the server's own log, on the server's own clock; what a
visitor was told and got is what its client heard.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import soundfile
from gradio_client import Client
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.local import free_port

ROOT = Path(__file__).parents[2]
ENDED = re.compile(r"^(\S+ \S+) INFO (job=.*)$", re.MULTILINE)
VALUE = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)')


@dataclass(frozen=True)
class Job:
    """A line of the server's journal."""

    values: dict[str, str]
    ended: float  # seconds of the epoch

    @property
    def arrived(self) -> float:
        return self.ended - float(self.values["took_s"])

    @property
    def started(self) -> float | None:
        """When its first step came; None where none did."""
        waited_s = self.values.get("waited_s")
        return None if waited_s is None else self.arrived + float(waited_s)


@dataclass
class Server:
    """A running server."""

    url: str
    process: psutil.Process
    folder: Path  # its own temporary folder and its log
    api: dict[str, Any] = field(default_factory=dict)

    @property
    def jobs(self) -> list[Job]:
        """Those that ended, by their words."""
        text = (self.folder / "log").read_text(encoding="utf-8")
        return [
            Job(dict(VALUE.findall(line)), datetime.fromisoformat(at).timestamp())
            for at, line in ENDED.findall(text)
        ]

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics", timeout=60).raise_for_status().text
        return {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def busy(self) -> float:
        """Jobs at the desk and rows in the engine."""
        kinds = ("musicgen_queue", "musicgen_rows")
        return sum(n for name, n in self.metrics().items() if name.startswith(kinds))

    def settle(self, limit_s: float = 120) -> None:
        """Waits until nothing is under way."""
        until = time.monotonic() + limit_s
        while self.busy():
            assert time.monotonic() < until, self.metrics()
            time.sleep(0.2)

    def files(self) -> list[Path]:
        """Those it wrote, its log aside."""
        return [p for p in self.folder.rglob("*") if p.is_file() and p.name != "log"]

    def endpoint(self, name: str) -> dict[str, Any]:
        """The page's own description of an event, private ones too."""
        if not self.api:
            self.api = httpx.get(f"{self.url}/config", timeout=60).json()
        return next(d for d in self.api["dependencies"] if d["api_name"] == name)

    def defaults(self, name: str, **changes: Any) -> list[Any]:
        """What the page sends to an event when nothing was changed."""
        components = {c["id"]: c["props"] for c in self.api["components"]}
        event = self.endpoint(name)
        return [
            changes.get(components[i].get("elem_id") or "", components[i].get("value"))
            for i in event["inputs"]
        ]


@contextmanager
def server(folder: Path, *flags: str) -> Iterator[Server]:
    """`python app.py` on the bundled checkpoint, loaded and idle."""
    port = free_port()
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--log-prompts"]
    command += ["--checkpoint", "bundled", "--precision", "float32", "--device", "cpu"]
    command += ["--output-folder", "temporary", *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRADIO_")}
    environment |= {"TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    running = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid), folder)
    try:
        _wait_until_loaded(running)
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_loaded(running: Server, limit_s: float = 200) -> None:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        try:
            if running.metrics()["musicgen_models_resident"] and not running.busy():
                return
        except (httpx.HTTPError, KeyError):
            pass
        assert running.process.is_running(), (running.folder / "log").read_text()
        time.sleep(0.3)
    raise AssertionError((running.folder / "log").read_text())


@dataclass
class Visit:
    """What one client asked for, was told and got."""

    asked: dict[str, Any]
    told: list[tuple[float, str]] = field(default_factory=list)  # when, status
    take: tuple[np.ndarray, dict[str, Any]] | None = None  # int16 [samples, channels], settings
    error: str = ""
    cancelled: bool = False

    @property
    def ended_well(self) -> bool:
        """In a take, a clear answer or its own stop."""
        return bool(self.take or self.cancelled or "queue is full" in self.error)


def client_of(server: Server) -> Client:
    """A visitor of its own; a crowd's machine may be slow to answer."""
    return Client(server.url, verbose=False, httpx_kwargs={"timeout": 60})


def submit(client: Client, asked: dict[str, Any], cancel_after_s: float | None = None) -> Visit:
    """One request of a `gradio_client`, followed to its end."""
    visit = Visit(asked)
    job = client.submit(**asked, api_name="/generate")
    began, heard = time.monotonic(), 0
    while not job.done() or heard < len(job.outputs()):
        outputs, now = job.outputs(), time.time()
        visit.told += [(now, told["status"]) for files, told in outputs[heard:] if not files]
        heard = len(outputs)
        if cancel_after_s is not None and time.monotonic() - began > cancel_after_s:
            visit.cancelled = True
            job.cancel()
            return visit
        time.sleep(0.1)
    try:
        files, settings = job.result()
        visit.take = soundfile.read(files[0], dtype="int16", always_2d=True)[0], settings
    except Exception as error:
        visit.error = str(error)
    return visit


def tone(path: Path, frequency_hz: float, duration_s: float = 1.0) -> Path:
    """A clip that nobody else has."""
    t = np.arange(round(duration_s * 16_000)) / 16_000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * frequency_hz * t), 16_000)
    return path


class Tab:
    """A browser tab as the server sees it: a heartbeat that stays open, and an event stream."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.session = secrets.token_hex(6)
        self.http = httpx.Client(base_url=f"{server.url}/gradio_api", timeout=60)

    def generate_and_leave(self, after_s: float, **changes: Any) -> int:
        """Presses Generate and closes the tab; how many messages came before."""
        event = self.server.endpoint("compose")
        body = {"fn_index": event["id"], "session_hash": self.session, "trigger_id": None}
        body["data"] = self.server.defaults("compose", **changes)
        until, messages = time.monotonic() + after_s, 0
        with self.http, self.http.stream("GET", f"/heartbeat/{self.session}") as beat:
            beats = beat.iter_raw()
            next(beats)
            answer = self.http.post("/queue/join", json=body)
            assert answer.status_code == 200, answer.text
            query = {"session_hash": self.session}
            with self.http.stream("GET", "/queue/data", params=query) as stream:
                for line in stream.iter_lines():
                    messages += bool(line)
                    if time.monotonic() > until:
                        break
        return messages
