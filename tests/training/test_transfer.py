"""A decoder moved to another codec's codes: what it knew of the old ones it knows of the new."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from training import transfer
from training.codec import make_codec
from training.lm import code_logits, make_model
from training.presets import PRESETS

OLD, NEW, BOOKS, FRAMES = 64, 32, 4, 4000


def renamed(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [codebooks, frames] of an old and a new codec, and which old code each new one is."""
    place = np.stack([rng.permutation(OLD)[:NEW] for _ in range(BOOKS)])
    new = rng.integers(0, NEW, (BOOKS, FRAMES))
    return np.take_along_axis(place, new, 1), new, place


def test_codes_that_were_only_renamed_are_found_again():
    rng = np.random.default_rng(0)
    old, new, place = renamed(rng)
    noisy = np.where(rng.random(old.shape) < 0.4, rng.integers(0, OLD, old.shape), old)
    assert (np.stack(transfer.matched(noisy, new, OLD, NEW)) == place).all()


def test_a_moved_decoder_says_of_new_codes_what_it_said_of_old_ones():
    size, codec = PRESETS["tiny"].decoder, make_codec(PRESETS["tiny"].codec).config
    torch.manual_seed(0)
    model = make_model(codec, 100, size)
    rng = np.random.default_rng(1)
    old, new, place = renamed(rng)
    states, mask = torch.randn(1, 5, size.text_hidden), torch.ones(1, 5)
    state = transfer.moved(model.state_dict(), list(place))
    smaller = make_model(
        make_codec(replace(PRESETS["tiny"].codec, codebook_size=NEW)).config, 100, size
    )
    smaller.load_state_dict(
        {name: value for name, value in state.items() if not name.startswith("audio_encoder.")},
        strict=False,
    )
    with torch.no_grad():
        before = code_logits(model, torch.tensor(old[None, :, :20]), states, mask, 16)
        after = code_logits(smaller, torch.tensor(new[None, :, :20]), states, mask, 16)
    for book, (scores, same) in enumerate(zip(before, after, strict=True)):
        torch.testing.assert_close(same, scores[..., place[book]])


@pytest.mark.parametrize(("frames", "new_size"), [(FRAMES - 1, NEW), (FRAMES, OLD + 1)])
def test_codes_of_other_songs_or_a_larger_codec_are_refused(frames: int, new_size: int):
    old, new, _ = renamed(np.random.default_rng(2))
    with pytest.raises(ValueError, match="as many"):
        transfer.matched(old, new[:, :frames], OLD, new_size)
