"""Chords that a melody checkpoint follows, against transformers' `generate`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import MusicgenMelodyForConditionalGeneration

from musicgen_ui.audio import chords
from musicgen_ui.engine import delay_pattern
from musicgen_ui.engine.melody import ChromaExtractor, MelodyEncoder
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import ROCK, make_batch, noise, run_job, submit
from tests.helpers.melody import SCALE, generated, melody_batch

WINDOW = 235  # columns of chroma in 30 s
CHORDS = GenerationRequest(
    ROCK,
    chords="C F:min,G:7",
    chord_strength=1.5,
    tempo_bpm=240,
    duration_s=0.6,
    do_sample=False,
)


@pytest.fixture(scope="module", params=["eager", "graph"])
def batch(tiny_melody, request):
    return melody_batch(tiny_melody, graphs=request.param == "graph")


@pytest.fixture(scope="module")
def reference(tiny_melody):
    return MusicgenMelodyForConditionalGeneration.from_pretrained(tiny_melody).eval()


def multi_hot(count: int, strength: float = 1.5) -> torch.Tensor:
    """The columns of `CHORDS`, whose bars are 1 s, from their definition."""
    columns = torch.zeros(count, 12)
    for column in range(count):
        beat = column * 0.128 % 2
        named = (0, 4, 7) if beat < 1 else (5, 8, 0) if beat < 1.5 else (7, 11, 2, 5)
        columns[column, list(named)] = strength
    return columns


def test_greedy_equals_generate_with_chords_as_chroma(tiny_melody, batch, reference):
    _, codes, finished = run_job(batch, CHORDS)
    expected = generated(reference, tiny_melody, CHORDS.words(), multi_hot(WINDOW), 3.0, 30)
    assert torch.equal(codes, expected) and len(expected.unique()) > 10
    plain = generated(reference, tiny_melody, CHORDS.words(), None, 3.0, 30)
    assert not torch.equal(codes, plain)
    followed = finished.melody
    assert [each.chord.name for each in followed.chords] == ["C"] and not len(followed.classes)


def test_chords_beside_a_melody_and_an_audio_prompt(tiny_melody, batch, reference):
    """A class has the greater of its weights; before the new music the clip's own chroma stands."""
    clip = noise(1.28, batch.codec.channels)  # ten columns of chroma
    request = dataclasses.replace(CHORDS, melody=SCALE, audio_prompt=clip, include_prompt=False)
    job, codes, finished = run_job(batch, request)
    melody = torch.nn.functional.one_hot(ChromaExtractor()(SCALE).repeat(9)[:225], 12)
    both = torch.maximum(melody.float(), multi_hot(225))
    lead = torch.nn.functional.one_hot(ChromaExtractor()(clip)[-10:], 12).float()
    window = job.window
    context = delay_pattern.undelayed(window.columns, 0, window.context_frames, 1)
    expected = generated(
        reference, tiny_melody, CHORDS.words(), torch.cat([lead, both]), 3.0, 30, context
    )
    assert torch.equal(codes, expected)
    assert finished.melody.chords and len(finished.melody.classes) == 5


def test_window_of_chords_moves_with_the_music():
    encoder = MelodyEncoder(None, WINDOW, ChromaExtractor())
    request = dataclasses.replace(CHORDS, duration_s=60)
    later = encoder.window(request, 18 + 0.128 / 3)
    assert torch.equal(later, multi_hot(500)[round(18 / 0.128) :][:WINDOW])
    assert torch.equal(encoder.window(dataclasses.replace(request, chords=""), 0), encoder.silence)


def test_strength_weighs_the_chords(batch):
    takes = [
        run_job(batch, dataclasses.replace(CHORDS, chord_strength=strength))[1]
        for strength in (0.5, 2.5)
    ]
    assert not torch.equal(*takes)


def test_chords_are_refused_by_other_checkpoints(tiny_mono):
    events: list[object] = []
    batch = make_batch(tiny_mono)
    submit(batch, CHORDS, events.append)
    while batch.step():
        pass
    assert "cannot follow chords: choose one that can" in str(events[-1])


def test_chords_need_twelve_pitch_classes():
    encoder = MelodyEncoder(None, WINDOW, ChromaExtractor(num_chroma=24))
    with pytest.raises(ValueError, match="24 pitch classes instead of 12"):
        encoder.window(CHORDS, 0)


def test_placed_chords_are_those_of_the_whole_piece():
    encoder = MelodyEncoder(None, WINDOW, ChromaExtractor())
    found = encoder.chroma(dataclasses.replace(CHORDS, duration_s=2.5))
    names = [each.chord.name for each in found.chords]
    assert names == ["C", "F:min", "G:7", "C"] and found.chords[-1].end_s == 2.5
    assert np.array_equal(
        chords.Progression(chords.parse(CHORDS.chords), 1.0).chroma(0, 3, 1.0)[1],
        np.eye(12)[[5, 8, 0]].sum(0),
    )
