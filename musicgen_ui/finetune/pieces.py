"""A song in pieces that the decoder can learn: cut at silences, else at bars, else at the length.

Tempo and beats are librosa's (Ellis 2007, "Beat Tracking by Dynamic Programming"); the key is the
one whose profile (Krumhansl and Kessler 1982) correlates best with the mean chroma.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import SILENCE, Clip

LONGEST_S = 900.0  # of a song that are read, its last
SHORTEST_S = 2.0  # of a piece
EARLIEST_CUT = 0.6  # of a piece's length
BEATS_A_BAR = 4
RATE_HZ = 22_050  # for measuring
HOP = 512  # samples, for measuring
_QUIET_DB = -40.0  # below the song's loud parts, what counts as silence
_LEVEL_S = 0.05  # a frame of the level
_CLEAR = 0.5  # correlation from which a key is one
_PITCHES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
_PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}


@dataclass(frozen=True)
class Measures:
    """What was measured of a song."""

    tempo_bpm: int = 0  # 0: no beat was found
    key: str = ""  # "C# minor"; empty where none is clear
    bars_s: tuple[float, ...] = ()  # where every fourth beat is, in seconds


def measure(clip: Clip) -> Measures:
    """Tempo, bars and key of a song."""
    import librosa

    mono = audio.convert(clip, RATE_HZ, 1).samples[0]
    if clip.duration_s < SHORTEST_S or np.abs(mono).max() < SILENCE:
        return Measures()
    strength = librosa.onset.onset_strength(y=mono, sr=RATE_HZ, hop_length=HOP)
    tempo, beats = librosa.beat.beat_track(
        onset_envelope=strength, sr=RATE_HZ, hop_length=HOP, units="time"
    )
    chroma = librosa.feature.chroma_stft(y=mono, sr=RATE_HZ, hop_length=4 * HOP, tuning=0.0)
    bpm = round(float(np.ravel(tempo)[0])) if len(beats) >= 2 * BEATS_A_BAR else 0
    return Measures(bpm, key_of(chroma.mean(1)), tuple(map(float, beats[::BEATS_A_BAR])))


def key_of(chroma: np.ndarray) -> str:
    """The key of mean chroma [12], C first, as "C# minor"; empty where none is clear."""
    if chroma.std() == 0:
        return ""
    matches = {
        f"{pitch} {mode}": float(np.corrcoef(np.roll(profile, i), chroma)[0, 1])
        for mode, profile in _PROFILES.items()
        for i, pitch in enumerate(_PITCHES)
    }
    best = max(matches, key=lambda name: matches[name])
    return best if matches[best] >= _CLEAR else ""


def cut(clip: Clip, piece_s: float, bars_s: tuple[float, ...]) -> list[tuple[float, float]]:
    """Where pieces of at most `piece_s` begin and end, in seconds; silent ones are left out."""
    levels = _levels_db(clip)
    spans, start = [], 0.0
    while clip.duration_s - start > piece_s:
        end = _cut_between(levels, start + EARLIEST_CUT * piece_s, start + piece_s, bars_s)
        spans.append((start, end))
        start = end
    if clip.duration_s - start >= SHORTEST_S or not spans:
        spans.append((start, clip.duration_s))
    return [span for span in spans if _sounds(clip, *span)]


def _levels_db(clip: Clip) -> np.ndarray:
    """The level of each frame of `_LEVEL_S`, below the song's loud parts, in dB."""
    length = max(1, round(_LEVEL_S * clip.sampling_rate))
    whole = clip.samples.shape[1] // length * length
    power = np.square(clip.samples[:, :whole]).mean(0).reshape(-1, length).mean(1)
    loud = np.percentile(power, 95) if len(power) else 1.0
    levels: np.ndarray = 10 * np.log10(power / max(loud, 1e-12) + 1e-12)
    return levels


def _cut_between(
    levels: np.ndarray, earliest_s: float, latest_s: float, bars_s: tuple[float, ...]
) -> float:
    first, last = round(earliest_s / _LEVEL_S), round(latest_s / _LEVEL_S)
    some = levels[first:last]
    if len(some) and some.min() < _QUIET_DB:
        return (first + int(some.argmin()) + 0.5) * _LEVEL_S
    bars = [bar for bar in bars_s if earliest_s <= bar <= latest_s]
    return bars[-1] if bars else latest_s


def _sounds(clip: Clip, start_s: float, end_s: float) -> bool:
    rate = clip.sampling_rate
    some = clip.samples[:, round(start_s * rate) : round(end_s * rate)]
    return bool(some.size and np.abs(some).max() >= SILENCE)
