"""A clip as a picture: its mel spectrogram, as musicians read it, and a sentence for those who
cannot see it.

The picture has a dark ground of its own, like an instrument's display, so that it reads the same
on a light and on a dark page. It is drawn on a Figure of its own (no pyplot), so that any thread
may draw. librosa gives the mel filters; its own STFT would compile code with numba for half a
minute at the first use, so the transform is numpy's.
"""

from __future__ import annotations

import gc
import io
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from musicgen_ui import files
from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Chroma, Clip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_PX, MONO_HEIGHT_PX, STEREO_HEIGHT_PX = 1100, 360, 560
PIXEL_DENSITY = 2  # drawn at twice that size: crisp on phones
BANDS = 160
WINDOW_S = 0.064
PADDING = 2  # with zeros, so that the lowest bands, narrower than a bin, are not empty
BLOCK = 256  # windows transformed together: memory does not grow with the length
RANGE_DB = 80.0
LOWEST_HZ = 30.0
TICKS_HZ = (100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000)
TEXT_PT = 16  # legible where the page shows the picture at 40 % of its width
GROUND, INK = "#12141c", "#e6e8ef"
TOP_PX, BOTTOM_PX = 36, 64  # around the drawings, for their words
MELODY_HEIGHT_PX = 150
MELODY_GROUND, MELODY_INK = "#1d2030", "#2dd4bf"
CHORDS_SAID = 8  # in words
NOTES = ("C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B")  # of the chroma


def draw(clip: Clip, path: Path, prompt_s: float = 0.0, melody: Chroma | None = None) -> Path:
    """Writes the mel spectrogram as a PNG, whole or not at all, and returns its path."""
    files.replace(path, png(clip, prompt_s, melody))
    return path


def png(clip: Clip, prompt_s: float = 0.0, melody: Chroma | None = None) -> bytes:
    """The mel spectrogram as a PNG.

    Both channels are shown when the clip is stereo; the first `prompt_s` seconds are marked as
    the audio prompt. The melody that the rest followed is drawn below, on the same seconds.
    """
    drawn = _drawn(clip, prompt_s, melody)
    # A figure and its parts refer to each other, and hold 4 MB that Python does not count. It looks
    # at the young objects alone where it would have to look through all libraries, too.
    gc.collect(2 if gc.get_freeze_count() else 1)
    return drawn


def _drawn(clip: Clip, prompt_s: float, melody: Chroma | None) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height_px = MONO_HEIGHT_PX if clip.channels == 1 else STEREO_HEIGHT_PX
    channel_px = (height_px - TOP_PX - BOTTOM_PX) / clip.channels
    heights = [channel_px] * clip.channels + [MELODY_HEIGHT_PX] * (melody is not None)
    height_px = round(sum(heights)) + TOP_PX + BOTTOM_PX
    figure = Figure((WIDTH_PX / 100, height_px / 100), 100 * PIXEL_DENSITY, facecolor=GROUND)
    # Places in pixels: matplotlib's own layout would draw everything twice.
    grid = figure.add_gridspec(
        len(heights),
        2,
        width_ratios=(1, 0.013),
        height_ratios=heights,
        wspace=0.02,
        hspace=0.08,
        left=98 / WIDTH_PX,
        right=1 - 98 / WIDTH_PX,
        top=1 - TOP_PX / height_px,
        bottom=BOTTOM_PX / height_px,
    )
    rows = [figure.add_subplot(grid[row, 0]) for row in range(clip.channels)]
    names = ("Hz",) if clip.channels == 1 else ("left, Hz", "right, Hz")
    for row, level, name in zip(rows, mel_db(clip), names, strict=True):
        image = _draw_channel(row, level, clip)
        row.set_ylabel(name, color=INK, fontsize=TEXT_PT)
        row.tick_params(labelbottom=row is rows[-1] and melody is None)
    _draw_scale(figure.add_subplot(grid[: clip.channels, 1]), image)
    if melody is not None:
        rows.append(figure.add_subplot(grid[-1, 0]))
        _draw_melody(rows[-1], melody, prompt_s, rows[0].get_xlim())
    rows[-1].set_xlabel("seconds", color=INK, fontsize=TEXT_PT)
    if prompt_s:
        _mark_prompt(rows, prompt_s)
    # Fast compression: a third of the time for a sixth more bytes.
    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawn, pil_kwargs={"compress_level": 1})
    return drawn.getvalue()


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
    column = clip.samples.shape[1] // (WIDTH_PX * PIXEL_DENSITY)  # samples at the picture's width
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


def _draw_channel(axes: Axes, level: np.ndarray, clip: Clip) -> Any:
    from librosa.core.convert import hz_to_mel

    low, high = hz_to_mel([LOWEST_HZ, clip.sampling_rate / 2], htk=True)
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
    ticks = _readable_ticks(clip)
    axes.set_yticks(hz_to_mel(ticks, htk=True), [_tick(hz) for hz in ticks])
    axes.tick_params(colors=INK, labelsize=TEXT_PT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _readable_ticks(clip: Clip) -> list[int]:
    """Those of the ticks that fit without touching: low octaves lie close on a mel scale."""
    from librosa.core.convert import hz_to_mel

    top = hz_to_mel(clip.sampling_rate / 2, htk=True)
    gap = top * (0.09 if clip.channels == 1 else 0.1)
    ticks: list[int] = []
    for hz in TICKS_HZ:
        place = hz_to_mel(hz, htk=True)
        clear = not ticks or place - hz_to_mel(ticks[-1], htk=True) >= gap
        if place <= top and clear:
            ticks.append(hz)
    return ticks


def _tick(hz: int) -> str:
    return f"{hz // 1000}k" if hz >= 1000 else f"{hz}"


def _draw_scale(axes: Axes, image: Any) -> None:
    bar = axes.figure.colorbar(image, cax=axes)
    bar.set_label("dB", color=INK, fontsize=TEXT_PT)
    axes.tick_params(colors=INK, labelsize=TEXT_PT)
    bar.outline.set_visible(False)


def _draw_melody(axes: Axes, melody: Chroma, start_s: float, seconds: tuple[float, float]) -> None:
    """The strongest pitch class of each moment: the tune, without its octaves."""
    from matplotlib.colors import to_rgb

    columns = np.eye(len(NOTES), dtype=bool)[melody.classes].T  # [classes, columns]
    end_s = start_s + columns.shape[1] * melody.column_s
    axes.imshow(
        np.where(columns[..., None], to_rgb(MELODY_INK), to_rgb(MELODY_GROUND)),
        origin="lower",
        aspect="auto",
        extent=(start_s, end_s, -0.5, len(NOTES) - 0.5),
        interpolation="nearest",
    )
    axes.set_facecolor(GROUND)
    axes.set_xlim(seconds)
    named = [place for place, note in enumerate(NOTES) if note in "CEGB"]
    axes.set_yticks(named, [NOTES[place] for place in named])
    axes.set_ylabel("melody", color=INK, fontsize=TEXT_PT)
    axes.tick_params(colors=INK, labelsize=TEXT_PT)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _mark_prompt(rows: list[Axes], prompt_s: float) -> None:
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
            fontsize=TEXT_PT,
        )


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
