"""A checkpoint on the bench: what it makes, and a judge fitted on clips rendered for it alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from transformers import AutoProcessor, MusicgenForConditionalGeneration

from training.composer import Song, compose
from training.render import SINES, SoundfontRenderer, render_sines, to_clip
from training.style_classifier import RATE_HZ, features, fit_judge
from training.styles import STYLES

SECONDS = 8.0
JUDGE_SEED = 900_000_000  # rendered for the judge alone


@dataclass
class EvaluatedCheckpoint:
    """A checkpoint, the judge, and the rendered clips that it was held against."""

    checkpoint: Path
    soundfont: str
    judge_clips: int = 40  # a style, for fitting; half as many for the ceiling
    per_style: int = 8
    seed: int = 0

    def __post_init__(self):
        started = time.perf_counter()
        self.model = MusicgenForConditionalGeneration.from_pretrained(
            self.checkpoint, dtype=torch.float32
        ).eval()
        self.load_s = time.perf_counter() - started
        self.processor = AutoProcessor.from_pretrained(self.checkpoint)
        self.rate = self.model.config.audio_encoder.sampling_rate
        self.channels = self.model.config.decoder.audio_channels
        render = render_sines if self.soundfont == SINES else SoundfontRenderer(self.soundfont)
        total = self.judge_clips * 3 // 2
        self.rendered, self.songs = {}, {}
        for style in STYLES:
            seeds = range(JUDGE_SEED, JUDGE_SEED + total)
            self.songs[style] = [compose(seed, style, SECONDS) for seed in seeds]
            self.rendered[style] = [self._clip(render, song) for song in self.songs[style]]
        fitted = [(s, c) for s in STYLES for c in self.rendered[s][: self.judge_clips]]
        self.judge = fit_judge([c for _, c in fitted], [s for s, _ in fitted])

    @staticmethod
    def _clip(render: Callable, song: Song) -> np.ndarray:
        stereo = to_clip(render(song, SECONDS), song.gain, RATE_HZ)
        return stereo.mean(0).astype(np.float32) / 32767

    def pairs(self, style: str) -> list[tuple[Song, np.ndarray]]:
        """The songs of a style with their rendered clips."""
        return list(zip(self.songs[style], self.rendered[style], strict=True))

    def held_out(self, style: str) -> list[np.ndarray]:
        return self.rendered[style][self.judge_clips :]

    def styles_heard(self, clips: list[np.ndarray]) -> np.ndarray:
        return self.judge.predict(np.stack([features(clip) for clip in clips]))

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str],
        seconds: float = SECONDS,
        batch: int = 24,
        audio: list[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """float32 [channels, samples] at the checkpoint's rate, one a prompt ("" for none)."""
        torch.manual_seed(self.seed)
        steps = round(seconds * 50) + self.model.config.audio_encoder.num_quantizers - 1
        made: list[np.ndarray] = []
        for i in range(0, len(prompts), batch):
            given = {"audio": audio[i : i + batch], "sampling_rate": self.rate} if audio else {}
            inputs = self.processor(
                text=prompts[i : i + batch], padding=True, return_tensors="pt", **given
            )
            if not any(prompts[i : i + batch]):
                inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
            made += list(self.model.generate(**inputs, max_new_tokens=steps).float().numpy())
        return made

    def mono(self, clip: np.ndarray) -> np.ndarray:
        """[channels, samples] at the checkpoint's rate → what the judge hears."""
        return resample_poly(clip.mean(0), RATE_HZ, self.rate).astype(np.float32)

    def reconstructions(self, clips: list[np.ndarray]) -> list[np.ndarray]:
        up = [resample_poly(clip, self.rate, RATE_HZ) for clip in clips]
        audio = torch.from_numpy(np.stack(up)).float()[:, None]
        with torch.no_grad():
            made = self.model.audio_encoder(audio).audio_values[..., : audio.shape[-1]]
        return [self.mono(clip) for clip in made.numpy()]
