"""Sections through transformers' `generate`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import load


@torch.no_grad()
def switched(folder: Path, request: GenerationRequest, frames: int) -> torch.Tensor:
    """Greedy codes of transformers' decoder, stepped by hand."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    channels = model.decoder.config.audio_channels
    codebooks = model.decoder.num_codebooks
    shifts = [row // channels for row in range(codebooks)]
    columns = torch.full((codebooks, 1 + frames + shifts[-1]), model.decoder.config.pad_token_id)
    caches = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2)]
    words = None
    for step in range(columns.shape[1] - 1):
        now = request.words(min(step, frames - 1) / 50)
        if now != words:
            words = now
            tokens = tokenizer([words], return_tensors="pt")
            states = model.text_encoder(**tokens)[0]
            if hasattr(model, "enc_to_dec_proj"):
                states = model.enc_to_dec_proj(states)
            for cache in caches:
                cache.cross_attention_cache = DynamicCache()
                cache.is_updated = dict.fromkeys(cache.is_updated, False)
        wanted, unwanted = (
            model.decoder(
                columns[:, step : step + 1],
                encoder_hidden_states=heard,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            for cache, heard in zip(caches, (states, 0 * states), strict=True)
        )
        drawn = (unwanted + request.guidance_scale * (wanted - unwanted)).argmax(-1)
        for row, shift in enumerate(shifts):
            if shift <= step < shift + frames:
                columns[row, step + 1] = drawn[row]
    return torch.stack([columns[r, 1 + s : 1 + s + frames] for r, s in enumerate(shifts)])
