"""Faults of takes: those of the bundled checkpoint, and made ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from musicgen_ui.audio import load
from musicgen_ui.audio.clip import Clip
from musicgen_ui.audio.defects import Defects, measure

RATE = 16_000
GOLDEN = Path(__file__).parents[1] / "golden"


def melody(seconds: float) -> np.ndarray:
    """A note that decays twice a second, float32 [samples]."""
    t = np.arange(round(seconds * RATE)) / RATE
    hz = 220 * 2 ** (np.floor(2 * t) % 7 / 12)
    return (0.3 * np.sin(2 * np.pi * hz * t) * np.exp(-4 * (t % 0.5))).astype(np.float32)


def hum(seconds: float) -> np.ndarray:
    """A chord that never changes, with a little noise: what a stuck model makes."""
    t = np.arange(round(seconds * RATE)) / RATE
    chord = sum(0.1 * np.sin(2 * np.pi * hz * t) for hz in (100, 200, 240, 1_000))
    return (chord + np.random.default_rng(0).normal(0, 1e-5, t.shape)).astype(np.float32)


def held_chord(seconds: float) -> np.ndarray:
    """A chord that goes on and on, as the bundled model plays it: it trembles a little."""
    t = np.arange(round(seconds * RATE)) / RATE
    chord = sum(0.1 * np.sin(2 * np.pi * hz * t) for hz in (110, 220, 277, 330, 660, 1_320))
    tremolo = 1 + 0.12 * np.sin(2 * np.pi * 5 * t)
    noise = np.random.default_rng(0).normal(0, 1.5e-3, t.shape)
    return (chord * tremolo + noise).astype(np.float32)


def trembling_chord(seconds: float) -> np.ndarray:
    """The same, coarsely coded: every partial trembles at a rate of its own."""
    t = np.arange(round(seconds * RATE)) / RATE
    partials = (110, 220, 277, 330, 440, 660, 1_320, 1_760, 2_640, 3_520, 5_000)
    chord = sum(
        0.05 * (1 + 0.5 * np.sin(2 * np.pi * (6 + 0.7 * i) * t)) * np.sin(2 * np.pi * hz * t)
        for i, hz in enumerate(partials)
    )
    return (chord + np.random.default_rng(0).normal(0, 4e-3, t.shape)).astype(np.float32)


def pad(seconds: float) -> np.ndarray:
    """A pad that was asked for: detuned voices that beat, and breath."""
    t = np.arange(round(seconds * RATE)) / RATE
    draw = np.random.default_rng(0)
    voices = np.zeros_like(t)
    for hz in (110, 138.6, 165, 220):
        for detune in (-0.006, 0, 0.007):
            for partial in range(1, 9):
                phase = draw.uniform(0, 2 * np.pi)
                turns = 2 * np.pi * hz * (1 + detune) * partial * t
                voices += np.sin(turns + phase) / partial
    noise = draw.normal(0, 0.02, t.shape)
    return (0.03 * voices + noise).astype(np.float32)


def found(*parts: np.ndarray) -> Defects:
    return measure(Clip(np.concatenate(parts)[None], RATE))


@pytest.mark.parametrize("name", ["bundled.flac", "bundled-stereo.flac"])
def test_takes_of_the_bundled_checkpoint_have_no_fault(name):
    defects = measure(load.read(GOLDEN / name).clip)
    assert defects.penalty < 0.15 and not defects.unusable and defects.stuck == 0


def test_silence_is_measured_by_its_time():
    quiet = np.zeros(3 * RATE, np.float32)
    assert found(melody(1), quiet).silent == pytest.approx(0.75, abs=0.05)
    assert found(melody(1), quiet).unusable and found(quiet).penalty == 1
    assert found(melody(4)).silent == 0 and not found(melody(6), quiet).unusable
    assert measure(Clip(np.zeros((1, 0), np.float32), RATE)).unusable


def test_stuck_is_a_sound_that_does_not_move():
    assert found(melody(4)).stuck == 0
    assert found(melody(2), hum(2)).stuck == pytest.approx(0.5, abs=0.05)
    assert found(hum(4)).stuck > 0.9 and found(hum(4)).unusable
    held = [part for _ in range(4) for part in (melody(0.5), hum(1.0))]
    assert found(*held).stuck == 0  # a note may be held for a second


def test_held_chord_is_stuck_and_a_pad_that_moves_is_not():
    assert found(melody(3), held_chord(7)).stuck == pytest.approx(0.7, abs=0.05)
    assert found(melody(3), held_chord(7)).unusable
    assert found(pad(8)).stuck == 0


def test_chord_that_only_trembles_is_stuck():
    assert found(melody(3), trembling_chord(6)).stuck == pytest.approx(0.67, abs=0.05)


def test_clipping_is_a_run_at_full_scale():
    loud = np.clip(8 * melody(4), -1, 1)
    assert found(loud).clipped > 0.2 and "clipped" in found(loud).words
    single = melody(4)
    single[::500] = 1
    assert found(single).clipped == 0


def test_worse_takes_have_the_greater_penalty():
    fine, stuck = found(melody(4)), found(melody(2), hum(2))
    slightly = np.concatenate([melody(3.9), np.clip(8 * melody(0.1), -1, 1)])
    assert fine.penalty < found(slightly).penalty < stuck.penalty <= 1
    assert fine.words == "" and stuck.words.endswith("% stuck")
