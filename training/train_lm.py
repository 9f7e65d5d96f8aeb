"""Train the decoder on codes: from scratch with its text encoder, or alone on frozen states.

The loss is cross-entropy over the delay pattern. Input codes are corrupted from the start (their
targets stay clean), so that at sampling time one wrong code does not lead to the next. Captions
are dropped for 12 % of the rows, for guidance. The learning rate is held, then falls to nothing
over the second half of the steps or minutes. State is written every few minutes and on exit; the
weights with the lowest held-out loss are kept as `best.pt`.

Once some music is there it tells style and tempo better than the caption does. So a window's first
frames weigh more, and half of the batches are the openings of many clips instead of a few windows.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MusicgenForConditionalGeneration, PreTrainedTokenizerFast

from musicgen_ui.engine.delay_pattern import delayed
from training.dataset import Dataset
from training.lm import code_logits, corrupted, trained_state
from training.presets import DecoderSize

BOOK_WEIGHTS = (1.3, 1.0, 0.9, 0.8)  # the first codebook carries the rhythm
CAPTION_DROP, CAPTION_TOKENS = 0.12, 40
EARLY_WEIGHT, EARLY_FRAMES = 3.0, 48  # the frames that only words can tell
LONG_SHARE = 0.06  # of the batches: windows up to 30 s
OPENING_PART = 5  # an opening is so much shorter than a window, and its batch so much larger
# Of the learning rate, for the text encoder. At the full one its blocks grew to 130 times its
# embeddings, and 241 of 448 tokens, "slow", "drums" and "no" among them, gave nearly no state: a
# norm of 0.1. At this one, from blocks of zero, that of "slow" is 8.2 after 3,000 steps.
TEXT_SHARE = 0.3
HOLD = 0.5  # share of the run at the full learning rate


@dataclass
class Run:
    """How long, where to, and what is allowed to learn."""

    out: Path
    steps: int
    minutes: float | None = None  # if given, the schedule follows the clock instead
    train_text: bool = True
    noise: float = 0.2  # at most this share of a row's input codes is wrong
    openings: float = 0.5  # share of the batches; 0 for clips that are cut anywhere
    device: str = "cpu"
    save_every_s: float = 240
    check_every_s: float = 600
    seed: int = 0


@dataclass
class Trainer:
    model: MusicgenForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    material: Dataset
    size: DecoderSize
    run: Run
    step: int = 0
    elapsed_s: float = 0.0
    best: float = float("inf")
    _order: list[int] = field(default_factory=list)
    _states: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        run = self.run
        run.out.mkdir(parents=True, exist_ok=True)
        self.rng = random.Random(run.seed + self.step)
        self.model.to(run.device).train()
        self.model.audio_encoder.requires_grad_(False).eval()
        self.model.text_encoder.requires_grad_(run.train_text)
        # Without bfloat16 in its processor torch multiplies it number by number.
        self._half = run.device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        eager = run.device == "cpu" and self._half  # where sdpa takes 20 times as long
        self.model.decoder.set_attn_implementation("eager" if eager else "sdpa")
        self._can_be_long = bool(self.size.long_windows) and any(
            self.material.loops[self.material.held_out :]
        )
        if not any(self.material.fits(c, self.size.window) for c in self._training_clips()):
            raise ValueError(f"No clip is as long as a window of {self.size.window} frames.")
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        words = [p for p in self.model.text_encoder.parameters() if p.requires_grad]
        of_words = set(map(id, words))
        rest = [p for p in self.weights if id(p) not in of_words]
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.02},
            {"params": [p for p in rest if p.dim() < 2]},
        ]
        groups += [{"params": words, "share": TEXT_SHARE}] if words else []
        self.optimizer = torch.optim.AdamW(
            groups, self.size.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._resume()

    # State

    def _resume(self) -> None:
        path = self.run.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.run.device, weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s, self.best = state["step"], state["elapsed_s"], state["best"]
        self.rng = random.Random(self.run.seed + self.step)
        print(f"resumed at step {self.step}, {self.elapsed_s / 60:.0f} min", flush=True)

    def save(self, name: str = "state.pt") -> None:
        """`state.pt` to resume from; any other name holds the weights alone. Never half written."""
        state = {"model": trained_state(self.model)}
        if name == "state.pt":
            state |= {
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "elapsed_s": self.elapsed_s,
                "best": self.best,
            }
        partial = self.run.out / (name + ".tmp")
        torch.save(state, partial)
        partial.replace(self.run.out / name)

    # One step

    def batch(self) -> tuple[Tensor, list[str]]:
        """Codes [batch, rows, frames] and their captions."""
        frames, kind = self.size.window, self.rng.random()
        opening = kind < self.run.openings
        if opening:
            frames //= OPENING_PART
        elif self._can_be_long and kind > 1 - LONG_SHARE:
            frames = self.rng.choice(self.size.long_windows)
        rows = max(1, self.size.batch * self.size.window // frames)
        clips: list[int] = []
        while len(clips) < rows:
            clip = self._next_clip()
            if self.material.fits(clip, frames):
                clips.append(clip)
        starts = [0 if opening else self.material.start(c, frames, self.rng) for c in clips]
        windows = [self.material.window(c, frames, s) for c, s in zip(clips, starts, strict=True)]
        captions = [self.material.caption(clip, self.rng) for clip in clips]
        return torch.from_numpy(np.stack(windows)).to(self.run.device), captions

    def _training_clips(self) -> range:
        return range(self.material.held_out, len(self.material.codes))

    def _next_clip(self) -> int:
        if not self._order:
            self._order = list(self._training_clips())
            self.rng.shuffle(self._order)
        return self._order.pop()

    def losses(
        self,
        codes: Tensor,
        captions: list[str],
        *,
        noise: float = 0.0,
        drop: float = 0.0,
        early: float = 1.0,
    ) -> Tensor:
        """Mean cross-entropy in nats of each row of codes, [rows]; the first frames × `early`."""
        channels = self.model.config.decoder.audio_channels
        start = self.model.config.decoder.pad_token_id
        pattern = delayed(codes, codes.shape[-1], channels, start)
        inputs, targets, frames = pattern[..., :-1], pattern[..., 1:], codes.shape[-1]
        inputs = corrupted(inputs, start, noise) if noise else inputs
        kind = self.run.device.partition(":")[0]
        with torch.autocast(kind, torch.bfloat16, enabled=self._half):
            states, mask = self._text(captions)
            mask = mask * (torch.rand(len(captions), 1, device=mask.device) >= drop)
            logits = code_logits(self.model, inputs, states, mask, frames)
        at = torch.arange(frames, device=codes.device)
        weight = 1 + (early - 1) * (1 - at / EARLY_FRAMES).clamp(min=0)
        return torch.stack(
            [
                (
                    F.cross_entropy(
                        scores.float().transpose(1, 2),
                        targets[:, row, late : late + frames],
                        reduction="none",
                    )
                    * weight
                ).sum()
                / (weight.sum() * len(codes))
                for row, scores in enumerate(logits)
                for late in (row // channels,)
            ]
        )

    def _text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """States [batch, tokens, hidden] and mask; from a cache while the encoder is frozen."""
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=CAPTION_TOKENS,
            return_tensors="pt",
        ).to(self.run.device)
        if self.run.train_text:
            return self.model.text_encoder(**tokens)[0], tokens.attention_mask
        for i, text in enumerate(captions):
            if text not in self._states:
                row = {name: value[i : i + 1] for name, value in tokens.items()}
                with torch.no_grad():
                    self._states[text] = self.model.text_encoder(**row)[0][0]
        return torch.stack([self._states[text] for text in captions]), tokens.attention_mask

    def update(self) -> Tensor:
        """One optimizer step; returns the losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.size.learning_rate * self._rate() * group.get("share", 1.0)
        losses = self.losses(
            *self.batch(), noise=self.run.noise, drop=CAPTION_DROP, early=EARLY_WEIGHT
        )
        channels = self.model.config.decoder.audio_channels
        weights = torch.tensor([w for w in BOOK_WEIGHTS for _ in range(channels)]).to(losses)
        self.optimizer.zero_grad()
        (losses * weights[: len(losses)]).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1
        return losses.detach().cpu()

    def progress(self) -> float:
        """0 at the start, 1 when done."""
        minutes = self.run.minutes
        return self.elapsed_s / 60 / minutes if minutes else self.step / self.run.steps

    def _rate(self) -> float:
        return min(1, (self.step + 1) / 100, max(0.02, (1 - self.progress()) / (1 - HOLD)))

    # The loop

    def train(self) -> None:
        """Until the steps or minutes are used up; then a last check, and the state is kept."""
        mean, saved = None, time.time()
        checked = last = saved
        try:
            while self.progress() < 1:
                losses = self.update()
                mean = losses if mean is None else 0.95 * mean + 0.05 * losses
                now = time.time()
                self.elapsed_s, last = self.elapsed_s + now - last, now
                if self.step % 50 == 0:
                    self._log(kind="train", losses=mean.tolist())
                if now - saved > self.run.save_every_s:
                    self.save()
                    saved = now
                if now - checked > self.run.check_every_s:
                    self.check()
                    checked = last = time.time()
        finally:
            self.save()
        self.check()
        self.save()
        self.save("last.pt")

    @torch.no_grad()
    def check(self) -> None:
        """Held-out loss with the right and with another clip's caption; keeps the best weights."""
        self.model.eval()
        right, wrong = [], []
        window = self.size.window
        clips = [c for c in range(self.material.held_out) if self.material.fits(c, window)]
        for i in range(0, len(clips), self.size.batch):
            some = clips[i : i + self.size.batch]
            windows = [self.material.window(clip, window, 0) for clip in some]
            codes = torch.from_numpy(np.stack(windows)).to(self.run.device)
            captions = [self.material.caption(clip, random.Random(clip)) for clip in some]
            right.append(self.losses(codes, captions))
            wrong.append(self.losses(codes, captions[1:] + captions[:1]))
        self.model.train()
        self.model.audio_encoder.eval()
        means = [torch.stack(losses).mean(0).cpu() for losses in (right, wrong)]
        self._log(kind="held out", losses=means[0].tolist(), wrong_caption=means[1].tolist())
        if means[0].mean().item() < self.best:
            self.best = means[0].mean().item()
            self.save("best.pt")

    def _log(self, **entry) -> None:
        entry = {"step": self.step, "minutes": round(self.elapsed_s / 60, 1), **entry}
        for name, value in entry.items():
            entry[name] = [round(x, 3) for x in value] if isinstance(value, list) else value
        line = json.dumps(entry)
        print(line, flush=True)
        with (self.run.out / "log.jsonl").open("a") as log:
            log.write(line + "\n")
