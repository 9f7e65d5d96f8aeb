"""What the decoder trains on: codes, what to say of them, and which windows may be cut.

A composed piece ends in a loop of a whole number of frames, so its codes can be continued for
free by `codes[t] = codes[t - loop]`: 30 s windows come from 12 s clips.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.captions import TYPOS, caption
from training.encode import load_codes
from training.render import load_metas

CUT_FRAMES = 8  # the last frames of a clip see the cut at its end


@dataclass(frozen=True)
class Dataset:
    codes: list[np.ndarray]  # int16 [rows, frames] a clip
    caption: Callable[[int, random.Random], str]  # of a clip, in a fresh wording
    loops: list[int]  # frames, 0 where the clip cannot be continued
    changes: list[int]  # frame of the second section, 0 for none
    held_out: int  # the first so many clips are for validation

    def fits(self, clip: int, frames: int) -> bool:
        return self.codes[clip].shape[1] - CUT_FRAMES >= frames or self.loops[clip] > 0

    def window(self, clip: int, frames: int, start: int) -> np.ndarray:
        """int64 [rows, frames] from `start`, continued by its last loop if need be."""
        end, loop = self.codes[clip].shape[1] - CUT_FRAMES, self.loops[clip]
        index = np.arange(start, start + frames)
        if loop:
            over = index >= end
            index[over] = end - loop + (index[over] - end) % loop
        return self.codes[clip][:, index].astype(np.int64)

    def start(self, clip: int, frames: int, rng: random.Random) -> int:
        """Most windows start with the piece; some later, and some so that they see its change."""
        spare = self.codes[clip].shape[1] - CUT_FRAMES - frames
        if not self.loops[clip]:
            return rng.randint(0, max(0, spare))
        if self.changes[clip] and spare > 0 and rng.random() < 0.4:
            return rng.randint(0, spare)
        return rng.randrange(self.loops[clip]) if rng.random() < 0.2 else 0


def composed(data: Path, *, stereo: bool = False, held_out: int = 60) -> Dataset:
    """The rendered and encoded set; held out are, by default, a song a style at its five tempi."""
    codes, metas = load_codes(data, stereo=stereo), load_metas(data)
    metas = metas[: len(codes)]
    end = codes.shape[2] - CUT_FRAMES
    steady = [meta.change + 2 * meta.loop <= end for meta in metas]
    loops = [meta.loop if ok else 0 for meta, ok in zip(metas, steady, strict=True)]
    return Dataset(
        list(codes),
        lambda clip, rng: caption(metas[clip], rng, TYPOS),
        loops,
        [meta.change for meta in metas],
        min(held_out, len(codes) // 4),
    )
