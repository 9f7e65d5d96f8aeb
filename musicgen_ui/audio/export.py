"""What a take becomes on its way out: a limiter for its peaks, loops of whole bars, fade-outs.

Everything is exact to the sample and works on whole clips in memory; `clip.encode` writes the file.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import soxr

from musicgen_ui.audio.clip import Clip
from musicgen_ui.errors import RequestError

CEILING_DBTP = -1.0  # what MP3 and Opus need as headroom, and EBU R 128 and the shops recommend
OVERSAMPLING = 4  # as in ITU-R BS.1770-5, annex 2
TOLERANCE = 1.001  # 0.01 dB: what was limited and rounded to 16 bits is left as it is
LOOK_AHEAD_S = 0.003
RELEASE_DB_S = 40.0
MOST_PASSES = 6  # the first one leaves some hundredths of a dB
SEAM_S = 0.050
EDGE_S = 0.003  # where there is nothing to cross-fade with
BEATS_A_BAR = 4  # where no time signature is given
MAX_BARS, MAX_FADE_OUT_S = 128, 60.0


class ShapeSettings(TypedDict, total=False):
    """A shape in a take's settings."""

    loop_bars: int
    fade_out_s: float


@dataclass(frozen=True)
class Shape:
    """What is done to a take's sound before it is written; by default nothing.

    Raises:
        RequestError: a value is outside its limits.
    """

    loop_bars: int = 0  # whole bars from the start of the new music on; 0 is no loop
    fade_out_s: float = 0.0  # 0 is none

    def __post_init__(self) -> None:
        if not 0 <= self.loop_bars <= MAX_BARS:
            raise RequestError(f"A loop has 1 to {MAX_BARS} bars, not {self.loop_bars}.")
        if not 0 <= self.fade_out_s <= MAX_FADE_OUT_S:  # nan too
            raise RequestError(
                f"A fade-out takes 0 to {MAX_FADE_OUT_S:g} s, not {self.fade_out_s:g}."
            )
        if self.loop_bars and self.fade_out_s:
            raise RequestError("A loop has no end to fade out: choose the loop or the fade-out.")

    def __bool__(self) -> bool:
        return bool(self.loop_bars or self.fade_out_s)

    def settings(self) -> ShapeSettings:
        """What of it is set, for the file's tags."""
        values: ShapeSettings = {}
        if self.loop_bars:
            values["loop_bars"] = self.loop_bars
        if self.fade_out_s:
            values["fade_out_s"] = self.fade_out_s
        return values

    def duration_s(
        self, tempo_bpm: float, asked_s: float | None, beats_a_bar: int = BEATS_A_BAR
    ) -> float | None:
        """The length of the music to make for a loop with its seam, unless one is asked for.

        Raises:
            RequestError: there is no tempo, or the loop does not fit into what is asked for.
        """
        if not self.loop_bars:
            return asked_s
        loop_s = loop_samples(tempo_bpm, self.loop_bars, 1000, beats_a_bar) / 1000
        if asked_s is None:
            return math.ceil(10 * (loop_s + SEAM_S)) / 10
        if asked_s < loop_s:
            raise RequestError(
                f"{_needs(self.loop_bars, tempo_bpm)} {loop_s:.1f} s: choose fewer or "
                "a greater length.",
                "duration_s",
            )
        return asked_s

    def of(
        self,
        clip: Clip,
        tempo_bpm: float,
        start_s: float = 0.0,
        beats_a_bar: int = BEATS_A_BAR,
    ) -> Clip:
        """The clip in this shape, without codes where it was changed.

        Args:
            clip: the finished sound.
            tempo_bpm: of a loop; 0 is unknown.
            start_s: where in the clip a loop begins.
            beats_a_bar: beats of the tempo in a bar of a loop.

        Raises:
            RequestError: there is no tempo, or not enough music for the loop.
        """
        if self.loop_bars:
            return loop(clip, tempo_bpm, self.loop_bars, start_s, beats_a_bar)
        return fade_out(clip, self.fade_out_s) if self.fade_out_s else clip


AS_MADE = Shape()


def limit(clip: Clip, ceiling_dbtp: float = CEILING_DBTP) -> tuple[Clip, float]:
    """The clip with its true peaks held at the ceiling, and by how many dB at most it was reduced.

    A look-ahead limiter: the gain is down when a peak comes and recovers slowly after it, the same
    in all channels. Peaks are those of the waveform four times oversampled. What lies further from
    a peak than look-ahead and recovery stays as it is, bit for bit; so does a clip without peaks
    above the ceiling.
    """
    ceiling = 10 ** (ceiling_dbtp / 20)
    samples, reduced_db = clip.samples, 0.0
    for _ in range(MOST_PASSES):
        peaks = true_peaks(samples, clip.sampling_rate)
        if not peaks.size or peaks.max() <= ceiling * TOLERANCE:
            break
        excess_db = 20 * np.log10(np.maximum(peaks / ceiling, 1.0))
        reduction_db = _smoothed(excess_db, clip.sampling_rate)
        reduced_db += float(reduction_db.max())
        samples = samples * (10 ** (-reduction_db / 20)).astype(np.float32)
    else:  # a signal that no gain this slow can hold: white noise far beyond full scale
        peak = true_peaks(samples, clip.sampling_rate).max()
        samples = samples * np.float32(min(ceiling / peak, 1.0))
    return (dataclasses.replace(clip, samples=samples), reduced_db) if reduced_db else (clip, 0.0)


def true_peaks(samples: np.ndarray, sampling_rate: int) -> np.ndarray:
    """The highest point of any channel at and after each sample, oversampled: float32 [samples].

    Args:
        samples: float32 [channels, samples].
        sampling_rate: in Hz.
    """
    count = samples.shape[1]
    peaks: np.ndarray = np.abs(samples).max(axis=0, initial=0)
    for channel in samples:
        dense = soxr.resample(channel, sampling_rate, OVERSAMPLING * sampling_rate, quality="VHQ")
        dense = np.abs(dense[: count * OVERSAMPLING])
        dense = np.pad(dense, (0, count * OVERSAMPLING - len(dense)))
        np.maximum(peaks, dense.reshape(count, OVERSAMPLING).max(axis=1), out=peaks)
    return peaks


def _smoothed(excess_db: np.ndarray, sampling_rate: int) -> np.ndarray:
    """A gain reduction in dB that is nowhere less than `excess_db`, without steps: [samples].

    Of the greatest excess within the look-ahead on either side, the mean over that same stretch:
    every term of the mean at a peak has the peak in its stretch.
    """
    reach = max(round(LOOK_AHEAD_S * sampling_rate), 1)  # samples
    needed = np.pad(excess_db.astype(np.float64), 2 * reach)
    fall = np.arange(len(needed)) * (RELEASE_DB_S / sampling_rate)
    released = np.maximum.accumulate(needed + fall) - fall
    needed = np.where(released > 1e-9, np.maximum(released, needed), 0.0)
    held = _sliding_max(needed, 2 * reach + 1)  # [samples + 2 * reach]
    for _ in range(2):  # two boxes are a triangle: the gain has no corners
        total = np.cumsum(np.pad(held, (1, 0)))
        held = (total[reach + 1 :] - total[: -reach - 1]) / (reach + 1)
    return held


def _sliding_max(values: np.ndarray, width: int) -> np.ndarray:
    """The maximum of every `width` neighbours: [n] to [n - width + 1]."""
    reach = 1
    while reach < width:
        step = min(reach, width - reach)
        values = np.maximum(values[:-step], values[step:])
        reach += step
    return values


def loop_samples(
    tempo_bpm: float, bars: int, sampling_rate: int, beats_a_bar: int = BEATS_A_BAR
) -> int:
    """The length of so many bars, to the nearest sample.

    Raises:
        RequestError: there is no tempo.
    """
    if not tempo_bpm > 0:
        raise RequestError(
            "A loop needs a tempo: set one, and it is as long as its bars.", "tempo_bpm"
        )
    return round(bars * beats_a_bar * 60 / tempo_bpm * sampling_rate)


def _needs(bars: int, tempo_bpm: float) -> str:
    subject, verb = ("1 bar", "takes") if bars == 1 else (f"{bars} bars", "take")
    return f"{subject} at {tempo_bpm:g} bpm {verb}"


def loop(
    clip: Clip,
    tempo_bpm: float,
    bars: int,
    start_s: float = 0.0,
    beats_a_bar: int = BEATS_A_BAR,
) -> Clip:
    """So many bars from `start_s` on, as a piece that can be repeated without a break.

    What follows the last bar is faded out over the beginning of the first one, so the last sample
    goes on as the clip did. Where the clip ends with the last bar, what precedes the first bar is
    faded in over the end of the last one instead; where there is neither, both edges are faded.

    Raises:
        RequestError: there is no tempo, or the clip is shorter than the bars.
    """
    start = round(start_s * clip.sampling_rate)
    length = loop_samples(tempo_bpm, bars, clip.sampling_rate, beats_a_bar)
    end, whole = start + length, clip.samples.shape[1]
    if end > whole:
        bar = loop_samples(tempo_bpm, 1, clip.sampling_rate, beats_a_bar)
        fitting = int((whole - start) / bar + 1e-6)
        made_s = (whole - start) / clip.sampling_rate
        advice = f"choose {fitting} or a greater length." if fitting else "choose a greater length."
        raise RequestError(
            f"{_needs(bars, tempo_bpm)} {length / clip.sampling_rate:.1f} s, but there "
            f"are {made_s:.1f} s of music: {advice}"
        )
    fade = min(round(SEAM_S * clip.sampling_rate), length // 2)
    looped = clip.samples[:, start:end].copy()
    if (after := min(fade, whole - end)) >= fade // 4:
        looped[:, :after] = _cross_fade(clip.samples[:, end : end + after], looped[:, :after])
    elif (before := min(fade, start)) >= fade // 4:
        lead = clip.samples[:, start - before : start]
        looped[:, length - before :] = _cross_fade(looped[:, length - before :], lead, last=True)
    else:
        edge = min(round(EDGE_S * clip.sampling_rate), length // 2)
        rising = np.sin(np.linspace(0, np.pi / 2, edge, dtype=np.float32)) ** 2
        looped[:, :edge] *= rising
        looped[:, length - edge :] *= rising[::-1]
    return Clip(looped, clip.sampling_rate)


def _cross_fade(old: np.ndarray, new: np.ndarray, last: bool = False) -> np.ndarray:
    """From one piece to another, float32 [channels, samples] each, without a dip or a bump.

    The shares add up to the same power whatever the pieces have in common: to equal gain where
    they are alike, to equal power where they are not. The first sample is all old; with `last`
    the last one is all new instead.
    """
    both = float(np.vdot(old, new))
    power = math.sqrt(float(np.vdot(old, old)) * float(np.vdot(new, new)))
    alike = min(max(both / power, 0.0), 1.0) if power else 1.0
    count = old.shape[1]
    rising = (np.arange(count, dtype=np.float32) + bool(last)) / count
    falling = 1 - rising
    level = np.sqrt(falling**2 + rising**2 + 2 * alike * falling * rising)
    mixed: np.ndarray = (old * falling + new * rising) / level
    return mixed


def fade_out(clip: Clip, fade_s: float) -> Clip:
    """The clip with its last seconds led down to silence; as long as before."""
    count = min(round(fade_s * clip.sampling_rate), clip.samples.shape[1])
    samples = clip.samples.copy()
    falling = np.cos(np.linspace(0, np.pi / 2, count, dtype=np.float32)) ** 2
    if count:
        falling[-1] = 0.0
        samples[:, -count:] *= falling
    return Clip(samples, clip.sampling_rate)


def with_loop_points(wav: bytes, samples: int, sampling_rate: int) -> bytes:
    """A WAV file with a `smpl` chunk that says: all of it, `samples` long, is a loop.

    The chunk's layout is that of "Multimedia Programming Interface and Data Specifications 1.0"
    (IBM and Microsoft, 1991), as samplers and DAWs read it. It comes first, after the format, as
    some readers stop at the sound.
    """
    period_ns, middle_c, forever = round(1e9 / sampling_rate), 60, 0
    header = struct.pack("<9I", 0, 0, period_ns, middle_c, 0, 0, 0, 1, 0)
    only = struct.pack("<6I", 0, 0, 0, samples - 1, 0, forever)  # its last sample counts
    chunk = b"smpl" + struct.pack("<I", len(header) + len(only)) + header + only
    format_end = 12 + 8 + int.from_bytes(wav[16:20], "little")
    body = wav[8:format_end] + chunk + wav[format_end:]
    return b"RIFF" + struct.pack("<I", len(body)) + body
