"""How far a precision's next-token distributions are from float32's, over a minute of music.

Takes are sampled in float32; then both decoders read the same codes, and their distributions are
compared at each step: KL divergence in nats, and how often the likeliest code is the same. Both for
the cond logits and after guidance, from which codes are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_ui.backends.local import load_scheduler
from musicgen_ui.benchmark.runners import GUIDANCE_SCALE, place_of
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.engine.variation import Variation
from musicgen_ui.request import GenerationRequest

PROMPTS = ("techno with a hard kick", "happy acoustic guitar folk")
LIMIT = 0.01  # nats: a precision is the default only below it


@dataclass(frozen=True)
class Distance:
    """Means over all positions and codebooks."""

    kl: float  # nats
    top_1: float  # share of positions where the likeliest code is the same
    guided_kl: float
    guided_top_1: float

    def __str__(self) -> str:
        return (
            f"KL divergence {self.kl:.5f} nats, top-1 agreement {self.top_1:.3f}; after guidance "
            f"{self.guided_kl:.5f} and {self.guided_top_1:.3f}"
        )


def measure(source: Source, precision: str, device: str = "cpu", minute_s: float = 60) -> Distance:
    """The distance of a precision from float32 on a checkpoint, over `minute_s` of music."""
    exact, other = (_load(source, each, device) for each in ("float32", precision))
    lengths_s = [minute_s / len(PROMPTS)] * len(PROMPTS)
    found = [
        _compare(exact, other, _take(exact, prompt, duration_s, seed))
        for seed, (prompt, duration_s) in enumerate(zip(PROMPTS, lengths_s, strict=True))
    ]
    return Distance(*torch.cat(found).mean(0).tolist())


def _load(source: Source, precision: str, device: str) -> Scheduler:
    return load_scheduler(source, place_of(device, precision), 1, lambda note: None)


def _take(batch: Scheduler, prompt: str, duration_s: float, seed: int) -> Variation:
    """A finished job, for its columns."""
    request = GenerationRequest(
        prompt, duration_s=duration_s, seed=seed, guidance_scale=GUIDANCE_SCALE
    )
    batch.submit(request)
    batch.step()
    (job,) = batch.running
    while batch.step():
        pass
    return job


@torch.inference_mode()
def _compare(exact: Scheduler, other: Scheduler, job: Variation) -> Tensor:
    """[positions, 4]: a `Distance` for each column that has every codebook."""
    columns, rows = job.window.columns, []
    conditions = [exact.conditioner.states(job.request.prompt), None]
    batches = [
        (batch, batch.decoder.sequence(conditions, columns.shape[1])) for batch in (exact, other)
    ]
    for at in range(columns.shape[1] - 1):
        seen = []
        for batch, sequence in batches:
            cond, uncond = batch.decoder.step(columns[None, :, at], [sequence])
            seen.append((cond, uncond + (cond - uncond) * GUIDANCE_SCALE))
        if at >= len(columns):  # the start tokens are behind
            rows.append(torch.cat([_pair(*both) for both in zip(*seen, strict=True)]))
    return torch.stack(rows)


def _pair(exact: Tensor, other: Tensor) -> Tensor:
    """KL divergence and top-1 agreement of logits [codebooks, codes]."""
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return torch.stack([kl, (p.argmax(-1) == q.argmax(-1)).float().mean()])
