"""Songs for fine-tuning: tones in files, with captions beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Clip

RATE_HZ = 16_000


def tone(duration_s: float, pitch_hz: float = 220.0, bpm: float = 120.0) -> Clip:
    """A decaying note on every beat."""
    time_s = np.arange(round(duration_s * RATE_HZ)) / RATE_HZ
    since_s = time_s % (60 / bpm)
    samples = 0.4 * np.sin(2 * np.pi * pitch_hz * time_s) * np.exp(-6 * since_s)
    return Clip(samples[None].astype(np.float32), RATE_HZ)


def write(folder: Path, count: int = 3, duration_s: float = 2.5, captions: bool = True) -> Path:
    """A folder of songs of rising pitch."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        audio.write(tone(duration_s, 220.0 * (i + 1)), folder / f"0{i + 1}_song.wav")
        if captions:
            (folder / f"0{i + 1}_song.txt").write_text("slow piano\n")
    return folder
