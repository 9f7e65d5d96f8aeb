"""The KV cache of a layer in plain torch: in the computing dtype, or in 8 bits.

8 bits are int8 with a float32 scale for each position and head: 68 bytes in place of 128 for a head
of 64 in half precision. What is read for a step grows with the jobs and their lengths, while the
weights are read once for all, so this is for many long jobs at once. float8_e4m3 would take 64
bytes, but its three bits of mantissa round a number by up to 6 %, where int8 rounds by 0.4 % of the
head's largest one, and Triton has it for the newest GPUs alone.

int8 models on the CPU have `cpu.int8.Int8Cache`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = ("auto", "int8")  # of keys and values; "auto" is the computing dtype
PEAK = 127  # the largest magnitude of a code
SMALLEST = 1e-30  # scales below it are 0: their inverse would be infinite

Index: TypeAlias = "tuple[slice | Tensor, slice, slice | Tensor]"  # of rows, heads, positions


@dataclass
class FloatCache:
    """Keys and values of some rows in one layer, [rows, heads, positions, head_dim]."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Self:
        """Memory for keys and values of this shape, uninitialised."""
        return cls(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name; the first dimensions of each are rows, heads, positions."""
        return {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(each.nbytes for each in self.tensors.values())

    def zero_(self) -> None:
        """Makes all of it 0."""
        for each in self.tensors.values():
            each.zero_()

    def lengthen(self, positions: int) -> None:
        """Moves to other memory with room for so many positions, of which the new ones are 0."""
        for name, each in self.tensors.items():
            longer = each.new_zeros(*each.shape[:2], positions, *each.shape[3:])
            longer[:, :, : each.shape[2]] = each
            setattr(self, name, longer)

    def view(self, rows: slice) -> Self:
        """Some of the rows, in the same memory."""
        return dataclasses.replace(
            self, **{name: each[rows] for name, each in self.tensors.items()}
        )

    def copy_rows(self, other: object, sources: list[int], filled: int) -> None:
        """Copies the filled positions of `other`'s row `sources[i]` to row i."""
        assert isinstance(other, type(self))
        for name, mine in self.tensors.items():
            mine[:, :, :filled] = other.tensors[name][:, :, :filled][sources]

    def write(self, at: Index, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values at some rows and positions."""
        self.keys[at] = keys
        self.values[at] = values

    def read(self, rows: slice, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of some rows up to position `end`, in the computing dtype."""
        return self.keys[rows, :, :end], self.values[rows, :, :end]

    def attend(self, qkv: Tensor, start: int) -> Tensor:
        """Appends the keys and values of new columns; each column attends to all up to itself.

        Args:
            qkv: [rows, columns, 3, heads, head_dim].
            start: positions filled before.

        Returns:
            [rows, columns, heads · head_dim].
        """
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [rows, heads, columns, head_dim]
        n = q.shape[2]
        end = start + n
        every = slice(None)
        self.write((every, every, slice(start, end)), k, v)
        mask = None if n == 1 else _causal_mask(n, start, q.device)
        keys, values = self.read(every, end)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


@dataclass
class QuantizedCache(FloatCache):
    """The same in 8 bits: keys and values are int8, times a scale they are the numbers.

    What attention reads is what the cache holds, the newest position included, so that a column
    gets the same from a step as from a prefill.
    """

    key_scales: Tensor  # float32 [rows, heads, positions]
    value_scales: Tensor  # the same
    dtype: torch.dtype  # that attention computes in

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Self:
        """Memory for keys and values of this shape, uninitialised."""
        keys, values = (torch.empty(shape, dtype=torch.int8, device=device) for _ in range(2))
        key_scales, value_scales = (torch.empty(shape[:3], device=device) for _ in range(2))
        return cls(keys, values, key_scales, value_scales, dtype)

    def write(self, at: Index, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values at some rows and positions."""
        self.keys[at], self.key_scales[at] = quantize(keys)
        self.values[at], self.value_scales[at] = quantize(values)

    def read(self, rows: slice, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of some rows up to position `end`, in the computing dtype."""
        pairs = ((self.keys, self.key_scales), (self.values, self.value_scales))
        keys, values = (
            (codes[rows, :, :end] * scales[rows, :, :end, None]).to(self.dtype)
            for codes, scales in pairs
        )
        return keys, values


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., head_dim] as int8 of the same shape and scales, float32 [...].

    A scale is infinite or NaN where a number is, so that the product is too.
    """
    x = x.float()
    scales = x.abs().amax(-1) / PEAK
    inverse = torch.where(scales > SMALLEST, 1 / scales.clamp_min(SMALLEST), 0.0)
    return (x * inverse[..., None] + 0.5).floor().to(torch.int8), scales


def _causal_mask(n: int, start: int, device: torch.device) -> Tensor:
    """bool [n, start + n]: the positions that each of n columns attends to."""
    return torch.ones(n, start + n, dtype=torch.bool, device=device).tril(start)
