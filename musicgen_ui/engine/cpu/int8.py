"""int8 on the CPU: a decoder step as one compiled function, which all threads run at once.

A step of MusicGen reads hundreds of MB of weights for a handful of rows, so it should take the time
of reading them and no more. Here are the layers of a step, the weights and KV caches in the layout
that `kernels` reads, and the calls: all layers for some sequences or, where a LoRA adapter stands
beside the weights, a product and a layer's attention at a time. Weights have a scale an output,
inputs 12 bits and a scale a row, keys and values a scale a head and position.
docs/int8_kernels.md draws the layouts.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from musicgen_ui.engine.cpu.kernels import (
    CACHE,
    INPUT_PEAK,
    KV_PEAK,
    ROWS_AT_ONCE,
    WEIGHTS,
    Attention,
    Epilogue,
    Floats,
    Matmul,
    Normalise,
    Quantise,
    Quantised,
    Workspace,
    attend_head,
    matmul_block,
    normalise_row,
    quantise_row,
    weights_of,
)
from musicgen_ui.engine.cpu.machine_code import compiled, kernel
from musicgen_ui.engine.cpu.microkernel import BLOCK, TILE, UNROLL, parallel_for

Linear: TypeAlias = Any  # linear.Linear, which imports this
LayerWeights: TypeAlias = Any  # transformer.Layer, which imports this through `linear`
TextKV: TypeAlias = list[tuple[Tensor, Tensor]]  # as in transformer
Sequence: TypeAlias = Any  # transformer.Sequence

BLOCK_BARRIERS = 5  # of the `parallel_for`s in a residual block, see `_layers`
# A residual block: `x += last · f(first · norm(x))`, where `kind` says what f is.
RESIDUAL_BLOCK = np.dtype(
    [
        *((name, np.int64) for name in ("kind", "layer", "norm_ptr")),
        *((name, WEIGHTS) for name in ("first", "last")),
    ]
)

log = logging.getLogger(__name__)


# The layers of a step


class Kind(IntEnum):
    """What a residual block computes between its two products."""

    SELF_ATTENTION = 0
    CROSS_ATTENTION = 1  # to the prompt
    FEED_FORWARD = 2  # GELU


class Model(NamedTuple):
    """The decoder's layers, each of two or three residual blocks in order."""

    blocks: np.ndarray  # RESIDUAL_BLOCK [layers · blocks of a layer]
    epsilon: float  # of the layer norms
    heads: int


class Batch(NamedTuple):
    """The rows of a step, each of as many new columns, one row after the other."""

    x: np.ndarray  # float32 [rows · columns, hidden]: embeddings, then the last layer's output
    columns: int
    caches: np.ndarray  # CACHE [rows, layers]: of the positions before
    prompts: np.ndarray  # CACHE [rows, layers]: of the prompt; empty for the null condition


class Buffers(NamedTuple):
    """What lies between two operations of a step."""

    wide: np.ndarray  # float32 [rows · columns, widest outputs]
    y: np.ndarray  # float32 [rows · columns, hidden]
    codes: np.ndarray  # int16 [rows · columns, widest inputs]: quantised
    scales: np.ndarray  # float32 [rows · columns]: of the codes

    @classmethod
    def empty(cls, rows: int, hidden: int, outputs: int, inputs: int) -> Buffers:
        """Buffers for so many rows, uninitialised."""
        empty = functools.partial(np.empty, dtype=np.float32)
        codes = np.empty((rows, _round_up(inputs, UNROLL)), np.int16)
        return cls(empty((rows, outputs)), empty((rows, hidden)), codes, empty(rows))


@compiled
def floats_of(x: np.ndarray, width: int) -> Floats:
    """The first `width` columns of float32 [rows, …]."""
    return Floats(x.ctypes.data, 4 * x.shape[1], len(x), width)


@compiled
def quantised_in(buffers: Buffers) -> Quantised:
    """The buffers' codes and scales."""
    codes = buffers.codes
    stride = 2 * codes.shape[1]
    return Quantised(codes.ctypes.data, stride, buffers.scales.ctypes.data, len(codes))


@kernel
def _layers(model: Model, batch: Batch, buffers: Buffers, barriers: np.ndarray) -> None:
    """All layers in place of `batch.x`; int64 [residual blocks · BLOCK_BARRIERS, 2] barriers."""
    rows, hidden = batch.x.shape
    positions = hidden
    for row in range(len(batch.caches)):
        positions = max(positions, batch.caches[row, 0].capacity, batch.prompts[row, 0].capacity)
    sums = np.empty(ROWS_AT_ONCE * BLOCK, np.int32)
    scores, codes = np.empty(positions + 2, np.float32), np.empty(positions + 2, np.int16)
    workspace = Workspace(sums, scores, codes)
    x, y = floats_of(batch.x, hidden), floats_of(buffers.y, hidden)
    inputs, barrier = quantised_in(buffers), barriers.ctypes.data
    for index in range(len(model.blocks)):
        block = model.blocks[index]
        next_block = model.blocks[(index + 1) % len(model.blocks)]
        first, last = weights_of(block.first), weights_of(block.last)
        wide = floats_of(buffers.wide, first.outputs)
        feeds_forward = block.kind == Kind.FEED_FORWARD

        norm = Normalise(x, block.norm_ptr, model.epsilon, y, inputs)
        barrier = parallel_for(normalise_row, rows, norm, barrier)

        epilogue = Epilogue.GELU if feeds_forward else Epilogue.STORE
        product = Matmul(inputs, first, last, wide, epilogue, sums)
        barrier = parallel_for(matmul_block, first.blocks, product, barrier)

        if not feeds_forward:
            causal = block.kind == Kind.SELF_ATTENTION
            caches = batch.caches if causal else batch.prompts
            layer, columns, heads = block.layer, batch.columns, model.heads
            attention = Attention(
                caches, layer, causal, wide, y, columns, heads, workspace, last.tiles_ptr
            )
            barrier = parallel_for(attend_head, len(caches) * heads, attention, barrier)

        source = Quantise(wide if feeds_forward else y, inputs, INPUT_PEAK)
        barrier = parallel_for(quantise_row, rows, source, barrier)

        product = Matmul(inputs, last, weights_of(next_block.first), x, Epilogue.ADD, sums)
        barrier = parallel_for(matmul_block, last.blocks, product, barrier)


@kernel
def _product(
    x: np.ndarray, records: np.ndarray, buffers: Buffers, out: np.ndarray, barriers: np.ndarray
) -> None:
    """float32 [rows, inputs] times WEIGHTS [1] into `out` [rows, outputs]; two barriers."""
    sums, inputs = np.empty(ROWS_AT_ONCE * BLOCK, np.int32), quantised_in(buffers)
    weights, to = weights_of(records[0]), floats_of(out, out.shape[1])
    source = Quantise(floats_of(x, x.shape[1]), inputs, INPUT_PEAK)
    barrier = parallel_for(quantise_row, len(x), source, barriers.ctypes.data)
    product = Matmul(inputs, weights, weights, to, Epilogue.STORE, sums)
    parallel_for(matmul_block, weights.blocks, product, barrier)


@kernel
def _attention(
    qkv: np.ndarray,
    caches: np.ndarray,
    columns: int,
    heads: int,
    out: np.ndarray,
    barriers: np.ndarray,
) -> None:
    """Self-attention of [rows · columns, 3 · hidden] with CACHE [rows, 1]; one barrier."""
    positions = out.shape[1]
    for row in range(len(caches)):
        positions = max(positions, caches[row, 0].capacity)
    sums = np.empty(ROWS_AT_ONCE * BLOCK, np.int32)
    scores, codes = np.empty(positions + 2, np.float32), np.empty(positions + 2, np.int16)
    workspace = Workspace(sums, scores, codes)
    source, to = floats_of(qkv, qkv.shape[1]), floats_of(out, out.shape[1])
    attention = Attention(caches, 0, True, source, to, columns, heads, workspace, 0)
    parallel_for(attend_head, len(caches) * heads, attention, barriers.ctypes.data)


# Calls on all threads

_Call = list[tuple[Callable[..., None], tuple[Any, ...]]]
_CALLS: SimpleQueue[_Call | None] = SimpleQueue()  # None ends a helper
_HELPERS: list[threading.Thread] = []
ENDING_S = 1.0  # for the helpers, at the end of the process


@functools.cache
def _start_helper(number: int) -> None:
    helper = threading.Thread(target=_help, name=f"musicgen-int8-{number}", daemon=True)
    helper.start()
    _HELPERS.append(helper)


def _help() -> None:
    while (call := _CALLS.get()) is not None:
        try:
            function, args = call.pop()
        except IndexError:  # the call has returned
            continue
        try:
            function(*args)
        except Exception as error:  # before its first piece: the other threads do them all
            log.warning("A thread could not help", exc_info=error)
        del function, args


@atexit.register
def _end_helpers() -> None:
    """Ends the helpers: Python aborts where one comes out of a kernel while it shuts down."""
    for _ in _HELPERS:
        _CALLS.put(None)
    for helper in _HELPERS:
        helper.join(ENDING_S)


def run(function: Callable[..., None], barriers: int, *args: Any) -> None:
    """Calls a kernel on every thread, with `args` and int64 [barriers, 2] zeros.

    It returns when all pieces are done. A helper thread that comes late finds none left, so none is
    waited for. An executor's thread takes 50 to 130 µs to begin, a helper 30 to 70 (Zen 4).
    """
    helpers = torch.get_num_threads() - 1
    args = *args, np.zeros((barriers, 2), np.int64)
    call = [(function, args)] * helpers
    for number in range(helpers):
        _start_helper(number)
        _CALLS.put(call)
    try:
        function(*args)
    finally:
        call.clear()


# Weights and KV caches


class Product:
    """Weights float32 [outputs, inputs] as int8 with a scale an output."""

    def __init__(self, weight: np.ndarray) -> None:
        outputs, inputs = weight.shape
        self.shape = outputs, inputs
        padded = np.zeros((_round_up(outputs, BLOCK), _round_up(inputs, UNROLL)), np.float32)
        padded[:outputs, :inputs] = weight
        self._scales = np.maximum(np.abs(padded).max(1), np.float32(1e-8)) / np.float32(127)
        codes = np.rint(padded / self._scales[:, None]).astype(np.int8)
        tiles = codes.reshape(-1, TILE, padded.shape[1] // 2, 2).swapaxes(1, 2)
        self._tiles = np.ascontiguousarray(tiles)  # [tiles, pairs of inputs, TILE, 2]
        addresses = self._tiles.ctypes.data, self._scales.ctypes.data
        sizes = len(padded) // BLOCK, outputs, self._tiles.shape[1]
        self.record = np.array([(*addresses, *sizes)], WEIGHTS)  # while this object lives

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._tiles.nbytes + self._scales.nbytes

    def unpacked(self) -> np.ndarray:
        """The weights as they are multiplied, float32 [outputs, inputs]."""
        codes = self._tiles.swapaxes(1, 2).reshape(len(self._scales), -1)
        return (codes * self._scales[:, None])[: self.shape[0], : self.shape[1]]

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [rows, inputs] to [rows, outputs]."""
        outputs, inputs = self.shape
        out = np.empty((len(x), outputs), np.float32)
        buffers = Buffers.empty(len(x), 0, 0, inputs)
        run(_product, 2, x.contiguous().numpy(), self.record, buffers, out)
        return torch.from_numpy(out)


class Int8Cache:
    """Keys and values of some rows in one layer."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, scales: np.ndarray) -> None:
        self.keys = keys  # int8 [rows, heads, blocks of positions, pairs of dim, BLOCK, 2]
        self.values = values  # int8 [rows, heads, blocks of dim, pairs of positions, BLOCK, 2]
        self.scales = scales  # float32 [keys or values, rows, heads, positions]

    @classmethod
    def of_layers(cls, layers: int, shape: tuple[int, ...]) -> list[Int8Cache]:
        """Empty ones for [rows, heads, positions, dim] in each layer.

        They are views of one allocation, which the system backs by large pages: a fifth of the time
        of attention at 250 positions (Zen 5).
        """
        rows, heads, positions, dim = shape
        capacity = _round_up(positions, BLOCK)
        keys = (rows, heads, capacity // BLOCK, _round_up(dim, 2) // 2, BLOCK, 2)
        values = (rows, heads, _round_up(dim, BLOCK) // BLOCK, capacity // 2, BLOCK, 2)
        codes = (np.zeros((layers, *kind), np.int8) for kind in (keys, values))
        scales = np.zeros((layers, 2, rows, heads, capacity), np.float32)
        return [cls(*arrays) for arrays in zip(*codes, scales, strict=True)]

    @property
    def capacity(self) -> int:
        """Positions that can be filled."""
        return self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes + self.scales.nbytes

    def records(self, filled: int) -> np.ndarray:
        """CACHE [rows], valid while this object lives."""
        arrays = (self.keys, self.values, *self.scales)
        addresses = ([array[row].ctypes.data for array in arrays] for row in range(len(self.keys)))
        return np.array([(*row, self.capacity, filled) for row in addresses], CACHE)

    def fill(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Writes the first positions: float32 [rows, heads, positions, dim] each."""
        rows, heads, positions, dim = keys.shape
        for which, numbers in enumerate((keys, values)):
            peaks = np.maximum(np.abs(numbers).max(-1), np.float32(1e-12))
            scales = peaks / np.float32(KV_PEAK)
            self.scales[which, :, :, :positions] = scales
            codes = np.zeros((rows, heads, self.capacity, _round_up(dim, BLOCK)), np.int8)
            codes[:, :, :positions, :dim] = np.rint(numbers / scales[..., None])
            if which:
                pairs = codes.reshape(rows, heads, self.capacity // 2, 2, -1, BLOCK)
                self.values[:] = pairs.transpose(0, 1, 4, 2, 5, 3)
            else:
                pairs = codes.reshape(rows, heads, self.capacity // BLOCK, BLOCK, -1, 2)
                self.keys[:] = pairs.swapaxes(3, 4)[:, :, :, : self.keys.shape[3]]

    def copy_rows(self, other: object, sources: list[int], filled: int) -> None:
        """Copies row `sources[i]` of `other`, which has as much room, to row i."""
        assert isinstance(other, Int8Cache)
        self.keys[:] = other.keys[sources]
        self.values[:] = other.values[sources]
        self.scales[:] = other.scales[:, sources]

    def attend(self, qkv: Tensor, start: int) -> Tensor:
        """As `FloatCache.attend`, float32."""
        rows, columns, _, heads, dim = qkv.shape
        flat = qkv.reshape(rows * columns, -1).contiguous().numpy()
        out = np.empty((rows * columns, heads * dim), np.float32)
        run(_attention, 1, flat, self.records(start)[:, None], columns, heads, out)
        return torch.from_numpy(out).view(rows, columns, -1)


@dataclass
class SequenceCaches:
    """A sequence's records in a `Batch`, and the caches that their addresses belong to."""

    text: list[TextKV | None]  # what the prompts' caches were filled from, a row
    caches: list[Int8Cache]  # a layer
    prompts: list[list[Int8Cache]]  # a row, then a layer; none for the null condition
    records: np.ndarray  # CACHE [rows, layers]
    prompt_records: np.ndarray  # CACHE [rows, layers]

    @classmethod
    def of(cls, sequence: Sequence) -> SequenceCaches:
        """Quantises the keys and values of a sequence's prompts."""
        caches = sequence.caches
        prompts = [_prompt_caches(text_kv) for text_kv in sequence.text]
        prompt_records = np.zeros((len(prompts), len(caches)), CACHE)
        for row, (text_kv, of_row) in enumerate(zip(sequence.text, prompts, strict=True)):
            for layer, cache in enumerate(of_row):
                prompt_records[row, layer] = cache.records(text_kv[layer][0].shape[2])[0]
        records = np.stack([cache.records(0) for cache in caches], 1)
        return cls(sequence.text, caches, prompts, records, prompt_records)


def _prompt_caches(text_kv: TextKV | None) -> list[Int8Cache]:
    if text_kv is None:
        return []
    caches = Int8Cache.of_layers(len(text_kv), text_kv[0][0].shape)
    for cache, (keys, values) in zip(caches, text_kv, strict=True):
        cache.fill(keys.numpy(), values.numpy())
    return caches


class Layers:
    """All layers of a decoder whose weights are int8."""

    def __init__(self, layers: list[LayerWeights], heads: int) -> None:
        self._blocks = [block for layer in layers for block in _residual_blocks(layer)]
        of_layer = len(self._blocks) // len(layers)
        records = np.zeros(len(self._blocks), RESIDUAL_BLOCK)  # with addresses in `_blocks`
        for index, (kind, norm, first, last) in enumerate(self._blocks):
            weights = first.record[0], last.record[0]
            records[index] = (kind, index // of_layer, norm.ctypes.data, *weights)
        self._model = Model(records, layers[0].self_norm.eps, heads)
        shapes = [product.shape for _, _, *products in self._blocks for product in products]
        self._widest_outputs, self._widest_inputs = map(max, zip(*shapes, strict=True))

    def run(self, x: Tensor, sequences: list[Sequence], columns: int) -> Tensor:
        """Takes the next columns of the sequences' rows through all layers.

        Args:
            x: float32 [rows · columns, hidden].
            sequences: of the same rows.
            columns: of each.
        """
        for sequence in sequences:
            if sequence.kernel_caches is None or sequence.kernel_caches.text is not sequence.text:
                sequence.kernel_caches = SequenceCaches.of(sequence)
        caches = np.concatenate([s.kernel_caches.records for s in sequences])
        filled = np.repeat([s.filled for s in sequences], [s.rows for s in sequences])
        caches["filled"] = filled[:, None]
        prompts = np.concatenate([s.kernel_caches.prompt_records for s in sequences])
        out = x.numpy().copy()
        batch = Batch(out, columns, caches, prompts)
        rows, hidden = out.shape
        buffers = Buffers.empty(rows, hidden, self._widest_outputs, self._widest_inputs)
        barriers = BLOCK_BARRIERS * len(self._model.blocks)
        run(_layers, barriers, self._model, batch, buffers)
        return torch.from_numpy(out)


def _residual_blocks(layer: LayerWeights) -> Iterator[tuple[Kind, np.ndarray, Product, Product]]:
    """Kind, layer norm (float32 [2, hidden], weight and bias) and both products of each."""

    def block(kind: Kind, norm: nn.LayerNorm, first: Linear, last: Linear) -> Any:
        return kind, torch.stack([norm.weight, norm.bias]).numpy(), first.packed, last.packed

    yield block(Kind.SELF_ATTENTION, layer.self_norm, layer.qkv, layer.self_out)
    if text := layer.text:
        yield block(Kind.CROSS_ATTENTION, text.norm, text.q, text.out)
    yield block(Kind.FEED_FORWARD, layer.ffn_norm, layer.up, layer.down)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
