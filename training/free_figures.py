"""Takes on free wordings, and takes of which a tempo or a key was asked for.

What is measured of a take is measured of rendered clips too: that figure is the ceiling. Tempo and
key are found as for fine-tuning (`musicgen_ui.finetune.pieces`), silence and what is stuck as the
app does when it ranks takes (`musicgen_ui.audio.defects`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import scipy.linalg
import scipy.ndimage

from musicgen_ui.audio import defects
from musicgen_ui.audio.clip import Clip
from musicgen_ui.finetune import pieces
from training.captions import FLATS, SHARPS
from training.evaluated import EvaluatedCheckpoint
from training.prompts import FREE_WORDINGS, KEY_PROMPTS, TEMPO_PROMPTS
from training.style_classifier import RATE_HZ, chroma, mel
from training.styles import STYLES

NEARLY_SILENT = 0.01  # root mean square, -40 dBFS
NOISY_FLATNESS = 0.78  # white noise has 0.85, rendered drums up to 0.75
TOLERANCE = 0.04  # of a tempo
SHARPS_AND_FLATS = {name: i for names in (SHARPS, FLATS) for i, name in enumerate(names)}
WINDOW = 2048  # samples
WITH_TEMPO = ("drums", "rock", "techno", "funk")


def fault(samples: np.ndarray) -> str:
    """ "silent", "stuck" or "noisy" of a take that is no music, "" of one that may be."""
    found = defects.measure(Clip(samples[None], RATE_HZ))
    if np.sqrt((samples**2).mean()) < NEARLY_SILENT or found.silent >= 0.5:
        return "silent"
    spectrum = np.abs(np.fft.rfft(samples)) + 1e-6
    flatness = np.exp(np.log(spectrum).mean()) / spectrum.mean()
    if flatness > NOISY_FLATNESS:  # which steady noise is before it is stuck
        return "noisy"
    return "stuck" if found.stuck >= 0.5 else ""


def has_tempo(samples: np.ndarray, bpm: float) -> bool:
    """The beat is within 4 % of a tempo, or of its half or double, which are beats of it too."""
    found = pieces.measure(Clip(samples[None], RATE_HZ)).tempo_bpm
    return any(abs(found / (bpm * times) - 1) <= TOLERANCE for times in (0.5, 1, 2))


def has_key(samples: np.ndarray, key: int, mode: str, fifths: int = 0) -> bool:
    """The notes are those of a key, or of one that is up to so many fifths away from it.

    A loop of two chords often lacks the note in which neighbours by a fifth differ.
    """
    found = pieces.key_of(chroma(samples))
    if not found:
        return False
    tonic, of_mode = found.lower().split()
    away = scale(SHARPS_AND_FLATS[tonic], of_mode) - scale(key, mode)  # semitones
    return min(7 * away % 12, -7 * away % 12) <= fifths


def scale(key: int, mode: str) -> int:
    """The tonic, as a pitch class, of the major key with the same notes."""
    return (key + 3 * (mode == "minor")) % 12


def frechet(real: Iterable[np.ndarray], made: Iterable[np.ndarray]) -> float:
    """The Fréchet distance of the log-mel means of each second (after Kilgour et al. 2019, "Fréchet
    Audio Distance", with this spectrum in place of a network's features), in dB squared a band."""
    (m, a), (n, b) = _moments(real), _moments(made)
    root = np.real(scipy.linalg.sqrtm(a @ b))
    return float((((m - n) ** 2).sum() + np.trace(a + b - 2 * root)) / len(m))


def _moments(clips: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of [seconds, bands]."""
    seconds = [
        10 * np.log10(mel(clip[start : start + RATE_HZ])[0] + 1e-5).mean(1)
        for clip in clips
        for start in range(0, len(clip) - RATE_HZ + 1, RATE_HZ)
    ]
    return np.mean(seconds, 0), np.cov(np.stack(seconds).T)


def steady_lines(samples: np.ndarray) -> float:
    """The share of a drum clip's energy in lines of the spectrum that go on between the hits."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[:: WINDOW // 2]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW), axis=1)).T ** 2  # [bins, frames]
    between = np.quantile(power, 0.25, axis=1)
    around = scipy.ndimage.median_filter(between, 21)
    return float(np.maximum(between - 2 * around, 0).sum() / power.mean(1).sum())


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def free_figures(checkpoint: EvaluatedCheckpoint, takes: int = 200) -> dict[str, float]:
    """Style on sixty free wordings, and how many of the takes on them are no music."""
    asked = [FREE_WORDINGS[i % len(FREE_WORDINGS)] for i in range(takes)]
    clips = [checkpoint.mono(clip) for clip in checkpoint.generate([words for words, _ in asked])]
    heard = checkpoint.styles_heard(clips[: len(FREE_WORDINGS)])
    fits = [style in allowed for style, (_, allowed) in zip(heard, asked, strict=False)]
    faults = [fault(clip) for clip in clips]
    rendered = [clip for style in STYLES for clip in checkpoint.held_out(style)]
    struck = checkpoint.held_out("drums")
    hum = _mean(map(steady_lines, struck))
    made = [clip for clip, (_, allowed) in zip(clips, asked, strict=True) if allowed == ("drums",)]
    return {
        f"style on {len(FREE_WORDINGS)} free wordings": _mean(fits),
        **{
            f"{kind}, of {takes} takes": faults.count(kind) for kind in ("silent", "stuck", "noisy")
        },
        "faulty, of rendered clips": _mean(bool(fault(clip)) for clip in rendered),
        "Fréchet distance": frechet(rendered, clips),
        "Fréchet distance, halves of rendered clips": frechet(rendered[::2], rendered[1::2]),
        "hum of drums, reconstructed to rendered": _mean(
            map(steady_lines, checkpoint.reconstructions(struck[:8]))
        )
        / hum,
        "hum of drums, takes to rendered": _mean(map(steady_lines, made)) / hum,
    }


def asked_figures(checkpoint: EvaluatedCheckpoint, takes: int = 48) -> dict[str, float]:
    """Tempo of "bpm: N" and key of "key: X", in the words that the app adds to a prompt."""
    rng = random.Random(checkpoint.seed)
    tempi = [rng.randint(60, 170) for _ in range(takes)]
    words = [TEMPO_PROMPTS[style] for style in WITH_TEMPO]
    prompts = [f"{words[i % len(words)]}. bpm: {bpm}" for i, bpm in enumerate(tempi)]
    in_time = map(has_tempo, map(checkpoint.mono, checkpoint.generate(prompts)), tempi)
    keys = [(rng.randrange(12), rng.choice(("major", "minor"))) for _ in range(takes)]
    words = list(KEY_PROMPTS.values())
    prompts = [f"{words[i % 4]}. key: {FLATS[key]} {mode}" for i, (key, mode) in enumerate(keys)]
    made = [checkpoint.mono(clip) for clip in checkpoint.generate(prompts)]
    beats = [pair for style in WITH_TEMPO for pair in checkpoint.pairs(style)[: takes // 4]]
    tones = [pair for style in KEY_PROMPTS for pair in checkpoint.pairs(style)[: takes // 4]]
    figures = {
        "tempo within 4 % of bpm: N": _mean(in_time),
        "the same, rendered": _mean(has_tempo(c, 750 / s.meta.sixteenth) for s, c in beats),
    }
    for fifths, words in enumerate(("key of key: X", "the same, or a fifth from it")):
        asked = zip(made, keys, strict=True)
        figures[words] = _mean(has_key(clip, *key, fifths) for clip, key in asked)
        figures[f"{words}, rendered"] = _mean(
            has_key(clip, song.meta.key, song.meta.mode, fifths) for song, clip in tones
        )
    return figures
