"""Chroma is what transformers' feature extractor and audiocraft make of a clip."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.melody import ChromaExtractor
from tests.helpers.melody import tune

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "melody" / "expected.npz")


class Spectrogram:
    """torchaudio's, as the feature extractor uses it: power over that of the window."""

    def __init__(self, **settings: Any) -> None:
        assert settings.pop("power") == 2 and settings.pop("normalized") is True
        assert settings.pop("pad") == 0
        self.settings = settings

    def __call__(self, wave: torch.Tensor) -> torch.Tensor:
        window = torch.hann_window(self.settings["win_length"])
        spectrum = torch.stft(
            wave, window=window, pad_mode="reflect", return_complex=True, **self.settings
        )
        return (spectrum / window.square().sum().sqrt()).abs().square()


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' own, given the one thing that it wants of torchaudio."""
    theirs = importlib.import_module(
        "transformers.models.musicgen_melody.feature_extraction_musicgen_melody"
    )
    transforms = types.SimpleNamespace(Spectrogram=Spectrogram)
    torchaudio = types.SimpleNamespace(transforms=transforms)
    monkeypatch.setattr(theirs, "torchaudio", torchaudio, raising=False)
    return theirs.MusicgenMelodyFeatureExtractor()


def noise(samples: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.2, (channels, samples)).astype(np.float32)


def test_chroma_equals_audiocrafts():
    classes = ChromaExtractor()(Clip(GOLDEN["melody"], 32_000))
    assert np.array_equal(np.eye(12, dtype=np.float32)[classes], GOLDEN["chroma"][0])
    assert set(classes.tolist()) == {0, 4, 7}  # C, E and G


@pytest.mark.parametrize("samples", [5_000, 16_384, 128_000, 32_000 * 40])
def test_chroma_equals_the_feature_extractors(extractor, samples):
    """A clip shorter than a window, of one, of some, and longer than it hears."""
    wave = noise(samples)
    expected = extractor(wave[0], sampling_rate=32_000, return_tensors="pt").input_features[0]
    classes = ChromaExtractor()(Clip(wave, 32_000))[: len(expected)]
    assert torch.equal(classes, expected.argmax(-1))
    assert len(classes.unique()) > 5 or samples < 20_000


@pytest.mark.parametrize("rate", [16_000, 32_000, 44_100])
def test_chroma_names_notes_at_any_rate_and_in_stereo(rate):
    clip = tune(0, 9, 4, note_s=1.0, rate=rate)
    classes = ChromaExtractor()(Clip(np.repeat(clip.samples, 2, axis=0), rate))
    middles = [classes[round((i + 0.5) / 0.128)].item() for i in range(3)]
    assert middles == [0, 9, 4]


def test_chroma_of_a_long_clip_does_not_depend_on_pieces(monkeypatch):
    clip = Clip(noise(32_000 * 20), 32_000)
    whole = ChromaExtractor()(clip)
    monkeypatch.setattr("musicgen_ui.engine.melody.MAX_COLUMNS", 7)
    assert torch.equal(ChromaExtractor()(clip), whole)
