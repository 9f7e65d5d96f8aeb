"""ZeroGPU: the engine through the real `spaces`, without effect here and with its forked workers.

zerogpu.py runs the calls of this file once, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musicgen_ui import files
from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends import zerogpu, zerogpu_worker
from musicgen_ui.engine.protocol import NO_LIVE_MODE, Chunk, Failed, Finished, Progress, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers.jobs import made, read
from tests.helpers.local import wait_for

HARNESS = Path(__file__).parents[1] / "helpers" / "zerogpu.py"


@pytest.fixture(scope="module")
def told(tiny_mono: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every call of the harness gave."""
    offload = tmp_path_factory.mktemp("zero") / "tensors"
    # One thread: those of OpenMP do not live on in a fork.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ZEROGPU_OFFLOAD_DIR": str(offload)}
    command = [sys.executable, str(HARNESS), str(tiny_mono)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def engine(tiny_mono: Path) -> zerogpu.ZeroBackend:
    """The engine in this process, where `spaces` does nothing."""
    return zerogpu.ZeroBackend(str(tiny_mono), device="cpu")


def asked_s(call: dict[str, Any]) -> int:
    """The seconds of GPU that a call asked for."""
    return next(int(asked["durationSeconds"]) for path, asked in call["calls"] if "sched" in path)


def paths(call: dict[str, Any]) -> list[str]:
    return [path for path, _ in call["calls"]]


def test_weights_wait_on_cuda_and_leave_the_servers_memory(told: dict[str, Any]) -> None:
    assert told["device"] == "cuda:0"
    assert told["packed_bytes"] > 300_000


def test_a_forked_worker_makes_the_takes_that_one_process_makes(
    told: dict[str, Any], engine: zerogpu.ZeroBackend, tiny_mono: Path
) -> None:
    clip = Clip(np.sin(np.arange(32_000) / 30, dtype=np.float32)[None] * 0.3, 32_000)
    request = GenerationRequest(
        prompt="waltz", duration_s=1, seed=7, variations=2, audio_prompt=clip
    )
    events = made(engine, request)
    here = {e.variation: e for e in events if isinstance(e, Finished)}
    there = {take["variation"]: take for take in told["whole"]["takes"]}
    assert here.keys() == there.keys() == {0, 1}
    for variation, take in there.items():
        assert np.allclose(here[variation].clip.samples.ravel(), take["samples"], atol=1e-4)
        assert take["seed"] == 7 + variation and take["prompt_s"] == 1.0
        assert take["checkpoint"] == str(tiny_mono) and not take["stopped"]


def test_chunks_travel_and_joined_are_the_take(told: dict[str, Any]) -> None:
    (take,) = told["alone"]["takes"]
    assert told["alone"]["heard"]["0"] == take["samples"]
    assert told["alone"]["kinds"].index("Chunk") < told["alone"]["kinds"].index("Finished")


def test_a_worker_that_is_used_again_makes_the_same(told: dict[str, Any]) -> None:
    assert "/allow" not in paths(told["again"])  # no new worker
    for first, again in zip(told["whole"]["takes"], told["again"]["takes"], strict=True):
        assert first["samples"] == again["samples"]


def test_a_stop_reaches_the_worker_and_keeps_what_was_made(told: dict[str, Any]) -> None:
    (take,) = told["stopped"]["takes"]
    assert take["stopped"] and 0 < len(take["samples"]) < 30 * 32_000
    assert paths(told["stopped"])[-1] == "/release"
    assert not take["notes"] and told["stopped"]["heard"]["0"] == take["samples"]


def test_what_was_heard_of_a_worker_that_dies_is_the_take(told: dict[str, Any]) -> None:
    (take,) = told["killed"]["takes"]
    assert take["stopped"] and "taken away in the middle" in take["notes"][0]
    assert take["samples"] == told["killed"]["heard"]["0"] and take["seed"] == 3


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("killed early", "before the first sound: press Generate again."),
        ("refused", "GPU limit"),  # the Hub's own words
        ("mended", "The memory of this machine is full."),  # a RequestError of the worker
        ("broken", "Something went wrong on the GPU"),
    ],
)
def test_what_goes_wrong_is_a_sentence(told: dict[str, Any], call: str, said: str) -> None:
    assert said in told[call]["error"]
    assert "secret" not in told[call]["error"] and "Traceback" not in told[call]["error"]


def test_no_stop_file_is_left(told: dict[str, Any]) -> None:
    assert all(call["files"] == [] for call in told.values() if isinstance(call, dict))


def test_a_call_asks_for_what_the_ones_before_it_needed(told: dict[str, Any]) -> None:
    assert asked_s(told["alone"]) < asked_s(told["whole"])  # the first one could but guess
    pace = zerogpu_worker.Pace(start_s=10, step_s=0.05)
    request = GenerationRequest(duration_s=10)
    guess = pace.seconds("small", request)
    pace.learn("small", zerogpu.Spent(start_s=2.0, step_s=0.002))
    assert pace.seconds("small", request) == 6  # 2 + 1.25 · (2 + 500 · 0.002), rounded up
    assert pace.seconds("large", request) == guess
    pace.learn("small", zerogpu.Spent(start_s=0.1, step_s=None))  # a worker that was warm
    assert pace.seconds("small", request) == 6
    longer = GenerationRequest(duration_s=20)
    more = GenerationRequest(duration_s=10, variations=4)
    assert pace.seconds("small", request) < pace.seconds("small", more)
    assert pace.seconds("small", more) <= pace.seconds("small", longer)


def test_parts_come_at_once_in_the_beginning_and_about_every_second_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock_s = [100.0]
    monkeypatch.setattr(zerogpu_worker.time, "time", lambda: clock_s[0])
    request = GenerationRequest(duration_s=30)

    def events() -> Any:
        yield Progress(Stage.COMPOSING)
        for _ in range(60):  # half a second of music every 0.1 s
            clock_s[0] += 0.1
            yield Chunk(0, Clip(np.zeros((1, 16_000), np.float32), 32_000))
        yield Finished(0, Clip(np.zeros((1, 960_000), np.float32), 32_000), request, 0.0, 5.0)

    sent_s, made_s, heard_s, parts = [], 0.0, None, []
    for part in zerogpu_worker._parts(events(), request, began_s=98.0):
        now_s = clock_s[0]
        if heard_s is not None and not isinstance(part[-1], zerogpu.Spent):
            assert made_s >= now_s - heard_s  # never a gap while it plays
        made_s += sum(e.clip.duration_s for e in part if isinstance(e, Chunk))
        heard_s = now_s if made_s and heard_s is None else heard_s
        sent_s.append(now_s)
        parts.append(part)
    assert isinstance(parts[1][-1], Chunk) and sent_s[1] == pytest.approx(100.1)
    waits_s = np.diff(sent_s[2:-2])
    assert waits_s.max() < 1.2 and waits_s[-1] > 0.9
    (spent,) = parts[-1]
    assert spent.start_s == pytest.approx(2.1)
    assert spent.step_s == pytest.approx(5.9 / (50 * 29.5))


def test_spaces_has_no_effect_here(engine: zerogpu.ZeroBackend) -> None:
    assert not hasattr(zerogpu.compose, "zerogpu")
    events = made(engine, GenerationRequest(duration_s=0.5, seed=1, checkpoint="bundled"))
    (finished,) = [e for e in events if isinstance(e, Finished)]
    assert finished.clip.duration_s == 0.5 and finished.request.checkpoint == "bundled"


def test_only_what_is_loaded_is_offered(engine: zerogpu.ZeroBackend, tiny_mono: Path) -> None:
    assert engine.checkpoints() == [str(tiny_mono), "auto", "bundled"]
    assert set(zerogpu.MODELS) >= {str(tiny_mono), "bundled", "bundled-stereo"}
    with pytest.raises(RequestError, match="these checkpoints alone"):
        made(engine, GenerationRequest(checkpoint="facebook/musicgen-large"))
    with pytest.raises(RequestError, match="mono: switch stereo off"):
        made(engine, GenerationRequest(stereo=True))
    with pytest.raises(RequestError, match="alone"):
        engine.describe("large")
    assert engine.describe("bundled").stereo == "choice" and engine.status().device == "ZeroGPU"
    events = made(engine, GenerationRequest(duration_s=0.5, checkpoint="bundled", stereo=True))
    assert events[-1].clip.channels == 2


def test_a_sibling_that_cannot_be_had_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = zerogpu._loaded

    def loaded(source: Any, device: str) -> Any:
        if "stereo" in source.name:
            raise RequestError("The disk is full.")
        return whole(source, device)

    monkeypatch.setattr(zerogpu, "_loaded", loaded)
    engine = zerogpu.ZeroBackend("bundled", device="cpu")
    assert "bundled-stereo is not offered" in caplog.text
    with pytest.raises(RequestError, match="mono: switch stereo off"):
        made(engine, GenerationRequest(stereo=True))


def test_what_a_killed_server_leaves_is_what_the_next_one_clears(
    engine: zerogpu.ZeroBackend,
) -> None:
    assert engine._folder.name.startswith(f"{files.PRIVATE}{os.getpid()}-")


def test_visitors_beyond_those_who_can_have_a_gpu_wait_in_order(
    engine: zerogpu.ZeroBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go, started = threading.Event(), []

    def compose(name: str, request: GenerationRequest, stop: zerogpu.StopFile) -> Any:
        started.append(name)
        let_go.wait(10)
        yield [Finished(0, Clip(np.zeros((1, 9), np.float32), 9), request, 0.0, 0.0)]

    monkeypatch.setattr(zerogpu, "compose", compose)

    jobs = [engine.submit(GenerationRequest(seed=1)) for _ in range(zerogpu.AT_ONCE + 2)]
    wait_for(lambda: all(len(job.log) for job in jobs) and len(started) == zerogpu.AT_ONCE)
    time.sleep(0.1)
    assert len(started) == zerogpu.AT_ONCE
    let_go.set()
    events = [read(job) for job in jobs]
    places = sorted(one[0].place for one in events)
    assert places == [0] * zerogpu.AT_ONCE + [1, 2]
    assert all(isinstance(one[-1], Finished) for one in events)


def test_stop_while_waiting_for_a_gpu_ends_at_once(
    engine: zerogpu.ZeroBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = threading.Event()
    seen: list[bool] = []

    def compose(name: str, request: GenerationRequest, stop: zerogpu.StopFile) -> Any:
        lent.wait(10)
        seen.append(stop.is_set())
        yield from ()

    monkeypatch.setattr(zerogpu, "compose", compose)
    job = engine.submit(GenerationRequest())
    wait_for(lambda: len(job.log))
    job.stop()
    *_, take = read(job)
    assert take.stopped and not take.clip.samples.size
    lent.set()
    while any(t.name == "zero-call" for t in threading.enumerate()):
        time.sleep(0.01)
    assert seen in ([True], [])


def test_a_live_piece_is_refused_with_the_reason(engine: zerogpu.ZeroBackend) -> None:
    job = engine.submit(GenerationRequest(live=True))
    last = list(job.follow())[-1]
    assert isinstance(last, Failed) and str(last.error) == NO_LIVE_MODE
