"""A product of quantised rows with int8 weights, as a piece of work: a block of its outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from musicgen_ui.engine.cpu.microkernel import BLOCK, TILE, TURN, compiled, tile_1, tile_2, tile_4
from musicgen_ui.engine.cpu.vectors import floats, gelu

ROWS = 4  # inputs that meet a weight while it is in a register
AHEAD = 8192  # bytes of weights asked for ahead: 8 rows 18 ms instead of 21 (Zen 5, one thread)


@compiled
def pairs_of(inputs: Any) -> Any:
    """Of a product's inputs, as they are laid out."""
    return (inputs + TURN - 1) // TURN * (TURN // 2)


@compiled
def _rescale(sums: Any, first: Any, column: Any, scale: Any, out: Any, adds: Any) -> None:
    for o in range(len(out)):
        value = np.float32(sums[first + o]) * (column[o] * scale)
        out[o] = out[o] + value if adds else value


@compiled
def multiply(
    block: Any, weights: Any, columns: Any, space: Any, pairs: Any, outputs: Any, out: Any,
    adds: Any, activates: Any, sums: Any, then: Any,
) -> None:  # fmt: skip
    """A block of outputs for all rows, into `out` or added to it; `then`: what is read next."""
    end, left = min(outputs, (block + 1) * BLOCK), pairs * 2 * BLOCK  # bytes from the tile on
    weights += block * left
    for first in range(block * BLOCK, end, TILE):
        last = min(end, first + TILE)
        following = weights + pairs * 2 * TILE if last < end else then
        _multiply_tile(first, last, weights, left, following, then,
                       columns, space, pairs, out, adds, activates, sums)  # fmt: skip
        weights += pairs * 2 * TILE
        left -= pairs * 2 * TILE


@compiled
def _multiply_tile(
    first: Any, last: Any, weights: Any, left: Any, following: Any, then: Any, columns: Any,
    space: Any, pairs: Any, out: Any, adds: Any, activates: Any, sums: Any,
) -> None:  # fmt: skip
    column = floats(columns + 4 * first, TILE)
    to, wide = out.ctypes.data + 4 * first, 4 * out.shape[1]
    stride, into, row = space.codes.shape[1], sums.ctypes.data, 0
    # A pass of all rows asks for what is AHEAD. Of several only the first would wait for memory, so
    # each asks for its part of the whole tile that is next: 8 rows 12.9 ms, not 14.2 (Zen 5).
    passes = (len(out) + ROWS - 1) // ROWS
    advance = 2 * TILE // passes  # bytes a pair of inputs
    ahead, turn = weights + AHEAD, (left - AHEAD) // (2 * TILE)
    soon = then - turn * 2 * TILE
    if passes > 1:
        turn, soon = 0, following
    while row < len(out):
        x = space.codes.ctypes.data + 2 * stride * row
        count = len(out) - row
        if count >= 4:
            count = 4
            tile_4(weights, x, stride, pairs, into, ahead, turn, soon, advance)
        elif count >= 2:
            count = 2
            tile_2(weights, x, stride, pairs, into, ahead, turn, soon, advance)
        else:
            tile_1(weights, x, stride, pairs, into, ahead, turn, soon, advance)
        soon += pairs * advance
        for each in range(row, row + count):
            own = floats(to + wide * each, last - first)
            _rescale(sums, TILE * (each - row), column, space.scales[each], own, adds)
            if activates:
                gelu(own)
        row += count
