"""Clips: resampling, joining, loudness and encoding.

Everything here works on whole clips in memory: a take is at most a few minutes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import soundfile
import soxr

from musicgen_ui import files
from musicgen_ui.audio.chords import PlacedChord

SILENCE = 1e-4  # -80 dBFS
CANCELLED = 0.01  # what is left of the power in the mean of two channels: -20 dB


class Compression(TypedDict, total=False):
    """Options of soundfile."""

    compression_level: float
    subtype: str


# Compression, 0 to 1: variable bit rates of about 150 kbit/s (MP3), 230 (Ogg Vorbis) and 160 (Ogg
# Opus) in stereo at 32 kHz.
LOSSY: dict[str, Compression] = {
    ".mp3": {"compression_level": 0.2},
    ".ogg": {"compression_level": 0.2, "subtype": "VORBIS"},
    ".opus": {"compression_level": 0.7, "subtype": "OPUS"},
}
ENDINGS = (".wav", ".flac", *LOSSY)  # of the files that `encode` makes
OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)  # Hz; others become the last
ENCODED_AT_ONCE = 65_536  # samples
JOIN_FADE_S = 0.020
LOUDNESS_BLOCK_S = 0.4  # BS.1770's gating block: nothing shorter can be measured


@dataclass(frozen=True, eq=False)
class Clip:
    """A piece of audio: `samples` float32 [channels, samples], nominally within ±1.

    Where the samples were decoded from codes, these may come along, and with them a continuation
    needs no encoding.
    """

    samples: np.ndarray
    sampling_rate: int  # Hz
    codes: np.ndarray | None = None  # int16 [codebooks, frames]
    codec: str = ""  # which codec the codes belong to

    @property
    def channels(self) -> int:
        """1 for mono, 2 for stereo."""
        return int(self.samples.shape[0])

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return float(self.samples.shape[1] / self.sampling_rate)


@dataclass(frozen=True, eq=False)
class Chroma:
    """What new music followed over time: a melody's strongest pitch class, chords, or both."""

    classes: np.ndarray  # uint8 [columns]; 0 is C, 11 is B; empty without a melody
    column_s: float  # seconds from column to column
    chords: tuple[PlacedChord, ...] = ()


def cancels(samples: np.ndarray) -> bool:
    """Whether channels, float32 [channels, samples], are of opposite phase: their mean is next to
    nothing although they sound.
    """
    mean = samples.mean(axis=0)
    return len(samples) > 1 and float(np.vdot(mean, mean)) < CANCELLED * float(
        np.vdot(samples, samples) / len(samples)
    )


def convert(clip: Clip, sampling_rate: int, channels: int) -> Clip:
    """The clip at another sampling rate and channel count: round(samples · new / old) samples.

    Mono becomes stereo as two equal channels, stereo becomes mono as their mean, or as the louder
    channel where the two cancel each other out.
    """
    samples = clip.samples
    if channels < clip.channels and cancels(samples):
        louder = int(np.square(samples).sum(axis=1).argmax())
        samples = samples[louder : louder + 1]
    elif channels < clip.channels:
        samples = samples.mean(axis=0, keepdims=True, dtype=np.float32)
    if sampling_rate != clip.sampling_rate and samples.shape[1]:
        samples = _resampled(samples, clip.sampling_rate, sampling_rate)
    if channels > samples.shape[0]:
        samples = np.repeat(samples, channels, axis=0)
    return Clip(samples, sampling_rate)


def _resampled(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    length = round(samples.shape[1] * new / old)
    resampled = soxr.resample(samples.T, old, new, quality="VHQ").T[:, :length]
    missing = length - resampled.shape[1]
    return np.ascontiguousarray(np.pad(resampled, ((0, 0), (0, missing))), dtype=np.float32)


def join(clip: Clip, decoded: np.ndarray, context_samples: int) -> Clip:
    """A continuation's take: the clip's own samples, then the new ones exactly as decoded.

    `decoded` is the codec's float32 audio [channels, context_samples + new] of the clip's last
    `context_samples` samples and what follows them, at the clip's rate and channel count. The
    codec's rendering differs from the clip, so within the clip's last 20 ms (or the context, if
    that is shorter) an equal-gain cross-fade leads from the one to the other: the two are
    correlated, which makes equal gain the fade without a bump.
    """
    if decoded.shape[0] != clip.channels:
        raise ValueError(f"{decoded.shape[0]} decoded channels cannot follow {clip.channels}")
    own, new = clip.samples, decoded[:, context_samples:]
    fade = min(round(JOIN_FADE_S * clip.sampling_rate), context_samples, own.shape[1])
    kept, tail = np.split(own, [own.shape[1] - fade], axis=1)
    rendered = decoded[:, context_samples - fade : context_samples]
    share = np.arange(1, fade + 1, dtype=np.float32) / max(fade, 1)  # [fade]
    samples = np.concatenate([kept, tail + share * (rendered - tail), new], axis=1)
    return Clip(samples.astype(np.float32, copy=False), clip.sampling_rate)


def loudness_lufs(clip: Clip) -> float:
    """Integrated loudness after ITU-R BS.1770-4; -inf for silence.

    A clip shorter than one gating block is measured as if it went on repeating itself.
    """
    import pyloudnorm  # brings SciPy's signal package: a second that the page's start can spare

    if not clip.samples.any():
        return -np.inf
    meter = pyloudnorm.Meter(clip.sampling_rate, block_size=LOUDNESS_BLOCK_S)
    shortest = int(np.ceil(LOUDNESS_BLOCK_S * clip.sampling_rate)) + 1
    repeats = -(-shortest // clip.samples.shape[1])
    return float(meter.integrated_loudness(np.tile(clip.samples, repeats).T.astype(np.float64)))


def true_peak_dbtp(clip: Clip) -> float:
    """The highest point of the waveform between the samples too, 4 times oversampled."""
    rate = clip.sampling_rate
    peak = np.abs(clip.samples).max(initial=0)
    for channel in clip.samples:
        between = soxr.resample(channel, rate, 4 * rate, quality="VHQ")
        peak = max(peak, np.abs(between, out=between).max(initial=0))
    return 20 * float(np.log10(peak)) if peak else -np.inf


def normalize(
    clip: Clip, target_lufs: float = -14.0, true_peak_dbtp_max: float = -1.0
) -> tuple[Clip, float]:
    """The clip at the target loudness, or as near as its true peak allows; and the gain in dB.

    One gain for the whole clip, never a limiter: the music's dynamics stay as they were made.
    Silence is left as it is.
    """
    loudness = loudness_lufs(clip)
    if not np.isfinite(loudness):
        return clip, 0.0
    gain_db = min(target_lufs - loudness, true_peak_dbtp_max - true_peak_dbtp(clip))
    samples = clip.samples * np.float32(10 ** (gain_db / 20))
    return Clip(samples, clip.sampling_rate), gain_db


def encode(clip: Clip, ending: str, tags: Mapping[str, str] | None = None) -> bytes:
    """The clip as a file: ".wav" or ".flac" with 16-bit samples, ".mp3", ".ogg" (Vorbis), ".opus".

    `tags` are soundfile's names: title, artist, comment, date … In WAV and FLAC, samples are
    rounded to the nearest of 65,536 levels without dither: a codec's own noise lies far above the
    last bit, a 16-bit clip comes back bit for bit, silence stays silent, and a seed gives the same
    file.

    Raises:
        soundfile.SoundFileError: MP3 or Vorbis cannot have this sampling rate.
    """
    kind = {".opus": "OGG"}.get(ending, ending[1:].upper())
    if ending == ".opus" and clip.sampling_rate not in OPUS_RATES:
        clip = convert(clip, OPUS_RATES[-1], clip.channels)
    samples, options = clip.samples.T, LOSSY.get(ending)
    if options is None:
        samples = to_int16(samples)
        options = {"subtype": "PCM_16"}
    encoded = io.BytesIO()
    with soundfile.SoundFile(
        encoded, "w", clip.sampling_rate, clip.channels, format=kind, **options
    ) as file:
        for name, text in (tags or {}).items():
            if text:  # libsndfile refuses an empty tag
                setattr(file, name, text)
        for start in range(0, len(samples), ENCODED_AT_ONCE):  # Vorbis crashes on minutes
            file.write(samples[start : start + ENCODED_AT_ONCE])
    return encoded.getvalue()


def to_int16(samples: np.ndarray) -> np.ndarray:
    """float32 samples as they are in a 16-bit file, in the same shape."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)


def write(clip: Clip, path: Path, tags: Mapping[str, str] | None = None) -> None:
    """Writes a file as `encode` makes it, by the name's ending; complete or not at all.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    files.replace(path, encode(clip, path.suffix, tags))
