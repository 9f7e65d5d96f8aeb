"""Pieces longer than the model's window: window for window what `generate` makes, and one piece."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from musicgen_ui.engine import code_window, sampling, variation
from musicgen_ui.engine import scheduler as batches
from musicgen_ui.engine.protocol import Chunk, Event
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import (
    PIANO,
    ROCK,
    codes_of,
    make_batch,
    noise,
    run,
    stream,
    submit,
    whole,
)
from tests.helpers.long_takes import generated

WINDOW, OVERLAP = 100, 50  # frames: short windows show what long ones do


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_window, "WINDOW_S", WINDOW / 50)


def long_request(**settings: object) -> GenerationRequest:
    return GenerationRequest(
        **{"prompt": ROCK, "duration_s": 4.0, "overlap_s": OVERLAP / 50, "seed": 7} | settings
    )


@pytest.mark.parametrize("clip_s", [0.0, 0.5, 1.8])
def test_every_window_is_what_generate_makes_of_the_overlap(folder, batch, reference, clip_s):
    clip = noise(clip_s, batch.codec.channels) if clip_s else None
    request = long_request(do_sample=False, audio_prompt=clip, context_s=clip_s)
    windows, _, job = run(batch, request)
    frames = job.window.context_frames + 200
    starts = range(0, frames - OVERLAP, WINDOW - OVERLAP)
    assert list(windows) == list(starts) and len(windows) >= 3
    known = windows[0][:, : job.window.context_frames]
    for window in windows.values():
        if known.shape[1]:
            assert torch.equal(window, generated(reference, folder, known, window.shape[1]))
        known = window[:, -OVERLAP:]
    assert len(whole(windows)[0].unique()) > 20  # a piece that says something


def test_piece_is_one_decode_of_codes_that_agree_in_the_overlaps(batch):
    windows, finished, _ = run(batch, long_request(duration_s=4.34))
    codes = whole(windows)
    for start, window in windows.items():
        assert torch.equal(codes[:, start : start + WINDOW], window)
    samples = finished.clip.samples
    assert samples.shape == (batch.codec.channels, 217 * 640)
    assert np.abs(samples - batch.codec.decode(codes).numpy()).max() < 1e-5


def test_chunks_joined_are_the_take_and_progress_only_rises(batch):
    events = list(stream(batch, long_request()))
    chunks = [event.clip.samples for event in events if isinstance(event, Chunk)]
    assert np.array_equal(np.concatenate(chunks, 1), events[-1].clip.samples)
    assert max(chunk.shape[1] for chunk in chunks) < 40 * 640  # none waits for a window's end


def test_memory_is_that_of_a_window(batch):
    held, events = set(), []
    submit(batch, long_request(), events.append)
    while batch.step():
        held.update(job.slot.sequence.nbytes for job in batch.running)
    submit(batch, long_request(duration_s=WINDOW / 50), events.append)
    batch.step()
    (single,) = batch.running
    assert max(held) == single.slot.sequence.nbytes
    single.job.stop()
    while batch.step():
        pass


def test_a_seed_gives_the_same_piece_alone_beside_others_and_whatever_the_length(batch):
    request = long_request(duration_s=3.0)
    alone = whole(run(batch, request)[0])
    assert not torch.equal(alone, whole(run(batch, dataclasses.replace(request, seed=8))[0]))
    events: list[Event | Exception] = []
    submit(batch, dataclasses.replace(request, prompt=PIANO, seed=1), events.append)
    for _ in range(30):
        batch.step()
    submit(batch, request, events.append)
    submit(batch, GenerationRequest("", duration_s=0.6, seed=2), events.append)
    batch.step()
    beside = next(job for job in batch.running if job.request.seed == 7)
    windows = {}
    while batch.running:
        batch.step()
        windows[beside.window.start] = codes_of(beside)
    assert torch.equal(whole(windows), alone)
    longer = whole(run(batch, dataclasses.replace(request, duration_s=3.3))[0])
    assert torch.equal(longer[:, :150], alone)


def test_every_frame_has_random_numbers_of_its_own_whatever_its_window(batch, monkeypatch):
    rows, draw = [], sampling.draw

    def spy(logits: torch.Tensor, settings: object, uniform: torch.Tensor) -> torch.Tensor:
        rows.append(uniform[0].clone())
        return draw(logits, settings, uniform)

    monkeypatch.setattr(sampling, "draw", spy)
    windows, _, job = run(batch, long_request(audio_prompt=noise(0.5, batch.codec.channels)))
    expected = []  # a code is drawn with the row of its frame and its codebook's delay
    for start, window in windows.items():
        first = start + OVERLAP if start else job.window.context_frames
        expected += range(first, start + window.shape[1] + 3)
    assert torch.equal(torch.stack(rows), job.uniforms[torch.tensor(expected) - 25])


def test_stop_keeps_every_window_before(batch):
    request, stop = long_request(), threading.Event()
    made, events = 0.0, []
    for event in stream(batch, request, stop):
        events.append(event)
        if isinstance(event, Chunk):
            made += event.clip.duration_s
        if made > 2.5:  # in the third window
            stop.set()
    take = events[-1].clip.samples
    assert events[-1].stopped and 2.5 * 32000 <= take.shape[1] < 4 * 32000
    expected = run(batch, request)[1].clip.samples[:, : take.shape[1] - 4 * 640]
    assert np.abs(take[:, : expected.shape[1]] - expected).max() < 1e-4


def test_others_go_on_while_a_window_takes_its_past_in(batch, monkeypatch):
    monkeypatch.setattr(batches, "PREFILL_COLUMNS", 5)
    events: list[Event | Exception] = []
    submit(batch, long_request(duration_s=3.0), events.append)
    for _ in range(60):
        batch.step()
    submit(batch, GenerationRequest(ROCK, duration_s=1.5, seed=1), events.append)
    batch.step()
    long, short = batch.running
    waited = 0  # steps without a column of its own
    while short in batch.running:
        before = long.window.written, short.window.written
        batch.step()
        if long.window.written == before[0] and not long.window.done:
            waited += 1
            assert short.window.written == before[1] + 1
    assert waited == OVERLAP / 5 - 2  # the window begins in the first, and goes on in the last
    while batch.step():
        pass


def test_a_window_waits_for_the_codec_where_it_lags_behind_the_overlap(batch, monkeypatch):
    """A long audio prompt is decoded while few new frames fill the window."""
    monkeypatch.setattr(variation, "CHUNK_FRAMES", 2)
    clip = noise(1.96, batch.codec.channels)
    request = long_request(audio_prompt=clip, context_s=1.96, duration_s=1.0, include_prompt=False)
    windows, finished, _ = run(batch, request)
    decoded = batch.codec.decode(whole(windows)).numpy()
    assert np.abs(finished.clip.samples - decoded[:, -32000:]).max() < 1e-5


def test_audio_prompt_gives_at_least_the_overlap_to_a_piece_beyond_the_window():
    def used(clip_s: float, **settings: float) -> float:
        return GenerationRequest(audio_prompt=noise(clip_s), **settings).context_used_s()

    assert used(20, duration_s=25) == 12
    assert used(20, duration_s=290) == 12
    assert used(3, duration_s=290) == 3
    assert used(29.9, duration_s=290, context_s=30) == 29.5
    assert used(20, duration_s=60, overlap_s=5) == 5


@pytest.mark.parametrize(
    ("window_s", "overlap_s", "duration_s"),
    [(4.0, 2.0, 9.0), pytest.param(30.0, 12.0, 90.0, marks=pytest.mark.long)],
)
def test_loudness_does_not_drift_and_joints_do_not_click(
    monkeypatch, window_s, overlap_s, duration_s
):
    """The bundled checkpoint, as people hear it."""
    monkeypatch.setattr(code_window, "WINDOW_S", window_s)
    batch = make_batch(Path(__file__).parents[2] / "assets" / "bundled")
    request = GenerationRequest(
        "80s rock with drums, bass and electric guitar",
        duration_s=duration_s,
        overlap_s=overlap_s,
        temperature=0.7,
        top_k=50,
        seed=1,
    )
    *_, finished = stream(batch, request)
    rate, samples = finished.clip.sampling_rate, finished.clip.samples
    stride_s = window_s - overlap_s
    ends = samples[:, : round(stride_s * rate)], samples[:, -round(stride_s * rate) :]
    first_db, last_db = (10 * np.log10(np.square(end).mean()) for end in ends)
    assert -40 < first_db < -6 and abs(last_db - first_db) < 4
    steps = np.abs(np.diff(samples, axis=1))[0]
    joints = np.arange(window_s, duration_s, stride_s)
    assert len(joints) >= 3
    at_joints = np.concatenate([steps[round(j * rate) - 20 : round(j * rate) + 20] for j in joints])
    assert at_joints.max() <= np.quantile(steps, 0.9999)
