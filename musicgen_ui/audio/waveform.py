"""The waveform of a clip as a player draws it: its extremes by zoom level, and in one row."""

from __future__ import annotations

import numpy as np

from musicgen_ui.audio.clip import Clip

FINEST = 256  # samples a point; each further level has a fourth of the points
ZOOM = 4
FEWEST_POINTS = 128
PEAKS, PEAK_S = 4000, 0.01  # columns of a row at most, and the shortest of them


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


def peaks(clip: Clip) -> tuple[np.ndarray, float]:
    """The waveform's lowest and highest sample in each column, over all channels.

    Returns:
        int8 [2, columns] from -127 to 127, lowest first; and the seconds of a column.
    """
    samples = clip.samples.shape[1]
    column = max(round(PEAK_S * clip.sampling_rate), -(-samples // PEAKS))
    starts = np.arange(0, max(samples, 1), column)
    low = np.minimum.reduceat(clip.samples.min(axis=0), starts)
    high = np.maximum.reduceat(clip.samples.max(axis=0), starts)
    scaled = np.rint(127 * np.clip(np.stack([low, high]), -1, 1))
    return scaled.astype(np.int8), column / clip.sampling_rate
