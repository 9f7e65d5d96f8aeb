"""A matrix product with fixed weights, packed for a precision.

| precision | weights | activations | where |
|---|---|---|---|
| float32 | float32 | float32 | everywhere; equal to transformers |
| bfloat16, float16 | the same | the same | GPUs |
| int8 | int8, a scale an output channel | 12 bits, a scale a row | CPUs |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from musicgen_ui.engine.cpu.int8 import Product

PRECISIONS = ("float32", "bfloat16", "float16", "int8")


def computing_dtype(precision: str) -> torch.dtype:
    """The type of the activations around the products."""
    return torch.float32 if precision == "int8" else getattr(torch, precision)


class Linear:
    """A function from [rows, inputs] to [rows, outputs] in the computing type.

    Args:
        weight: [outputs, inputs] in any floating type; not kept.
        precision: one of `PRECISIONS`.
        device: where it will run; int8 runs on the CPU.
    """

    packed: Product | None = None  # the weights where they are int8

    def __init__(self, weight: Tensor, precision: str, device: torch.device) -> None:
        self._product: Callable[[Tensor], Tensor]
        if precision == "int8":
            from musicgen_ui.engine.cpu.int8 import Product  # imports numba

            self._product = self.packed = Product(weight.float().numpy())
            self.nbytes = self.packed.nbytes
            return
        plain = weight.to(device, getattr(torch, precision)).contiguous()
        self.nbytes = plain.nbytes
        if torch.device(device).type == "cpu" and _multiplies(plain.dtype):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(plain, 2)
            self._product = partial(_onednn, self._weight)
        else:
            self._weight = plain
            self._product = partial(F.linear, weight=plain)

    def __call__(self, x: Tensor) -> Tensor:
        """The product of [rows, inputs] with the weights."""
        return self._product(x)

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs] in the computing type; on a CPU a copy. Not of int8."""
        weight: Tensor = self._weight.to_dense() if self._weight.is_mkldnn else self._weight
        return weight


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of this type on this processor."""
    if dtype == torch.bfloat16:  # with AVX-512 or younger
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return bool(torch.backends.mkldnn.is_available())


def _onednn(packed: Tensor, x: Tensor) -> Tensor:
    # Laid out for oneDNN once: for 2 rows of musicgen-small's size 51 ms of one core (AMD EPYC,
    # Zen 5) where F.linear, which goes through MKL there, takes 219 ms.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return product
