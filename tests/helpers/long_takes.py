"""Takes longer than a window, through transformers' `generate` window by window."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from tests.helpers.engine import ROCK


def generated(
    model: MusicgenForConditionalGeneration, folder: Path, known: torch.Tensor, frames: int
) -> torch.Tensor:
    """transformers' greedy codes of a window that goes on from `known` codes."""
    seen, decode = [], model.audio_encoder.decode

    def spy(codes: torch.Tensor, **kwargs: object) -> object:
        seen.append(codes[0, 0])
        return decode(codes, **kwargs)

    model.audio_encoder.decode = spy
    try:
        model.generate(
            **AutoTokenizer.from_pretrained(folder)([ROCK], return_tensors="pt").to(model.device),
            decoder_input_ids=known,
            do_sample=False,
            guidance_scale=3.0,
            max_new_tokens=frames - known.shape[1] + 3,
        )
    finally:
        model.audio_encoder.decode = decode
    return seen[0] if len(seen) == 1 else torch.stack(seen, 1).flatten(0, 1)
