"""A clip as a picture: its mel spectrogram, as musicians read it, and a sentence for those who
cannot see it.

The picture has a dark ground of its own, like an instrument's display, so that it reads the same
on a light and on a dark page. It is drawn on a Figure of its own (no pyplot), so that any thread
may draw. librosa gives the mel filters; its own STFT would compile code with numba for half a
minute at the first use, so the transform is numpy's.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from musicgen_ui import audio
from musicgen_ui.request import Clip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_PX, MONO_HEIGHT_PX, STEREO_HEIGHT_PX = 1100, 360, 560
PIXEL_DENSITY = 2  # drawn at twice that size: crisp on phones
BANDS = 160
WINDOW_S = 0.064
RANGE_DB = 80.0
LOWEST_HZ = 30.0
TICKS_HZ = (50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000)
GROUND, INK, FAINT = "#12141c", "#e6e8ef", "#8a90a2"


def draw(clip: Clip, path: Path, prompt_s: float = 0.0) -> Path:
    """Writes the mel spectrogram as a PNG and returns its path.

    Both channels are shown when the clip is stereo; the first `prompt_s` seconds are marked as
    the audio prompt.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = MONO_HEIGHT_PX if clip.channels == 1 else STEREO_HEIGHT_PX
    figure = Figure(
        figsize=(WIDTH_PX / 100, height / 100),
        dpi=100 * PIXEL_DENSITY,
        facecolor=GROUND,
        layout="constrained",
    )
    canvas = FigureCanvasAgg(figure)
    rows = figure.subplots(clip.channels, 1, sharex=True, squeeze=False)[:, 0]
    levels = mel_db(clip)
    for row, level, name in zip(rows, levels, ("left", "right"), strict=False):
        image = _draw_channel(row, level, clip, prompt_s)
        if clip.channels == 2:
            row.set_title(name, color=FAINT, loc="left", fontsize=9, pad=4)
    rows[-1].set_xlabel("seconds", color=INK, fontsize=9)
    bar = figure.colorbar(image, ax=list(rows), pad=0.01, aspect=30)
    bar.set_label("dB", color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=9)
    bar.outline.set_visible(False)
    if prompt_s:
        _mark_prompt(rows, clip, prompt_s)
    canvas.print_png(path)
    return path


def mel_db(clip: Clip) -> np.ndarray:
    """Power in mel bands in dB below full scale: float32 [channels, bands, frames]."""
    rate = clip.sampling_rate
    window = 2 ** round(np.log2(WINDOW_S * rate))  # samples
    hop = max(window // 4, clip.samples.shape[1] // (WIDTH_PX * PIXEL_DENSITY))
    padded = np.pad(clip.samples, ((0, 0), (window // 2, window)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window, axis=1)[:, ::hop]
    frames = frames[:, : clip.samples.shape[1] // hop + 1]
    shape = np.hanning(window + 1)[:-1].astype(np.float32)
    spectrum = np.fft.rfft(frames * (shape * (2 / shape.sum())), axis=2)
    power = (np.abs(spectrum) ** 2).astype(np.float32)
    bands = np.einsum("bf,ctf->cbt", _filters(rate, window), power, optimize=True)
    return 10 * np.log10(np.maximum(bands, 1e-12))


@lru_cache(maxsize=8)
def _filters(rate: int, window: int) -> np.ndarray:
    from librosa.filters import mel

    return mel(sr=rate, n_fft=window, n_mels=BANDS, fmin=LOWEST_HZ, norm=None)


def _draw_channel(axes: Axes, level: np.ndarray, clip: Clip, prompt_s: float) -> Any:
    from librosa.core.convert import hz_to_mel

    low, high = hz_to_mel([LOWEST_HZ, clip.sampling_rate / 2])
    image = axes.imshow(
        level,
        origin="lower",
        aspect="auto",
        extent=(0, max(clip.duration_s, 1e-3), low, high),
        cmap="magma",
        vmin=-RANGE_DB,
        vmax=0,
        interpolation="nearest",
    )
    ticks = [hz for hz in TICKS_HZ if hz <= clip.sampling_rate / 2]
    axes.set_yticks(hz_to_mel(ticks), [f"{hz // 1000}k" if hz >= 1000 else f"{hz}" for hz in ticks])
    axes.set_ylabel("Hz", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _mark_prompt(rows: Any, clip: Clip, prompt_s: float) -> None:
    for row in rows:
        row.axvline(prompt_s, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    for x, text, side in ((-6, "your clip", "right"), (6, "new", "left")):
        rows[0].annotate(
            text,
            (prompt_s, 1),
            xycoords=("data", "axes fraction"),
            xytext=(x, 4),
            textcoords="offset points",
            ha=side,
            color=INK,
            fontsize=9,
        )


def alt_text(clip: Clip, prompt_s: float = 0.0) -> str:
    """The picture in one sentence: length, channels, loudness, where most of the energy lies."""
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
    hz = mel_frequencies(BANDS + 2, fmin=LOWEST_HZ, fmax=clip.sampling_rate / 2)
    low, high = (hz[int(np.searchsorted(share, part)) + 1] for part in (0.1, 0.9))
    return _hertz(low), _hertz(high)


def _hertz(hz: float) -> str:
    return f"{hz / 1000:.1f} kHz" if hz >= 1000 else f"{round(hz, -1):.0f} Hz"
