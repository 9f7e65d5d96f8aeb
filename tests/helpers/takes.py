"""Finished takes without an engine."""

from __future__ import annotations

import numpy as np

from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.request import GenerationRequest

RATE = 16_000


def finished(level=0.1, seconds=1.0, channels=1, prompt_s=0.0, **settings):
    draw = np.random.default_rng(0)
    samples = draw.uniform(-level, level, (channels, round(seconds * RATE))).astype(np.float32)
    request = GenerationRequest.parse({"seed": 7, "checkpoint": "bundled", **settings})
    return Finished(0, Clip(samples, RATE), request, prompt_s, 1.2345, notes=("A note.",))
