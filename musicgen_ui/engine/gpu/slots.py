"""The buffers that a captured step reads and writes: they never move, and each job has a slot."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_ui.engine.kv_cache import FloatCache
from musicgen_ui.engine.sampling import SamplingTensors
from musicgen_ui.engine.transformer import Decoder, TextKV

TEXT_TOKENS = (64, 512)  # of a prompt: what the buffers hold at first, and at most
ROWS = 2  # of a slot: cond and uncond


@dataclass
class Slots:
    """The buffers of all slots, on the decoder's device."""

    caches: list[FloatCache]  # a layer: [ROWS * slots, heads, positions, head_dim]
    text: Tensor  # keys and values: [layers, 2, ROWS * slots, heads, tokens, head_dim]
    text_mask: Tensor  # bool [ROWS * slots, tokens]: the tokens that a row attends to
    tokens: Tensor  # int32 [ROWS * slots]: of each row's prompt; 0 is the null prompt
    columns: Tensor  # int64 [slots, codebooks, columns]
    uniforms: Tensor  # float32 [slots, columns - 1, codebooks]
    at: Tensor  # int64 [slots]: the column that is stepped next
    prefix: Tensor  # int64 [slots]: positions before the first column
    ready: Tensor  # bool [slots]: its job is stepped
    finite: Tensor  # bool [slots, codebooks]: all logits so far were finite
    sampling: SamplingTensors

    @classmethod
    def of(cls, decoder: Decoder, slots: int, columns: int, positions: int) -> Slots:
        """Buffers for so many jobs of so many columns, the first one not counted."""
        device = decoder.device
        zeros = functools.partial(torch.zeros, device=device)
        caches = []
        for cache in decoder.new_caches(ROWS * slots, positions):
            assert isinstance(cache, FloatCache)  # on the CPU there is another one
            cache.zero_()  # masked positions are multiplied by 0, so they must not be NaN
            caches.append(cache)
        layers = 0 if decoder.prefixed else len(decoder.layers)
        text = (layers, 2, ROWS * slots, decoder.heads, TEXT_TOKENS[0], decoder.head_dim)
        return cls(
            caches=caches,
            text=zeros(text, dtype=decoder.dtype),
            text_mask=zeros((ROWS * slots, TEXT_TOKENS[0]), dtype=torch.bool),
            tokens=zeros(ROWS * slots, dtype=torch.int32),
            columns=zeros((slots, decoder.codebooks, columns + 1), dtype=torch.int64),
            uniforms=zeros((slots, columns, decoder.codebooks)),
            at=zeros(slots, dtype=torch.int64),
            prefix=zeros(slots, dtype=torch.int64),
            ready=zeros(slots, dtype=torch.bool),
            finite=zeros((slots, decoder.codebooks), dtype=torch.bool),
            sampling=SamplingTensors(
                guidance_scale=zeros(slots, 1, 1) + 1,
                temperature=zeros(slots, 1, 1) + 1,
                top_k=zeros(slots, 1, 1, dtype=torch.int64) + 1,
                top_p=zeros(slots, 1, 1) + 1,
                greedy=zeros(slots, 1, dtype=torch.bool),
                max_top_k=decoder.codebook_size,
                same_top_k=False,
                any_top_p=True,
                any_sampled=True,
                any_greedy=True,
            ),
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [self.text, self.columns, self.uniforms]
        return sum(cache.nbytes for cache in self.caches) + sum(buffer.nbytes for buffer in held)

    def views(self, slot: int, rows: int) -> list[FloatCache]:
        """The KV cache of a slot's first rows."""
        start = ROWS * slot
        return [cache.view(slice(start, start + rows)) for cache in self.caches]

    def write_text(self, slot: int, text: list[TextKV | None]) -> bool:
        """Writes the keys and values of the rows' prompts; whether the buffers moved for it."""
        tokens = [text_kv[0][0].shape[2] if text_kv else 0 for text_kv in text]
        moved = max(tokens) > self.text.shape[4]
        if moved:
            more = TEXT_TOKENS[1] - self.text.shape[4]
            self.text = F.pad(self.text, (0, 0, 0, more))
            self.text_mask = F.pad(self.text_mask, (0, more))
        rows = slice(ROWS * slot, ROWS * (slot + 1))
        self.text[:, :, rows] = 0
        self.text_mask[rows] = False
        # The null condition attends to one token whose value is 0: the result is 0, never NaN.
        self.text_mask[rows, 0] = True
        self.tokens[rows] = 0
        for row, text_kv in enumerate(text, start=rows.start):
            if not text_kv:
                continue
            states = torch.stack([torch.cat(layer) for layer in text_kv], dim=1)
            count = states.shape[3]  # states: [2, layers, heads, tokens, head_dim]
            self.text[:, :, row, :, :count] = states.transpose(0, 1)
            self.text_mask[row, :count] = True
            self.tokens[row] = count
        return moved
