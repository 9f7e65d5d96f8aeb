"""From logits to codes: mixed prompts, guidance, temperature, top-k, top-p and the draw.

Each variation has a random generator of its own, drawn ahead of time: one uniform number for each
codebook of each step. The draw is the inverse of the cumulative distribution in the order of the
codebook, so a take depends on its seed alone, never on its row or on other variations, and a
rounding difference changes a code only where it crosses the edge between two codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musicgen_ui.request import GenerationRequest


def uniforms(seed: int, steps: int, codebooks: int) -> Tensor:
    """The random numbers of a take: float32 [steps, codebooks] in [0, 1), on any device alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, codebooks, generator=generator)


@dataclass(frozen=True)
class SamplingParams:
    """How a variation's codes are drawn; a variation may get others between two steps."""

    guidance_scale: float  # 1 is off
    temperature: float
    top_k: int  # 0 is off
    top_p: float  # 0 and 1 are off
    do_sample: bool  # False takes the likeliest code

    @classmethod
    def of(cls, request: GenerationRequest) -> SamplingParams:
        """Those that a request begins with."""
        return cls(
            guidance_scale=request.guidance_scale,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            do_sample=request.do_sample,
        )


@dataclass(frozen=True)
class SamplingTensors:
    """The parameters of several variations, as tensors that broadcast over their logits."""

    guidance_scale: Tensor  # [variations, 1, 1]
    temperature: Tensor  # [variations, 1, 1]
    top_k: Tensor  # int64 [variations, 1, 1], at least 1
    top_p: Tensor  # [variations, 1, 1], 1 is off
    greedy: Tensor  # bool [variations, 1]
    # Known on the host, so that the device is never asked:
    max_top_k: int
    same_top_k: bool  # all variations have `max_top_k`
    any_top_p: bool
    any_sampled: bool  # any variation draws
    any_greedy: bool  # any variation takes the likeliest code

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], codebook_size: int, device: torch.device
    ) -> SamplingTensors:
        """Gathers the parameters of several variations on `device`."""
        values = [_values(p, codebook_size) for p in params]
        top_k = {each["top_k"] for each in values}

        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            numbers = [each[name] for each in values]
            return torch.tensor(numbers, dtype=dtype, device=device).view(-1, 1, 1)

        return cls(
            guidance_scale=column("guidance_scale"),
            temperature=column("temperature"),
            top_k=column("top_k", torch.int64),
            top_p=column("top_p"),
            greedy=column("greedy", torch.bool).squeeze(-1),
            max_top_k=int(max(top_k)),
            same_top_k=len(top_k) == 1,
            any_top_p=any(0 < p.top_p < 1 for p in params),
            any_sampled=any(p.do_sample for p in params),
            any_greedy=not all(p.do_sample for p in params),
        )

    @property
    def _tensors(self) -> dict[str, Tensor]:
        names = ("guidance_scale", "temperature", "top_k", "top_p", "greedy")
        return {name: getattr(self, name) for name in names}

    def first(self, variations: int) -> SamplingTensors:
        """The parameters of the first variations alone, as views."""
        views = {name: tensor[:variations] for name, tensor in self._tensors.items()}
        return replace(self, **views)  # type: ignore[arg-type]

    def write(self, variation: int, params: SamplingParams) -> None:
        """Writes the parameters of one variation, in place, without a wait for the device."""
        for name, value in _values(params, self.max_top_k).items():
            self._tensors[name][variation] = value


def _values(params: SamplingParams, codebook_size: int) -> dict[str, float]:
    """The parameters of a variation as the tensors hold them."""
    return {
        "guidance_scale": params.guidance_scale,
        "temperature": params.temperature,
        "top_k": min(params.top_k or codebook_size, codebook_size),
        "top_p": params.top_p or 1.0,
        "greedy": not params.do_sample,
    }


def mix(logits: Tensor, weights: Sequence[float]) -> Tensor:
    """The cond logits of several prompts as one: sum_i w_i · logits_i, before guidance.

    Args:
        logits: float32 [prompts, codebooks, codebook_size].
        weights: of the prompts; they sum to 1.

    Returns:
        float32 [codebooks, codebook_size]; of a single prompt its logits, bit for bit.
    """
    mixed = logits[0] * weights[0]
    for prompt, weight in zip(logits[1:], weights[1:], strict=True):
        mixed = mixed + prompt * weight
    return mixed


def guide(cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): away from uncond, past cond."""
    return uncond + (cond - uncond) * scale


def finite(logits: Tensor) -> Tensor:
    """Whether all its logits are finite: bool [variations], without asking the device."""
    return logits.sum((1, 2)).isfinite()


def probabilities(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """The distribution that is drawn from: temperature, then top-k, then top-p, as transformers.

    Args:
        logits: float32 [variations, codebooks, codebook_size].
        sampling: of the same variations.

    Returns:
        float32 of the same shape; 0 for the codes that are never drawn.
    """
    scores = logits / sampling.temperature
    threshold = _threshold(scores, sampling)
    return scores.masked_fill(scores < threshold, -torch.inf).softmax(-1)


def _threshold(scores: Tensor, sampling: SamplingTensors) -> Tensor:
    """The least score that may be drawn: [variations, codebooks, 1]."""
    if sampling.same_top_k and not sampling.any_top_p:  # a third of the time of sorting them
        return scores.topk(sampling.max_top_k, sorted=False).values.amin(-1, keepdim=True)
    best = scores.topk(sampling.max_top_k).values  # falling
    kept = sampling.top_k
    if sampling.any_top_p:
        rank = torch.arange(sampling.max_top_k, device=scores.device)
        shares = best.masked_fill(rank >= sampling.top_k, -torch.inf).softmax(-1)
        before = shares.cumsum(-1) - shares
        inside = (before < sampling.top_p) & (shares > 0)
        kept = inside.sum(-1, keepdim=True).clamp_min(1)
    return best.gather(-1, (kept - 1).expand(*best.shape[:-1], 1))


def draw(logits: Tensor, sampling: SamplingTensors, uniform: Tensor) -> Tensor:
    """The next codes, int64 [variations, codebooks].

    Args:
        logits: float32 [variations, codebooks, codebook_size], guidance applied.
        sampling: of the same variations.
        uniform: float32 [variations, codebooks] in [0, 1).
    """
    if not sampling.any_sampled:
        return logits.argmax(-1)
    # In double precision u · total stays below total, so the draw never falls off the end. MPS
    # has no doubles: there the last code is taken instead, once in 2^24 draws.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = probabilities(logits, sampling).to(exact).cumsum(-1)  # rising to 1
    drawn = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)
    drawn = drawn.squeeze(-1).clamp_max(logits.shape[-1] - 1)
    if not sampling.any_greedy:
        return drawn
    return torch.where(sampling.greedy, logits.argmax(-1), drawn)
