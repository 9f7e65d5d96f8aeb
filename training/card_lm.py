"""The decoders in minutes on a GPU: as in train_lm.py, from codes and captions on the device.

A step takes whole windows, the openings of many clips, or windows of 30 s that go on by a clip's
loop; all batches are drawn on the device. The learning rate is held, then falls with the time that
is left. What is written are averages of the weights.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EncodecConfig

from musicgen_ui.engine.delay_pattern import delayed
from training import pack
from training.card_plan import FEWEST_STEPS, LOG_EVERY_S, Clips, Plan
from training.dataset import CUT_FRAMES
from training.fast import code_logits, text_states
from training.lm import corrupted, make_model, widen_to_stereo
from training.tokenizer import make_tokenizer
from training.train_lm import BOOK_WEIGHTS, EARLY_FRAMES, EARLY_WEIGHT, TEXT_SHARE

CAPTION_DROP, NOISE = 0.12, 0.15
OPENING_SHARE, LONG_SHARE = 0.35, 0.12  # of the steps
OPENING_PART = 3  # an opening is so much shorter than a window, and its batch so much larger
HOLD, WARMUP = 0.4, 0.03  # shares of the time
RESUMED_RATE, STEREO_RATE = 0.6, 0.6  # of the learning rate
AVERAGED = 0.995  # decay of the averaged weights, a step
CHECK_EVERY_S = 25.0
HELD_OUT = 64  # clips, the first


@dataclass
class Songs:
    """Codes and captions on the device, and how each clip goes on."""

    codes: Tensor  # int16 [clips, rows, frames]
    tokens: Tensor  # int16 [clips, captions, tokens]
    loops: Tensor  # int64 [clips], frames; 0 where the clip cannot be continued
    changes: Tensor  # int64 [clips], frame of the second section, 0 for none
    steady: Tensor  # int64, the training clips that can be continued
    held_out: int

    @classmethod
    def of(cls, plan: Plan, codes: Tensor, clips: Clips) -> Songs:
        metas = clips.metas[: len(codes)]
        end = codes.shape[2] - CUT_FRAMES
        loops = [meta.loop if meta.change + 2 * meta.loop <= end else 0 for meta in metas]
        held = min(HELD_OUT, len(metas) // 4)
        device = plan.device
        steady = [i for i, loop in enumerate(loops) if loop and i >= held]
        return cls(
            codes,
            clips.tokens[: len(codes)],
            torch.tensor(loops, device=device),
            torch.tensor([meta.change for meta in metas], device=device),
            torch.tensor(steady, device=device),
            held,
        )

    def windows(self, clip: Tensor, start: Tensor, frames: int) -> Tensor:
        """int64 [batch, rows, frames] of clips from their starts, continued by their last loops."""
        end = self.codes.shape[2] - CUT_FRAMES
        at = start[:, None] + torch.arange(frames, device=clip.device)
        loop = self.loops[clip][:, None].clamp(min=1)
        at = torch.where(at >= end, end - loop + (at - end) % loop, at)
        return self.codes[clip[:, None], :, at].transpose(1, 2).long()

    def starts(self, clip: Tensor, frames: int) -> Tensor:
        """Most windows start with the piece; some later, and some so that they see its change."""
        spare = max(0, self.codes.shape[2] - CUT_FRAMES - frames)
        chance = torch.rand(len(clip), device=clip.device)
        anywhere = torch.rand(len(clip), device=clip.device)
        loop = self.loops[clip]
        late = torch.where(loop > 0, loop, spare + 1)
        start = torch.where(chance < 0.2, (anywhere * late).long(), torch.zeros_like(loop))
        seen = (self.changes[clip] > 0) & (chance > 0.6)
        return torch.where(seen | (loop == 0), (anywhere * (spare + 1)).long(), start)


class CardDecoder:
    """One decoder, mono or stereo; a stereo one starts from `mono` and keeps its text encoder."""

    def __init__(
        self,
        plan: Plan,
        codec: EncodecConfig,
        songs: Songs,
        *,
        stereo: bool,
        mono: CardDecoder | None = None,
    ):
        self.plan, self.songs, self.size = plan, songs, plan.preset.decoder
        self.name = "stereo" if stereo else "mono"
        self.channels = 2 if stereo else 1
        words = len(make_tokenizer())
        self.model = make_model(codec, words, self.size, stereo=stereo, loops=False)
        state = pack.read(plan.resume, self.name) if plan.resume else {}
        self.rate = RESUMED_RATE if state else STEREO_RATE if mono else 1.0
        if mono:
            state = widen_to_stereo(mono.best or mono.average) | state
        if state:
            self.model.load_state_dict(state, strict=False)
        else:
            self._forget_unseen_words()
        self.model.to(plan.device).train()
        self.model.audio_encoder.requires_grad_(False)
        self.model.text_encoder.requires_grad_(not stereo)
        self.half = plan.device != "cpu"
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone() for n, p in self.trained.items()}
        self.best: dict[str, Tensor] = {}  # of the averages, by held-out loss
        self.best_loss = math.inf
        text = [p for n, p in self.trained.items() if n.startswith("text_encoder.")]
        of_text = set(map(id, text))
        rest = [p for p in self.trained.values() if id(p) not in of_text]
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.03},
            {"params": [p for p in rest if p.dim() < 2]},
        ]
        groups += [{"params": text, "share": TEXT_SHARE}] if text else []
        self.optimizer = torch.optim.AdamW(
            groups, self.size.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.step = 0
        weights = [w for w in BOOK_WEIGHTS for _ in range(self.channels)]
        self.book_weights = torch.tensor(weights, device=plan.device)
        if plan.device != "cpu":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _forget_unseen_words(self) -> None:
        """Words that no caption has begin, and so stay, without meaning rather than with noise."""
        table = self.model.text_encoder.shared.weight
        seen = torch.zeros(len(table), dtype=torch.bool)
        seen[self.songs.tokens.unique().long().cpu()] = True
        table[~seen] = 0

    # One step

    def batch(self) -> tuple[Tensor, Tensor]:
        """Codes [batch, rows, frames] and caption tokens [batch, tokens]."""
        songs, frames, rows = self.songs, self.size.window, self.size.batch
        kind = torch.rand(()).item()
        opening = kind < OPENING_SHARE
        long = kind > 1 - LONG_SHARE and bool(self.size.long_windows) and len(songs.steady) > 0
        if opening:
            frames //= OPENING_PART
        elif long:
            frames = self.size.long_windows[int(torch.randint(len(self.size.long_windows), ()))]
        rows = max(1, rows * self.size.window // frames)
        device = songs.codes.device
        if long:
            clip = songs.steady[torch.randint(len(songs.steady), (rows,), device=device)]
        else:
            clip = torch.randint(songs.held_out, len(songs.codes), (rows,), device=device)
        start = torch.zeros_like(clip) if opening else songs.starts(clip, frames)
        wording = torch.randint(songs.tokens.shape[1], (rows,), device=device)
        return songs.windows(clip, start, frames), songs.tokens[clip, wording].long()

    def losses(
        self,
        codes: Tensor,
        tokens: Tensor,
        *,
        noise: float = 0.0,
        drop: float = 0.0,
        early: float = 1.0,
    ) -> Tensor:
        """Mean cross-entropy in nats of each row of codes; the first frames count `early` times."""
        start, frames = self.model.config.decoder.pad_token_id, codes.shape[-1]
        pattern = delayed(codes, codes.shape[-1], self.channels, start)
        inputs, targets = pattern[..., :-1], pattern[..., 1:]
        inputs = corrupted(inputs, start, noise) if noise else inputs
        mask = (tokens > 0).float()
        states = text_states(self.model.text_encoder, tokens, mask)
        mask = mask * (torch.rand(len(tokens), 1, device=mask.device) >= drop)
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=self.half):
            logits = code_logits(self.model, inputs, states, mask, frames)
        at = torch.arange(frames, device=codes.device)
        weight = 1 + (early - 1) * (1 - at / EARLY_FRAMES).clamp(min=0)
        weight = weight / (weight.sum() * len(codes))
        losses = []
        for row, scores in enumerate(logits):
            late = row // self.channels
            wanted = targets[:, row, late : late + frames].reshape(-1)
            nats = F.cross_entropy(scores.flatten(0, 1).float(), wanted, reduction="none")
            losses.append((nats.view(len(codes), frames) * weight).sum())
        return torch.stack(losses)

    def update(self, share: float) -> Tensor:
        """One step at this share of the time; the losses, on the device."""
        rate = self.rate * min(1, share / WARMUP + 0.01, max(0.01, (1 - share) / (1 - HOLD)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.size.learning_rate * rate * group.get("share", 1.0)
        codes, tokens = self.batch()
        losses = self.losses(codes, tokens, noise=NOISE, drop=CAPTION_DROP, early=EARLY_WEIGHT)
        self.optimizer.zero_grad()
        (losses * self.book_weights[: len(losses)]).mean().backward()
        weights = list(self.trained.values())
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        self.optimizer.found_inf = (~norm.isfinite()).float()  # such a step changes nothing
        self.optimizer.step()
        self.step += 1
        keep = min(AVERAGED, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - keep)
        return losses.detach()

    # The loop

    def train(self, seconds: float) -> None:
        """Until the seconds are used up; writes averaged weights now and then, and at the end."""
        began = logged = checked = time.time()
        mean, steps, frames = None, 0, self.size.batch * self.size.window
        while (now := time.time()) - began < seconds or self.step < FEWEST_STEPS:
            losses = self.update(min(1.0, (now - began) / max(seconds, 1e-3)))
            mean = losses if mean is None else mean.lerp(losses, 0.05)
            if self.step % 5 == 0 and self.half:
                torch.cuda.synchronize()  # so that the clock tells of work that is done
            if now - logged > LOG_EVERY_S:
                speed = (self.step - steps) / (now - logged)
                self.plan.log(
                    self.name,
                    step=self.step,
                    steps_a_s=speed,
                    frames_a_s=speed * frames,
                    losses=mean,
                )
                logged, steps = now, self.step
            if now - checked > CHECK_EVERY_S:
                self.check()
                checked = time.time()
            if self.plan.save_due:
                self.save()
        self.check()
        self.save()

    def save(self) -> None:
        """The best averages so far; the frozen rest of a stereo one is the mono one's."""
        self.plan.save(self.name, self.best or self.average)

    @torch.no_grad()
    def check(self) -> None:
        """Held-out losses of the averaged weights, with their captions and with others'."""
        now = {name: p.detach().clone() for name, p in self.trained.items()}
        self._load(self.average)
        self.model.eval()
        clip = torch.arange(self.songs.held_out, device=self.songs.codes.device)
        frames = min(self.size.window, self.songs.codes.shape[2] - CUT_FRAMES)
        codes = self.songs.windows(clip, torch.zeros_like(clip), frames)
        tokens = self.songs.tokens[clip, 0].long()
        right, wrong = self.losses(codes, tokens), self.losses(codes, tokens.roll(1, 0))
        self.plan.log(f"{self.name} held out", step=self.step, losses=right, wrong_caption=wrong)
        loss = (right * self.book_weights).mean().item()
        if loss < self.best_loss:  # few songs are soon known by heart
            self.best, self.best_loss = {n: p.clone() for n, p in self.average.items()}, loss
        self.model.train()
        self._load(now)

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        torch._foreach_copy_(list(self.trained.values()), list(weights.values()))
