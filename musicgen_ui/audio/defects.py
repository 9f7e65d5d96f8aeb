"""Simple faults of a take, measured: silence, one sound that does not move, clipping.

The limits were set by takes of the bundled checkpoint and by 160 rendered songs of 19 styles that
its codec had coloured. A take that held one sound for 6 s changed by at most 0.8 dB from one 0.3 s
to the next while it did; of the songs, ambient pads and organ chords among them, none stayed below
1.6 dB for more than 1.1 s. (From one 0.05 s to the next the same held sound changes by 1.9 to 2.7
dB: the codec makes it tremble.) Of lively rhythms up to 13 % were silent; peaks beyond full scale
lasted for a few samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from musicgen_ui.audio.clip import Clip

BLOCK_S = 0.05
SILENT_DBFS = -60.0
SPAN = 6  # blocks whose mean power is compared with that of the next ones
STUCK_DB = 1.5  # mean change of a band from span to span in what does not move
STUCK_S = 1.5  # a note may be held that long
BANDS = 24
CLIPPED = 0.999  # of full scale
CLIPPED_RUN = 3  # samples in a row: a single peak is no fault


@dataclass(frozen=True)
class Defects:
    """Shares of a take, each from 0 to 1."""

    silent: float  # of its time
    stuck: float  # of its time
    clipped: float  # of its samples

    @property
    def penalty(self) -> float:
        """What they take from a score: 1 for a take that is wholly silent or stuck."""
        return min(1.0, self.silent + self.stuck + 10 * self.clipped)

    @property
    def unusable(self) -> bool:
        """Half of the take or more is silent or stuck."""
        return self.silent + self.stuck >= 0.5

    @property
    def words(self) -> str:
        """Those above a percent, as "12 % silent, 3 % stuck"; empty without any."""
        shares = {"silent": self.silent, "stuck": self.stuck, "clipped": self.clipped}
        return ", ".join(f"{100 * s:.0f} % {name}" for name, s in shares.items() if s >= 0.01)


def measure(clip: Clip) -> Defects:
    """The faults of a clip; one without samples is silent."""
    samples, rate = clip.samples, clip.sampling_rate
    size = round(BLOCK_S * rate)
    count = samples.shape[1] // size
    if not count:
        return Defects(1.0, 0.0, 0.0)
    mono = samples[:, : count * size].mean(axis=0).reshape(count, size)
    loudest = np.sqrt(np.square(samples[:, : count * size]).reshape(-1, count, size).mean(2)).max(0)
    silent = loudest < 10 ** (SILENT_DBFS / 20)
    return Defects(
        float(silent.mean()), float((_stuck(mono, rate) & ~silent).mean()), _clipped(samples)
    )


def _stuck(blocks: np.ndarray, rate: int) -> np.ndarray:
    """Which blocks belong to a stretch in which no band changes, bool [blocks]."""
    found = np.zeros(len(blocks), bool)
    if len(blocks) < 2 * SPAN:
        return found
    window = np.hanning(blocks.shape[1]).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft(blocks * window)))
    edges_hz = np.geomspace(60, rate / 2, BANDS + 1)
    edges = np.unique(np.round(edges_hz * blocks.shape[1] / rate).astype(int))
    bands = np.add.reduceat(power, edges[:-1], axis=1)  # [blocks, bands]
    spans = np.lib.stride_tricks.sliding_window_view(bands, SPAN, axis=0).mean(axis=-1)
    level = 10 * np.log10(spans + spans.max(axis=1, keepdims=True) * 1e-4 + 1e-12)
    still = np.abs(level[SPAN:] - level[:-SPAN]).mean(axis=1) < STUCK_DB
    needed, start = round(STUCK_S / BLOCK_S), 0
    for end in range(len(still) + 1):
        if end == len(still) or not still[end]:
            last = end + 2 * SPAN - 1  # of the blocks that were compared; `end` itself moved
            if end > start and last - start >= needed:
                found[start:last] = True
            start = end + 1
    return found


def _clipped(samples: np.ndarray) -> float:
    """The share of samples in runs at full scale."""
    beyond = np.abs(samples) >= CLIPPED
    length = samples.shape[1] - CLIPPED_RUN + 1
    if length < 1:
        return 0.0
    runs = np.logical_and.reduce([beyond[:, i : i + length] for i in range(CLIPPED_RUN)])
    covered = np.zeros_like(beyond)
    for i in range(CLIPPED_RUN):
        covered[:, i : i + length] |= runs
    return float(covered.mean())
