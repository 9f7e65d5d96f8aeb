"""The keys and values of a job's rows in one layer, and attention over what is filled of them.

In the computing type, with torch's own attention. int8 on the CPU has `compiled.Int8Cache`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class FloatCache:
    """Keys and values in the computing type, [rows, heads, positions, head_dim] each."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes

    def attend(self, qkv: Tensor, start: int) -> Tensor:
        """Appends the keys and values of new columns and attends to all up to each of them.

        Args:
            qkv: [rows, columns, 3, heads, head_dim].
            start: positions filled before.

        Returns:
            [rows, columns, heads · head_dim].
        """
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [rows, heads, columns, head_dim]
        n = q.shape[2]
        end = start + n
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        mask = None if n == 1 else _up_to_itself(n, start, q.device)
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


def _up_to_itself(n: int, start: int, device: torch.device) -> Tensor:
    return torch.ones(n, start + n, dtype=torch.bool, device=device).tril(start)
