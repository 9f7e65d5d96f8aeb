"""The waveform of a clip as a player draws it: extremes by zoom level, computed once."""

from __future__ import annotations

import numpy as np

from musicgen_ui.audio.clip import Clip

FINEST = 256  # samples a point; each further level has a fourth of the points
ZOOM = 4
FEWEST_POINTS = 128


def levels(clip: Clip) -> dict[int, np.ndarray]:
    """Lowest and highest samples of any channel: int8 [points, 2] by samples a point.

    The finest level comes first. The last point of a level may stand for fewer samples.
    """
    scaled = np.clip(np.rint(clip.samples * 127.0), -127, 127).astype(np.int8)
    low, high = scaled.min(axis=0), scaled.max(axis=0)
    found: dict[int, np.ndarray] = {}
    samples_a_point, factor = FINEST, FINEST
    while len(low):
        starts = np.arange(0, len(low), factor)
        low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
        found[samples_a_point] = np.stack([low, high], axis=1)
        if len(low) <= FEWEST_POINTS:
            break
        samples_a_point, factor = samples_a_point * ZOOM, ZOOM
    return found
