"""Melody checkpoints: a tune that is followed, against transformers' `generate` and audiocraft.

transformers' `generate` is right where a prompt is given. Without one it encodes a start token of
the decoder as if it were text; here, as in audiocraft, no prompt is a single state of zeros, which
the reference is given as a masked token.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import PIANO, ROCK, make_batch, noise, run_job
from transformers import AutoTokenizer, MusicgenMelodyForConditionalGeneration

from musicgen_ui.engine import delay
from musicgen_ui.engine.batch import Batch, stream
from musicgen_ui.engine.chroma import Extractor
from musicgen_ui.engine.events import Chunk, Event, Finished
from musicgen_ui.request import Clip, GenerationRequest, RequestError

WINDOW = 235  # columns of chroma in 30 s


def tune(*notes: int, note_s: float = 0.5, rate: int = 32_000) -> Clip:
    """Notes one after the other, semitones above middle C, each with an octave."""
    t = np.arange(round(note_s * rate)) / rate
    waves = []
    for note in notes:
        hz = 261.63 * 2 ** (note / 12)
        waves.append(0.3 * np.sin(2 * np.pi * hz * t) + 0.1 * np.sin(4 * np.pi * hz * t))
    return Clip(np.concatenate(waves)[None].astype(np.float32), rate)


SCALE, DOWN = tune(0, 2, 4, 5, 7, 9, 11, 12), tune(11, 7, 5, 2)


@pytest.fixture(scope="module", params=["melody", "stereo_melody"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module", params=["eager", "graph"])
def batch(folder: Path, request: pytest.FixtureRequest) -> Batch:
    """Both ways of stepping; the graph's as it runs before it is captured."""
    return melody_batch(folder, graphs=request.param == "graph")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return MusicgenMelodyForConditionalGeneration.from_pretrained(folder).eval()


def melody_batch(folder: Path, **options: Any) -> Batch:
    model = MusicgenMelodyForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Batch(model, tokenizer, checkpoint=folder.name, **options)


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
    inputs = dict(AutoTokenizer.from_pretrained(folder)([prompt], return_tensors="pt"))
    if not prompt:
        inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    if chroma is not None:
        inputs["input_features"] = torch.nn.functional.one_hot(chroma, 12).float()[None]
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


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("melody", [SCALE, None])
@pytest.mark.parametrize("prompt", [ROCK, ""])
def test_greedy_equals_generate(folder, batch, reference, prompt, melody, guidance_scale):
    request = GenerationRequest(
        prompt, melody=melody, duration_s=0.6, guidance_scale=guidance_scale, do_sample=False
    )
    _, codes, _ = run_job(batch, request)
    chroma = Extractor()(melody) if melody else None
    expected = generated(reference, folder, prompt, chroma, guidance_scale, 30)
    assert len(expected.unique()) > 10  # a sequence that says something
    assert torch.equal(codes, expected)


def test_two_melodies_give_two_results(batch):
    request = GenerationRequest(ROCK, duration_s=0.6, do_sample=False)
    takes = [
        run_job(batch, dataclasses.replace(request, melody=melody))[1]
        for melody in (None, SCALE, DOWN)
    ]
    assert not torch.equal(takes[0], takes[1])
    assert not torch.equal(takes[0], takes[2])
    assert not torch.equal(takes[1], takes[2])
