"""The server's settings, its limits, and a page that answers before the engine is there."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from musicgen_ui.backends.starting import BackgroundEngine
from musicgen_ui.engine.protocol import Progress
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.server.limits import YOUNG_S, BodyLimit, Sweeper
from musicgen_ui.server.settings import Settings, settings, table, variable
from tests.helpers.fakes import FakeEngine

ROOT = Path(__file__).parents[2]


def test_settings_come_from_the_environment_and_flags_override_them() -> None:
    environment = {"GRADIO_SERVER_PORT": "9000", "MUSICGEN_UI_JOBS": "2", "MUSICGEN_UI_DEVICE": ""}
    chosen = settings(["--port", "9001", "--no-any-checkpoint"], environment)
    assert (chosen.port, chosen.jobs, chosen.device) == (9001, 2, "auto")
    assert not chosen.any_checkpoint
    assert settings([], {}) == Settings()


def test_visitors_of_a_space_choose_among_the_listed_checkpoints_unless_it_says_otherwise() -> None:
    assert not settings([], {"SPACE_ID": "owner/name"}).any_checkpoint
    told = {"SPACE_ID": "owner/name", "MUSICGEN_UI_ANY_CHECKPOINT": "1"}
    assert settings([], told).any_checkpoint


def test_gradios_own_variables_name_host_and_port() -> None:
    assert (variable("host"), variable("port")) == ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT")
    assert variable("queue_length") == "MUSICGEN_UI_QUEUE_LENGTH"
    assert Settings().host == "127.0.0.1" and Settings().port == 7860


def test_every_setting_is_explained() -> None:
    rows = table()
    assert len(rows) == len(Settings.__dataclass_fields__)
    assert all(help for *_, help in rows)
    assert "--queue-length" in [row[1] for row in rows]


def test_the_page_and_the_server_load_without_torch() -> None:
    code = "import sys, musicgen_ui.ui.page, musicgen_ui.server.app; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "False", run.stderr


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="glibc's")
@pytest.mark.parametrize("own", ["", "5"])  # what the user chose stays
def test_threads_share_two_heaps(own: str, tmp_path: Path) -> None:
    code = """
import ctypes, threading
from musicgen_ui.server.limits import share_heaps
share_heaps()
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


def collect(engine: Any, request: GenerationRequest, stop: threading.Event | None = None) -> list:
    async def run() -> list:
        return [event async for event in engine.stream(request, stop)]

    return asyncio.run(run())


def test_a_click_waits_for_an_engine_that_is_being_built() -> None:
    built = threading.Event()

    def build() -> FakeEngine:
        built.wait()
        return FakeEngine()

    engine = BackgroundEngine(build, "mono")
    engine.start()
    assert engine.status() == "starting …"
    threading.Timer(0.3, built.set).start()
    events = collect(engine, GenerationRequest(duration_s=0.5))
    assert events[0] == Progress("loading", note="starting the engine")
    assert events[-1].clip.duration_s == 0.5
    assert engine.checkpoints() == ["mono", "auto", "wide"]
    assert engine.status() == "fake · CPU · float32"


def test_stop_ends_the_wait_for_the_engine() -> None:
    engine = BackgroundEngine(FakeEngine, "auto")  # never started
    stop = threading.Event()
    stop.set()
    assert collect(engine, GenerationRequest(), stop) == []


def test_an_engine_that_fails_to_start_is_said_in_a_sentence() -> None:
    def build() -> FakeEngine:
        raise OSError("no such device")

    engine = BackgroundEngine(build, "auto")
    engine.start()
    with pytest.raises(RequestError, match="could not start"):
        engine.describe("auto")
    assert "failed" in engine.status()


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


def test_the_sweeper_deletes_what_is_old_and_folders_that_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, used = tmp_path / "a" / "old.wav", tmp_path / "b" / "new.wav", tmp_path / "used.wav"
    sweeper, now_s = Sweeper(tmp_path, kept_s=100), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    for path in (old, used):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert sweeper.sweep() == 0
    now_s += 99
    new.parent.mkdir()
    new.write_bytes(b"x")
    os.utime(used, ns=(1, 1))
    assert sweeper.sweep() == 0
    now_s += 2
    assert sweeper.sweep() == 1
    assert new.exists() and used.exists() and not old.parent.exists()


def test_a_folder_that_is_too_large_loses_its_oldest_takes_and_none_that_are_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    sweeper = Sweeper(tmp_path, kept_s=1e6, kept_bytes=500)
    monkeypatch.setattr(time, "monotonic", lambda: now_s)

    def left() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    for name in ("z", "b", "a"):  # the oldest first
        for suffix in ("wav", "flac"):
            (tmp_path / f"{name}.{suffix}").write_bytes(bytes(100))
        assert sweeper.sweep() == 0
        now_s += 100
    now_s = YOUNG_S - 1
    assert sweeper.sweep() == 0 and len(left()) == 6
    now_s = YOUNG_S
    assert sweeper.sweep() == 2 and left() == {"b.wav", "b.flac", "a.wav", "a.flac"}
    assert sweeper.sweep() == 0


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_a_clock_that_jumps_deletes_nothing(tmp_path: Path, jump_s: float) -> None:
    path = tmp_path / "take.wav"
    path.write_bytes(b"x")
    sweeper = Sweeper(tmp_path, kept_s=100)
    sweeper.sweep()
    os.utime(path, (time.time() + jump_s,) * 2)  # as it looks to a clock that was set
    for _ in range(3):
        assert sweeper.sweep() == 0
    assert path.exists()
