"""What a captured step reads and writes: buffers that never move, with a slot for each job."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_ui.engine import sampling
from musicgen_ui.engine.attention import FloatCache
from musicgen_ui.engine.transformer import Decoder

TOKENS = (64, 512)  # of the prompts: room at first, and at most
ROWS = 2  # of a slot: cond and uncond


@dataclass
class Slots:
    """The buffers of all slots, on the decoder's device."""

    caches: list[FloatCache]  # a layer: [ROWS * slots, heads, positions, head_dim]
    text: Tensor  # [layers, 2, ROWS * slots, heads, tokens, head_dim]: keys and values of prompts
    heard: Tensor  # bool [ROWS * slots, tokens]: the tokens that a row attends to
    tokens: Tensor  # int32 [ROWS * slots]: how many of them are of a prompt; 0 is the null prompt
    columns: Tensor  # int64 [slots, codebooks, columns]
    uniforms: Tensor  # float32 [slots, columns - 1, codebooks]
    at: Tensor  # int64 [slots]: the column that is stepped next
    prefix: Tensor  # int64 [slots]: positions before the first column
    ready: Tensor  # bool [slots]: a job that is stepped
    finite: Tensor  # bool [slots, codebooks]: the logits were numbers so far
    settings: sampling.Settings

    @classmethod
    def of(cls, decoder: Decoder, slots: int, columns: int, positions: int) -> Slots:
        """Room for so many jobs of so many columns (the given first one left out)."""
        device = decoder.device
        zeros = functools.partial(torch.zeros, device=device)
        shape = (ROWS * slots, decoder.heads, positions, decoder.head_dim)
        caches = [FloatCache(shape, decoder.dtype, device) for _ in decoder.layers]
        for cache in caches:  # what was never written is multiplied by 0, so no NaN
            cache.keys.zero_(), cache.values.zero_()
        layers = 0 if decoder.prefixed else len(decoder.layers)
        text = (layers, 2, ROWS * slots, decoder.heads, TOKENS[0], decoder.head_dim)
        return cls(
            caches=caches,
            text=zeros(text, dtype=decoder.dtype),
            heard=zeros((ROWS * slots, TOKENS[0]), dtype=torch.bool),
            tokens=zeros(ROWS * slots, dtype=torch.int32),
            columns=zeros((slots, decoder.codebooks, columns + 1), dtype=torch.int64),
            uniforms=zeros((slots, columns, decoder.codebooks)),
            at=zeros(slots, dtype=torch.int64),
            prefix=zeros(slots, dtype=torch.int64),
            ready=zeros(slots, dtype=torch.bool),
            finite=zeros((slots, decoder.codebooks), dtype=torch.bool),
            settings=sampling.Settings(
                guidance_scale=zeros(slots, 1, 1) + 1,
                temperature=zeros(slots, 1, 1) + 1,
                top_k=zeros(slots, 1, 1, dtype=torch.int64) + 1,
                top_p=zeros(slots, 1, 1) + 1,
                greedy=zeros(slots, 1, dtype=torch.bool),
                candidates=decoder.codebook_size,
                alike=False,
                nucleus=True,
                draws=True,
                chooses=True,
            ),
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [self.text, self.columns, self.uniforms]
        return sum(cache.nbytes for cache in self.caches) + sum(buffer.nbytes for buffer in held)
