"""The audio thread of the player, in Chromium: what it is given and what comes out, to the sample.

Rendered offline, so nothing waits for a clock.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from tests.helpers.fakes import FakeBackend

# Posts each message at its time, with a moment for it to arrive, and gives the left channel.
RENDER = """async ([rate, seconds, messages]) => {
  const context = new OfflineAudioContext(2, Math.round(rate * seconds), rate);
  await context.audioWorklet.addModule(musicgenPlayer.sound.worklet);
  const node = new AudioWorkletNode(context, 'musicgen-player', {
    numberOfInputs: 0, outputChannelCount: [2] });
  node.connect(context.destination);
  const reports = [];
  node.port.onmessage = ({ data }) => reports.push(data);
  const post = (message) => {
    if (message.pcm) {
      const bytes = Uint8Array.from(atob(message.pcm), (c) => c.charCodeAt(0));
      message = { ...message, value: new Int16Array(bytes.buffer) };
    }
    node.port.postMessage(message);
  };
  const at = Map.groupBy(messages, ([time]) => time);
  for (const [time, list] of at)
    context.suspend(time).then(async () => {
      for (const [, message] of list) post(message);
      await new Promise((done) => setTimeout(done, 40));
      context.resume();
    });
  const audio = await context.startRendering();
  const bytes = new Uint8Array(audio.getChannelData(0).buffer);
  let text = '';
  for (let i = 0; i < bytes.length; i += 4096)
    text += String.fromCharCode(...bytes.subarray(i, i + 4096));
  return [btoa(text), reports];
}"""
Message = tuple[float, dict[str, Any]]


@pytest.fixture(scope="module")
def pages() -> Iterator[list[Page]]:
    pages: list[Page] = []
    yield pages
    for page in pages:
        page.close()


@pytest.fixture
def page(chromium: Browser, served: tuple[str, FakeBackend], pages: list[Page]) -> Page:
    """One page for all tests here; another after it crashed."""
    if not pages or pages[-1].is_closed():
        page = chromium.new_page()
        pages.append(page)
        page.goto(served[0])
        page.wait_for_function("() => window.musicgenPlayer")
    return pages[-1]


def render(page: Page, rate: int, seconds: float, messages: list[Message]) -> np.ndarray:
    """float32 samples of the left channel."""
    text, _ = page.evaluate(RENDER, [rate, seconds, messages])
    return np.frombuffer(base64.b64decode(text), np.float32)


def track(samples: np.ndarray, rate: int, number: int = 0, complete: bool = True) -> list[Message]:
    """The messages that hand a whole mono track over, in pieces."""
    pcm = np.rint(samples * 32768).astype("<i2")
    pieces = np.array_split(pcm, 5)
    messages = [{"op": "open", "track": number, "rate": rate, "channels": 1}]
    for piece in pieces:
        text = base64.b64encode(piece.tobytes()).decode()
        messages.append({"op": "append", "track": number, "pcm": text})
    messages += [{"op": "complete", "track": number}] * complete
    return [(0.0, message) for message in messages]


def now(op: str, value: Any = True, at_s: float = 0.0, **more: Any) -> Message:
    return at_s, {"op": op, "value": value, **more}


PLAY = [now("ready"), now("play")]
NOISE = (np.random.default_rng(1).uniform(-0.5, 0.5, 12_000) * 32768).round() / 32768


def test_samples_of_the_same_rate_come_out_unchanged(page: Page) -> None:
    out = render(page, 16_000, 1.0, [*track(NOISE, 16_000), *PLAY])
    assert np.array_equal(out[: len(NOISE)], NOISE.astype(np.float32))
    assert not out[len(NOISE) :].any()


@pytest.mark.parametrize("rate", [16_000, 32_000, 48_000])
def test_another_rate_is_resampled_without_distortion(page: Page, rate: int) -> None:
    t = np.arange(rate) / rate
    out = render(page, 44_100, 0.9, [*track(0.5 * np.sin(2 * np.pi * 3000 * t), rate), *PLAY])
    sine = 0.5 * np.sin(2 * np.pi * 3000 * np.arange(len(out)) / 44_100)
    error = (out - sine)[200:]
    assert 20 * np.log10(np.std(error) / np.std(sine)) < -60


def test_a_loop_repeats_to_the_sample(page: Page) -> None:
    loop = now("loop", [0.1, 0.25])
    out = render(page, 16_000, 1.0, [*track(NOISE, 16_000), loop, *PLAY])
    expected = np.concatenate([NOISE[:4000], *[NOISE[1600:4000]] * 5])[: len(out)]
    assert np.array_equal(out, expected.astype(np.float32))


def test_a_loop_of_the_whole_track_has_no_gap(page: Page) -> None:
    loop = now("loop", [0, 10.0])
    out = render(page, 16_000, 1.5, [*track(NOISE, 16_000), loop, *PLAY])
    assert np.array_equal(out, np.tile(NOISE, 2)[: len(out)].astype(np.float32))


def test_a_track_that_runs_dry_waits_and_goes_on_where_it_was(page: Page) -> None:
    first, rest = track(NOISE[:4096], 16_000, complete=False), track(NOISE[4096:], 16_000)
    later = [(0.5, message) for _, message in rest if message["op"] != "open"]
    out = render(page, 16_000, 1.5, [*first, *PLAY, *later, now("ready", at_s=0.5)])
    assert np.array_equal(out[:4096], NOISE[:4096].astype(np.float32))
    assert not out[4096:7900].any()
    sounding = out[7900:][np.argmax(out[7900:] != 0) :]
    ramp = 80  # samples of the fade after the wait
    assert np.array_equal(sounding[ramp : len(NOISE) - 4096 - 1],
                          NOISE[4096 + 1 + ramp :].astype(np.float32))  # fmt: skip


def test_tracks_are_switched_without_a_gap_at_their_loudness(page: Page) -> None:
    flat = np.full(16_000, 0.5)
    tracks = [*track(flat, 16_000), *track(flat / 2, 16_000, number=1)]
    louder = now("gain", 2.0, track=1)
    quieter = now("gain", 0.5, track=1, at_s=0.7)
    switch = now("select", 1, at_s=0.3)
    out = render(page, 16_000, 0.9, [*tracks, louder, *PLAY, switch, quieter])
    assert np.all(np.abs(out[:11_000] - 0.5) < 0.01)  # both are as loud now
    assert np.allclose(out[12_000:], 0.125)


def test_pause_and_seek_make_no_click(page: Page) -> None:
    flat = np.full(16_000, 0.5)
    changes = [now("play", False, 0.2), now("play", True, 0.4), now("seek", 0.1, 0.6)]
    out = render(page, 16_000, 0.9, [*track(flat, 16_000), *PLAY, *changes])
    assert np.abs(np.diff(out[1:])).max() < 0.02
    assert not out[3500:6300].any() and out[7000] == 0.5 and out[-1] == 0.5
