"""The innermost loops of the int8 kernels, and the primitives by which threads share work.

All matrix products and both halves of attention are one loop: integer weights laid out as [tiles,
pairs of inputs, outputs of a tile, 2] and read in that order, times int16 inputs, summed exactly in
int32. It is written with LLVM's vectors of 16 int32, which LLVM maps to what the processor has: on
x86 `vpmaddwd`, which multiplies 32 pairs of int16 and adds neighbours, and with VNNI `vpdpwssd`,
which adds the sum as well.

Arguments are addresses and sizes, int64, in named tuples. `*_ptr` is an address, `*_stride` the
distance between two rows in bytes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from musicgen_ui.engine.cpu.machine_code import compiled

_intrinsic: Any = intrinsic  # its stubs require an argument that has a default
BLOCK = 64  # outputs in one piece of work; positions whose keys lie together
FEATURES = llvmlite.binding.get_host_cpu_features()
# Outputs of a tile: as many as have their sums for four rows in registers. AVX2 has a quarter of
# AVX-512's: a thread does 34 billion multiplications a second in tiles of 64 there, 58 in tiles of
# 16 (Zen 4 at 2.7 GHz).
TILE = 64 if FEATURES.get("avx512bw") else 16
UNROLL = 4  # inputs of one turn of the loop at most: layouts are padded to a multiple of it
CACHE_LINE = 64  # bytes
BARRIER_BYTES = 16  # of a `parallel_for`: int64 of the pieces taken, int64 of the pieces done


class Operands(NamedTuple):
    """Of a tile's product."""

    weights_ptr: int  # int8 or int16 [pairs, outputs of a tile, 2]
    inputs_ptr: int  # int16 [rows, inputs]
    inputs_stride: int
    pairs: int  # of inputs


class Prefetch(NamedTuple):
    """What a tile's loop requests from memory while it computes.

    With pair `p` it requests as many bytes as a pair has weights: from
    `near_ptr + p · bytes_per_pair` while `p < near_pairs`, else `far_ptr + p · bytes_per_pair`.
    """

    near_ptr: int
    near_pairs: int
    far_ptr: int
    bytes_per_pair: int


class FloatOutput(NamedTuple):
    """Where a tile's sums go as float32: `sum · column_scale · row_scale + bias + addend`."""

    out_ptr: int
    out_stride: int
    column_scales_ptr: int
    row_scales_ptr: int
    row_scales_stride: int
    bias_ptr: int
    addend_ptr: int
    addend_stride: int


# Primitives


@_intrinsic
def atomic_add(typing: Any, address: Any, number: Any) -> tuple[Any, Any]:
    """Adds to the int64 at an address atomically; returns the value before."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], _pointer(64)), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), build


@_intrinsic
def atomic_load(typing: Any, address: Any) -> tuple[Any, Any]:
    """The int64 at an address, which other threads change."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(b.inttoptr(args[0], _pointer(64)), "acquire", 8)

    return types.int64(types.int64), build


@_intrinsic
def prefetch(typing: Any, address: Any) -> tuple[Any, Any]:
    """Requests the cache line at an address from memory; any address is allowed."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.call(_prefetch(b), [b.inttoptr(args[0], _pointer(8)), *_PREFETCH_HINTS])
        return context.get_dummy_value()

    return types.void(types.int64), build


@_intrinsic
def pointer(typing: Any, address: Any) -> tuple[Any, Any]:
    """An address as a pointer for `numba.carray`."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], _pointer(8))

    return types.voidptr(types.int64), build


_yield_core = types.ExternalFunction(
    "SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32()
)


@compiled
def wait_until(address: int, count: int) -> None:
    """Waits until the int64 at an address is `count` or more."""
    turns = 0
    while atomic_load(address) < count:  # busy at first: it takes no more than microseconds
        turns += 1
        if turns > 2000:  # the thread that is waited for may need this core
            _yield_core()


@compiled
def parallel_for(
    piece: Callable[..., None], count: int, args: Any, barrier: int, lookahead: bool = True
) -> int:
    """Runs `piece(index, next_index, args)` for every index below `count`, shared by all threads.

    All threads call this with equal arguments, and it returns when all pieces are done.

    Args:
        piece: a compiled function.
        count: of pieces.
        args: what pieces read and write, a named tuple.
        barrier: address of BARRIER_BYTES that are 0 and that no other call uses.
        lookahead: a thread takes its next piece before it does the present one, so that it may
            prefetch what the next one reads. `next_index` is `count` or more without one.

    Returns:
        The address of the next barrier.
    """
    taken, done = barrier, barrier + 8
    index = atomic_add(taken, 1)
    while index < count:
        next_index = atomic_add(taken, 1) if lookahead else count
        piece(index, next_index, args)
        atomic_add(done, 1)
        index = next_index if lookahead else atomic_add(taken, 1)
    wait_until(done, count)
    return barrier + BARRIER_BYTES


# Tiles

_I64, _I32, _I32X16 = ir.IntType(64), ir.IntType(32), ir.VectorType(ir.IntType(32), 16)
_F32X16 = ir.VectorType(ir.FloatType(), 16)
_PREFETCH_HINTS = [ir.Constant(_I32, hint) for hint in (0, 3, 1)]  # read, keep in L1, data


def _pointer(bits: int) -> ir.Type:
    return ir.IntType(bits).as_pointer()


def _prefetch(b: Any) -> Any:
    kind = ir.FunctionType(ir.VoidType(), [_pointer(8), _I32, _I32, _I32])
    name = "llvm.prefetch.p0"
    return b.module.globals.get(name) or ir.Function(b.module, kind, name)


def _32_ints(bits: int) -> ir.Type:
    return ir.VectorType(ir.IntType(bits), 32)


def _i64(number: int) -> ir.Constant:
    return ir.Constant(_I64, number)


def _lanes(start: int, step: int) -> ir.Constant:
    return ir.Constant(_I32X16, [start + step * lane for lane in range(16)])


def _at(b: Any, base: Any, offset: Any, kind: ir.Type) -> Any:
    """A pointer to the address `base + offset`."""
    offset = _i64(offset) if isinstance(offset, int) else offset
    return b.inttoptr(b.add(base, offset), kind.as_pointer())


def _unpack(b: Any, values: Any, kind: type[tuple[Any, ...]]) -> Any:
    """The fields of a named tuple of int64, as LLVM values."""
    fields: Any = kind
    return fields(*(b.extract_value(values, i) for i in range(len(fields._fields))))


def _products(b: Any, weights: list[Any], both: Any) -> list[Any]:
    """A pair of inputs, int32 that holds two int16, times vectors of 16 pairs of weights."""
    zeros = ir.Constant(_I32X16, None)
    spread = b.insert_element(zeros, both, ir.Constant(_I32, 0))
    spread = b.bitcast(b.shuffle_vector(spread, spread, _lanes(0, 0)), _32_ints(16))
    inputs, sums = b.sext(spread, _32_ints(32)), []
    for sixteen in weights:
        products = b.mul(sixteen, inputs)
        evens = b.shuffle_vector(products, products, _lanes(0, 2))
        odds = b.shuffle_vector(products, products, _lanes(1, 2))
        sums.append(b.add(evens, odds))
    return sums


class _Shape(NamedTuple):
    rows: int
    outputs: int  # that are computed
    tile: int  # outputs that the weights are laid out for
    weight_bits: int


def _sums(b: Any, shape: _Shape, operands: Operands, ahead: Prefetch | None) -> list[list[Any]]:
    """The loop of a tile: for each row its sums, in vectors of 16 outputs.

    A turn of the loop reads at least a cache line of weights, so that none is requested twice.
    """
    rows, parts = shape.rows, shape.outputs // 16
    pair_bytes = 2 * shape.tile * shape.weight_bits // 8
    turn_pairs = max(1, CACHE_LINE // pair_bytes)
    before = b.block
    loop, after = b.append_basic_block("tile"), b.append_basic_block("tiled")
    b.branch(loop)
    b.position_at_end(loop)
    pair = b.phi(_I64)
    sums = [b.phi(_I32X16) for _ in range(parts * rows)]
    offset = b.mul(pair, _i64(pair_bytes))
    if ahead:
        base = b.select(b.icmp_signed("<", pair, ahead.near_pairs), ahead.near_ptr, ahead.far_ptr)
        requested = b.add(base, b.mul(pair, ahead.bytes_per_pair))
        for line in range(0, pair_bytes, CACHE_LINE):
            b.call(_prefetch(b), [_at(b, requested, line, ir.IntType(8)), *_PREFETCH_HINTS])
    new = list(sums)
    for turn in range(turn_pairs):
        kind, place = _32_ints(shape.weight_bits), b.add(operands.weights_ptr, offset)
        weights = [
            b.load(_at(b, place, turn * pair_bytes + 4 * shape.weight_bits * part, kind), align=1)
            for part in range(parts)
        ]
        weights = [b.sext(sixteen, _32_ints(32)) for sixteen in weights]
        for row in range(rows):
            place = b.add(b.mul(operands.inputs_stride, _i64(row)), b.shl(pair, _i64(2)))
            place = b.add(place, _i64(4 * turn))
            both = b.load(_at(b, operands.inputs_ptr, place, _I32), align=1)
            for part, products in enumerate(_products(b, weights, both)):
                new[parts * row + part] = b.add(new[parts * row + part], products)
    following = b.add(pair, _i64(turn_pairs))
    pair.add_incoming(_i64(0), before)
    pair.add_incoming(following, loop)
    for total, value in zip(sums, new, strict=True):
        total.add_incoming(ir.Constant(_I32X16, None), before)
        total.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", following, operands.pairs), loop, after)
    b.position_at_end(after)
    return [new[row * parts : (row + 1) * parts] for row in range(rows)]


def _int8_tile(rows: int, tile: int = TILE) -> Any:
    """The product of int8 weights [pairs, tile, 2] with some rows, into int32 [rows, tile]."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        operands, sums_ptr, ahead = args
        operands, ahead = _unpack(b, operands, Operands), _unpack(b, ahead, Prefetch)
        sums = _sums(b, _Shape(rows, tile, tile, 8), operands, ahead)
        for number, value in enumerate(itertools.chain(*sums)):
            b.store(value, _at(b, sums_ptr, 64 * number, _I32X16), align=4)
        return context.get_dummy_value()

    @_intrinsic
    def int8_tile(typing: Any, operands: Any, sums_ptr: Any, ahead: Any) -> tuple[Any, Any]:
        return types.void(operands, types.int64, ahead), build

    return int8_tile


def _int16_tile(rows: int, outputs: int = TILE) -> Any:
    """The product of int16 weights [pairs, TILE, 2] with some rows, as float32.

    The weights are small and read again and again, so nothing is requested ahead. `outputs` are the
    first of the tile that are computed.
    """

    def spread(b: Any, number: Any) -> Any:
        first = b.insert_element(ir.Constant(_F32X16, None), number, ir.Constant(_I32, 0))
        return b.shuffle_vector(first, first, _lanes(0, 0))

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        operands, to = _unpack(b, args[0], Operands), _unpack(b, args[1], FloatOutput)
        sums = _sums(b, _Shape(rows, outputs, TILE, 16), operands, None)
        for number, of_row in enumerate(sums):
            row = _i64(number)
            scale_at = _at(b, to.row_scales_ptr, b.mul(to.row_scales_stride, row), ir.FloatType())
            scale = spread(b, b.load(scale_at, align=4))
            out_row = b.add(to.out_ptr, b.mul(to.out_stride, row))
            addend_row = b.add(to.addend_ptr, b.mul(to.addend_stride, row))
            for part, total in enumerate(of_row):
                column, bias, addend = (
                    b.load(_at(b, base, 64 * part, _F32X16), align=4)
                    for base in (to.column_scales_ptr, to.bias_ptr, addend_row)
                )
                value = b.fmul(b.sitofp(total, _F32X16), b.fmul(column, scale))
                value = b.fadd(value, b.fadd(bias, addend))
                b.store(value, _at(b, out_row, 64 * part, _F32X16), align=4)
        return context.get_dummy_value()

    @_intrinsic
    def int16_tile(typing: Any, operands: Any, output: Any) -> tuple[Any, Any]:
        return types.void(operands, output), build

    return int16_tile


int8_tile_1, int8_tile_2, int8_tile_4 = _int8_tile(1), _int8_tile(2), _int8_tile(4)
int8_block_1 = _int8_tile(1, BLOCK)  # the sums of a single row fit into any registers
int16_tile_1, int16_tile_1_of_16 = _int16_tile(1), _int16_tile(1, 16)
int16_tile_4, int16_tile_4_of_16 = _int16_tile(4), _int16_tile(4, 16)
