"""Train the codec on rendered audio, or its decoder alone on frozen codes.

From scratch the first tenth of the run passes the latent unquantised, then k-means starts the
codebooks. With a discriminator (large presets) it joins after a third. `decoder_only` keeps
encoder and codebooks, and so every code: the cheapest gain there is, free for the decoder of
codes. The mono mix, left and right are all trained on, soft styles more often than others: they
were the last that the judge knew again. Resumes from `codec_state.pt`.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.codec import ResidualQuantizer, make_codec, scale_layers
from training.codec_losses import (
    TERM_WEIGHTS,
    Discriminator,
    SpectralLoss,
    adversarial_losses,
    discriminator_loss,
    log_mel_distance_db,
    si_snr_db,
)
from training.presets import CodecSize

EDGE_FRAMES = 2  # at both ends of a window, where the padding is heard
UNQUANTISED, ADVERSARIAL_FROM = 0.1, 0.35  # shares of the run
HELD_OUT = 12  # clips, the first of the first part
SOFT_STYLES = ("piano ballad", "jazz", "flute")
SOFT_SHARE = 1 / 3  # of the windows that are taken from soft clips, beside those by chance


@dataclass
class CodecTrainer:
    size: CodecSize
    audio: list[np.ndarray]  # int16 [clips, 2, samples] a part
    out: Path
    steps: int
    minutes: float | None = None
    decoder_only: bool = False
    device: str = "cpu"
    init: Path | None = None
    save_every_s: float = 240
    soft: list[tuple[int, int]] = field(default_factory=list)  # part and clip of soft styles

    def __post_init__(self):
        held_out = {(0, clip) for clip in range(HELD_OUT)}
        self.soft = [place for place in self.soft if place not in held_out]
        self.out.mkdir(parents=True, exist_ok=True)
        self.codec = make_codec(self.size).to(self.device)
        self.quantizer = ResidualQuantizer(self.codec)
        self.loss = SpectralLoss(self.size.sampling_rate).to(self.device)
        self.rng = np.random.default_rng()
        if self.init:
            state = torch.load(self.init, map_location=self.device, weights_only=True)
            self.codec.load_state_dict(state.get("model", state))
            self.quantizer.started = True
        else:
            scale_layers(self.codec, self.batch()[:, None])
        part = self.codec.decoder if self.decoder_only else self.codec
        self.weights = list(part.parameters())
        self.optimizer = torch.optim.AdamW(
            self.weights, self.size.learning_rate, betas=(0.85, 0.99), weight_decay=1e-4
        )
        self.judge = Discriminator().to(self.device) if self.size.discriminator else None
        if self.judge:
            rate = self.size.learning_rate / 2
            weights = self.judge.parameters()
            self.judge_optimizer = torch.optim.AdamW(weights, rate, betas=(0.5, 0.9))
        self.average = {k: v.clone() for k, v in self.codec.decoder.state_dict().items()}
        self.step, self.elapsed_s = 0, 0.0
        self._resume()

    def _state(self) -> dict:
        state = {
            "model": self.codec.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "started": self.quantizer.started,
        }
        if self.judge:
            state |= {
                "judge": self.judge.state_dict(),
                "judge_optimizer": self.judge_optimizer.state_dict(),
            }
        return state

    def _resume(self) -> None:
        path = self.out / "codec_state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.codec.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.quantizer.started = state["average"], state["started"]
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        if self.judge:
            self.judge.load_state_dict(state["judge"])
            self.judge_optimizer.load_state_dict(state["judge_optimizer"])

    def save(self) -> None:
        partial = self.out / "codec_state.tmp"
        torch.save(self._state(), partial)
        partial.replace(self.out / "codec_state.pt")

    def batch(self) -> Tensor:
        """float32 [batch, samples]: random windows of the mix, left or right, none silent."""
        samples, windows = self.size.frames * self.size.hop, []
        while len(windows) < self.size.batch:
            part, clip = self._clip()
            clips = self.audio[part]
            last = (clips.shape[2] - samples) // self.size.hop
            start = int(self.rng.integers(0, last + 1)) * self.size.hop
            window = clips[clip][:, start : start + samples].astype(np.float32) / 32767
            side = int(self.rng.integers(4))
            window = window.mean(0) if side > 1 else window[side]
            if np.abs(window).max() > 1e-3:
                windows.append(window)
        return torch.from_numpy(np.stack(windows)).to(self.device)

    def _clip(self) -> tuple[int, int]:
        if self.soft and self.rng.random() < SOFT_SHARE:
            return self.soft[int(self.rng.integers(len(self.soft)))]
        part = int(self.rng.integers(len(self.audio)))
        count = len(self.audio[part])
        first = HELD_OUT if part == 0 and count > 2 * HELD_OUT else 0
        return part, int(self.rng.integers(first, count))

    def progress(self) -> float:
        return self.elapsed_s / 60 / self.minutes if self.minutes else self.step / self.steps

    def latent(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Quantised latent of [batch, samples] and its commitment loss."""
        if self.decoder_only:
            with torch.no_grad():
                codes = self.codec.quantizer.encode(
                    self.codec.encoder(audio[:, None]), self.codec.config.target_bandwidths[0]
                )
                return self.codec.quantizer.decode(codes), audio.new_zeros(())
        latent = self.codec.encoder(audio[:, None])
        if not self.quantizer.started and self.progress() > UNQUANTISED:
            self._start_codebooks()
        if self.quantizer.started:
            return self.quantizer(latent)
        return latent, audio.new_zeros(())

    @torch.no_grad()
    def _start_codebooks(self) -> None:
        wanted = 24 * self.size.codebook_size
        batches = -(-wanted // (self.size.batch * self.size.frames))
        latents = (self.codec.encoder(self.batch()[:, None]) for _ in range(batches))
        vectors = torch.cat([z.transpose(1, 2).flatten(0, 1) for z in latents])
        left = self.quantizer.start(vectors)
        print(f"codebooks started by k-means; {left:.3f} of the variance left", flush=True)

    def update(self) -> dict[str, float]:
        """One optimizer step of the codec and, when it has joined, of the discriminator."""
        share = max(0.02, 0.5 + 0.5 * math.cos(math.pi * min(1, self.progress())))
        for group in self.optimizer.param_groups:
            group["lr"] = self.size.learning_rate * min(1, (self.step + 1) / 80) * share
        audio = self.batch()
        latent, commitment = self.latent(audio)
        made = self.codec.decoder(latent)[:, 0, : audio.shape[-1]]
        edge = EDGE_FRAMES * self.size.hop
        audio, made = audio[:, edge:-edge], made[:, edge:-edge]
        terms = self.loss(audio, made)
        total = sum(TERM_WEIGHTS[name] * term for name, term in terms.items()) + 0.25 * commitment
        if self.judge and self.progress() > ADVERSARIAL_FROM:
            self.judge_optimizer.zero_grad()
            discriminator_loss(self.judge, audio, made).backward()
            self.judge_optimizer.step()
            fooled, matching = adversarial_losses(self.judge, audio, made)
            terms |= {"fooled": fooled, "matching": matching}
            total = total + 0.15 * fooled + 0.8 * matching
        self.optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 2.0)
        self.optimizer.step()
        self.step += 1
        keep = min(0.995, self.step / (self.step + 50))
        for name, value in self.codec.decoder.state_dict().items():
            self.average[name].lerp_(value, 1 - keep)
        return {name: term.item() for name, term in terms.items()}

    def train(self) -> Path:
        """Until steps or minutes are used up; writes codec.pt."""
        mean: dict[str, float] = {}
        saved = last = time.time()
        try:
            while self.progress() < 1:
                for name, value in self.update().items():
                    mean[name] = 0.96 * mean.get(name, value) + 0.04 * value
                now = time.time()
                self.elapsed_s, last = self.elapsed_s + now - last, now
                if self.step % 100 == 0:
                    self._log(mean)
                if now - saved > self.save_every_s:
                    self.save()
                    saved = now
        finally:
            self.save()
        if self.decoder_only:
            self.codec.decoder.load_state_dict(self.average)
        self.save()
        torch.save(self.codec.state_dict(), self.out / "codec.pt")
        self._log(held_out(self.codec, self.loss, self.audio[0][:HELD_OUT], self.device))
        return self.out / "codec.pt"

    def _log(self, values: dict[str, float]) -> None:
        rounded = {name: round(value, 4) for name, value in values.items()}
        entry = {"step": self.step, "minutes": round(self.elapsed_s / 60, 1), **rounded}
        print(json.dumps(entry), flush=True)
        with (self.out / "codec_log.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")


@torch.no_grad()
def held_out(codec, loss: SpectralLoss, clips: np.ndarray, device: str) -> dict[str, float]:
    """Figures of reconstructions of int16 [clips, 2, samples], of their mono mix."""
    audio = torch.from_numpy(clips.astype(np.float32).mean(1) / 32767).to(device)
    made = codec.eval()(audio[:, None]).audio_values[:, 0, : audio.shape[-1]]
    terms = {name: term.item() for name, term in loss(audio, made).items()}
    distance = log_mel_distance_db(loss, audio, made).item()
    return {**terms, "log_mel_db": distance, "si_snr_db": si_snr_db(audio, made).item()}
