"""The bundled checkpoints: what they weigh, and that the loop still makes the music it made.

The golden takes are greedy, so they hold on any machine whose rounding does not turn a choice
around. After new weights or a wanted change, `python -m tests.test_bundled` writes them again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile

from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import stream

ROOT = Path(__file__).parents[2]
FOLDERS = {name: ROOT / "assets" / name for name in ("bundled", "bundled-stereo")}
GREEDY = GenerationRequest(prompt="techno with a hard kick", duration_s=1.5, do_sample=False)


def take(name: str, request: GenerationRequest) -> Clip:
    manager = LocalBackend(device="cpu", precision="float32")
    with manager.use(str(FOLDERS[name])) as batch:
        *_, finished = stream(batch, request)
    assert isinstance(finished, Finished)
    return finished.clip


def golden(name: str) -> Path:
    return ROOT / f"tests/golden/{name}.flac"


@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_take_is_the_golden_one(name):
    found = take(name, GREEDY)
    expected, rate = soundfile.read(golden(name), dtype="float32", always_2d=True)
    assert rate == found.sampling_rate
    assert np.abs(np.clip(found.samples, -1, 1) - expected.T).max() < 2e-3


def test_drums_are_more_percussive_than_a_flute():
    asked = GenerationRequest(duration_s=3, variations=2, seed=1, temperature=0.7, top_k=50)
    shares = {}
    for prompt in ("drums only", "flute melody with harp"):
        clip = take("bundled", dataclasses.replace(asked, prompt=prompt))
        harmonic, percussive = librosa.effects.hpss(clip.samples.mean(0))
        shares[prompt] = (percussive**2).sum() / ((harmonic**2).sum() + (percussive**2).sum())
    assert shares["drums only"] > 2 * shares["flute melody with harp"]


def test_both_weigh_at_most_40_mb():
    files = [file for folder in FOLDERS.values() for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40e6


if __name__ == "__main__":
    for each in FOLDERS:
        made = take(each, GREEDY)
        soundfile.write(golden(each), made.samples.T, made.sampling_rate, subtype="PCM_16")
