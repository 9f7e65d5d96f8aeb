"""Measure a checkpoint on prompts and clips held out from training, and print a table.

The judge is fitted on rendered clips of seeds that training never saw; its accuracy on other such
clips is the ceiling of every style figure. Prompts are worded apart from the captions' templates.
Sampling is the checkpoint's own generation config, fixed beforehand.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly

from training.evaluated import EvaluatedCheckpoint
from training.free_figures import asked_figures, free_figures
from training.prompts import FREE_PROMPTS, PROMPTS, TEMPO_PROMPTS
from training.style_classifier import (
    RATE_HZ,
    chroma,
    in_scale,
    loudness_lufs,
    onset_rate,
    percussive_share,
    periodicity,
    tempo_lag_s,
)
from training.styles import STYLES

WITH_BEAT = [name for name, style in STYLES.items() if style.drums]
TONAL = [name for name in STYLES if name != "drums"]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def codec_figures(checkpoint: EvaluatedCheckpoint) -> dict[str, float]:
    from training.codec_losses import SpectralLoss, log_mel_distance_db, si_snr_db

    clips = [clip for style in STYLES for clip in checkpoint.held_out(style)[:8]]
    names = [style for style in STYLES for _ in checkpoint.held_out(style)[:8]]
    eights = [clips[i : i + 8] for i in range(0, len(clips), 8)]
    made = [clip for eight in eights for clip in checkpoint.reconstructions(eight)]
    length = min(map(len, clips + made))
    pair = [torch.from_numpy(np.stack([c[:length] for c in group])) for group in (clips, made)]
    loss = SpectralLoss(RATE_HZ)
    ceiling = np.mean(checkpoint.styles_heard(clips) == names)
    return {
        "judge on held-out rendered clips (ceiling)": ceiling,
        "judge on reconstructions / ceiling": np.mean(checkpoint.styles_heard(made) == names)
        / ceiling,
        "log-mel distance, dB": log_mel_distance_db(loss, *pair).item(),
        "SI-SNR, dB": si_snr_db(*pair).item(),
    }


def style_figures(checkpoint: EvaluatedCheckpoint) -> dict[str, float]:
    """Adherence, rhythm, pitch and level of the same generated clips."""
    names = [style for style in STYLES for _ in range(checkpoint.per_style)]
    prompts = [PROMPTS[name][i % 2] for i, name in enumerate(names)]
    raw = checkpoint.generate(prompts)
    clips = [checkpoint.mono(clip) for clip in raw]
    right = checkpoint.styles_heard(clips) == np.array(names)
    by_style = {s: float(right[[n == s for n in names]].mean()) for s in STYLES}
    beats = [c for n, c in zip(names, clips, strict=True) if n in WITH_BEAT]
    tones = [c for n, c in zip(names, clips, strict=True) if n in TONAL]
    in_range = [-24 <= loudness_lufs(clip, checkpoint.rate) <= -12 for clip in raw]
    real = {style: checkpoint.held_out(style) for style in STYLES}
    figures = {
        "periodicity, rendered": _mean(periodicity(c) for s in WITH_BEAT for c in real[s][:8]),
        "in-scale chroma, rendered": _mean(in_scale(chroma(c)) for s in TONAL for c in real[s][:2]),
        "style accuracy": float(right.mean()),
        "lowest style": min(by_style.values()),
        "periodicity": float(np.mean([periodicity(clip) for clip in beats])),
        "in-scale chroma": float(np.mean([in_scale(chroma(c)) for c in tones[::4]])),
        "share of clips between -24 and -12 LUFS": float(np.mean(in_range)),
        **{f"style {name}": value for name, value in by_style.items()},
    }
    if checkpoint.channels == 2:
        figures |= stereo_figures(raw, names)
    return figures


def stereo_figures(clips: list[np.ndarray], names: list[str]) -> dict[str, float]:
    """Side against middle, and what folding to mono loses, of stereo clips in panned styles."""
    panned = [c for n, c in zip(names, clips, strict=True) if n not in ("drums", "techno")]
    energy = [(c.mean(0) ** 2).mean() for c in panned]
    side = [((c[0] - c[1]) ** 2).mean() / 4 for c in panned]
    both = [(c**2).mean() for c in panned]
    ratio = [10 * np.log10(s / (m + 1e-9) + 1e-9) for s, m in zip(side, energy, strict=True)]
    fold = [10 * np.log10(m / (b + 1e-9) + 1e-9) for m, b in zip(energy, both, strict=True)]
    return {"side to middle, dB": float(np.median(ratio)), "mono fold, dB": float(np.median(fold))}


def _ordered(low: list[float], high: list[float]) -> float:
    """Share of pairs in which the first is smaller; ties count half."""
    return float(np.mean([(a < b) + 0.5 * (a == b) for a in low for b in high]))


def control_figures(checkpoint: EvaluatedCheckpoint, takes: int = 4) -> dict[str, float]:
    """Speed words, drums against none, freely worded prompts, no prompt."""
    asked = [(s, word) for s in TEMPO_PROMPTS for word in ("slow", "fast") for _ in range(takes)]
    clips = checkpoint.generate([f"{word} {TEMPO_PROMPTS[s]}" for s, word in asked])
    rate: dict[tuple[str, str], list[float]] = {}
    for key, clip in zip(asked, clips, strict=True):
        rate.setdefault(key, []).append(onset_rate(checkpoint.mono(clip)))
    order = [_ordered(rate[s, "slow"], rate[s, "fast"]) for s in TEMPO_PROMPTS]
    rendered = []
    for style in TEMPO_PROMPTS:
        speeds = {"slow": [], "fast": []}
        for song, clip in zip(checkpoint.songs[style], checkpoint.rendered[style], strict=True):
            if song.meta.speed in speeds:
                speeds[song.meta.speed].append(onset_rate(clip))
        rendered.append(_ordered(speeds["slow"], speeds["fast"]))
    able = [i for i, value in enumerate(rendered) if value >= 0.85]
    with_, without = (
        [percussive_share(checkpoint.mono(c)) for c in checkpoint.generate([words] * 8)]
        for words in ("drums only", "acoustic folk guitar, no drums")
    )
    struck, strummed = (
        [
            percussive_share(c)
            for song, c in zip(checkpoint.songs[s], checkpoint.rendered[s], strict=True)
            if song.meta.drums == (s == "drums")
        ]
        for s in ("drums", "folk")
    )
    free = checkpoint.generate([prompt for prompt in FREE_PROMPTS for _ in range(4)])
    heard = checkpoint.styles_heard([checkpoint.mono(clip) for clip in free])
    asked_for = [allowed for allowed in FREE_PROMPTS.values() for _ in range(4)]
    fits = [style in allowed for style, allowed in zip(heard, asked_for, strict=True)]
    blank = [checkpoint.mono(clip) for clip in checkpoint.generate([""] * 8)]
    flat = [
        np.exp(np.log(np.abs(np.fft.rfft(c)) + 1e-6).mean()) / np.abs(np.fft.rfft(c)).mean()
        for c in blank
    ]
    level = [np.sqrt((clip**2).mean()) for clip in blank]
    return {
        "speed order, rendered": float(np.mean(rendered)),
        "speed order, where rendered clips have it": float(np.mean([order[i] for i in able])),
        "speed order, all eight styles": float(np.mean(order)),
        "drums against no drums, rendered": _ordered(strummed, struck),
        "drums against no drums": _ordered(without, with_),
        "freely worded prompts": float(np.mean(fits)),
        "unconditional clips that are music": float(
            np.mean([lv > 0.01 and fl < 0.5 for lv, fl in zip(level, flat, strict=True)])
        ),
    }


def continuation_figures(checkpoint: EvaluatedCheckpoint, per_style: int = 2) -> dict[str, float]:
    """The last 5 s of a held-out clip, continued for 5 s, against another clip's continuation."""
    names = [style for style in STYLES for _ in range(per_style)]
    ends = [checkpoint.held_out(s)[i][-5 * RATE_HZ :] for s in STYLES for i in range(per_style)]
    given = [resample_poly(end, checkpoint.rate, RATE_HZ).astype(np.float32) for end in ends]
    if checkpoint.channels == 2:
        given = [np.stack([end, end]) for end in given]
    prompts = [PROMPTS[name][0] for name in names]
    made = [
        checkpoint.mono(c)[-5 * RATE_HZ :] for c in checkpoint.generate(prompts, 5.0, audio=given)
    ]
    tonal = [i for i, name in enumerate(names) if name in TONAL]
    keys = {i: (chroma(ends[i]), chroma(made[i])) for i in tonal}
    partner = {i: i + 1 if i % per_style == 0 else i - 1 for i in range(len(names))}
    alike = [np.corrcoef(keys[i][0], keys[i][1])[0, 1] for i in tonal]
    other = [np.corrcoef(keys[i][0], keys[partner[i]][1])[0, 1] for i in tonal]
    beat = [i for i, name in enumerate(names) if name in WITH_BEAT]
    clips = [(ends[i], made[i], made[partner[i]]) for i in beat]
    lags = [[tempo_lag_s(clip) for clip in three] for three in clips]
    near = [[abs(np.log2(a / b)) % 1 for b in rest] for a, *rest in lags]
    same = [[min(x, 1 - x) < 0.06 for x in row] for row in near]
    return {
        "continuation: chroma correlation": float(np.mean(alike)),
        "continuation of another clip: chroma correlation": float(np.mean(other)),
        "continuation: same tempo": float(np.mean([row[0] for row in same])),
        "continuation of another clip: same tempo": float(np.mean([row[1] for row in same])),
        "continuation: style": float(np.mean(checkpoint.styles_heard(made) == np.array(names))),
    }


def signal_figures(checkpoint: EvaluatedCheckpoint) -> dict[str, float]:
    """30 s takes: level of each 5 s, offset, clipping; and the speed of transformers' own loop."""
    started = time.perf_counter()
    takes = [
        checkpoint.generate([PROMPTS[style][0]], 30.0)[0] for style in ("techno", "folk", "jazz")
    ]
    elapsed = time.perf_counter() - started
    parts = [
        np.sqrt((t[:, : 30 * checkpoint.rate].reshape(6, -1) ** 2).mean(1))
        for t in (take.mean(0, keepdims=True) for take in takes)
    ]
    return {
        "30 s: loudest to quietest 5 s, dB": float(
            max(20 * np.log10(p.max() / (p.min() + 1e-9)) for p in parts)
        ),
        "30 s: largest offset": float(max(abs(t.mean(1)).max() for t in takes)),
        "30 s: share of samples at full scale": float(max((np.abs(t) >= 1).mean() for t in takes)),
        "transformers generate, times real time": 90 / elapsed,
        "loading, s": checkpoint.load_s,
        "weights, MB": sum(f.stat().st_size for f in checkpoint.checkpoint.iterdir()) / 1e6,
    }


PARTS = {
    "codec": codec_figures,
    "style": style_figures,
    "control": control_figures,
    "free": free_figures,
    "asked": asked_figures,
    "continuation": continuation_figures,
    "signal": signal_figures,
}


def evaluate(
    folder: Path,
    soundfont: str,
    parts: list[str],
    per_style: int = 8,
    judge_clips: int = 40,
    out: Path | None = None,
) -> dict[str, float]:
    """Print the table as it grows, and write it as JSON if asked."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = EvaluatedCheckpoint(folder, soundfont, judge_clips, per_style)
    table: dict[str, float] = {}
    for part in parts:
        for name, value in PARTS[part](checkpoint).items():
            table[name] = round(float(value), 3)
            print(f"{name:58s} {table[name]:8.3f}", flush=True)
        if out:
            out.write_text(json.dumps(table, indent=1) + "\n")
    return table
