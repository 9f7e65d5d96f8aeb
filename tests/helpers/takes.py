"""Finished takes without an engine."""

from __future__ import annotations

from dataclasses import replace

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


HOP = 320  # samples a frame


def with_codes(take, context_frames=0, codec="bundled/codec"):
    """A finished take with codes, as the engine gives them."""
    new = take.clip.samples.shape[1] - round(take.prompt_s * RATE)
    draw = np.random.default_rng(take.request.seed)
    codes = draw.integers(0, 2048, (4, context_frames + new // HOP), dtype=np.int16)
    clip = replace(take.clip, codes=codes, codec=codec)
    return replace(take, clip=clip, codes=codes, context_frames=context_frames)
