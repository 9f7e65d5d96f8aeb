"""Melodies, and batches on tiny checkpoints that follow them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, MusicgenMelodyForConditionalGeneration

from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.scheduler import Scheduler


def tune(*notes: int, note_s: float = 0.5, rate: int = 32_000) -> Clip:
    """Notes one after the other, semitones above middle C, each with an octave."""
    t = np.arange(round(note_s * rate)) / rate
    waves = []
    for note in notes:
        hz = 261.63 * 2 ** (note / 12)
        waves.append(0.3 * np.sin(2 * np.pi * hz * t) + 0.1 * np.sin(4 * np.pi * hz * t))
    return Clip(np.concatenate(waves)[None].astype(np.float32), rate)


SCALE, DOWN = tune(0, 2, 4, 5, 7, 9, 11, 12), tune(11, 7, 5, 2)


def melody_batch(folder: Path, **options: Any) -> Scheduler:
    model = MusicgenMelodyForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Scheduler(model, tokenizer, checkpoint=folder.name, **options)


def needs_generate() -> None:
    """Skips a test where `generate` hears neither words nor melody, as in transformers 5.17.

    It drops them once there is a cache, which there is before the first step.
    """
    step = MusicgenMelodyForConditionalGeneration.prepare_inputs_for_generation
    if "is_first_iteration" not in inspect.signature(step).parameters:
        pytest.skip("this transformers' generate hears neither words nor melody")


def generated(
    model: Any,
    folder: Path,
    prompt: str,
    chroma: torch.Tensor | None,
    guidance_scale: float,
    frames: int,
    context: torch.Tensor | None = None,
) -> torch.Tensor:
    """transformers' greedy codes [codebooks, frames], the context's included."""
    needs_generate()
    inputs = dict(AutoTokenizer.from_pretrained(folder)([prompt], return_tensors="pt"))
    if not prompt:
        inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    if chroma is not None:
        one_hot = chroma if chroma.ndim == 2 else torch.nn.functional.one_hot(chroma, 12)
        inputs["input_features"] = one_hot.float()[None]
    if context is not None:
        inputs["decoder_input_ids"] = context
    seen: list[torch.Tensor] = []

    def spy(codes: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(codes[0, 0])
        return decode(codes, **kwargs)

    decode, model.audio_encoder.decode = model.audio_encoder.decode, spy
    try:
        model.generate(
            **inputs,
            do_sample=False,
            guidance_scale=guidance_scale,
            max_new_tokens=frames + 3,
        )
    finally:
        model.audio_encoder.decode = decode
    return seen[0] if len(seen) == 1 else torch.stack(seen, 1).flatten(0, 1)
