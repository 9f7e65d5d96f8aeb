"""The inner kernels of int8 on the CPU, compiled by numba for the processor at hand.

All products, and both sides of attention, are one small kernel: int8 numbers laid out as [blocks of
64 outputs, pairs of inputs, 64, 2] and read in that order, times int16, exact in int32. The rest
here are functions in a form that LLVM makes vectors of.

Compiled code is kept on the disk beside `kernels`, `convolution` and `recurrence`, with these
inside: numba compiles it anew when those change, not when this one does, so touch them too.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_intrinsic: Any = intrinsic  # its stubs want an argument that callers do not give
BLOCK = 64  # outputs that the kernel makes together
ALL, SIZE = np.int32(-1), np.int32(2**31 - 1)  # the bits of a float32; all but its sign


def compiled(function: Callable) -> Any:
    """Leaves the compilation to the first call, and its outcome on the disk."""
    options: Any = {"fastmath": True, "nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is nowhere to keep it
        return numba.njit(**options)(function)


@_intrinsic
def add(typing: Any, address: Any, number: Any) -> tuple:
    """Adds to the int64 at an address, at once for all threads; gives what was there before."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], _pointer(64)), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), build


@_intrinsic
def read(typing: Any, address: Any) -> tuple:
    """The int64 at an address, which other threads change."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(b.inttoptr(args[0], _pointer(64)), "acquire", 8)

    return types.int64(types.int64), build


@_intrinsic
def ask(typing: Any, address: Any) -> tuple:
    """Asks memory for the 64 bytes at an address, which are read soon; any address will do."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.call(_prefetch(b), [b.inttoptr(args[0], _pointer(8)), *_HINTS])
        return context.get_dummy_value()

    return types.void(types.int64), build


@_intrinsic
def pointer(typing: Any, address: Any) -> tuple:
    """An address as what `numba.carray` takes."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], _pointer(8))

    return types.voidptr(types.int64), build


_give_way = types.ExternalFunction(
    "SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32()
)


@compiled
def wait(address: Any, number: Any) -> None:
    """Until the int64 at an address has reached a number: busy at first, since it takes no time."""
    turns = 0
    while read(address) < number:
        turns += 1
        if turns > 2000:  # the thread that is waited for may want this core
            _give_way()


def _pointer(bits: int) -> ir.Type:
    return ir.IntType(bits).as_pointer()


_WORD, _NUMBER, _FEW = ir.IntType(64), ir.IntType(32), ir.VectorType(ir.IntType(32), 16)
_FLOATS = ir.VectorType(ir.FloatType(), 16)
_HINTS = [ir.Constant(_NUMBER, hint) for hint in (0, 3, 1)]  # read, keep near, data


def _prefetch(b: Any) -> Any:
    kind = ir.FunctionType(ir.VoidType(), [_pointer(8), _NUMBER, _NUMBER, _NUMBER])
    name = "llvm.prefetch.p0"
    return b.module.globals.get(name) or ir.Function(b.module, kind, name)


def _wide(bits: int) -> ir.Type:
    return ir.VectorType(ir.IntType(bits), 32)


def _lanes(start: int, step: int) -> ir.Constant:
    return ir.Constant(_FEW, [start + step * lane for lane in range(16)])


def _place(b: Any, base: Any, offset: Any, kind: ir.Type) -> Any:
    offset = ir.Constant(_WORD, offset) if isinstance(offset, int) else offset
    return b.inttoptr(b.add(base, offset), kind.as_pointer())


def _sums(b: Any, shape: tuple[int, int, int], args: Any) -> list[list[Any]]:
    """The loop of a tile: rows of sums of 16 outputs each; `shape`: rows, parts of 16, bits."""
    rows, parts, bits = shape
    weights, x, stride, pairs, *asked = args
    before = b.block
    loop, after = b.append_basic_block("tile"), b.append_basic_block("tiled")
    b.branch(loop)
    b.position_at_end(loop)
    pair = b.phi(_WORD)
    sums = [b.phi(_FEW) for _ in range(parts * rows)]
    step = b.mul(pair, ir.Constant(_WORD, 2 * BLOCK * bits // 8))
    if asked:
        ahead, turn, then = asked
        soon = b.add(b.select(b.icmp_signed("<", pair, turn), ahead, then), step)
        for line in (0, 64):  # of the processor's cache
            b.call(_prefetch(b), [_place(b, soon, line, ir.IntType(8)), *_HINTS])
    at, kind = b.add(weights, step), _wide(bits)
    wide = [
        b.sext(b.load(_place(b, at, 4 * bits * part, kind), align=1), _wide(32))
        for part in range(parts)
    ]
    new = []
    for row in range(rows):
        at = b.add(b.mul(stride, ir.Constant(_WORD, 2 * row)), b.shl(pair, ir.Constant(_WORD, 2)))
        both = b.load(_place(b, x, at, _NUMBER), align=1)
        spread = b.insert_element(ir.Constant(_FEW, None), both, ir.Constant(_NUMBER, 0))
        spread = b.bitcast(b.shuffle_vector(spread, spread, _lanes(0, 0)), _wide(16))
        inputs = b.sext(spread, _wide(32))
        for part in range(parts):
            products = b.mul(wide[part], inputs)
            evens = b.shuffle_vector(products, products, _lanes(0, 2))
            odds = b.shuffle_vector(products, products, _lanes(1, 2))
            new.append(b.add(sums[parts * row + part], b.add(evens, odds)))
    following = b.add(pair, ir.Constant(_WORD, 1))
    pair.add_incoming(ir.Constant(_WORD, 0), before)
    pair.add_incoming(following, loop)
    for total, value in zip(sums, new, strict=True):
        total.add_incoming(ir.Constant(_FEW, None), before)
        total.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", following, pairs), loop, after)
    b.position_at_end(after)
    return [new[row * parts : (row + 1) * parts] for row in range(rows)]


def _tile_of(rows: int) -> Any:
    """The kernel for so many rows at once, from addresses: `tile(weights, x, stride, pairs, out,
    ahead, turn, then)` of int8 [pairs, 64, 2], int16 [rows, stride] and int32 [rows, 64].

    With each pair of inputs memory is asked for as many bytes as it has weights: from `ahead` on,
    as far from it as the pair's weights are from the first, and from pair `turn` on from `then` on.

    It is written in LLVM's vectors of 16 int32, which LLVM turns into what a processor has: on x86
    a multiplication of 32 pairs of int16 that adds neighbours, and with VNNI the sum as well.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        weights, x, stride, pairs, out, *asked = args
        sums = _sums(b, (rows, 4, 8), (weights, x, stride, pairs, *asked))
        for number, value in enumerate(itertools.chain(*sums)):
            b.store(value, _place(b, out, 64 * number, _FEW), align=4)
        return context.get_dummy_value()

    @_intrinsic
    def tile(
        typing: Any, weights: Any, x: Any, stride: Any, pairs: Any, out: Any, ahead: Any,
        turn: Any, then: Any,
    ) -> tuple:  # fmt: skip
        return types.void(*[types.int64] * 8), build

    return tile


def _near_tile_of(rows: int, parts: int = 4) -> Any:
    """The same for int16 weights that are read again and again, so that memory is asked for
    nothing, and for the first so many 16 of the 64 outputs: `tile(weights, x, stride, pairs, out,
    wide, columns, scales, far, bias, onto, wide_onto)`.

    The sums go as float32 to `out`, whose rows are `wide` bytes apart: times the scales of columns
    and rows, these `far` bytes apart, plus `bias`, plus what is at `onto`.
    """

    def spread(b: Any, number: Any) -> Any:
        first = b.insert_element(ir.Constant(_FLOATS, None), number, ir.Constant(_NUMBER, 0))
        return b.shuffle_vector(first, first, _lanes(0, 0))

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        *inputs, out, wide, columns, scales, far, bias, onto, wide_onto = args
        sums = _sums(b, (rows, parts, 16), inputs)
        for row, of_row in enumerate(sums):
            number = ir.Constant(_WORD, row)
            scale = b.load(_place(b, scales, b.mul(far, number), ir.FloatType()), align=4)
            scale, to = spread(b, scale), b.add(out, b.mul(wide, number))
            there = b.add(onto, b.mul(wide_onto, number))
            for part, total in enumerate(of_row):
                column, shift, more = (
                    b.load(_place(b, base, 64 * part, _FLOATS), align=4)
                    for base in (columns, bias, there)
                )
                value = b.fmul(b.sitofp(total, _FLOATS), b.fmul(column, scale))
                value = b.fadd(value, b.fadd(shift, more))
                b.store(value, _place(b, to, 64 * part, _FLOATS), align=4)
        return context.get_dummy_value()

    @_intrinsic
    def tile(
        typing: Any, weights: Any, x: Any, stride: Any, pairs: Any, out: Any, wide: Any,
        columns: Any, scales: Any, far: Any, bias: Any, onto: Any, wide_onto: Any,
    ) -> tuple:  # fmt: skip
        return types.void(*[types.int64] * 12), build

    return tile


tile_1, tile_2, tile_4 = _tile_of(1), _tile_of(2), _tile_of(4)
near_tile_4_of_64, near_tile_4_of_16 = _near_tile_of(4), _near_tile_of(4, parts=1)
near_tile_1_of_64, near_tile_1_of_16 = _near_tile_of(1), _near_tile_of(1, parts=1)


@compiled
def exp(x: Any) -> Any:
    """e to the x for x up to 0, within 2e-6 of it down to x = -40, so that loops become vectors."""
    y = max(x * np.float32(1.44269504), np.float32(-125))
    whole = np.floor(y + np.float32(0.5))
    f = (y - whole) * np.float32(0.69314718)
    p = np.float32(1 / 720)  # Taylor's polynomial, for f up to 0.35 either way
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def gelu(x: Any) -> None:
    """GELU in place; the error function after Abramowitz and Stegun 7.1.26, within 1.5e-7."""
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
def floats(address: Any, count: Any) -> Any:
    """float32 [count] at an address."""
    return numba.carray(pointer(address), count, np.float32)


@compiled
def largest(x: Any, count: Any, kept: Any) -> Any:
    """Of the first numbers, with the bits `kept` of each.

    They are compared as integers in the same order: of these LLVM makes vectors (a tenth of the
    time).
    """
    numbers, best = numba.carray(pointer(x.ctypes.data), count, np.int32), np.int32(-(2**31))
    for i in range(count):
        bits = numbers[i] & kept
        best = max(best, bits ^ ((bits >> np.int32(31)) & SIZE))
    return np.int32(best ^ ((best >> np.int32(31)) & SIZE)).view(np.float32)


@compiled
def quantise(x: Any, codes: Any, most: Any) -> Any:
    """float32 [n] to the first n int16 of `codes`; gives their scale."""
    peak = max(np.float32(1e-12), largest(x, len(x), SIZE))
    inverse = np.float32(most) / peak
    for i in range(len(x)):
        codes[i] = np.int16(np.rint(x[i] * inverse))
    return peak / np.float32(most)


@compiled
def normalise(x: Any, norm: Any, epsilon: Any, out: Any) -> None:
    """A layer norm of one row; `norm`: scales and shifts."""
    mean, square = np.float32(0), np.float32(0)
    for i in range(len(x)):
        mean += x[i]
    mean /= np.float32(len(x))
    for i in range(len(x)):
        square += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1) / np.sqrt(square / np.float32(len(x)) + np.float32(epsilon))
    for i in range(len(x)):
        out[i] = (x[i] - mean) * scale * norm[0, i] + norm[1, i]
