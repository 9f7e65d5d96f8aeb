"""Many songs at any tempo and in all keys, rendered side by side until a time is up.

What `all --preset card` trains on: clips as int16 [clips, 2, samples], their metas, and captions
already as tokens, so that no text is handled while a GPU waits. A part appears under its final name
only when it is complete, so a reader may take what is there at any moment.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.captions import TYPOS, caption
from training.composer import Meta, Song, compose
from training.more_styles import MORE_STYLES, TEMPI
from training.render import SINES, SoundfontRenderer, render_sines, to_clip
from training.styles import STYLES
from training.tokenizer import make_tokenizer

SONG_SEED = 1_000_000_000  # the judge's songs have lower ones
CLIPS_A_PART = 32
CAPTIONS, TOKENS = 24, 40  # a clip, and the most of a caption
ODD_TEMPO = 0.25  # share of songs
WEIGHTS = dict.fromkeys(STYLES, 1.0) | dict.fromkeys(MORE_STYLES, 0.5)
WEIGHTS |= {"drums": 1.8, "piano ballad": 1.2, "solo": 1.8}


@dataclass(frozen=True)
class SongJob:
    folder: Path
    seconds: float  # of a clip
    sampling_rate: int
    soundfont: str
    clips: int  # at most
    until: float  # of `time.time()`, when no further part is begun
    first_seed: int = SONG_SEED


def draw_song(seed: int, seconds: float) -> Song:
    """Style, tempo and all else from the seed; three quarters at a tempo usual for the style."""
    rng = random.Random(f"song {seed}")
    style = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    bpm = rng.uniform(60, 170) if rng.random() < ODD_TEMPO else rng.uniform(*TEMPI[style])
    return compose(seed, style, seconds, keys=12, bpm=bpm)


def tokens_of(metas: list[Meta], seed: int) -> np.ndarray:
    """int16 [clips, CAPTIONS, TOKENS], padded with 0: each clip's captions."""
    rng, tokenizer = random.Random(f"captions {seed}"), make_tokenizer()
    texts = [caption(meta, rng, TYPOS) for meta in metas for _ in range(CAPTIONS)]
    rows = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS)["input_ids"]
    return np.array(rows, np.int16).reshape(len(metas), CAPTIONS, TOKENS)


def render_song_part(job: SongJob, part: int, renderer) -> None:
    samples = round(job.seconds * job.sampling_rate)
    audio = np.zeros((min(CLIPS_A_PART, job.clips), 2, samples), np.int16)
    metas = []
    for i in range(len(audio)):
        song = draw_song(job.first_seed + part * CLIPS_A_PART + i, job.seconds)
        audio[i] = to_clip(renderer(song, job.seconds), song.gain, job.sampling_rate)[:, :samples]
        metas.append(song.meta)
    np.save(job.folder / f"audio_{part}.npy", audio)
    np.save(job.folder / f"captions_{part}.npy", tokens_of(metas, job.first_seed + part))
    partial = job.folder / f"meta_{part}.tmp"
    partial.write_text(json.dumps([meta.as_dict() for meta in metas]))
    partial.replace(job.folder / f"meta_{part}.json")


def _work(job: SongJob, counter) -> None:
    os.nice(5)
    renderer = render_sines if job.soundfont == SINES else SoundfontRenderer(job.soundfont)
    first = True  # a slow start still gives a part
    while first or time.time() < job.until:
        first = False
        with counter.get_lock():
            part, counter.value = counter.value, counter.value + 1
        if part * CLIPS_A_PART >= job.clips:
            return
        render_song_part(job, part, renderer)


def render_songs(job: SongJob, workers: int) -> int:
    """Parts until the time is up or all clips are there; returns how many clips there are."""
    job.folder.mkdir(parents=True, exist_ok=True)
    found = [int(path.stem.split("_")[1]) for path in job.folder.glob("meta_*.json")]
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    counter = context.Value("i", max(found, default=-1) + 1)
    crew = [context.Process(target=_work, args=(job, counter)) for _ in range(workers)]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
    if any(process.exitcode for process in crew):
        print("a rendering process failed; what is complete is used", flush=True)
    return sum(len(json.loads(path.read_text())) for path in job.folder.glob("meta_*.json"))


def complete_parts(folder: Path) -> list[int]:
    return sorted(int(path.stem.split("_")[1]) for path in folder.glob("meta_*.json"))


def load_part(folder: Path, part: int) -> tuple[np.ndarray, np.ndarray, list[Meta]]:
    """Audio int16 [clips, 2, samples], caption tokens, metas."""
    metas = [
        Meta(**{**entry, "instruments": tuple(entry["instruments"])})
        for entry in json.loads((folder / f"meta_{part}.json").read_text())
    ]
    audio = np.load(folder / f"audio_{part}.npy")
    return audio, np.load(folder / f"captions_{part}.npy"), metas
