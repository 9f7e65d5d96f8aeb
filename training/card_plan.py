"""The time and the files of a training within minutes, and the songs that it is made of."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training import pack
from training.composer import Meta
from training.presets import Preset
from training.songs import complete_parts, load_part

SAVE_EVERY_S, LOG_EVERY_S = 40.0, 5.0
CLOSING_S = 6.0  # of the budget, for the last files
FEWEST_STEPS = 6  # of each training, however little time there is


@dataclass
class Plan:
    """Where files are and how much time there is."""

    data: Path  # of `render_songs`
    out: Path  # unfinished files
    keep: Path
    preset: Preset
    budget_s: float
    device: str = "cuda"
    resume: Path | None = None
    stereo: bool = True
    seed: int = 0
    started: float = field(default_factory=time.time)
    saved: float = 0.0

    def __post_init__(self):
        self.out.mkdir(parents=True, exist_ok=True)
        self.keep.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed_s(self) -> float:
        return time.time() - self.started

    @property
    def left_s(self) -> float:
        return self.budget_s - CLOSING_S * min(1.0, self.budget_s / 120) - self.elapsed_s

    def log(self, stage: str, **values) -> None:
        entry: dict = {"s": round(self.elapsed_s, 1), "stage": stage}
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.tolist()
            entry[name] = _rounded(value)
        line = json.dumps(entry)
        print(line, flush=True)
        with (self.keep / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def save(self, name: str, state: dict[str, Tensor], *, int8: bool = True) -> None:
        size = pack.write(state, self.keep, name, self.out, int8=int8)
        self.saved = time.time()
        self.log("saved", name=name, MB=size / 1e6)

    @property
    def save_due(self) -> bool:
        return time.time() - self.saved > min(SAVE_EVERY_S, self.budget_s / 5)


def _rounded(value):
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


@dataclass
class Clips:
    """The rendered set on the device."""

    audio: Tensor  # int16 [clips, 2, samples]
    tokens: Tensor  # int16 [clips, captions, tokens]
    metas: list[Meta]


def load_clips(plan: Plan) -> Clips:
    """All parts that are complete, read by several threads."""
    parts = complete_parts(plan.data)
    if not parts:
        raise FileNotFoundError(f"No songs in {plan.data}: run `python -m training render` first.")
    first = load_part(plan.data, parts[0])
    counts = [len(json.loads((plan.data / f"meta_{part}.json").read_text())) for part in parts]
    starts = np.cumsum([0, *counts])
    shape = (int(starts[-1]), *first[0].shape[1:])
    audio = torch.empty(shape, dtype=torch.int16, device=plan.device)
    tokens = torch.empty((shape[0], *first[1].shape[1:]), dtype=torch.int16, device=plan.device)
    metas: list[list[Meta]] = [[] for _ in parts]

    def load(i: int) -> None:
        sound, words, metas[i] = load_part(plan.data, parts[i])
        rows = slice(int(starts[i]), int(starts[i + 1]))
        audio[rows] = torch.from_numpy(sound).to(plan.device)
        tokens[rows] = torch.from_numpy(words).to(plan.device)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, range(len(parts))))
    clips = Clips(audio, tokens, [meta for part in metas for meta in part])
    plan.log(
        "loaded",
        clips=len(clips.metas),
        hours=shape[0] * shape[2] / plan.preset.codec.sampling_rate / 3600,
    )
    return clips
