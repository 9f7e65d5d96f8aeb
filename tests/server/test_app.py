"""The server's settings, its limits, and a page that answers before the engine is there."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from musicgen_ui.backends import starting
from musicgen_ui.backends.starting import StartingBackend
from musicgen_ui.engine.protocol import Progress, Stage, Trouble
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.server.middleware import BodyLimit
from musicgen_ui.server.settings import Settings, settings, table, variable
from tests.helpers.fakes import FakeBackend
from tests.helpers.jobs import made, read, takes

ROOT = Path(__file__).parents[2]


def test_flags_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_SERVER_PORT", "9000")
    monkeypatch.setenv("MUSICGEN_UI_JOBS", "2")
    monkeypatch.setenv("MUSICGEN_UI_DEVICE", "")
    chosen = settings(["--port", "9001", "--no-any-checkpoint"])
    assert (chosen.port, chosen.jobs, chosen.device) == (9001, 2, "auto")
    assert not chosen.any_checkpoint
    assert (settings([]).port, settings([]).jobs) == (9000, 2)


def test_a_space_offers_listed_checkpoints_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "owner/name")
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)  # of a server in this process
    assert not settings([]).any_checkpoint and settings([]).host == "0.0.0.0"
    assert settings(["--host", "[::1]"]).host == "::1"
    monkeypatch.setenv("MUSICGEN_UI_ANY_CHECKPOINT", "1")
    assert settings([]).any_checkpoint


def test_gradios_own_variables_name_host_and_port() -> None:
    assert (variable("host"), variable("port")) == ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT")
    assert variable("queue_length") == "MUSICGEN_UI_QUEUE_LENGTH"
    assert Settings().host == "127.0.0.1" and Settings().port == 7860


def test_every_setting_is_explained() -> None:
    rows = table()
    assert len(rows) == len(Settings.model_fields)
    assert all(help for *_, help in rows)
    assert "--queue-length" in [row[1] for row in rows]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="glibc's")
@pytest.mark.parametrize("own", ["", "5"])  # what the user chose stays
def test_threads_share_two_heaps(own: str, tmp_path: Path) -> None:
    code = """
import ctypes, threading
from musicgen_ui import heap
heap.share()
c, over = ctypes.CDLL(None), threading.Event()
for _ in range(12):
    threading.Thread(target=lambda: (c.malloc(5000), over.wait())).start()
c.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(c.fopen(b"heaps", b"w"))
c.malloc_info(0, file), c.fclose(file), over.set()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | (
        {"MALLOC_ARENA_MAX": own} if own else {}
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "heaps").read_text().count("<heap nr") == int(own or 2)


def test_a_click_waits_for_an_engine_that_is_being_built() -> None:
    built = threading.Event()

    def build() -> FakeBackend:
        built.wait()
        return FakeBackend()

    engine = StartingBackend(build, "mono")
    engine.start()
    assert engine.status().starting
    threading.Timer(0.3, built.set).start()
    events = made(engine, GenerationRequest(duration_s=0.5))
    assert events[0] == Progress(Stage.LOADING, note="starting the engine")
    assert events[-1].clip.duration_s == 0.5
    assert engine.checkpoints() == ["mono", "auto", "wide"]
    assert engine.status().loaded == ("fake",)


def test_stop_ends_the_wait_for_the_engine() -> None:
    engine = StartingBackend(FakeBackend, "auto")  # never started
    job = engine.submit(GenerationRequest())
    job.stop()
    (take,) = takes(read(job))
    assert take.stopped and not take.clip.samples.size


def test_an_engine_that_fails_to_start_is_said_in_a_sentence() -> None:
    def build() -> FakeBackend:
        raise OSError("no such device")

    engine = StartingBackend(build, "auto")
    engine.start()
    with pytest.raises(RequestError, match="could not start"):
        engine.describe("auto")
    assert engine.health().trouble is Trouble.NOT_STARTED


def test_engine_that_is_built_after_the_end_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "CLOSE_S", 0.0)
    asked, built, backend = threading.Event(), threading.Event(), FakeBackend()

    def build() -> FakeBackend:
        asked.set()
        built.wait()
        return backend

    engine = StartingBackend(build, "mono")
    engine.start()
    asked.wait()
    engine.close()
    built.set()
    engine._thread.join()
    assert backend.ended


async def app(scope: dict, receive: Any, send: Any) -> None:
    """Reads the whole body and answers 200."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"read"})


def post(path: str, chunks: list[bytes], length: int | None = None) -> int:
    sent: list[dict] = []
    queue = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    queue.append({"type": "http.request", "body": b"", "more_body": False})
    headers = [(b"content-length", str(length).encode())] if length is not None else []

    async def receive() -> dict:
        return queue.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)

    limited = BodyLimit(app, upload_bytes=5_000, body_bytes=1_000)
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(limited(scope, receive, send))
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("path", "chunks", "length", "status"),
    [
        ("/gradio_api/queue/join", [b"x" * 900], None, 200),
        ("/gradio_api/queue/join", [b"x" * 900] * 2, None, 413),  # sent in chunks, unannounced
        ("/gradio_api/queue/join", [], 2_000, 413),  # announced: refused before it is read
        ("/gradio_api/upload", [b"x" * 900] * 2, None, 200),
        ("/gradio_api/upload", [b"x" * 900] * 6, None, 413),
        ("/gradio_api/queue/join", [], -1, 200),
    ],
)
def test_bodies_are_bounded(
    path: str, chunks: list[bytes], length: int | None, status: int
) -> None:
    assert post(path, chunks, length) == status
