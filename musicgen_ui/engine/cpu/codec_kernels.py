"""The codec's convolutions on the CPU in whole numbers, each one compiled call on all threads.

A time step's channels become int16 with a scale of their own, after the ELU; weights are int16 with
a scale an output, and each tap of the kernel is a product of `tiles`, exact in int32. So an output
depends on its own inputs alone, to the bit, whatever is computed beside it. With AVX2, as with
AVX-512's VNNI, twice as many of these multiplications are done at once as in float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicgen_ui.engine.cpu.int8 import run
from musicgen_ui.engine.cpu.microkernel import (
    TILE,
    add,
    compiled,
    kernel,
    near_tile_1,
    near_tile_1_of_16,
    near_tile_4,
    near_tile_4_of_16,
    wait,
)
from musicgen_ui.engine.cpu.vectors import at_least, at_most, exp, quantise

AT_ONCE = 4  # outputs in time that meet a weight while it is in a register
STEPS = 64  # in time, of a piece


class Convolution16:
    """[time, inputs] to [outputs in time, outputs]: an ELU if wanted, then `weight` and `bias`.

    Args:
        weight: float32 [outputs, inputs, taps]; outputs in sixteens or, where stride and dilation
            are 1, so few that all taps of all are no more.
        bias: float32 [outputs].
        stride: in time.
        dilation: steps between two taps.
        elu: whether it comes first.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: int = 1, dilation: int = 1, elu: bool = True
    ) -> None:
        self.outputs, self.inputs, self.taps = weight.shape
        self.stride, self.dilation, self.elu = stride, dilation, elu
        self.spread = 1  # taps that stand beside each other as outputs, where those are few
        if self.outputs % 16:
            self.spread, self.taps = self.taps, 1
            weight = weight.permute(2, 0, 1).reshape(-1, self.inputs, 1)  # [taps · outputs, in, 1]
            bias = torch.cat([bias, bias.new_zeros(len(weight) - len(bias))])
        # The bits that an int32 has for a tap's sum, shared so that both sides round alike:
        # weights, as a bell curve has them, sum up to about their number times a fifth of the peak.
        self.most = min(32767, math.isqrt(5 * 2**31 // self.inputs))
        tiles, pairs = -(-len(weight) // TILE), -(-self.inputs // 2)
        padded = np.zeros((tiles * TILE, 2 * pairs, self.taps), np.float32)
        padded[: len(weight), : self.inputs] = weight.numpy()
        sizes = np.abs(padded)
        room = (2**31 - 1) / self.most - self.inputs  # less what rounding may add
        scales = np.maximum(sizes.max((1, 2)) / 32767, sizes.sum(1).max(1) / room)
        self.scales = np.maximum(scales, 1e-12).astype(np.float32)
        codes = np.rint(padded / self.scales[:, None, None]).astype(np.int16)
        # [taps, tiles, pairs of inputs, TILE, 2]
        laid = codes.reshape(tiles, TILE, pairs, 2, self.taps).transpose(4, 0, 2, 1, 3)
        self.codes = np.ascontiguousarray(laid)
        self.bias = np.zeros((tiles + 1) * TILE, np.float32)  # and zeros, for nothing
        self.bias[: len(bias)] = bias.numpy()

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """float32 [batch, time, inputs] to [batch, outputs in time, outputs], added to `onto`."""
        batch, time, _ = x.shape
        count = (time - (self.taps - 1) * self.dilation - 1) // self.stride + 1
        wide = -(-self.spread * self.outputs // 16) * 16
        few = wide > self.outputs
        out = x.new_empty(batch, count, wide) if onto is None or few else onto
        codes = np.empty((time, 2 * self.codes.shape[2]), np.int16)
        peaks = np.empty(time, np.float32)
        at = np.array([self.codes.ctypes.data, *self.codes.shape[:3]], np.int64)
        shape = np.array([self.stride, self.dilation, self.most, self.elu, out is onto])
        for one, into in zip(x, out.numpy(), strict=True):
            one = one.contiguous().numpy()  # of other strides it would be compiled again
            run(_convolve, 2, one, at, self.scales, self.bias, shape, codes, peaks, into)
        if few:  # an output is the sum of its taps, each from an input of its own
            size = batch, count - self.spread + 1, self.spread, self.outputs
            out = out.as_strided(size, (count * wide, wide, wide + self.outputs, 1)).sum(2)
            out = out if onto is None else out.add_(onto)
        return out


@compiled
def _activated(x: Any, out: Any) -> None:
    for i in range(len(x)):
        below = at_most(x[i], np.float32(0))
        out[i] = at_least(x[i], np.float32(0)) + (exp(below) - np.float32(1))


@kernel
def _convolve(
    x: Any, at: Any, columns: Any, bias: Any, shape: Any, codes: Any, scales: Any, out: Any,
    counters: Any,
) -> None:  # fmt: skip
    """What one of the threads does; `at`: address of the weights, taps, tiles, pairs of inputs."""
    weights, taps, tiles, pairs = at
    stride, dilation, most, elu, adds = shape
    row = np.empty(x.shape[1], np.float32)
    for stage in range(2):
        length = len(out) if stage else len(x)
        pieces = (length + STEPS - 1) // STEPS * (tiles if stage else 1)
        taken = counters.ctypes.data + 16 * stage
        piece = add(taken, 1)
        while piece < pieces:
            if stage:
                _tile(piece, weights, taps, tiles, pairs, stride, dilation, columns, bias,
                       adds != 0, codes, scales, out)  # fmt: skip
            else:
                for t in range(piece * STEPS, min(len(x), (piece + 1) * STEPS)):
                    if elu:
                        _activated(x[t], row)
                        scales[t] = quantise(row, codes[t], most)
                    else:
                        scales[t] = quantise(x[t], codes[t], most)
            add(taken + 8, 1)
            piece = add(taken, 1)
        wait(taken + 8, pieces)


@compiled
def _tile(
    piece: Any, weights: Any, taps: Any, tiles: Any, pairs: Any, stride: Any, dilation: Any,
    columns: Any, bias: Any, adds: Any, codes: Any, scales: Any, out: Any,
) -> None:  # fmt: skip
    """A tile of outputs of some time steps."""
    tile, wide, far = piece % tiles, codes.shape[1], 4 * stride
    width, nothing = 4 * out.shape[1], bias.ctypes.data + 4 * tiles * TILE
    t = piece // tiles * STEPS
    end = min(len(out), t + STEPS)
    while t < end:
        count = AT_ONCE if end - t >= AT_ONCE else 1
        for tap in range(taps):
            begin = t * stride + tap * dilation
            x, scale = codes.ctypes.data + 2 * wide * begin, scales.ctypes.data + 4 * begin
            o, last = TILE * tile, min(out.shape[1], TILE * (tile + 1))
            while o < last:
                some = TILE if last - o >= TILE else 16
                w = weights + ((tap * tiles + tile) * pairs * TILE + o % TILE) * 4
                column, shift = columns.ctypes.data + 4 * o, bias.ctypes.data + 4 * o
                y = out.ctypes.data + width * t + 4 * o
                shift = shift if tap == 0 else nothing
                onto, between = (y, width) if adds or tap else (nothing, 0)
                if count == AT_ONCE and some == TILE:
                    near_tile_4(w, x, wide * stride, pairs, y, width, column, scale, far,
                                shift, onto, between)  # fmt: skip
                elif count == AT_ONCE:
                    near_tile_4_of_16(w, x, wide * stride, pairs, y, width, column, scale, far,
                                      shift, onto, between)  # fmt: skip
                elif some == TILE:
                    near_tile_1(w, x, wide * stride, pairs, y, width, column, scale, far,
                                shift, onto, between)  # fmt: skip
                else:
                    near_tile_1_of_16(w, x, wide * stride, pairs, y, width, column, scale, far,
                                      shift, onto, between)  # fmt: skip
                o += some
        t += count
