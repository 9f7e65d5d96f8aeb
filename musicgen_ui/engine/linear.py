"""A matrix product with fixed weights, packed for a precision.

| precision | weights | activations | where |
|---|---|---|---|
| float32 | float32 | float32 | everywhere; equal to transformers |
| bfloat16, float16 | the same | the same | GPUs |
| int8 | int8, a scale an output channel | int8, a scale a row | CPUs |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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

    def __init__(self, weight: Tensor, precision: str, device: torch.device) -> None:
        if precision == "int8":
            self.nbytes = weight.numel()
            self._product = _int8(weight.float())
            return
        packed = weight.to(device, getattr(torch, precision)).contiguous()
        self.nbytes = packed.nbytes
        on_cpu = torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available()
        self._product = _onednn(packed) if on_cpu else partial(F.linear, weight=packed)

    def __call__(self, x: Tensor) -> Tensor:
        """The product of [rows, inputs] with the weights."""
        return self._product(x)


def _onednn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    # Laid out for oneDNN once: for 2 rows of musicgen-small's size 51 ms of one core (AMD EPYC,
    # Zen 5) where F.linear, which goes through MKL there, takes 219 ms.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 2)

    def product(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return product


def _int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    scales = weight.abs().amax(1).clamp_min(1e-8) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():  # deprecated without a successor; there in torch 2.8 to 2.13
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    # Without VNNI the kernel adds pairs of products in 16 bits: activations of 7 bits then.
    reduce_range = not torch.cpu._is_vnni_supported()

    def product(x: Tensor) -> Tensor:
        # The operator quantises all rows on one scale. Dividing each by its own peak first keeps
        # a loud row from drowning its quiet neighbours, and is exact since there is no bias.
        peak = x.abs().amax(1, keepdim=True).clamp_min_(1e-12)
        return torch.ops.quantized.linear_dynamic(x / peak, packed, reduce_range).mul_(peak)

    return product
