"""int8 on the CPU: one compiled function takes all layers of a step, on every thread at once.

A step of MusicGen reads some hundred MB of weights for a handful of rows, so it should take the
time of that reading and no more. Here are the weights and the keys and values as `kernels` wants
them, one copy each, and the calls: all layers for some sequences, or, where an adapter stands
beside the weights, a product and a layer's attention at a time. Weights have a scale an output,
inputs 12 bits on a scale a row, keys and values a scale a head and position.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from musicgen_ui.engine.cpu import kernels
from musicgen_ui.engine.cpu.microkernel import BLOCK, TILE, TURN

Layer: TypeAlias = Any  # `layers`' and `decoder`'s, which import this
Memory: TypeAlias = Any
Sequence: TypeAlias = Any


class Model(NamedTuple):
    """What the stages read of a decoder."""

    products: np.ndarray  # int64 [layers, 6, 2]: addresses of each product's codes and scales
    widths: np.ndarray  # int64 [6, 2]: each product's outputs and inputs
    norms: np.ndarray  # float32 [layers, 3, 2, hidden]: scales and shifts
    epsilon: float
    heads: int
    told: bool  # there is attention to a prompt


class Rows(NamedTuple):
    """The rows of a call, each of as many columns, one after the other."""

    x: np.ndarray  # float32 [rows · columns, hidden]: what goes in, and in the end what comes out
    columns: int
    filled: np.ndarray  # int64 [rows]: positions before these columns
    own: np.ndarray  # int64 [rows, layers, 4]: addresses of keys, values, and the scales of both
    room: np.ndarray  # int64 [rows]: positions there is room for
    tokens: np.ndarray  # int64 [rows]: of the prompt; 0 is the null condition
    text: np.ndarray  # int64 [rows, layers, 4]: as `own`, of the prompt
    text_room: np.ndarray  # int64 [rows]


class Space(NamedTuple):
    """What lies between two stages."""

    wide: np.ndarray  # float32 [rows · columns, the widest outputs]
    y: np.ndarray  # float32 [rows · columns, hidden]
    codes: np.ndarray  # int16 [rows · columns, the widest inputs]: quantised
    scales: np.ndarray  # float32 [rows · columns]: of the codes

    @classmethod
    def of(cls, rows: int, hidden: int, outputs: int, inputs: int) -> Space:
        """Room for so many rows."""
        empty = functools.partial(np.empty, dtype=np.float32)
        codes = np.empty((rows, _up(inputs, TURN)), np.int16)
        return cls(empty((rows, outputs)), empty((rows, hidden)), codes, empty(rows))


log = logging.getLogger(__name__)

_CALLS: SimpleQueue[list] = SimpleQueue()  # what helpers wait for


@functools.cache
def _start(number: int) -> None:
    """Starts a helper."""
    threading.Thread(target=_help, name=f"musicgen-int8-{number}", daemon=True).start()


def _help() -> None:
    while True:
        call = _CALLS.get()
        try:
            kernel, args = call.pop()
        except IndexError:  # it is done already
            continue
        try:
            kernel(*args)
        except Exception as error:  # before its first piece, so the others do the work
            log.warning("A thread could not help", exc_info=error)
        del kernel, args


def run(kernel: Callable[..., None], stages: int, *args: Any) -> None:
    """Calls the kernel on every thread, with counters of the stages' pieces between them.

    It returns when all pieces are done. A helper that comes late finds none, so none is waited for:
    an executor's takes 50 to 130 µs to begin, these 30 to 70 (Zen 4).
    """
    helpers = torch.get_num_threads() - 1
    args = *args, np.zeros((stages, 2), np.int64)
    call = [(kernel, args)] * helpers
    for number in range(helpers):
        _start(number)
        _CALLS.put(call)
    try:
        kernel(*args)
    finally:
        call.clear()


class Product:
    """Weights float32 [outputs, inputs] as int8 with a scale an output."""

    def __init__(self, weight: np.ndarray) -> None:
        outputs, inputs = weight.shape
        self.shape = outputs, inputs
        padded = np.zeros((_up(outputs, BLOCK), _up(inputs, TURN)), np.float32)
        padded[:outputs, :inputs] = weight
        self.scales = np.maximum(np.abs(padded).max(1), np.float32(1e-8)) / np.float32(127)
        codes = np.rint(padded / self.scales[:, None]).astype(np.int8)
        tiles = codes.reshape(-1, TILE, padded.shape[1] // 2, 2).swapaxes(1, 2)
        self.codes = np.ascontiguousarray(tiles)  # [tiles, pairs of inputs, TILE, 2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def addresses(self) -> tuple[int, int]:
        """Of codes and scales, while this lives."""
        return self.codes.ctypes.data, self.scales.ctypes.data

    def unpacked(self) -> np.ndarray:
        """The weights as they are multiplied, float32 [outputs, inputs]."""
        codes = self.codes.swapaxes(1, 2).reshape(len(self.scales), -1)
        return (codes * self.scales[:, None])[: self.shape[0], : self.shape[1]]

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [rows, inputs] to [rows, outputs]."""
        outputs, inputs = self.shape
        out = np.empty((len(x), outputs), np.float32)
        space = Space.of(len(x), 0, 0, inputs)
        run(kernels.product, 2, x.contiguous().numpy(), *self.addresses, space, out)
        return torch.from_numpy(out)


class Int8Cache:
    """Keys and values of some rows in one layer."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, scales: np.ndarray) -> None:
        self.keys = keys  # int8 [rows, heads, blocks of 64 positions, pairs of dim, 64, 2]
        self.values = values  # int8 [rows, heads, blocks of 64 dim, pairs of positions, 64, 2]
        self.scales = scales  # float32 [key or value, rows, heads, positions]

    @classmethod
    def of_layers(cls, layers: int, shape: tuple[int, ...]) -> list[Int8Cache]:
        """Empty ones for [rows, heads, positions, dim] in each layer.

        They are parts of one piece of memory, which the system then gives in large pages: a fifth
        of the time of attention at 250 positions (Zen 5).
        """
        rows, heads, positions, dim = shape
        room = _up(positions, BLOCK)
        keys = (rows, heads, room // BLOCK, _up(dim, 2) // 2, BLOCK, 2)
        values = (rows, heads, _up(dim, BLOCK) // BLOCK, room // 2, BLOCK, 2)
        made = (np.zeros((layers, *kind), np.int8) for kind in (keys, values))
        scales = np.zeros((layers, 2, rows, heads, room), np.float32)
        return [cls(*parts) for parts in zip(*made, scales, strict=True)]

    @property
    def room(self) -> int:
        """Positions there is room for."""
        return self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes + self.scales.nbytes

    @property
    def addresses(self) -> np.ndarray:
        """int64 [rows, 4]: of each row's keys, values, and the scales of both, while this lives."""
        parts = (self.keys, self.values, *self.scales)
        of_rows = [[part[row].ctypes.data for part in parts] for row in range(len(self.keys))]
        return np.array(of_rows, np.int64)

    def fill(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Lays down the first positions: float32 [rows, heads, positions, dim] each."""
        rows, heads, positions, dim = keys.shape
        for part, numbers in enumerate((keys, values)):
            scales = np.maximum(np.abs(numbers).max(-1), np.float32(1e-12)) / np.float32(127)
            self.scales[part, :, :, :positions] = scales
            codes = np.zeros((rows, heads, self.room, _up(dim, BLOCK)), np.int8)
            codes[:, :, :positions, :dim] = np.rint(numbers / scales[..., None])
            if part:
                pairs = codes.reshape(rows, heads, self.room // 2, 2, -1, BLOCK)
                self.values[:] = pairs.transpose(0, 1, 4, 2, 5, 3)
            else:
                pairs = codes.reshape(rows, heads, self.room // BLOCK, BLOCK, -1, 2)
                self.keys[:] = pairs.swapaxes(3, 4)[:, :, :, : self.keys.shape[3]]

    def copy_rows(self, other: Int8Cache, sources: list[int], filled: int) -> None:
        """Copies row `sources[i]` of `other`, which has as much room, to row i."""
        self.keys[:] = other.keys[sources]
        self.values[:] = other.values[sources]
        self.scales[:] = other.scales[:, sources]

    def attend(self, qkv: Tensor, start: int) -> Tensor:
        """As `FloatCache.attend`, float32."""
        rows, columns, _, heads, dim = qkv.shape
        flat = qkv.reshape(rows * columns, -1).contiguous().numpy()
        out = np.empty((rows * columns, heads * dim), np.float32)
        own, none = self.addresses[:, None], np.zeros(rows, np.int64)
        filled, room = np.full(rows, start), np.full(rows, self.room)
        called = Rows(out, columns, filled, own, room, none, own, none)
        run(kernels.attention, 1, called, heads, 0, flat, out)
        return torch.from_numpy(out).view(rows, columns, -1)


@dataclass
class Places:
    """A sequence's part of `Rows`, and what the addresses in it belong to."""

    text: list[Memory | None]
    prompts: list[list[Int8Cache]]
    own: np.ndarray
    room: np.ndarray
    tokens: np.ndarray
    addresses: np.ndarray
    text_room: np.ndarray

    @classmethod
    def of(cls, sequence: Sequence) -> Places:
        """The places of a sequence and of its prompts, which are laid out here."""
        caches: Any = sequence.caches  # Int8Cache a layer
        prompts = [_prompt(memory) for memory in sequence.text]
        nowhere = np.zeros((1, len(caches), 4), np.int64)
        of_prompts = [np.stack([c.addresses for c in p], 1) if p else nowhere for p in prompts]
        return cls(
            sequence.text,
            prompts,
            own=np.stack([cache.addresses for cache in caches], 1),
            room=np.full(sequence.rows, caches[0].room),
            tokens=np.array([m[0][0].shape[2] if m else 0 for m in sequence.text], np.int64),
            addresses=np.concatenate(of_prompts),
            text_room=np.array([p[0].room if p else 0 for p in prompts], np.int64),
        )


def _prompt(memory: Memory | None) -> list[Int8Cache]:
    if memory is None:
        return []
    caches = Int8Cache.of_layers(len(memory), memory[0][0].shape)
    for cache, (keys, values) in zip(caches, memory, strict=True):
        cache.fill(keys.numpy(), values.numpy())
    return caches


class Layers:
    """All layers of a decoder packed in int8."""

    def __init__(self, layers: list[Layer], heads: int) -> None:
        told = [layer.text is not None for layer in layers]
        packed = [_products(layer) for layer in layers]
        shapes = [product.shape if product else (0, 0) for product in packed[0]]
        norms = [[torch.stack([n.weight, n.bias]) for n in _norms(layer)] for layer in layers]
        self.model = Model(
            products=np.array([[p.addresses if p else (0, 0) for p in of] for of in packed]),
            widths=np.array(shapes),
            norms=torch.stack([torch.stack(of) for of in norms]).numpy(),
            epsilon=layers[0].self_norm.eps,
            heads=heads,
            told=all(told),
        )

    def run(self, x: Tensor, sequences: list[Sequence], columns: int) -> Tensor:
        """Takes the next columns of the sequences' rows through all layers.

        Args:
            x: float32 [rows · columns, hidden].
            sequences: of the same rows.
            columns: of each.
        """
        for sequence in sequences:
            if sequence.places is None or sequence.places.text is not sequence.text:
                sequence.places = Places.of(sequence)
        places = [sequence.places for sequence in sequences if sequence.places]

        def joined(part: str) -> np.ndarray:
            return np.concatenate([getattr(place, part) for place in places])

        out = x.numpy().copy()
        filled = np.repeat([s.filled for s in sequences], [s.rows for s in sequences])
        parts = ("own", "room", "tokens", "addresses", "text_room")
        rows = Rows(out, columns, filled, *map(joined, parts))
        outputs, inputs = self.model.widths.max(0)
        space = Space.of(len(out), out.shape[1], outputs, inputs)
        stages = kernels.STAGES * len(self.model.products)
        run(kernels.layers, stages, self.model, rows, space)
        return torch.from_numpy(out)


def _products(layer: Layer) -> list[Product | None]:
    """In the order of their stages."""
    of_text = [layer.text.q.packed, layer.text.out.packed] if layer.text else [None, None]
    return [layer.qkv.packed, layer.self_out.packed, *of_text, layer.up.packed, layer.down.packed]


def _norms(layer: Layer) -> list[nn.LayerNorm]:
    of_text = layer.text.norm if layer.text else layer.self_norm
    return [layer.self_norm, of_text, layer.ffn_norm]


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
