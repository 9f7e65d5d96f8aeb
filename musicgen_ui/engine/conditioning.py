"""What the decoder attends to: prompts as states of the text encoder.

Every prompt is encoded alone and without padding, so what a job hears of its words never depends
on its neighbours. An empty prompt is the null condition: no states at all, which is exact, since
MusicGen's null states are zeros and its cross-attention has no biases.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

MAX_TOKENS = 512  # T5 was trained on sequences of 512 tokens


class Conditioner:
    """Prompts to states, by the checkpoint's own tokenizer, text encoder and projection."""

    def __init__(
        self, text_encoder: nn.Module, projection: nn.Module | None, tokenizer: Any
    ) -> None:
        self.text_encoder = text_encoder
        self.projection = projection  # None where the widths agree already
        self.tokenizer = tokenizer
        self.states = lru_cache(maxsize=64)(self._encode)  # visitors repeat prompts and examples

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        modules = [self.text_encoder, *([self.projection] if self.projection else [])]
        return sum(p.nbytes for module in modules for p in module.parameters())

    @torch.inference_mode()
    def _encode(self, prompt: str) -> Tensor | None:
        """The states of `prompt`, [tokens, hidden]; None for the null condition of ""."""
        if not prompt:
            return None
        tokens = self.tokenizer(
            prompt, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).input_ids
        states = self.text_encoder(input_ids=tokens.to(self.text_encoder.device))[0]
        return (states if self.projection is None else self.projection(states))[0]

    def cut_after(self, prompt: str) -> str | None:
        """The last words that are heard of a prompt that is too long; None if all of it is."""
        tokens = self.tokenizer(prompt, truncation=False).input_ids
        if len(tokens) <= MAX_TOKENS:
            return None
        heard = self.tokenizer(prompt, truncation=True, max_length=MAX_TOKENS).input_ids
        words = self.tokenizer.decode(heard, skip_special_tokens=True).split()
        return " ".join(words[-3:])
