"""The int8 kernels of a decoder step, compiled by numba and run by all threads together.

A kernel is called on every thread and is a sequence of `parallel_for`: the threads share its pieces
and go on when all are done. A piece depends on nothing but its index, so results are equal to the
bit on any number of threads, and a row's are equal beside any other rows.

Matrices are passed as addresses in named tuples: numba counts references to slices, which on
several threads takes longer than the work itself (attention of a head 0.9 µs instead of 0.4).
`*_ptr` is an address, `*_stride` the distance between two rows in bytes. Whoever makes a kernel's
arguments keeps the arrays alive until the call returns, see `int8`.

NaN and infinity pass through: a row that holds one gets the scale NaN, so all its outputs are NaN.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

import numba
import numpy as np

from musicgen_ui.engine.cpu.machine_code import compiled, compiled_sum
from musicgen_ui.engine.cpu.microkernel import (
    BLOCK,
    CACHE_LINE,
    TILE,
    Operands,
    Prefetch,
    int8_block_1,
    int8_tile_1,
    int8_tile_2,
    int8_tile_4,
    pointer,
    prefetch,
)

INPUT_PEAK = 2047  # of quantised inputs: sums of 8192 · 127 · 2047 fit into an int32
KV_PEAK = 127  # of a quantised key or value
ROWS_AT_ONCE = 4  # rows that are multiplied with a weight while it is in a register
PREFETCH_BYTES = 8192  # ahead of a product: 8 rows 18 ms instead of 21 (Zen 5, one thread)

_ALL_BITS, _WITHOUT_SIGN = np.int32(-1), np.int32(2**31 - 1)  # of a float32

_POINTERS = ("keys_ptr", "values_ptr", "key_scales_ptr", "value_scales_ptr")
# Records in arrays: int64, with addresses of arrays that the caller keeps alive.
WEIGHTS = np.dtype(
    [(name, np.int64) for name in ("tiles_ptr", "scales_ptr", "blocks", "outputs", "pairs")]
)
CACHE = np.dtype([(name, np.int64) for name in (*_POINTERS, "capacity", "filled")])
Record: TypeAlias = Any  # an element of an array of such records


class Epilogue(IntEnum):
    """What happens to the sums of a matrix product."""

    STORE = 0
    ADD = 1  # to what the output holds, as at a residual connection
    GELU = 2


class Floats(NamedTuple):
    """A matrix of float32."""

    ptr: int
    stride: int
    rows: int
    width: int


class Quantised(NamedTuple):
    """The inputs of a product: int16 codes with a scale a row."""

    codes_ptr: int  # int16 [rows, inputs]
    codes_stride: int
    scales_ptr: int  # float32 [rows]
    rows: int


class HeadCache(NamedTuple):
    """Keys and values of one row and head."""

    keys_ptr: int  # int8 [blocks of positions, pairs of dim, BLOCK, 2]
    values_ptr: int  # int8 [blocks of dim, pairs of positions, BLOCK, 2]
    key_scales_ptr: int  # float32 [capacity]
    value_scales_ptr: int  # float32 [capacity]
    capacity: int  # positions, a multiple of BLOCK
    filled: int  # positions


class Workspace(NamedTuple):
    """Memory of one thread."""

    sums: np.ndarray  # int32 [ROWS_AT_ONCE · BLOCK]
    scores: np.ndarray  # float32 [positions]
    codes: np.ndarray  # int16 [positions]


# Arithmetic on rows of float32, in loops of one task each, which LLVM vectorises.


@compiled
def at_most(x: Any, limit: Any) -> Any:
    """The lesser of the two; NaN if x is NaN, which `min` does not promise."""
    return limit if x > limit else x


@compiled
def at_least(x: Any, limit: Any) -> Any:
    """The greater of the two; NaN if x is NaN."""
    return limit if x < limit else x


@compiled
def exp(x: Any) -> Any:
    """e to the x for x up to 87, within a relative 2e-6 from -40 on; vectorised, unlike libm's."""
    y = x * np.float32(1.44269504)
    y = at_least(y, np.float32(-125))
    bounded = y if y > np.float32(-125) else np.float32(-125)  # NaN has no integer part
    whole = np.floor(bounded + np.float32(0.5))
    f = (y - whole) * np.float32(0.69314718)
    p = np.float32(1 / 720)  # Taylor's polynomial, for f within 0.35 of zero
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def gelu(x: np.ndarray) -> None:
    """GELU in place; the error function is Abramowitz and Stegun's 7.1.26, within 1.5e-7."""
    for i in range(len(x)):
        z = abs(x[i]) * np.float32(0.70710678)
        t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * z)
        p = np.float32(1.061405429)
        p = p * t - np.float32(1.453152027)
        p = p * t + np.float32(1.421413741)
        p = p * t - np.float32(0.284496736)
        p = p * t + np.float32(0.254829592)
        erf = np.float32(1) - p * t * exp(-z * z)
        x[i] = np.float32(0.5) * (x[i] + abs(x[i]) * erf)


@compiled
def floats(address: int, count: int) -> np.ndarray:
    """float32 [count] at an address."""
    return numba.carray(pointer(address), count, np.float32)


@compiled
def _maximum(x: np.ndarray, count: int, bits: Any) -> Any:
    """The maximum of the first numbers, of which only some bits count.

    They are compared as integers of the same order, which LLVM vectorises (a tenth of the time).
    Without the sign NaN is the greatest of all.
    """
    numbers, best = numba.carray(pointer(x.ctypes.data), count, np.int32), np.int32(-(2**31))
    for i in range(count):
        number = numbers[i] & bits
        best = max(best, number ^ ((number >> np.int32(31)) & _WITHOUT_SIGN))
    return np.int32(best ^ ((best >> np.int32(31)) & _WITHOUT_SIGN)).view(np.float32)


@compiled
def maximum(x: np.ndarray, count: int) -> Any:
    """The maximum of the first numbers; NaN may be passed over."""
    return _maximum(x, count, _ALL_BITS)


@compiled
def max_magnitude(x: np.ndarray, count: int) -> Any:
    """The maximum of the first numbers' magnitudes; NaN if one is NaN."""
    return _maximum(x, count, _WITHOUT_SIGN)


@compiled
def quantise(x: np.ndarray, codes: np.ndarray, peak_code: Any) -> Any:
    """float32 [n] as the first n int16 of `codes`; returns their scale.

    The scale is NaN, and codes are 0, where a number is NaN or infinite.
    """
    peak = at_least(max_magnitude(x, len(x)), np.float32(1e-12))
    if not peak < np.float32(np.inf):
        for i in range(len(x)):
            codes[i] = 0
        return np.float32(np.nan)
    inverse = np.float32(peak_code) / peak
    for i in range(len(x)):
        codes[i] = np.int16(np.rint(x[i] * inverse))
    return peak / np.float32(peak_code)


@compiled_sum
def total_of(x: np.ndarray, count: int) -> Any:
    """The sum of the first numbers."""
    total = np.float32(0)
    for i in range(count):
        total += x[i]
    return total


@compiled_sum
def _squared_distance(x: np.ndarray, mean: Any) -> Any:
    """The sum of squares of the distances from `mean`."""
    square = np.float32(0)
    for i in range(len(x)):
        square += (x[i] - mean) * (x[i] - mean)
    return square


@compiled
def normalise(x: np.ndarray, norm: np.ndarray, epsilon: Any, out: np.ndarray) -> None:
    """Layer norm of one row; `norm` is float32 [2, n], weight and bias."""
    mean = total_of(x, len(x)) / np.float32(len(x))
    variance = _squared_distance(x, mean) / np.float32(len(x))
    scale = np.float32(1) / np.sqrt(variance + np.float32(epsilon))
    for i in range(len(x)):
        out[i] = (x[i] - mean) * scale * norm[0, i] + norm[1, i]


# Operations on rows


class Quantise(NamedTuple):
    """Arguments of `quantise_row`."""

    source: Floats
    to: Quantised
    peak_code: int


class Normalise(NamedTuple):
    """Arguments of `normalise_row`."""

    source: Floats
    norm_ptr: int  # float32 [2, width]: weight and bias
    epsilon: float
    out: Floats  # not quantised
    to: Quantised


@compiled
def quantise_row(row: int, next_row: int, args: Quantise) -> None:
    """Quantises one row."""
    source, to = args.source, args.to
    codes = numba.carray(pointer(to.codes_ptr + row * to.codes_stride), source.width, np.int16)
    numbers = floats(source.ptr + row * source.stride, source.width)
    floats(to.scales_ptr, to.rows)[row] = quantise(numbers, codes, args.peak_code)


@compiled
def normalise_row(row: int, next_row: int, args: Normalise) -> None:
    """Layer norm of one row, quantised."""
    source, to = args.source, args.to
    codes = numba.carray(pointer(to.codes_ptr + row * to.codes_stride), source.width, np.int16)
    norm = numba.carray(pointer(args.norm_ptr), (2, source.width), np.float32)
    out = floats(args.out.ptr + row * args.out.stride, source.width)
    normalise(floats(source.ptr + row * source.stride, source.width), norm, args.epsilon, out)
    floats(to.scales_ptr, to.rows)[row] = quantise(out, codes, INPUT_PEAK)


# Matrix products


class Weights(NamedTuple):
    """int8 weights of a product with a scale an output."""

    tiles_ptr: int  # int8 [tiles of outputs, pairs of inputs, TILE, 2]
    scales_ptr: int  # float32 [outputs]
    blocks: int  # of BLOCK outputs
    outputs: int
    pairs: int  # of inputs, a multiple of UNROLL / 2


@compiled
def weights_of(record: Record) -> Weights:
    """A record of WEIGHTS."""
    return Weights(record.tiles_ptr, record.scales_ptr, record.blocks, record.outputs, record.pairs)


class Matmul(NamedTuple):
    """Arguments of `matmul_block`: `out = inputs · weights`."""

    inputs: Quantised
    weights: Weights
    next_weights: Weights  # which are read after these
    out: Floats
    epilogue: int
    sums: np.ndarray  # of the thread, int32 [ROWS_AT_ONCE · BLOCK]


@compiled
def _finish(
    sums: np.ndarray, scales: np.ndarray, scale: Any, out: np.ndarray, epilogue: int
) -> None:
    """The epilogue of one row's outputs."""
    add = epilogue == Epilogue.ADD
    for o in range(len(out)):
        value = np.float32(sums[o]) * (scales[o] * scale)
        out[o] = out[o] + value if add else value
    if epilogue == Epilogue.GELU:
        gelu(out)


@compiled
def _tile_prefetch(
    remaining: int, passes: int, tile_ptr: int, next_tile_ptr: int, next_ptr: int
) -> Prefetch:
    """What to prefetch while a tile is multiplied.

    A single pass over the weights requests what is PREFETCH_BYTES ahead and, near the end of the
    block, the start of the next block at `next_ptr`. Of several passes only the first would wait
    for memory, so each requests its share of the next tile: 8 rows 12.9 ms, not 14.2 (Zen 5).
    """
    if passes > 1:
        return Prefetch(tile_ptr, 0, next_tile_ptr, 2 * TILE // passes)
    near_pairs = (remaining - PREFETCH_BYTES) // (2 * TILE)
    return Prefetch(
        tile_ptr + PREFETCH_BYTES, near_pairs, next_ptr - near_pairs * 2 * TILE, 2 * TILE
    )


@compiled
def matmul_block(block: int, next_block: int, args: Matmul) -> None:
    """BLOCK outputs of a product for all rows."""
    inputs, weights, out = args.inputs, args.weights, args.out
    tile_bytes, block_bytes = weights.pairs * 2 * TILE, weights.pairs * 2 * BLOCK
    next_ptr = weights.tiles_ptr + next_block * block_bytes
    if next_block >= weights.blocks:
        following = args.next_weights
        next_ptr = following.tiles_ptr + (next_block - weights.blocks) * following.pairs * 2 * BLOCK
    passes = (inputs.rows + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE
    scales, sums_ptr = floats(inputs.scales_ptr, inputs.rows), args.sums.ctypes.data
    tile_ptr, remaining = weights.tiles_ptr + block * block_bytes, block_bytes
    end = min(weights.outputs, (block + 1) * BLOCK)
    for first in range(block * BLOCK, end, TILE):
        last = min(end, first + TILE)
        column_scales = floats(weights.scales_ptr + 4 * first, TILE)
        next_tile_ptr = tile_ptr + tile_bytes if last < end else next_ptr
        ahead = _tile_prefetch(remaining, passes, tile_ptr, next_tile_ptr, next_ptr)
        far_ptr, row = ahead.far_ptr, 0
        while row < inputs.rows:
            inputs_ptr = inputs.codes_ptr + row * inputs.codes_stride
            operands = Operands(tile_ptr, inputs_ptr, inputs.codes_stride, weights.pairs)
            requested = Prefetch(ahead.near_ptr, ahead.near_pairs, far_ptr, ahead.bytes_per_pair)
            count = inputs.rows - row
            if count >= 4:
                count = 4
                int8_tile_4(operands, sums_ptr, requested)
            elif count >= 2:
                count = 2
                int8_tile_2(operands, sums_ptr, requested)
            else:
                int8_tile_1(operands, sums_ptr, requested)
            far_ptr += weights.pairs * ahead.bytes_per_pair
            for each in range(row, row + count):
                of_row = numba.carray(pointer(sums_ptr + 4 * TILE * (each - row)), TILE, np.int32)
                to = floats(out.ptr + each * out.stride + 4 * first, last - first)
                _finish(of_row, column_scales, scales[each], to, args.epilogue)
            row += count
        tile_ptr += tile_bytes
        remaining -= tile_bytes


# Attention


class Attention(NamedTuple):
    """Arguments of `attend_head`."""

    caches: np.ndarray  # CACHE [rows, layers]
    layer: int
    causal: bool  # new columns are appended and attend up to themselves; else to what is filled
    qkv: Floats  # [rows · columns, queries and, if causal, keys and values]
    out: Floats  # [rows · columns, hidden]
    columns: int
    heads: int
    workspace: Workspace
    next_ptr: int  # of the weights that are read afterwards


@compiled
def _head_cache(cache: Record, head: int, dim: int) -> HeadCache:
    capacity = cache.capacity
    return HeadCache(
        cache.keys_ptr + head * capacity * 2 * ((dim + 1) // 2),
        cache.values_ptr + head * capacity * ((dim + BLOCK - 1) // BLOCK * BLOCK),
        cache.key_scales_ptr + 4 * head * capacity,
        cache.value_scales_ptr + 4 * head * capacity,
        capacity,
        cache.filled,
    )


@compiled
def _append(
    key: np.ndarray, value: np.ndarray, cache: HeadCache, at: int, codes: np.ndarray
) -> None:
    """Writes the key and the value of position `at`, float32 [dim] each."""
    dim, capacity = len(key), cache.capacity
    floats(cache.key_scales_ptr, capacity)[at] = quantise(key, codes, KV_PEAK)
    shape = (capacity // BLOCK, (dim + 1) // 2, BLOCK, 2)
    keys = numba.carray(pointer(cache.keys_ptr), shape, np.int8)
    for d in range(dim):
        keys[at // BLOCK, d // 2, at % BLOCK, d % 2] = codes[d]
    floats(cache.value_scales_ptr, capacity)[at] = quantise(value, codes, KV_PEAK)
    shape = ((dim + BLOCK - 1) // BLOCK, capacity // 2, BLOCK, 2)
    values = numba.carray(pointer(cache.values_ptr), shape, np.int8)
    for d in range(dim):
        values[d // BLOCK, at // 2, d % BLOCK, at % 2] = codes[d]


@compiled
def attend(
    query: np.ndarray,
    cache: HeadCache,
    filled: int,
    out: np.ndarray,
    workspace: Workspace,
    next_ptr: int,
) -> None:
    """Attention of one query over the first positions, float32 [dim] to [dim].

    Scores are summed in int32 from the quantised query and keys; the softmax weights, times their
    values' scales, are quantised in turn and summed in int32 with the values.
    """
    sums, scores, codes = workspace.sums, workspace.scores, workspace.codes
    sums_ptr, codes_ptr = sums.ctypes.data, codes.ctypes.data
    dim = len(query)
    pairs = (dim + 1) // 2
    key_scales = floats(cache.key_scales_ptr, cache.capacity)
    value_scales = floats(cache.value_scales_ptr, cache.capacity)
    codes[dim] = 0  # completes the last pair of an odd dim
    scale = quantise(query, codes, INPUT_PEAK) / np.float32(np.sqrt(dim))
    for first in range(0, filled, BLOCK):  # prefetched: the values of these positions
        operands = Operands(cache.keys_ptr + first * 2 * pairs, codes_ptr, 0, pairs)
        int8_block_1(
            operands, sums_ptr, Prefetch(cache.values_ptr + first * BLOCK, pairs, 0, 2 * BLOCK)
        )
        for t in range(BLOCK):  # beyond `filled` in the last block, where there is capacity
            scores[first + t] = np.float32(sums[t]) * (scale * key_scales[first + t])
    best = maximum(scores, filled)
    for t in range(filled):  # loops of one task each, which LLVM vectorises: a third of the time
        scores[t] = exp(scores[t] - best)
    total = total_of(scores, filled)
    for t in range(filled):
        scores[t] *= value_scales[t]
    peak = at_least(max_magnitude(scores, filled), np.float32(1e-30))
    if not peak < np.float32(np.inf):
        for d in range(dim):
            out[d] = np.float32(np.nan)
        return
    most = np.float32(min(8191, 8191 * 2048 // filled))  # 127 · 8191 · 2048 fit into an int32
    inverse = most / peak
    for t in range(filled):
        codes[t] = np.int16(np.rint(scores[t] * inverse))
    codes[filled] = 0  # completes the last pair of an odd number of positions
    pairs, scale = (filled + 1) // 2, peak / (most * total)
    for first in range(0, dim, BLOCK):
        operands = Operands(cache.values_ptr + first * cache.capacity, codes_ptr, 0, pairs)
        int8_block_1(operands, sums_ptr, Prefetch(next_ptr, pairs, 0, 2 * BLOCK))
        for d in range(min(BLOCK, dim - first)):
            out[first + d] = np.float32(sums[d]) * scale


@compiled
def attend_head(piece: int, next_piece: int, args: Attention) -> None:
    """All columns of one row and head, in order."""
    row, head = piece // args.heads, piece % args.heads
    hidden = args.out.width
    dim = hidden // args.heads
    cache = _head_cache(args.caches[row, args.layer], head, dim)
    filled, next_ptr = cache.filled, args.next_ptr
    if next_piece < len(args.caches) * args.heads:
        next_row, next_head = next_piece // args.heads, next_piece % args.heads
        following = _head_cache(args.caches[next_row, args.layer], next_head, dim)
        next_ptr = following.keys_ptr
        for offset in range(0, 4 * following.filled, CACHE_LINE):
            prefetch(following.key_scales_ptr + offset)
            prefetch(following.value_scales_ptr + offset)
    for column in range(row * args.columns, (row + 1) * args.columns):
        query_ptr = args.qkv.ptr + column * args.qkv.stride + 4 * head * dim
        out = floats(args.out.ptr + column * args.out.stride + 4 * head * dim, dim)
        if args.causal:
            key, value = floats(query_ptr + 4 * hidden, dim), floats(query_ptr + 8 * hidden, dim)
            _append(key, value, cache, filled, args.workspace.codes)
            filled += 1
        if filled == 0:  # the null condition
            out[:] = 0
        else:
            attend(floats(query_ptr, dim), cache, filled, out, args.workspace, next_ptr)
