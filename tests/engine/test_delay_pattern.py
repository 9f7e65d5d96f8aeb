"""The delay pattern against transformers' own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.musicgen.modeling_musicgen import MusicgenForCausalLM

from musicgen_ui.engine import delay_pattern


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("context_frames", [0, 5])
def test_pattern_is_that_of_transformers(channels: int, context_frames: int) -> None:
    codebooks, frames = 4 * channels, 12
    context = torch.randint(0, 64, (codebooks, context_frames))
    model = SimpleNamespace(
        num_codebooks=codebooks, config=SimpleNamespace(audio_channels=channels)
    )
    given = torch.cat([torch.full((codebooks, 1), 64), context], 1)
    _, mask = MusicgenForCausalLM.build_delay_pattern_mask(model, given, 64, 1 + frames + 3)
    columns = delay_pattern.delayed(context, frames, channels, 64)
    assert torch.equal(columns, mask)


@pytest.mark.parametrize("channels", [1, 2])
def test_undelayed_is_the_inverse(channels: int) -> None:
    codes = torch.randint(0, 64, (4 * channels, 9))
    columns = delay_pattern.delayed(codes, 9, channels, 64)
    assert torch.equal(delay_pattern.undelayed(columns, 0, 9, channels), codes)
    assert torch.equal(delay_pattern.undelayed(columns, 3, 7, channels), codes[:, 3:7])
