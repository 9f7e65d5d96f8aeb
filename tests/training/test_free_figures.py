"""What is measured of takes on free wordings, and of an asked tempo and key."""

from __future__ import annotations

import numpy as np
import pytest

from musicgen_ui.finetune import pieces
from training.free_figures import fault, frechet, has_key, has_tempo, steady_lines
from training.prompts import FREE_WORDINGS
from training.style_classifier import RATE_HZ
from training.styles import STYLES

SECONDS = np.arange(8 * RATE_HZ) / RATE_HZ
NOISE = np.random.default_rng(0).standard_normal(len(SECONDS)).astype(np.float32)


def tone(hz: float) -> np.ndarray:
    return np.sin(2 * np.pi * hz * SECONDS).astype(np.float32)


def beats(bpm: float) -> np.ndarray:
    """Short bursts of noise, one a beat."""
    return NOISE * np.exp(-12 * (SECONDS % (60 / bpm))).astype(np.float32)


def melody(steps: tuple[int, ...]) -> np.ndarray:
    """Notes of half a second, in semitones above middle C."""
    notes = [steps[i % len(steps)] for i in range(16)]
    return np.concatenate([tone(261.63 * 2 ** (n / 12))[: RATE_HZ // 2] for n in notes])


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (0.005 * melody((0, 4, 7)), "silent"),
        (0.1 * tone(220), "stuck"),
        (0.1 * NOISE, "noisy"),
        (0.5 * tone(70) * np.exp(-12 * (SECONDS % 0.5)), ""),
        (0.1 * melody((0, 4, 7, 5)), ""),
    ],
)
def test_fault_tells_music_from_what_is_none(samples: np.ndarray, says: str) -> None:
    assert fault(samples) == says


@pytest.mark.parametrize(("bpm", "right"), [(100, True), (103, True), (50, True), (130, False)])
def test_a_beat_has_its_tempo_its_half_and_double(
    monkeypatch: pytest.MonkeyPatch, bpm: float, right: bool
) -> None:
    monkeypatch.setattr(pieces, "measure", lambda clip: pieces.Measures(100))
    assert has_tempo(beats(100), bpm) == right


@pytest.mark.parametrize(
    ("key", "mode", "fifths", "right"),
    [
        (0, "major", 0, True),
        (9, "minor", 0, True),  # the same notes
        (7, "major", 0, False),
        (7, "major", 1, True),
        (5, "major", 1, True),
        (2, "major", 1, False),
    ],
)
def test_a_melody_has_its_key(key: int, mode: str, fifths: int, right: bool) -> None:
    assert has_key(melody((0, 4, 7, 5, 9, 11, 2, 0)), key, mode, fifths) == right


def test_distance_grows_with_the_difference() -> None:
    real = [beats(bpm) for bpm in (80, 100, 120)]
    near, far = [0.8 * clip for clip in real], [tone(hz) for hz in (200, 300, 400)]
    assert abs(frechet(real, real)) < 0.1
    assert frechet(real, near) < frechet(real, far) / 3


def test_a_line_between_the_hits_is_hum() -> None:
    assert steady_lines(beats(100) + 0.05 * tone(440)) > 5 * steady_lines(beats(100))


def test_free_wordings_are_five_a_style() -> None:
    assert len({words for words, _ in FREE_WORDINGS}) == len(FREE_WORDINGS) == 60
    allowed = [style for _, styles in FREE_WORDINGS for style in styles]
    assert {style: allowed.count(style) for style in STYLES} == dict.fromkeys(STYLES, 5)
