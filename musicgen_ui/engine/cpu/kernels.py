"""What numba compiles for int8 on the CPU: the stages of a step, taken by all threads together.

A call is a list of stages, and a stage so many independent pieces. Every thread goes through all
stages and in each takes the next piece that nobody has, so a thread that the system holds back
delays the others by two pieces at most: a thread names its next piece before it does the present
one, and asks memory for what that will read. A piece depends on nothing but its number: results are
the same to the bit on any number of threads, and a row's the same beside any others.

Parts of arrays are taken by their addresses: a slice would count its users, which on several
threads costs more than what is done with it (a head's attention 0.9 µs instead of 0.4).

`compiled` owns the memory and hands it over as its named tuples of arrays, and as addresses, int64,
where there is an array for each layer and job.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from musicgen_ui.engine.cpu.microkernel import (
    BLOCK,
    add,
    ask,
    compiled,
    kernel,
    pointer,
    tile_1_of_64,
    wait,
)
from musicgen_ui.engine.cpu.products import ROWS, multiply, pairs_of
from musicgen_ui.engine.cpu.vectors import (
    ALL,
    SIZE,
    at_least,
    exp,
    floats,
    largest,
    normalise,
    quantise,
)

MOST = 2047  # of a quantised input: 127 · 2047 · 8192 inputs still fit into an int32

# A layer's stages: normalise (0, 5, 10) and quantise (3, 8, 12) rows; attend to the columns (2) and
# to the prompt (7); products into `wide` (1, 6, 11) and onto `x` (4, 9, 13).
STAGES = 14
_PRODUCT = (-1, 0, -1, -1, 1, -1, 2, -1, -1, 3, -1, 4, -1, 5)  # the one that a stage makes
_OF_PROMPT = (5, 9)  # the first and the last stage of attention to the prompt


@compiled
def _append(key: Any, value: Any, to: Any, at: Any, room: Any, codes: Any) -> None:
    """Lays down the key and the value of position `at`; `to`: addresses for a row and head."""
    dim = len(key)
    pairs, blocks = (dim + 1) // 2, (dim + BLOCK - 1) // BLOCK
    floats(to[2], room)[at] = quantise(key, codes, 127)
    keys = numba.carray(pointer(to[0]), (room // BLOCK, pairs, BLOCK, 2), np.int8)
    for d in range(dim):
        keys[at // BLOCK, d // 2, at % BLOCK, d % 2] = codes[d]
    floats(to[3], room)[at] = quantise(value, codes, 127)
    values = numba.carray(pointer(to[1]), (blocks, room // 2, BLOCK, 2), np.int8)
    for d in range(dim):
        values[d // BLOCK, at // 2, d % BLOCK, at % 2] = codes[d]


@compiled
def _attend(
    query: Any, at: Any, filled: Any, room: Any, weights: Any, codes: Any, sums: Any, out: Any,
    then: Any,
) -> None:  # fmt: skip
    """One query over the first `filled` positions; `at`: addresses for a row and head."""
    dim = len(query)
    pairs, code, into = (dim + 1) // 2, codes.ctypes.data, sums.ctypes.data
    codes[dim] = 0
    scale = quantise(query, codes, MOST) / np.float32(np.sqrt(dim))
    key_scales, value_scales = floats(at[2], room), floats(at[3], room)
    for first in range(0, filled, BLOCK):  # what is asked for ahead: the values beside
        values = at[1] + first * BLOCK
        tile_1_of_64(at[0] + first * 2 * pairs, code, 0, pairs, into, values, pairs, 0, 2 * BLOCK)
        for t in range(BLOCK):  # of the last block more than are filled: there is room
            weights[first + t] = np.float32(sums[t]) * (scale * key_scales[first + t])
    best, total = largest(weights, filled, ALL), np.float32(0)
    for t in range(filled):  # of loops with one task each LLVM makes vectors: a third of the time
        weights[t] = exp(weights[t] - best)
    for t in range(filled):
        total += weights[t]
    for t in range(filled):
        weights[t] *= value_scales[t]
    peak = at_least(largest(weights, filled, SIZE), np.float32(1e-30))
    most = np.float32(min(8191, 8191 * 2048 // filled))  # 127 · 8191 · 2048 fit into an int32
    for t in range(filled):
        codes[t] = np.int16(np.rint(weights[t] * (most / peak)))
    codes[filled] = 0  # beside the last position, where their number is odd
    for first in range(0, dim, BLOCK):
        halves = (filled + 1) // 2
        tile_1_of_64(at[1] + first * room, code, 0, halves, into, then, halves, 0, 2 * BLOCK)
        for d in range(min(BLOCK, dim - first)):
            out[first + d] = np.float32(sums[d]) * (peak / (most * total))


@compiled
def _place(piece: Any, heads: Any, dim: Any, rows: Any, told: Any, layer: Any) -> Any:
    """Of a row and head: addresses of keys, values and the scales of both; room; filled ones."""
    row, head = piece // heads, piece % heads
    filled = rows.tokens[row] if told else rows.filled[row]
    room = rows.text_room[row] if told else rows.room[row]
    base = rows.text if told else rows.own
    return (
        base[row, layer, 0] + head * room * 2 * ((dim + 1) // 2),
        base[row, layer, 1] + head * room * ((dim + BLOCK - 1) // BLOCK * BLOCK),
        base[row, layer, 2] + 4 * head * room,
        base[row, layer, 3] + 4 * head * room,
        room,
        filled,
    )


@compiled
def _attend_columns(
    piece: Any, following: Any, heads: Any, rows: Any, told: Any, layer: Any, qkv: Any,
    weights: Any, codes: Any, sums: Any, out: Any, then: Any,
) -> None:  # fmt: skip
    """All columns of a row and head, over the row's positions or, with `told`, its prompt's.

    Memory is asked for what the `following` piece reads or, if there is none, `then`.
    """
    hidden, first = out.shape[1], piece // heads * rows.columns
    dim = hidden // heads
    at = _place(piece, heads, dim, rows, told, layer)
    room, filled = at[4], at[5]
    if following < len(rows.filled) * heads:
        ahead = _place(following, heads, dim, rows, told, layer)
        then = ahead[0]
        for byte in range(0, 4 * ahead[5], 64):
            ask(ahead[2] + byte)
            ask(ahead[3] + byte)
    for column in range(first, first + rows.columns):
        query = qkv.ctypes.data + 4 * (column * qkv.shape[1] + piece % heads * dim)
        to = floats(out.ctypes.data + 4 * (column * hidden + piece % heads * dim), dim)
        if told and filled == 0:
            to[:] = 0
            continue
        if not told:
            key, value = floats(query + 4 * hidden, dim), floats(query + 8 * hidden, dim)
            _append(key, value, at, filled, room, codes)
            filled += 1
        _attend(floats(query, dim), at, filled, room, weights, codes, sums, to, then)


@compiled
def _pieces(kind: Any, model: Any, rows: Any) -> Any:
    """How many a stage has."""
    if not model.told and _OF_PROMPT[0] <= kind <= _OF_PROMPT[1]:
        return 0
    if kind == 2 or kind == 7:
        return len(rows.filled) * model.heads
    if _PRODUCT[kind] >= 0:
        return (model.widths[_PRODUCT[kind], 0] + BLOCK - 1) // BLOCK
    return len(rows.x)


@compiled
def _block(model: Any, layer: Any, which: Any, block: Any) -> Any:
    """Where a product's block of weights lies; after its last block come the next product's."""
    blocks = (model.widths[which, 0] + BLOCK - 1) // BLOCK
    if block >= blocks:
        block -= blocks
        which = 4 if which == 1 and not model.told else (which + 1) % 6
        layer = (layer + (which == 0)) % len(model.products)
    pairs = pairs_of(model.widths[which, 1])
    return model.products[layer, which, 0] + block * pairs * 2 * BLOCK


@compiled
def _work(
    layer: Any, kind: Any, piece: Any, following: Any, model: Any, rows: Any, space: Any,
    weights: Any, codes: Any, sums: Any,
) -> None:  # fmt: skip
    """A piece of a stage; `following`: the next one of this thread."""
    if kind == 2 or kind == 7:
        told = kind == 7
        then = _block(model, layer, 3 if told else 1, 0)
        _attend_columns(
            piece, following, model.heads, rows, told, layer, space.wide, weights, codes, sums,
            space.y, then,
        )  # fmt: skip
    elif _PRODUCT[kind] >= 0:
        which = _PRODUCT[kind]
        at, columns = model.products[layer, which]
        outputs, inputs = model.widths[which]
        adds = kind == 4 or kind == 9 or kind == 13
        out = rows.x if adds else space.wide
        pairs = pairs_of(inputs)
        then = _block(model, layer, which, following)
        multiply(piece, at, columns, space, pairs, outputs, out, adds, kind == 11, sums, then)
    else:
        of = space.y[piece]
        if kind == 12:
            of = space.wide[piece, : model.widths[5, 1]]
        elif kind != 3 and kind != 8:
            normalise(rows.x[piece], model.norms[layer, kind // 5], model.epsilon, of)
        space.scales[piece] = quantise(of, space.codes[piece], MOST)


@kernel
def layers(model: Any, rows: Any, space: Any, counters: Any) -> None:
    """All layers: what one of the threads does; counters int64 [layers · STAGES, 2] are 0."""
    sums = np.empty(ROWS * BLOCK, np.int32)
    longest = max(rows.room.max(), rows.text_room.max(), rows.x.shape[1]) + 2  # rooms: of blocks
    weights, codes = np.empty(longest, np.float32), np.empty(longest, np.int16)
    for stage in range(len(counters)):
        layer, kind = stage // STAGES, stage % STAGES
        pieces, taken = _pieces(kind, model, rows), counters.ctypes.data + 16 * stage
        piece = add(taken, 1)
        while piece < pieces:
            following = add(taken, 1)
            _work(layer, kind, piece, following, model, rows, space, weights, codes, sums)
            add(taken + 8, 1)
            piece = following
        wait(taken + 8, pieces)


@kernel
def product(x: Any, weights: Any, columns: Any, space: Any, out: Any, counters: Any) -> None:
    """float32 [rows, inputs] to `out` [rows, outputs]: what one of the threads does."""
    sums = np.empty(ROWS * BLOCK, np.int32)
    pairs, outputs = pairs_of(x.shape[1]), out.shape[1]
    for stage in range(2):
        pieces = (outputs + BLOCK - 1) // BLOCK if stage else len(x)
        taken = counters.ctypes.data + 16 * stage
        piece = add(taken, 1)
        while piece < pieces:
            following = add(taken, 1)
            if stage:
                then = weights + following * pairs * 2 * BLOCK
                multiply(
                    piece, weights, columns, space, pairs, outputs, out, False, False, sums, then
                )
            else:
                space.scales[piece] = quantise(x[piece], space.codes[piece], MOST)
            add(taken + 8, 1)
            piece = following
        wait(taken + 8, pieces)


@kernel
def attention(rows: Any, heads: Any, layer: Any, qkv: Any, out: Any, counters: Any) -> None:
    """The columns of `qkv`, [rows · columns, 3 · hidden], in a layer: one of the threads."""
    sums = np.empty(ROWS * BLOCK, np.int32)
    longest = max(rows.room.max(), out.shape[1]) + 2
    weights, codes = np.empty(longest, np.float32), np.empty(longest, np.int16)
    taken = counters.ctypes.data
    pieces, piece = len(rows.filled) * heads, add(taken, 1)
    while piece < pieces:
        following = add(taken, 1)
        _attend_columns(
            piece, following, heads, rows, False, layer, qkv, weights, codes, sums, out, 0
        )
        add(taken + 8, 1)
        piece = following
    wait(taken + 8, pieces)
