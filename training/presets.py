"""Sizes: `tiny` for the smoke test, `cpu` for two cores and a night, `card` for a GPU's minutes,
`move` for the card's decoder on the codes of the `cpu` preset's codec."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True)
class CodecSize:
    sampling_rate: int
    ratios: tuple[int, ...]
    filters: int
    hidden: int
    lstm_layers: int
    codebook_size: int
    codebooks: int
    discriminator: bool
    batch: int
    frames: int  # of a training window
    learning_rate: float
    steps: int

    @property
    def hop(self) -> int:
        return prod(self.ratios)


@dataclass(frozen=True)
class DecoderSize:
    hidden: int
    layers: int
    heads: int
    feed_forward: int
    text_hidden: int
    text_layers: int
    batch: int  # rows of `window` frames; longer windows take fewer rows
    window: int
    long_windows: tuple[int, ...]
    learning_rate: float
    steps: int


@dataclass(frozen=True)
class Preset:
    clips: int
    seconds: float
    keys: int  # a mode
    codec: CodecSize
    decoder: DecoderSize


PRESETS = {
    "tiny": Preset(
        24,
        4.0,
        4,
        CodecSize(16_000, (4, 4, 5, 4), 4, 16, 1, 64, 4, True, 2, 24, 1e-3, 6),
        DecoderSize(64, 2, 4, 128, 32, 1, 2, 100, (160,), 1e-3, 4),
    ),
    "cpu": Preset(
        3600,
        12.0,
        2,
        CodecSize(16_000, (4, 4, 5, 4), 16, 64, 1, 512, 4, False, 8, 48, 6e-4, 30_000),
        DecoderSize(256, 6, 8, 768, 128, 2, 5, 480, (800, 1200, 1496), 1.2e-3, 40_000),
    ),
    # Minutes of one GPU: by the clock, with songs at any tempo. The codec decodes on two cores.
    "card": Preset(
        12_000,
        12.0,
        12,
        CodecSize(32_000, (8, 5, 4, 4), 24, 128, 1, 1024, 4, True, 64, 50, 6e-4, 0),
        DecoderSize(448, 6, 7, 1792, 256, 3, 96, 500, (1000, 1496), 1e-3, 0),
    ),
}
PRESETS["move"] = replace(
    PRESETS["card"],
    codec=PRESETS["cpu"].codec,
    decoder=replace(PRESETS["card"].decoder, batch=5, window=480, learning_rate=6e-4),
)
