"""The decoder's layers, packed for decoding: query, key and value are one matrix."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from musicgen_ui.engine.linear import Linear, computing_dtype

Memory = list[tuple[Tensor, Tensor]]  # a layer: keys and values, [1, heads, tokens, head_dim]


@dataclass(frozen=True)
class CrossAttention:
    """The packed weights by which a layer attends to a prompt."""

    norm: nn.LayerNorm
    q: Linear
    kv: Linear
    out: Linear


@dataclass(frozen=True)
class Layer:
    """The packed weights of a transformer layer."""

    self_norm: nn.LayerNorm
    qkv: Linear
    self_out: Linear
    ffn_norm: nn.LayerNorm
    up: Linear
    down: Linear
    text: CrossAttention | None  # None in a melody checkpoint

    @classmethod
    def of(cls, layer: Any, precision: str, device: torch.device) -> Layer:
        """Packs a layer of transformers' decoder, whose weights may be released after it."""
        own, text = layer.self_attn, getattr(layer, "encoder_attn", None)

        def packed(*linears: nn.Linear) -> Linear:
            return Linear(torch.cat([each.weight for each in linears]), precision, device)

        def norm(module: nn.LayerNorm) -> nn.LayerNorm:
            # A copy, even where nothing changes: a view would keep the whole file mapped.
            return copy.deepcopy(module).to(device, computing_dtype(precision))

        return cls(
            self_norm=norm(layer.self_attn_layer_norm),
            qkv=packed(own.q_proj, own.k_proj, own.v_proj),
            self_out=packed(own.out_proj),
            ffn_norm=norm(layer.final_layer_norm),
            up=packed(layer.fc1),
            down=packed(layer.fc2),
            text=CrossAttention(
                norm=norm(layer.encoder_attn_layer_norm),
                q=packed(text.q_proj),
                kv=packed(text.k_proj, text.v_proj),
                out=packed(text.out_proj),
            )
            if text
            else None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        rooms = [self, self.text] if self.text else [self]
        parts = [part for room in rooms for part in vars(room).values()]
        return sum(part.nbytes for part in parts if isinstance(part, Linear))
