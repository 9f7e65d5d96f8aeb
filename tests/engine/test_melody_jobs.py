"""Melody checkpoints: a tune that is followed, against transformers' `generate` and audiocraft.

transformers' `generate` is right where a prompt is given. Without one it encodes a start token of
the decoder as if it were text; here, as in audiocraft, no prompt is a single state of zeros, which
the reference is given as a masked token.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MusicgenMelodyForConditionalGeneration

from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.engine import delay_pattern
from musicgen_ui.engine.melody import ChromaExtractor
from musicgen_ui.engine.protocol import Chunk, Event, Finished
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import (
    PIANO,
    ROCK,
    beside,
    make_batch,
    noise,
    run,
    run_job,
    stream,
    submit,
)
from tests.helpers.jobs import made
from tests.helpers.melody import DOWN, SCALE, generated, melody_batch, tune

WINDOW = 235  # columns of chroma in 30 s


@pytest.fixture(scope="module", params=["eager", "graph"])
def batch(folder: Path, request: pytest.FixtureRequest) -> Scheduler:
    """Both ways of stepping; the graph's as it runs before it is captured."""
    return melody_batch(folder, graphs=request.param == "graph")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return MusicgenMelodyForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module", params=["melody", "stereo_melody"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("melody", [SCALE, None])
@pytest.mark.parametrize("prompt", [ROCK, ""])
def test_greedy_equals_generate(folder, batch, reference, prompt, melody, guidance_scale):
    request = GenerationRequest(
        prompt, melody=melody, duration_s=0.6, guidance_scale=guidance_scale, do_sample=False
    )
    _, codes, _ = run_job(batch, request)
    chroma = ChromaExtractor()(melody) if melody else None
    expected = generated(reference, folder, prompt, chroma, guidance_scale, 30)
    assert len(expected.unique()) > 10  # a sequence that says something
    assert torch.equal(codes, expected)


def test_melody_changes_the_music(batch):
    request = GenerationRequest(ROCK, duration_s=0.6, do_sample=False)
    takes = [
        run_job(batch, dataclasses.replace(request, melody=melody))[1]
        for melody in (None, SCALE, DOWN)
    ]
    assert not torch.equal(takes[0], takes[1])
    assert not torch.equal(takes[0], takes[2])
    assert not torch.equal(takes[1], takes[2])


def test_shorter_prompt_is_padded_with_zeros(folder, batch, reference):
    """A negative prompt that is longer: the reference gets zeros after the shorter one."""
    request = GenerationRequest(
        PIANO, negative_prompt=ROCK, melody=SCALE, duration_s=0.5, do_sample=False
    )
    wanted, unwanted = batch.conditioner.conditions(request).states
    assert wanted.shape == unwanted.shape and not wanted[-1].any() and unwanted[-1].any()
    columns = torch.full((2 * batch.decoder.codebooks, 1), batch.decoder.start_token)
    with torch.no_grad():
        states = torch.stack([wanted, unwanted])
        logits = reference.decoder(columns, encoder_hidden_states=states).logits[:, -1]
    wanted, unwanted = logits.view(2, batch.decoder.codebooks, -1)
    expected = (unwanted + 3 * (wanted - unwanted)).argmax(-1)
    job, _, _ = run_job(batch, request)
    own = torch.arange(batch.decoder.codebooks) < batch.codec.channels  # not delayed
    assert torch.equal(job.window.columns[own, 1], expected[own])
    plain, _, _ = run_job(batch, dataclasses.replace(request, negative_prompt=""))
    assert not torch.equal(job.window.columns, plain.window.columns)


def test_melody_beside_an_audio_prompt(folder, batch, reference):
    """The melody begins with the new music; before it the clip's own chroma stands."""
    clip = noise(1.28, batch.codec.channels)  # ten columns of chroma
    request = GenerationRequest(
        ROCK, audio_prompt=clip, include_prompt=False, melody=SCALE, duration_s=0.6, do_sample=False
    )
    job, codes, finished = run_job(batch, request)
    melody = ChromaExtractor()(SCALE)
    heard = torch.cat([ChromaExtractor()(clip)[-10:], melody.repeat(8)])[:WINDOW]
    context = delay_pattern.undelayed(
        job.window.columns, 0, job.window.context_frames, batch.codec.channels
    )
    assert torch.equal(codes, generated(reference, folder, ROCK, heard, 3.0, 30, context))
    assert np.array_equal(finished.melody.classes, melody[:5])
    other = run_job(batch, dataclasses.replace(request, melody=None))[1]
    assert not torch.equal(codes, other)


def test_melody_jobs_do_not_affect_others(batch):
    """Jobs of other lengths, prefixes and positions; one of them is admitted late."""
    request = GenerationRequest(ROCK, melody=SCALE, duration_s=0.6, seed=7)
    _, alone, _ = run_job(batch, request)
    others = [
        GenerationRequest("", duration_s=1.0, seed=1),
        GenerationRequest(PIANO + " and drums" * 9, melody=DOWN, duration_s=0.5, seed=2),
        GenerationRequest(PIANO, duration_s=0.5, guidance_scale=1, do_sample=False),
    ]
    job = beside(batch, request, others)
    codes = delay_pattern.undelayed(job.window.columns, 0, job.window.frames, batch.codec.channels)
    assert torch.equal(codes, alone)


def test_variations_stream_and_stop(batch):
    request = GenerationRequest(ROCK, melody=SCALE, duration_s=1.2, seed=3, variations=2)
    events = list(stream(batch, request))
    takes = {event.variation: event for event in events if isinstance(event, Finished)}
    assert not np.array_equal(takes[0].clip.samples, takes[1].clip.samples)
    for variation, take in takes.items():
        chunks = [e.clip for e in events if isinstance(e, Chunk) and e.variation == variation]
        assert np.array_equal(np.concatenate([c.samples for c in chunks], 1), take.clip.samples)
    stop, kept = threading.Event(), None
    for event in stream(batch, dataclasses.replace(request, duration_s=20, variations=1), stop):
        kept = event
        if isinstance(event, Chunk):
            stop.set()
    assert kept.stopped and 0 < kept.clip.duration_s < 2 and not batch.running
    # A stop while the prefix is taken in: nothing was made, and the rows are free.
    stop = threading.Event()
    for event in stream(batch, request, stop):
        kept = event
        stop.set()
    assert kept.stopped and kept.clip.duration_s == 0 and not batch.running


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_every_precision_follows(tiny_melody, precision):
    batch = melody_batch(tiny_melody, precision=precision)
    request = GenerationRequest(ROCK, melody=SCALE, duration_s=0.5, do_sample=False)
    _, codes, finished = run_job(batch, request)
    assert finished.clip.samples.shape == (1, 16_000) and np.isfinite(finished.clip.samples).all()
    _, other, _ = run_job(batch, dataclasses.replace(request, melody=DOWN))
    assert not torch.equal(codes, other)


def test_takes_tell_what_they_followed(batch):
    request = GenerationRequest(ROCK, melody=DOWN, duration_s=3.0)
    stop = threading.Event()
    stop.set()
    batch.step()
    melody = batch.conditioner.chroma(request)
    own = ChromaExtractor()(DOWN).numpy()  # 2 s, so it is heard again
    assert melody.column_s == 0.128 and len(melody.classes) == 24
    assert np.array_equal(melody.classes, np.tile(own, 2)[:24])
    assert batch.conditioner.chroma(GenerationRequest(ROCK)) is None


def test_melody_is_refused_by_other_checkpoints(tiny_mono, tiny_melody):
    request = GenerationRequest(ROCK, melody=SCALE, checkpoint=str(tiny_mono), duration_s=0.5)
    manager = LocalBackend("cpu", "float32")
    with pytest.raises(RequestError, match="cannot follow a melody: choose melody, melody-large"):
        made(manager, request)
    assert not manager.describe(str(tiny_mono)).melody
    assert manager.describe(str(tiny_melody)).melody and manager.describe("melody").melody
    (error,) = {str(e) for e in refused(make_batch(tiny_mono), request)}
    assert "cannot follow a melody" in error
    took = dataclasses.replace(request, checkpoint=str(tiny_melody))
    assert made(manager, took)[-1].melody is not None
    manager.close()


def refused(batch: Scheduler, request: GenerationRequest) -> list[Exception]:
    events: list[Event | Exception] = []
    submit(batch, request, events.append)
    while batch.step():
        pass
    return [event for event in events if isinstance(event, Exception)]


@pytest.mark.parametrize(
    ("clip", "said"),
    [
        (Clip(np.zeros((1, 32_000), np.float32), 32_000), "silent: choose a clip with a tune"),
        (tune(0, note_s=0.3), "0.30 s short: choose a clip of at least 0.5 s"),
    ],
)
def test_clips_without_a_melody_are_refused(clip, said):
    with pytest.raises(RequestError, match=said) as caught:
        GenerationRequest.parse({"melody": clip})
    assert caught.value.field == "melody"


def test_melody_moves_along_with_the_windows(folder, batch, reference, monkeypatch):
    """Each window is what `generate` makes of the overlap and the chroma from there on."""
    monkeypatch.setattr("musicgen_ui.engine.code_window.WINDOW_S", 2.0)
    request = GenerationRequest(ROCK, melody=SCALE, duration_s=4.0, overlap_s=1.0, do_sample=False)
    windows, finished, _ = run(batch, request)
    assert list(windows) == [0, 50, 100] and finished.clip.samples.shape[1] == 128_000
    tune_again = ChromaExtractor()(SCALE).repeat(9)
    known = None
    for start, window in windows.items():
        first = round(start / 50 / 0.128)
        heard = tune_again[first : first + WINDOW]
        expected = generated(reference, folder, ROCK, heard, 3.0, 50 + 50 * (not start), known)
        assert torch.equal(window, expected)
        known = window[:, -50:]


def test_sections_change_at_their_frame_beside_a_melody(batch, reference):
    request = GenerationRequest(
        ROCK,
        sections=[(0.3, PIANO)],
        melody=SCALE,
        duration_s=0.6,
        guidance_scale=1,
        do_sample=False,
    )
    job, _, _ = run_job(batch, request)
    columns = job.window.columns[None]  # [1, codebooks, columns]
    for at_s, part in ((0.0, slice(0, 15)), (0.3, slice(15, 30))):
        (states,) = batch.conditioner.conditions(request, at_s=at_s).states
        with torch.no_grad():
            logits = reference.decoder(
                columns[0, :, :-1], encoder_hidden_states=states[None]
            ).logits
        likeliest = logits.argmax(-1)[:, len(states) :]  # [codebooks, columns]
        free = torch.arange(batch.decoder.codebooks) < batch.codec.channels  # never a start token
        assert torch.equal(likeliest[free][:, part], columns[0, free, 1:][:, part])


def test_clips_are_analysed_before_the_job_is_stepped(folder, monkeypatch):
    batch = melody_batch(folder)
    clip = noise(2, batch.codec.channels)
    request = GenerationRequest(ROCK, melody=SCALE, audio_prompt=clip, duration_s=1.0)
    batch.encode(request)

    def refuse(*_: object) -> None:
        raise AssertionError("on the stepping thread")

    monkeypatch.setattr(ChromaExtractor, "__call__", refuse)
    assert batch.conditioner.conditions(request, start_s=-1.0).states
    assert len(batch.conditioner.chroma(request).classes)
