"""A clip's mel spectrogram: a picture without axes, and a sentence for those who cannot see it.

The player draws the axes, so it is told to the pixel which time and which frequency lie where.
librosa gives the mel filters; its own STFT would compile code with numba for half a minute at the
first use, so the transform is numpy's.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Chroma, Clip

BANDS = 160
MOST_COLUMNS = 2200  # of a picture, about: the width of the place where it is shown, twice
WINDOW_S = 0.064
PADDING = 2  # with zeros, so that the lowest bands, narrower than a bin, are not empty
BLOCK = 256  # windows transformed together: memory does not grow with the length
RANGE_DB = 80.0
LOWEST_HZ = 30.0
CHORDS_SAID = 8  # in words
NOTES = ("C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B")  # of the chroma


@dataclass(frozen=True)
class Edges:
    """What lies at the outer edges of a spectrogram's pixels."""

    start_s: float  # left edge of the first column
    end_s: float  # right edge of the last one
    low_hz: float  # bottom edge of a channel; pixels are evenly spaced in mel (HTK's) ...
    high_hz: float  # ... up to its top edge
    channels: int  # left above right, each as high as the other


def png(clip: Clip) -> tuple[bytes, Edges]:
    """The mel spectrogram as a PNG, a pixel for each band and column of `mel_db`."""
    from matplotlib.image import imsave

    level_db = mel_db(clip)  # [channels, bands, columns], the lowest band first
    picture = io.BytesIO()
    imsave(
        picture,
        np.concatenate(level_db[:, ::-1]),  # [channels x bands, columns], the highest band first
        vmin=-RANGE_DB,
        vmax=0,
        cmap="magma",
        format="png",
        pil_kwargs={"compress_level": 1},
    )
    return picture.getvalue(), _edges(clip, *level_db.shape)


def _edges(clip: Clip, channels: int, bands: int, columns: int) -> Edges:
    from librosa.core.convert import hz_to_mel, mel_to_hz

    hop_s = window_and_hop(clip)[1] / clip.sampling_rate
    low, high = hz_to_mel([LOWEST_HZ, clip.sampling_rate / 2], htk=True)
    half = (high - low) / (bands + 1) / 2  # between the middle of a band and its pixel's edge
    low_hz, high_hz = mel_to_hz([low + half, high - half], htk=True)
    middle = hop_s / 2
    return Edges(-middle, columns * hop_s - middle, float(low_hz), float(high_hz), channels)


def mel_db(clip: Clip) -> np.ndarray:
    """Power in mel bands in dB below full scale: float32 [channels, bands, frames]."""
    rate, samples = clip.sampling_rate, clip.samples.shape[1]
    window, hop = window_and_hop(clip)
    padded = np.pad(clip.samples, ((0, 0), (window // 2, window)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window, axis=1)[:, ::hop]
    frames = frames[:, : samples // hop + 1]
    blocks = np.array_split(frames, -(-frames.shape[1] // BLOCK), axis=1)
    bands = np.concatenate([_bands(block, rate) for block in blocks], axis=2)
    decibels: np.ndarray = 10 * np.log10(np.maximum(bands, 1e-12))
    return decibels


def window_and_hop(clip: Clip) -> tuple[int, int]:
    """Samples of a transform, and from the middle of one column of `mel_db` to the next."""
    column = clip.samples.shape[1] // MOST_COLUMNS
    window = 2 ** round(np.log2(max(WINDOW_S * clip.sampling_rate, column)))
    return window, max(window // 4, column)  # nothing falls between columns


def _bands(frames: np.ndarray, rate: int) -> np.ndarray:
    """[channels, frames, window] of samples to power, float32 [channels, bands, frames]."""
    window = frames.shape[2]
    shape = np.hanning(window + 1)[:-1].astype(np.float32)
    spectrum = np.fft.rfft(frames * (shape * (2 / shape.sum())), n=PADDING * window, axis=2)
    power = (np.abs(spectrum) ** 2 / PADDING).astype(np.float32)  # [channels, frames, bins]
    filters = _filters(rate, PADDING * window)
    bands: np.ndarray = np.einsum("bf,ctf->cbt", filters, power, optimize=True)
    return bands


@lru_cache(maxsize=8)
def _filters(rate: int, fft: int) -> np.ndarray:
    from librosa.filters import mel

    return mel(sr=rate, n_fft=fft, n_mels=BANDS, fmin=LOWEST_HZ, htk=True, norm=None)


def alt_text(clip: Clip, prompt_s: float = 0.0, melody: Chroma | None = None) -> str:
    """The picture in words: length, channels, loudness, where most of the energy lies; the notes of
    the melody, most of the time first; the first chords.
    """
    text = _sound(clip, prompt_s)
    if melody is None:
        return text
    if len(melody.classes):
        counts = np.bincount(melody.classes, minlength=len(NOTES))
        notes = [NOTES[place] for place in np.argsort(-counts, kind="stable")[: np.sum(counts > 0)]]
        text += f" Below it the melody that it follows: {', '.join(notes)}."
    if melody.chords:
        names = [placed.chord.name for placed in melody.chords[:CHORDS_SAID]]
        more = ", …" if len(melody.chords) > CHORDS_SAID else ""
        text += f" Below it the chords that it follows: {', '.join(names)}{more}."
    return text


def _sound(clip: Clip, prompt_s: float) -> str:
    loudness = audio.loudness_lufs(clip)
    channels = "stereo" if clip.channels == 2 else "mono"
    start = f"Mel spectrogram of {clip.duration_s:.1f} s of {channels} audio"
    if prompt_s:
        start += f", the first {prompt_s:.1f} s your clip"
    if not np.isfinite(loudness):
        return f"{start}: silent."
    low, high = _energy_hz(clip)
    return f"{start}: {loudness:.0f} LUFS, most of its energy between {low} and {high}."


def _energy_hz(clip: Clip) -> tuple[str, str]:
    from librosa.core.convert import mel_frequencies

    energy = (10 ** (mel_db(clip) / 10)).sum(axis=(0, 2))
    share = np.cumsum(energy) / energy.sum()
    hz = mel_frequencies(BANDS + 2, fmin=LOWEST_HZ, fmax=clip.sampling_rate / 2, htk=True)
    low, high = (hz[int(np.searchsorted(share, part)) + 1] for part in (0.1, 0.9))
    return _hertz(low), _hertz(high)


def _hertz(hz: float) -> str:
    return f"{hz / 1000:.1f} kHz" if hz >= 1000 else f"{round(hz, -1):.0f} Hz"
