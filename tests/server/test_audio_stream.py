"""A job's sound over HTTP: all of it, from any sample, to its owner alone."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import soundfile
from starlette.applications import Starlette
from starlette.testclient import TestClient

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.event_log import EventLog
from musicgen_ui.engine.protocol import Chunk, Failed, Finished
from musicgen_ui.request import GenerationRequest
from musicgen_ui.server import audio_stream

RATE = 16_000
MUSIC = np.random.default_rng(0).uniform(-1.1, 1.1, (2, 5000)).astype(np.float32)
OWNER = {"x-session": "mine"}


def chunks(variation: int = 0, size: int = 700) -> Iterator[Chunk]:
    for start in range(0, MUSIC.shape[1], size):
        yield Chunk(variation, Clip(MUSIC[:, start : start + size], RATE), start)


def end(log: EventLog, variation: int = 0) -> None:
    log.append(Finished(variation, Clip(MUSIC, RATE), GenerationRequest(), 0.0, 1.0))


def in_a_file() -> np.ndarray:
    """The same music as the take's file holds it: int16 [samples, channels]."""
    return soundfile.read(io.BytesIO(audio.encode(Clip(MUSIC, RATE), ".wav")), dtype="int16")[0]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> EventLog:
    monkeypatch.setattr(audio_stream, "RESPONSE_S", 0.15)
    return EventLog()


@pytest.fixture
def client(log: EventLog) -> TestClient:
    def find(job: str, session: str) -> EventLog | None:
        return log if (job, session) == ("job", "mine") else None

    return TestClient(Starlette(routes=[audio_stream.route(find)]))


def get(client: TestClient, after: int = 0, **more: int) -> tuple[int, np.ndarray]:
    """Status and samples, int16 [samples, channels]."""
    answer = client.get("/jobs/job/audio", params={"after": after, **more}, headers=OWNER)
    if answer.status_code == 200:
        fields = [answer.headers[f"x-{name}"] for name in ("sample-rate", "channels", "start")]
        assert fields == [str(RATE), "2", str(after)]
    return answer.status_code, np.frombuffer(answer.content, "<i2").reshape(-1, 2)


@pytest.mark.parametrize("after", [0, 700, 1234, 4999])
def test_stream_from_any_sample_equals_the_file(client: TestClient, log: EventLog, after: int):
    for chunk in chunks():
        log.append(chunk)
    end(log)
    status, samples = get(client, after)
    assert status == 200 and np.array_equal(samples, in_a_file()[after:])
    assert get(client, MUSIC.shape[1])[0] == audio_stream.COMPLETE


def test_stream_follows_a_job_in_short_responses(client: TestClient, log: EventLog):
    def make() -> None:
        for chunk in chunks():
            log.append(chunk)
            time.sleep(0.06)
        end(log)

    thread = threading.Thread(target=make)
    thread.start()
    received, responses, status = np.zeros((0, 2), np.int16), 0, 200
    while status != audio_stream.COMPLETE:
        began_s = time.monotonic()
        status, samples = get(client, len(received))
        assert time.monotonic() - began_s < 2
        received, responses = np.concatenate([received, samples]), responses + 1
    thread.join()
    assert np.array_equal(received, in_a_file()) and responses > 3


def test_stream_without_sound_says_whether_one_may_come(client: TestClient, log: EventLog):
    assert get(client)[0] == audio_stream.NOT_YET
    log.append(Failed(ValueError("broken")))
    assert get(client)[0] == audio_stream.COMPLETE


def test_stream_of_a_variation_is_its_alone(client: TestClient, log: EventLog):
    log.append(Chunk(1, Clip(-MUSIC[:, :100], RATE)))
    log.append(Chunk(0, Clip(MUSIC[:, :100], RATE)))
    log.append(Chunk(1, Clip(-MUSIC[:, 100:200], RATE)))
    status, samples = get(client, variation=1)
    assert status == 200 and len(samples) == 200
    assert np.array_equal(np.sign(samples[:, 0]), -np.sign(MUSIC[0, :200]))


def test_stream_is_for_its_owner_alone(client: TestClient, log: EventLog):
    log.append(next(chunks()))
    for job, headers in (("job", {}), ("job", {"x-session": "other"}), ("else", OWNER)):
        answer = client.get(f"/jobs/{job}/audio", headers=headers)
        assert answer.status_code == 404 and answer.text == "Not found.\n"


@pytest.mark.parametrize("rate", [16_000, 32_000])
def test_opus_is_one_stream_of_the_rest(client: TestClient, log: EventLog, rate: int):
    t = np.arange(3 * rate) / rate
    music = np.stack([np.sin(2 * np.pi * 440 * t), np.sin(2 * np.pi * 660 * t)]).astype("f4") / 2
    for start in range(0, music.shape[1], 1777):
        log.append(Chunk(0, Clip(music[:, start : start + 1777], rate), start))
    end(log)
    answer = client.get("/jobs/job/audio?format=opus&after=8000", headers=OWNER)
    assert answer.headers["content-type"] == "audio/ogg" and answer.headers["x-start"] == "8000"
    heard, opus_rate = soundfile.read(io.BytesIO(answer.content), always_2d=True)
    expected = audio.convert(Clip(music[:, 8000:], rate), opus_rate, 2).samples.T
    assert len(heard) == len(expected)
    assert len(answer.content) < 4 * (music.shape[1] - 8000) / 3  # a third of PCM at most
    middle = slice(4800, -4800)  # a codec needs its time at the ends
    error_db = 20 * np.log10(np.std((heard - expected)[middle]) / np.std(expected[middle]))
    assert error_db < -20


def test_opus_comes_while_the_music_is_made():
    music = np.zeros((1, 16_000), np.float32)

    async def clips():
        yield Clip(music, 16_000)
        yield Clip(music, 16_000)
        raise AssertionError("nothing was sent before the end")

    async def first() -> bytes:
        pages = audio_stream._opus(clips())
        return await anext(pages) + await anext(pages)

    assert asyncio.run(first()).startswith(b"OggS")


def test_opus_of_a_job_without_sound_is_empty(client: TestClient, log: EventLog):
    log.append(Failed(ValueError("broken")))
    answer = client.get("/jobs/job/audio?format=opus", headers=OWNER)
    assert (answer.status_code, answer.content) == (200, b"")
    assert client.get("/jobs/job/audio?format=mp3", headers=OWNER).status_code == 400


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "٣", "9" * 40, ""])
def test_stream_refuses_what_is_no_number(client: TestClient, after: str):
    answer = client.get("/jobs/job/audio", params={"after": after}, headers=OWNER)
    assert answer.status_code == 400


def test_stream_asks_proxies_to_pass_it_on(client: TestClient, log: EventLog):
    log.append(next(chunks()))
    headers = client.get("/jobs/job/audio", headers=OWNER).headers
    assert headers["x-accel-buffering"] == "no" and "no-transform" in headers["cache-control"]
    assert "content-encoding" not in headers
