"""The codec in minutes on a GPU: as in train_codec.py, from clips that lie on the device."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import EncodecModel

from training import pack
from training.card_plan import FEWEST_STEPS, LOG_EVERY_S, Clips, Plan
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
from training.fast import through_codec, to_codes
from training.train_codec import EDGE_FRAMES, SOFT_STYLES

UNQUANTISED, ADVERSARIAL_FROM = 0.06, 0.35  # shares of the time
SOFT_WEIGHT = 2.5  # of soft clips and solo pieces, in how often they are taken
HELD_OUT = 24  # clips, the first


class CardCodec:
    def __init__(self, plan: Plan, clips: Clips):
        self.plan, self.size, self.audio = plan, plan.preset.codec, clips.audio
        self.codec = make_codec(self.size).to(plan.device)
        state = kept_codec(plan.resume) if plan.resume else {}
        self.kept = bool(state)
        if self.kept:
            self.codec.load_state_dict(state)
        self.half = plan.device != "cpu"  # bfloat16; TF32 took as long on an H200
        held = min(HELD_OUT, len(clips.metas) // 4)
        self.held = self.audio[:held]
        weights = [
            0.0 if i < held else SOFT_WEIGHT if meta.style in (*SOFT_STYLES, "solo") else 1.0
            for i, meta in enumerate(clips.metas)
        ]
        self.weights = torch.tensor(weights, device=plan.device)
        self.loss = SpectralLoss(self.size.sampling_rate).to(plan.device)
        self.quantizer = ResidualQuantizer(self.codec, started=self.kept)
        self.step, self.share = 0, 0.0

    def batch(self) -> Tensor:
        """float32 [batch, samples]: windows of the mix, of left or of right."""
        samples, rows, device = self.size.frames * self.size.hop, self.size.batch, self.audio.device
        clip = torch.multinomial(self.weights, rows, replacement=True)
        last = (self.audio.shape[2] - samples) // self.size.hop
        start = torch.randint(last + 1, (rows, 1), device=device) * self.size.hop
        at = start + torch.arange(samples, device=device)
        both = self.audio[clip[:, None], :, at].float() / 32767  # [batch, samples, 2]
        kind = torch.randint(4, (rows, 1), device=device)
        left = torch.where(kind == 0, 1.0, torch.where(kind == 1, 0.0, 0.5))
        return both[..., 0] * left + both[..., 1] * (1 - left)

    def train(self, seconds: float) -> None:
        """Until the seconds are used up, which count from when the kernels are chosen."""
        scale_layers(self.codec, self.batch()[:, None])
        options = {"fused": True, "weight_decay": 1e-4}
        self.parts = list(self.codec.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parts, self.size.learning_rate, betas=(0.85, 0.99), **options
        )
        self.judge = Discriminator().to(self.audio.device)
        self.judge_optimizer = torch.optim.AdamW(
            self.judge.parameters(), self.size.learning_rate / 2, betas=(0.5, 0.9), **options
        )
        self._warm_up()
        began = logged = time.time()
        mean: dict[str, Tensor] = {}
        steps = self.step
        while (now := time.time()) - began < seconds or self.step < FEWEST_STEPS:
            self.share = min(1.0, (now - began) / seconds)
            for name, value in self.update().items():
                mean[name] = mean[name].lerp(value, 0.05) if name in mean else value
            if self.step % 20 == 0 and self.audio.is_cuda:
                torch.cuda.synchronize()  # so that the clock tells of work that is done
            if now - logged > LOG_EVERY_S:
                self.plan.log(
                    "codec", step=self.step, steps_a_s=(self.step - steps) / (now - logged), **mean
                )
                logged, steps = now, self.step
            if self.plan.save_due:
                self.save()
        self.parts, self.optimizer, self.judge_optimizer, self.judge = [], None, None, None

    def save(self) -> None:
        """Without the codebooks' running sums, which follow from the rest."""
        state = self.codec.state_dict()
        kept = {name: value for name, value in state.items() if not name.endswith("embed_avg")}
        self.plan.save("codec", kept, int8=False)

    def _warm_up(self) -> None:
        """A pass of each kind, in which the device chooses its kernels; that takes many seconds.

        Were they part of the schedule, the stages that go by its shares would be over at its first
        steps.
        """
        began = time.time()
        self.update()
        audio = self._without_edges(self.batch())
        sum(self._adversarial(audio, audio.clone().requires_grad_())).backward()
        if self.audio.is_cuda:
            torch.cuda.synchronize()
        self.plan.log("codec", warm_up_s=time.time() - began)

    def update(self) -> dict[str, Tensor]:
        """One step of the codec and, when it has joined, of the discriminator; losses on device."""
        rate = min(1, (self.step + 1) / 80) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * self.share))
        for group in self.optimizer.param_groups:
            group["lr"] = self.size.learning_rate * rate
        audio = self.batch()
        latent = through_codec(self.codec.encoder.layers, audio[:, None], self.half)
        commitment = audio.new_zeros(())
        if not self.quantizer.started and self.share > UNQUANTISED:
            self._start_codebooks()
        if self.quantizer.started:
            latent, commitment = self.quantizer(latent)
        made = through_codec(self.codec.decoder.layers, latent, self.half)[:, 0]
        audio, made = self._without_edges(audio), self._without_edges(made)
        terms = self.loss(audio, made)
        total = sum(TERM_WEIGHTS[name] * term for name, term in terms.items()) + 0.25 * commitment
        if self.share > ADVERSARIAL_FROM:
            fooled, matching = self._adversarial(audio, made)
            terms |= {"fooled": fooled, "matching": matching}
            total = total + 0.15 * fooled + 0.8 * matching
        self._apply(self.optimizer, total, self.parts)
        self.step += 1
        return {name: term.detach().float() for name, term in terms.items()}

    def _without_edges(self, audio: Tensor) -> Tensor:
        edge = EDGE_FRAMES * self.size.hop
        return audio[:, edge:-edge]

    def _adversarial(self, audio: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        """A step of the discriminator, then what the codec pays to it."""
        some, made_some = audio[::4], made[::4]  # a window costs ten times as much as the codec's
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=self.half):
            loss = discriminator_loss(self.judge, some, made_some)
        self._apply(self.judge_optimizer, loss, list(self.judge.parameters()))
        self.judge.requires_grad_(False)
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=self.half):
            losses = adversarial_losses(self.judge, some, made_some)
        self.judge.requires_grad_(True)
        return losses

    @staticmethod
    def _apply(optimizer: torch.optim.Optimizer, loss: Tensor, weights: list) -> None:
        """A step of which a gradient that is not finite makes nothing."""
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 2.0)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()

    @torch.no_grad()
    def _start_codebooks(self) -> None:
        wanted = 24 * self.size.codebook_size
        batches = -(-wanted // (self.size.batch * self.size.frames))
        layers = self.codec.encoder.layers
        latents = (through_codec(layers, self.batch()[:, None], self.half) for _ in range(batches))
        vectors = torch.cat([z.transpose(1, 2).flatten(0, 1) for z in latents])
        self.plan.log("codebooks", variance_left=self.quantizer.start(vectors))

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Figures of reconstructions of the held-out clips' mono mix, in float32."""
        audio = self.held.float().mean(1) / 32767
        codes = to_codes(self.codec, audio)
        latent = self.codec.quantizer.decode(codes.transpose(0, 1))
        made = through_codec(self.codec.decoder.layers, latent)[:, 0]
        used = [len(codes[:, row].unique()) for row in range(codes.shape[1])]
        distance = log_mel_distance_db(self.loss, audio, made).item()
        return {"log_mel_db": distance, "si_snr_db": si_snr_db(audio, made).item(), "used": used}


def kept_codec(folder: Path) -> dict[str, Tensor]:
    """The state of the codec that a run kept, complete; empty where it kept none."""
    return with_averages(pack.read(folder, "codec"))


def with_averages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `CardCodec.save` wrote, complete."""
    sums = {
        name + "_avg": value * state[name.replace("embed", "cluster_size")][:, None]
        for name, value in state.items()
        if name.endswith("codebook.embed")
    }
    return state | sums


@torch.no_grad()
def encode_all(
    plan: Plan, codec: EncodecModel, audio: Tensor, seconds: float, *, stereo: bool, batch: int = 32
) -> Tensor:
    """int16 [clips, rows, frames] of the clips from the first on, as many as the seconds allow."""
    began, out = time.time(), []
    torch.set_float32_matmul_precision("highest")  # near ties between codes fall as in the app
    batch = max(1, batch // 2) if stereo else batch
    for i in range(0, len(audio), batch):
        clips = audio[i : i + batch].float() / 32767
        if stereo:
            sides = to_codes(codec, clips.flatten(0, 1)).unflatten(0, (-1, 2))
            out.append(sides.transpose(1, 2).flatten(1, 2).to(torch.int16))
        else:
            out.append(to_codes(codec, clips.mean(1)).to(torch.int16))
        if plan.device != "cpu" and i % (8 * batch) == 0:
            torch.cuda.synchronize()
        if time.time() - began > seconds and len(out) > 1:
            break
    torch.set_float32_matmul_precision("high")
    codes = torch.cat(out)
    plan.log("encoded", clips=len(codes), stereo=stereo, took_s=time.time() - began)
    return codes
