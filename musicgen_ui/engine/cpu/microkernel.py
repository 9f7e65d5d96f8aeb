"""The inner kernels of int8 on the CPU, compiled by numba for the processor at hand.

All products, and both sides of attention, are one small kernel: int8 numbers laid out as [tiles of
some outputs, pairs of inputs, outputs of a tile, 2] and read in that order, times int16, exact in
int32. Beside it is what the threads of a call need to share its work.

A `Kernel` is what Python calls, and all that is `compiled` is inlined into it: one piece of machine
code, kept on the disk as a whole. A function that stayed outside would exist twice, optimised alone
and optimised within the kernel, and round differently. The linker takes the first where this
process compiled it and the second where the kernel was loaded, so the first start of a version
would make other music than all later ones.
"""

from __future__ import annotations

import itertools
import logging
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from musicgen_ui.engine.cpu.machine_code import STORE, Store, is_whole, name_of, seal

log = logging.getLogger(__name__)

_intrinsic: Any = intrinsic  # its stubs want an argument that callers do not give
BLOCK = 64  # outputs of a piece of work; positions of keys that lie together
FEATURES = llvmlite.binding.get_host_cpu_features()  # of the processor
# Outputs that the kernel makes together: as many as have their sums for four rows in registers. Of
# these AVX2 has a quarter: a thread does 34 billion multiplications a second in tiles of 64, 58 in
# tiles of 16 (Zen 4 at 2.7 GHz).
TILE = 64 if FEATURES.get("avx512bw") else 16
TURN = 4  # inputs that a turn of the kernel's loop takes at most: products have a multiple of it


# All of fastmath except the promise that there is neither NaN nor infinity.
_FASTMATH = {"reassoc", "nsz", "arcp", "contract", "afn"}
_OPTIONS: Any = {"fastmath": _FASTMATH, "nogil": True, "error_model": "numpy"}
_COMPILING = threading.Lock()


def compiled(function: Callable) -> Any:
    """A function for kernels, which it is compiled into; Python cannot call it."""
    within: Any = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(**within, **_OPTIONS)(function)


def kernel(function: Callable[..., None]) -> Kernel:
    """A function that Python calls, as machine code."""
    return Kernel(function)


class Kernel:
    """Compiles a function when it is first called with some types, or loads it from the disk.

    Args:
        function: what the machine code does. It raises no TypeError.
        store: where the machine code is kept.
    """

    def __init__(self, function: Callable[..., None], store: Store = STORE) -> None:
        self._function = function
        self._store = store
        self._of_types: dict[tuple, Any] = {}  # numba's dispatchers, with one signature each
        self._latest: Any = None  # the one that was called last

    @property
    def signatures(self) -> list[tuple]:
        """The types that it was called with."""
        return list(self._of_types)

    def __call__(self, *args: Any) -> None:
        """Runs the machine code; on any number of threads at once."""
        if self._latest:
            try:
                self._latest(*args)
                return
            except TypeError:  # it is for other types
                pass
        types = tuple(map(numba.typeof, args))
        with _COMPILING:
            if types not in self._of_types:
                self._of_types[types] = self._machine_code(types)
                self._of_types[types].disable_compile()
        made = self._latest = self._of_types[types]
        made(*args)

    def _machine_code(self, types: tuple) -> Any:
        home = self._store.folder
        if home:
            kept = home / f"{self._function.__name__}-{name_of(types)}"
            made = self._load(types, kept) or self._compile(types, kept)
            if made:
                return made
        made = numba.njit(**_OPTIONS)(self._function)
        made.compile(types)
        return made

    def _load(self, types: tuple, kept: Path) -> Any:
        """What is kept of these types; None if that is nothing, or cannot be used."""
        if is_whole(kept):
            try:
                made = self._cached(kept)
                made.compile(types)
                if made.stats.cache_hits:
                    return made
            except Exception as error:  # whatever reading it brings about
                log.warning("A compiled kernel could not be read: %s", kept, exc_info=error)
        self._store.discard(kept)
        return None

    def _compile(self, types: tuple, kept: Path) -> Any:
        """Compiles and keeps it; None if it could not be compiled."""
        made = None
        try:
            with tempfile.TemporaryDirectory(dir=kept.parent, ignore_cleanup_errors=True) as new:
                made = self._cached(Path(new))
                made.compile(types)
                seal(Path(new))
                Path(new).replace(kept)
        except Exception as error:  # the disk is full, numba cannot write there, …
            if not is_whole(kept):  # otherwise another process was faster
                self._store.failed(kept.parent, error)
        return made if made and types in made.signatures else None

    def _cached(self, folder: Path) -> Any:
        """The function with numba's cache in a folder."""
        config: Any = numba.config  # read when a function is decorated
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
        try:
            made = numba.njit(cache=True, **_OPTIONS)(self._function)
        finally:
            config.CACHE_DIR = before
        if not Path(made.stats.cache_path).is_relative_to(folder):
            raise PermissionError(f"numba cannot write to {folder}")
        return made


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


def _word(number: int) -> ir.Constant:
    return ir.Constant(_WORD, number)


def _lanes(start: int, step: int) -> ir.Constant:
    return ir.Constant(_FEW, [start + step * lane for lane in range(16)])


def _place(b: Any, base: Any, offset: Any, kind: ir.Type) -> Any:
    offset = ir.Constant(_WORD, offset) if isinstance(offset, int) else offset
    return b.inttoptr(b.add(base, offset), kind.as_pointer())


def _sums(b: Any, shape: tuple[int, int, int, int], args: Any) -> list[list[Any]]:
    """The loop of a tile: rows of sums of 16 outputs each.

    `shape`: rows, parts of 16, bits of a weight, outputs that the weights are laid out for. A turn
    of the loop reads 64 bytes of weights at least, so that it asks for none twice.
    """
    rows, parts, bits, laid = shape
    weights, x, stride, pairs, *asked = args
    bytes_a_pair = 2 * laid * bits // 8
    turn_pairs = max(1, 64 // bytes_a_pair)
    before = b.block
    loop, after = b.append_basic_block("tile"), b.append_basic_block("tiled")
    b.branch(loop)
    b.position_at_end(loop)
    pair = b.phi(_WORD)
    sums = [b.phi(_FEW) for _ in range(parts * rows)]
    step = b.mul(pair, ir.Constant(_WORD, bytes_a_pair))
    if asked:
        ahead, turn, then, advance = asked
        soon = b.select(b.icmp_signed("<", pair, turn), ahead, then)
        soon = b.add(soon, b.mul(pair, advance))
        for line in range(0, bytes_a_pair, 64):  # of the processor's cache
            b.call(_prefetch(b), [_place(b, soon, line, ir.IntType(8)), *_HINTS])
    new = list(sums)
    for each in range(turn_pairs):
        at, kind = b.add(weights, step), _wide(bits)
        wide = [
            b.load(_place(b, at, each * bytes_a_pair + 4 * bits * part, kind), align=1)
            for part in range(parts)
        ]
        wide = [b.sext(few, _wide(32)) for few in wide]
        for row in range(rows):
            at = b.add(b.mul(stride, ir.Constant(_WORD, 2 * row)), b.shl(pair, _word(2)))
            both = b.load(_place(b, x, b.add(at, _word(4 * each)), _NUMBER), align=1)
            spread = b.insert_element(ir.Constant(_FEW, None), both, ir.Constant(_NUMBER, 0))
            spread = b.bitcast(b.shuffle_vector(spread, spread, _lanes(0, 0)), _wide(16))
            inputs = b.sext(spread, _wide(32))
            for part in range(parts):
                products = b.mul(wide[part], inputs)
                evens = b.shuffle_vector(products, products, _lanes(0, 2))
                odds = b.shuffle_vector(products, products, _lanes(1, 2))
                place = parts * row + part
                new[place] = b.add(new[place], b.add(evens, odds))
    following = b.add(pair, _word(turn_pairs))
    pair.add_incoming(_word(0), before)
    pair.add_incoming(following, loop)
    for total, value in zip(sums, new, strict=True):
        total.add_incoming(ir.Constant(_FEW, None), before)
        total.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", following, pairs), loop, after)
    b.position_at_end(after)
    return [new[row * parts : (row + 1) * parts] for row in range(rows)]


def _tile_of(rows: int, outputs: int = TILE) -> Any:
    """The kernel for so many rows at once, from addresses: `tile(weights, x, stride, pairs, out,
    ahead, turn, then, advance)` of int8 [pairs, outputs, 2], int16 [rows, stride], int32 [rows,
    outputs].

    With each pair of inputs memory is asked for as many bytes as it has weights: so many times
    `advance` after `ahead` as the pair's number says, and from pair `turn` on after `then`.

    It is written in LLVM's vectors of 16 int32, which LLVM turns into what a processor has: on x86
    a multiplication of 32 pairs of int16 that adds neighbours, and with VNNI the sum as well.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        weights, x, stride, pairs, out, *asked = args
        sums = _sums(b, (rows, outputs // 16, 8, outputs), (weights, x, stride, pairs, *asked))
        for number, value in enumerate(itertools.chain(*sums)):
            b.store(value, _place(b, out, 64 * number, _FEW), align=4)
        return context.get_dummy_value()

    @_intrinsic
    def tile(
        typing: Any, weights: Any, x: Any, stride: Any, pairs: Any, out: Any, ahead: Any,
        turn: Any, then: Any, advance: Any,
    ) -> tuple:  # fmt: skip
        return types.void(*[types.int64] * 9), build

    return tile


def _near_tile_of(rows: int, outputs: int = TILE) -> Any:
    """The same for int16 weights that are read again and again, so that memory is asked for
    nothing, and for the first so many outputs of a tile: `tile(weights, x, stride, pairs, out,
    wide, columns, scales, far, bias, onto, wide_onto)`.

    The sums go as float32 to `out`, whose rows are `wide` bytes apart: times the scales of columns
    and rows, these `far` bytes apart, plus `bias`, plus what is at `onto`.
    """

    def spread(b: Any, number: Any) -> Any:
        first = b.insert_element(ir.Constant(_FLOATS, None), number, ir.Constant(_NUMBER, 0))
        return b.shuffle_vector(first, first, _lanes(0, 0))

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        *inputs, out, wide, columns, scales, far, bias, onto, wide_onto = args
        sums = _sums(b, (rows, outputs // 16, 16, TILE), inputs)
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
tile_1_of_64 = _tile_of(1, BLOCK)  # a row's sums are few enough
near_tile_4, near_tile_4_of_16 = _near_tile_of(4), _near_tile_of(4, 16)
near_tile_1, near_tile_1_of_16 = _near_tile_of(1), _near_tile_of(1, 16)
