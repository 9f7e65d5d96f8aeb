"""transformers' decoder, stepped by hand while its prompts and guidance change."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from musicgen_ui.engine.scheduler import Scheduler
from tests.helpers.engine import ROCK, load


def written(columns: Tensor, frames: int, channels: int) -> Tensor:
    """Which codes of columns[:, 1:] the decoder wrote: no start tokens."""
    at, delay = torch.arange(columns.shape[1] - 1), torch.arange(len(columns))[:, None] // channels
    return (delay <= at) & (at < delay + frames)


@torch.no_grad()
def steered(folder: Path, batch: Scheduler, script: dict[int, tuple], frames: int) -> Tensor:
    """Greedy columns of transformers' decoder, a cache a row, stepped and mixed by hand."""
    model, channels = load(folder), batch.codec.channels
    count = 1 + frames + (model.decoder.num_codebooks - 1) // channels
    columns = torch.full((model.decoder.num_codebooks, count), model.decoder.config.pad_token_id)
    inside = written(columns, frames, channels)
    rows: dict[str | None, EncoderDecoderCache] = {}
    weights: dict[str, float] = {}
    for step in range(count - 1):
        if step in script:
            prompts, scale = script[step]
            names = [prompt for prompt, _ in prompts] + [None] * (scale > 1)
            new = EncoderDecoderCache(DynamicCache(), DynamicCache())
            past = rows[max(weights, key=weights.__getitem__)] if rows else new
            rows = {name: copy.deepcopy(rows.get(name, past)) for name in names}
            weights = dict(prompts)
            for cache in rows.values():
                cache.cross_attention_cache = DynamicCache()
                cache.is_updated = dict.fromkeys(cache.is_updated, False)
        logits = {}
        for name, cache in rows.items():
            states = batch.conditioner.states(name or ROCK)[None] * bool(name)
            out = model.decoder(
                columns[:, step : step + 1],
                encoder_hidden_states=states,
                past_key_values=cache,
                use_cache=True,
            )
            logits[name] = out.logits[:, -1]
        cond = sum(weight * logits[name] for name, weight in weights.items())
        uncond = logits.get(None, cond)
        drawn = (uncond + scale * (cond - uncond)).argmax(-1)
        columns[:, step + 1] = torch.where(inside[:, step], drawn, columns[:, step + 1])
    return columns
