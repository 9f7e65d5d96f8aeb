"""A trained decoder on the codes of another codec: each new code takes the place of an old one.

A decoder knows codes by their embeddings and output heads alone. Songs that both codecs encode tell
which old code stands where a new one does; a linear assignment by codebook gives every new code an
old one of its own, so embeddings stay as far apart as they were, and the heads that look for a
place in the loop and copy from it go on to work. What the decoder knows of words, keys and rhythm
stays; training on the new codes mends the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import EncodecModel

from training.codec import to_codes
from training.render import SINES, SoundfontRenderer, render_sines, to_clip
from training.songs import SONG_SEED, draw_song


def encoded_by_both(
    old: EncodecModel, new: EncodecModel, soundfont: str, songs: int, seconds: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes int64 [codebooks, frames] of each song's mono mix, by the old and by the new codec."""
    renderer = render_sines if soundfont == SINES else SoundfontRenderer(soundfont)
    for seed in range(SONG_SEED, SONG_SEED + songs):
        song = draw_song(seed, seconds)
        sound = renderer(song, seconds)
        yield tuple(
            to_codes(codec, _mono(sound, song.gain, codec.config.sampling_rate))[0].numpy()
            for codec in (old, new)
        )


def _mono(sound: np.ndarray, gain: float, sampling_rate: int) -> Tensor:
    """float32 [1, samples] of float32 [2, samples] at the synthesiser's rate."""
    clip = to_clip(sound.copy(), gain, sampling_rate)
    return torch.from_numpy(clip.astype(np.float32).mean(0, keepdims=True) / 32767)


def matched(old: np.ndarray, new: np.ndarray, old_size: int, new_size: int) -> list[np.ndarray]:
    """int64 [new_size] for each codebook: the old code whose place each new one takes.

    `old`, `new`: int64 [codebooks, frames], the same songs encoded by both codecs.
    Raises ValueError where the new codebooks are larger, or codebooks or frames differ in number.
    """
    if new_size > old_size or old.shape != new.shape:
        raise ValueError("The new codec must have as many codebooks and frames, and no more codes.")
    places = []
    for old_codes, new_codes in zip(old, new, strict=True):
        pairs = new_codes * old_size + old_codes
        together = np.bincount(pairs, minlength=new_size * old_size).reshape(new_size, old_size)
        # an old code that is beside everything says little of any new one
        weight = together / np.sqrt(together.sum(0, keepdims=True) + 1)
        places.append(linear_sum_assignment(weight, maximize=True)[1])
    return places


def moved(state: dict[str, Tensor], places: list[np.ndarray]) -> dict[str, Tensor]:
    """A mono decoder's weights for the new codes; the embedding of "no code yet" stays last."""
    out = dict(state)
    for book, place in enumerate(places):
        rows = torch.from_numpy(place)
        table = f"decoder.model.decoder.embed_tokens.{book}.weight"
        out[table] = torch.cat([state[table][rows], state[table][-1:]])
        head = f"decoder.lm_heads.{book}.weight"
        out[head] = state[head][rows]
    return out
