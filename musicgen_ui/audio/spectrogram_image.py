"""A clip as the player shows it: its spectrogram without axes, and its waveform.

The player draws the axes, so it knows to the pixel which time and which frequency lie where.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from musicgen_ui.audio import spectrogram
from musicgen_ui.audio.clip import Clip

PEAKS, PEAK_S = 4000, 0.01  # columns of a waveform at most, and the shortest of them


@dataclass(frozen=True)
class Edges:
    """What lies at the outer edges of a spectrogram's pixels."""

    start_s: float  # left edge of the first column
    end_s: float  # right edge of the last one
    low_hz: float  # bottom edge of a channel; pixels are evenly spaced in mel (HTK's) ...
    high_hz: float  # ... up to its top edge
    channels: int  # left above right, each as high as the other


def png(clip: Clip) -> tuple[bytes, Edges]:
    """The mel spectrogram as a PNG, a pixel for each band and column of `spectrogram.mel_db`."""
    from matplotlib.image import imsave

    level_db = spectrogram.mel_db(clip)  # [channels, bands, columns], the lowest band first
    picture = io.BytesIO()
    imsave(
        picture,
        np.concatenate(level_db[:, ::-1]),  # [channels x bands, columns], the highest band first
        vmin=-spectrogram.RANGE_DB,
        vmax=0,
        cmap="magma",
        format="png",
        pil_kwargs={"compress_level": 1},
    )
    return picture.getvalue(), _edges(clip, *level_db.shape)


def _edges(clip: Clip, channels: int, bands: int, columns: int) -> Edges:
    from librosa.core.convert import hz_to_mel, mel_to_hz

    hop_s = spectrogram.window_and_hop(clip)[1] / clip.sampling_rate
    low, high = hz_to_mel([spectrogram.LOWEST_HZ, clip.sampling_rate / 2], htk=True)
    half = (high - low) / (bands + 1) / 2  # between the middle of a band and its pixel's edge
    low_hz, high_hz = mel_to_hz([low + half, high - half], htk=True)
    middle = hop_s / 2
    return Edges(-middle, columns * hop_s - middle, float(low_hz), float(high_hz), channels)


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
