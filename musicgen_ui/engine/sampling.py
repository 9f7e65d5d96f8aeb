"""From logits to codes: guidance, temperature, top-k, top-p and the draw, for all jobs at once.

Each job draws from a generator of its own, ahead of time: one uniform number for each codebook of
each step. The draw is the inverse of the cumulative distribution in the order of the codebook, so
a take depends on its seed alone, never on its row or its neighbours, and a rounding difference
moves a draw only where it crosses an edge between two codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musicgen_ui.request import GenerationRequest


def uniforms(seed: int, steps: int, codebooks: int) -> Tensor:
    """What a take draws from: float32 [steps, codebooks] in [0, 1), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, codebooks, generator=generator)


@dataclass(frozen=True)
class Settings:
    """The sampling settings of the jobs in flight, as tensors that broadcast over their logits."""

    guidance_scale: Tensor  # [jobs, 1, 1]
    temperature: Tensor  # [jobs, 1, 1]
    top_k: Tensor  # int64 [jobs, 1, 1], at least 1
    top_p: Tensor  # [jobs, 1, 1], 1 is off
    greedy: Tensor  # bool [jobs, 1]
    # Known here, so that the device is never asked:
    candidates: int  # the largest top_k
    alike: bool  # all jobs have that one
    nucleus: bool  # any job uses top_p
    draws: bool  # any job draws
    chooses: bool  # any job takes the likeliest code

    @classmethod
    def of(
        cls, requests: list[GenerationRequest], codebook_size: int, device: torch.device
    ) -> Settings:
        """Gathers the settings of `requests` on `device`."""
        top_k = [min(r.top_k or codebook_size, codebook_size) for r in requests]

        def column(values: list, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)

        return cls(
            guidance_scale=column([r.guidance_scale for r in requests]),
            temperature=column([r.temperature for r in requests]),
            top_k=column(top_k, torch.int64),
            top_p=column([r.top_p or 1.0 for r in requests]),
            greedy=column([not r.do_sample for r in requests], torch.bool).squeeze(-1),
            candidates=max(top_k),
            alike=len(set(top_k)) == 1,
            nucleus=any(0 < r.top_p < 1 for r in requests),
            draws=any(r.do_sample for r in requests),
            chooses=not all(r.do_sample for r in requests),
        )

    def of_first(self, jobs: int) -> Settings:
        """The settings of the first jobs alone, as views."""
        tensors = ("guidance_scale", "temperature", "top_k", "top_p", "greedy")
        return replace(self, **{name: getattr(self, name)[:jobs] for name in tensors})


def guide(wanted: Tensor, unwanted: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): away from `unwanted`, towards `wanted`."""
    return unwanted + (wanted - unwanted) * scale


def finite(logits: Tensor) -> Tensor:
    """Whether all logits of a job are numbers: bool [jobs], without asking the device."""
    return logits.sum((1, 2)).isfinite()


def probabilities(logits: Tensor, settings: Settings) -> Tensor:
    """The distribution that is drawn from: temperature, then top-k, then top-p, as transformers.

    Args:
        logits: float32 [jobs, codebooks, codebook_size].
        settings: of the same jobs.

    Returns:
        float32 of the same shape; 0 for the codes that are never drawn.
    """
    scores = logits / settings.temperature
    edge = _edge(scores, settings)
    return scores.masked_fill(scores < edge, -torch.inf).softmax(-1)


def _edge(scores: Tensor, settings: Settings) -> Tensor:
    """The least score that may be drawn: [jobs, codebooks, 1]."""
    if settings.alike and not settings.nucleus:  # a third of the time of sorting them
        return scores.topk(settings.candidates, sorted=False).values.amin(-1, keepdim=True)
    best = scores.topk(settings.candidates).values  # falling
    kept = settings.top_k
    if settings.nucleus:
        rank = torch.arange(settings.candidates, device=scores.device)
        shares = best.masked_fill(rank >= settings.top_k, -torch.inf).softmax(-1)
        before = shares.cumsum(-1) - shares
        inside = (before < settings.top_p) & (shares > 0)
        kept = inside.sum(-1, keepdim=True).clamp_min(1)
    return best.gather(-1, (kept - 1).expand(*best.shape[:-1], 1))


def draw(logits: Tensor, settings: Settings, uniform: Tensor) -> Tensor:
    """The next codes, int64 [jobs, codebooks].

    Args:
        logits: float32 [jobs, codebooks, codebook_size], guidance applied.
        settings: of the same jobs.
        uniform: float32 [jobs, codebooks] in [0, 1).
    """
    if not settings.draws:
        return logits.argmax(-1)
    # In double precision u · total stays below total, so the draw never falls off the end. MPS
    # has no doubles: there the last code stands in, once in 2^24 draws.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    shares = probabilities(logits, settings).to(exact).cumsum(-1)  # rising to 1
    drawn = torch.searchsorted(shares, uniform[..., None] * shares[..., -1:], right=True)
    drawn = drawn.squeeze(-1).clamp_max(logits.shape[-1] - 1)
    return torch.where(settings.greedy, logits.argmax(-1), drawn) if settings.chooses else drawn
