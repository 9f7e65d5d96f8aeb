"""The codec's convolutions and LSTM on the CPU in integers, each one compiled call on all threads.

Convolution: a time step's channels become int16 with a scale of their own, after the ELU; weights
are int16 with a scale an output, and each tap of the filter is a product of tiles, exact in int32.
So an output depends on its own inputs alone, to the bit, whatever is computed beside it. With AVX2,
as with AVX-512's VNNI, twice as many of these multiplications are done at once as in float32.

LSTM: each frame waits for the weights of the state to be read. torch's cells read them on one
thread, as float32; here all threads read them as int8. Inputs and state have as many bits as the
sums of a layer's width allow, 14 for Meta's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor, nn

from musicgen_ui.engine.cpu.int8 import Buffers, Product, floats_of, quantised_in, run
from musicgen_ui.engine.cpu.kernels import (
    ROWS_AT_ONCE,
    Epilogue,
    Floats,
    Matmul,
    Quantise,
    Quantised,
    at_least,
    at_most,
    exp,
    floats,
    matmul_block,
    quantise,
    quantise_row,
    weights_of,
)
from musicgen_ui.engine.cpu.machine_code import compiled, kernel
from musicgen_ui.engine.cpu.microkernel import (
    BARRIER_BYTES,
    BLOCK,
    TILE,
    FloatOutput,
    Operands,
    atomic_add,
    int16_tile_1,
    int16_tile_1_of_16,
    int16_tile_4,
    int16_tile_4_of_16,
    parallel_for,
    pointer,
    wait_until,
)

STEPS_AT_ONCE = 4  # outputs in time that are multiplied with a weight while it is in a register
PIECE_STEPS = 64  # time steps of a piece

State = tuple[Tensor, Tensor]  # h and c, float32 [layers, batch, hidden] each


# Convolution


class Filters(NamedTuple):
    """A convolution's weights and settings."""

    weights_ptr: int  # int16 [taps, tiles of outputs, pairs of inputs, TILE, 2]
    taps: int
    tiles: int
    pairs: int
    stride: int  # time steps
    dilation: int  # time steps between two taps
    peak_code: int  # of a quantised input
    elu: bool
    add: bool  # to what the output holds


class Convolution(NamedTuple):
    """One signal's arrays in a convolution."""

    x: np.ndarray  # float32 [time, inputs]
    column_scales: np.ndarray  # float32 [outputs], of the weights
    bias: np.ndarray  # float32 [outputs + TILE], the last TILE are 0
    codes: np.ndarray  # int16 [time, inputs]: x, quantised
    row_scales: np.ndarray  # float32 [time]: of the codes
    out: np.ndarray  # float32 [outputs in time, outputs]


class _Steps(NamedTuple):
    """Arguments of the pieces of a convolution."""

    arrays: Convolution
    filters: Filters
    activated: np.ndarray  # of the thread, float32 [inputs]


class Convolution16:
    """[time, inputs] to [outputs in time, outputs]: an optional ELU, then `weight` and `bias`.

    Args:
        weight: float32 [outputs, inputs, taps]. `outputs` is a multiple of 16 or, where stride and
            dilation are 1, so small that `outputs · taps` is at most 16.
        bias: float32 [outputs].
        stride: in time steps.
        dilation: time steps between two taps.
        elu: whether the inputs are activated first.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: int = 1, dilation: int = 1, elu: bool = True
    ) -> None:
        self.outputs, self.inputs, self.taps = weight.shape
        self.stride, self.dilation, self.elu = stride, dilation, elu
        self.spread = 1  # taps that are computed as outputs side by side, where those are few
        if self.outputs % 16:
            self.spread, self.taps = self.taps, 1
            weight = weight.permute(2, 0, 1).reshape(-1, self.inputs, 1)  # [taps · outputs, in, 1]
            bias = torch.cat([bias, bias.new_zeros(len(weight) - len(bias))])
        # The bits that an int32 has for a tap's sum, shared so that both sides round alike: weights
        # that are normally distributed sum up to about their number times a fifth of the peak.
        self.peak_code = min(32767, math.isqrt(5 * 2**31 // self.inputs))
        tiles, pairs = -(-len(weight) // TILE), -(-self.inputs // 2)
        padded = np.zeros((tiles * TILE, 2 * pairs, self.taps), np.float32)
        padded[: len(weight), : self.inputs] = weight.numpy()
        sizes = np.abs(padded)
        limit = (2**31 - 1) / self.peak_code - self.inputs  # of a sum, less what rounding may add
        scales = np.maximum(sizes.max((1, 2)) / 32767, sizes.sum(1).max(1) / limit)
        self.scales = np.maximum(scales, 1e-12).astype(np.float32)
        codes = np.rint(padded / self.scales[:, None, None]).astype(np.int16)
        # [taps, tiles, pairs of inputs, TILE, 2]
        tiled = codes.reshape(tiles, TILE, pairs, 2, self.taps).transpose(4, 0, 2, 1, 3)
        self.codes = np.ascontiguousarray(tiled)
        self.bias = np.zeros((tiles + 1) * TILE, np.float32)
        self.bias[: len(bias)] = bias.numpy()

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """float32 [batch, time, inputs] to [batch, outputs in time, outputs], added to `onto`."""
        batch, time, _ = x.shape
        count = (time - (self.taps - 1) * self.dilation - 1) // self.stride + 1
        width = -(-self.spread * self.outputs // 16) * 16
        padded = width > self.outputs
        out = x.new_empty(batch, count, width) if onto is None or padded else onto
        codes = np.empty((time, 2 * self.codes.shape[2]), np.int16)
        scales = np.empty(time, np.float32)
        taps, tiles, pairs = self.codes.shape[:3]
        filters = Filters(
            self.codes.ctypes.data,
            taps,
            tiles,
            pairs,
            self.stride,
            self.dilation,
            self.peak_code,
            self.elu,
            add=out is onto,
        )
        for signal, to in zip(x, out.numpy(), strict=True):
            source = signal.contiguous().numpy()  # other strides would be compiled again
            arrays = Convolution(source, self.scales, self.bias, codes, scales, to)
            run(_convolve, 2, arrays, filters)
        if padded:  # an output is the sum of its taps, each from an input of its own
            size = batch, count - self.spread + 1, self.spread, self.outputs
            out = out.as_strided(size, (count * width, width, width + self.outputs, 1)).sum(2)
            out = out if onto is None else out.add_(onto)
        return out


@kernel
def _convolve(arrays: Convolution, filters: Filters, barriers: np.ndarray) -> None:
    """Quantises the inputs, then computes the outputs; two barriers."""
    args = _Steps(arrays, filters, np.empty(arrays.x.shape[1], np.float32))
    barrier = barriers.ctypes.data
    pieces = (len(arrays.x) + PIECE_STEPS - 1) // PIECE_STEPS
    barrier = parallel_for(_quantise_steps, pieces, args, barrier, False)
    pieces = (len(arrays.out) + PIECE_STEPS - 1) // PIECE_STEPS * filters.tiles
    parallel_for(_convolve_tile, pieces, args, barrier, False)


@compiled
def _elu(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(x)):
        below = at_most(x[i], np.float32(0))
        out[i] = at_least(x[i], np.float32(0)) + (exp(below) - np.float32(1))


@compiled
def _quantise_steps(piece: int, next_piece: int, args: _Steps) -> None:
    """PIECE_STEPS inputs in time."""
    arrays, activated = args.arrays, args.activated
    (time, inputs), width = arrays.x.shape, arrays.codes.shape[1]
    scales = floats(arrays.row_scales.ctypes.data, time)
    for t in range(piece * PIECE_STEPS, min(time, (piece + 1) * PIECE_STEPS)):
        x = floats(arrays.x.ctypes.data + 4 * inputs * t, inputs)
        codes = numba.carray(pointer(arrays.codes.ctypes.data + 2 * width * t), width, np.int16)
        if args.filters.elu:
            _elu(x, activated)
            scales[t] = quantise(activated, codes, args.filters.peak_code)
        else:
            scales[t] = quantise(x, codes, args.filters.peak_code)


@compiled
def _convolve_tile(piece: int, next_piece: int, args: _Steps) -> None:
    """A tile of outputs for PIECE_STEPS outputs in time."""
    arrays, filters = args.arrays, args.filters
    count, width = arrays.out.shape
    codes_stride = 2 * arrays.codes.shape[1]
    tile, pairs, stride = piece % filters.tiles, filters.pairs, filters.stride
    zeros_ptr = arrays.bias.ctypes.data + 4 * filters.tiles * TILE
    last = min(width, TILE * (tile + 1))
    t = piece // filters.tiles * PIECE_STEPS
    end = min(count, t + PIECE_STEPS)
    while t < end:
        steps = STEPS_AT_ONCE if end - t >= STEPS_AT_ONCE else 1
        for tap in range(filters.taps):
            step = t * stride + tap * filters.dilation
            inputs_ptr = arrays.codes.ctypes.data + codes_stride * step
            row_scales_ptr = arrays.row_scales.ctypes.data + 4 * step
            tap_ptr = filters.weights_ptr + (tap * filters.tiles + tile) * pairs * TILE * 4
            o = TILE * tile
            while o < last:
                outputs = TILE if last - o >= TILE else 16
                out_ptr = arrays.out.ctypes.data + 4 * (width * t + o)
                adds = filters.add or tap > 0
                operands = Operands(
                    tap_ptr + 4 * (o % TILE), inputs_ptr, codes_stride * stride, pairs
                )
                to = FloatOutput(
                    out_ptr,
                    4 * width,
                    arrays.column_scales.ctypes.data + 4 * o,
                    row_scales_ptr,
                    4 * stride,
                    arrays.bias.ctypes.data + 4 * o if tap == 0 else zeros_ptr,
                    out_ptr if adds else zeros_ptr,
                    4 * width if adds else 0,
                )
                if steps == STEPS_AT_ONCE and outputs == TILE:
                    int16_tile_4(operands, to)
                elif steps == STEPS_AT_ONCE:
                    int16_tile_4_of_16(operands, to)
                elif outputs == TILE:
                    int16_tile_1(operands, to)
                else:
                    int16_tile_1_of_16(operands, to)
                o += outputs
        t += steps


# LSTM


class LstmLayer(NamedTuple):
    """One layer of an LSTM."""

    weights: np.ndarray  # WEIGHTS [2]: of the inputs and of the state, 4 · hidden outputs each
    bias: np.ndarray  # float32 [4 · hidden]: the sum of both
    h: np.ndarray  # float32 [batch, hidden]: before the first frame
    c: np.ndarray  # float32 [batch, hidden], updated
    peak_code: int  # of quantised inputs and states


class _Units(NamedTuple):
    """Arguments of `_lstm_units`: one frame."""

    product: Matmul  # of the state, onto the frame's gates
    layer: LstmLayer
    h_ptr: int  # float32 [batch, hidden]: of this frame


class Lstm:
    """`nn.LSTM` of equal widths, a multiple of 64: [time, batch, hidden] and a state in and out."""

    def __init__(self, lstm: nn.LSTM) -> None:
        weights = [each.detach().float().numpy() for each in lstm.parameters()]
        self.hidden = lstm.hidden_size
        self.peak_code = min(32767, (2**31 - 1) // (127 * self.hidden))
        layers = [weights[i : i + 4] for i in range(0, len(weights), 4)]
        self._products = [(Product(inputs), Product(state)) for inputs, state, *_ in layers]
        # with addresses in the above
        self._records = [
            np.concatenate([p.record for p in of_layer]) for of_layer in self._products
        ]
        self._biases = [of_inputs + of_state for _, _, of_inputs, of_state in layers]

    def __call__(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """As `nn.LSTM`, float32."""
        time, batch, hidden = x.shape
        zeros = np.zeros((len(self._products), batch, hidden), np.float32)
        h, c = (zeros, zeros.copy()) if state is None else (each.numpy().copy() for each in state)
        out = np.ascontiguousarray(x.reshape(-1, hidden).numpy())
        buffers = Buffers.empty(time * batch, 0, 4 * hidden, hidden)
        threads = torch.get_num_threads()
        for index, (records, bias) in enumerate(zip(self._records, self._biases, strict=True)):
            layer = LstmLayer(records, bias, h[index], c[index], self.peak_code)
            y = np.empty_like(out)
            barriers = (2 + time) * threads + 1
            run(_lstm, barriers, out, layer, buffers, threads, y)
            h[index] = y[-batch:]
            out = y
        state = torch.from_numpy(h), torch.from_numpy(c)
        return torch.from_numpy(out).view(time, batch, hidden), state


@kernel
def _lstm(
    x: np.ndarray,
    layer: LstmLayer,
    buffers: Buffers,
    threads: int,
    out: np.ndarray,
    barriers: np.ndarray,
) -> None:
    """A layer over all time, [time · batch, hidden]; (2 + time) · threads + 1 barriers.

    The products of all frames' inputs first, then frame by frame that of the state, which every
    thread quantises for itself, and the cells.
    """
    (batch, hidden), rows = layer.h.shape, len(x)
    sums = np.empty(ROWS_AT_ONCE * BLOCK, np.int32)
    codes, scales = np.empty((batch, hidden), np.int16), np.empty(batch, np.float32)
    codes_ptr, scales_ptr = codes.ctypes.data, scales.ctypes.data
    of_inputs, of_state = weights_of(layer.weights[0]), weights_of(layer.weights[1])
    inputs, gates = quantised_in(buffers), floats_of(buffers.wide, 4 * hidden)
    thread = atomic_add(barriers.ctypes.data + BARRIER_BYTES * (len(barriers) - 1), 1)
    barrier = barriers.ctypes.data

    args = Quantise(floats_of(x, hidden), inputs, layer.peak_code)
    barrier = _parallel_for_shares(quantise_row, rows, args, thread, threads, barrier)
    product = Matmul(inputs, of_inputs, of_state, gates, Epilogue.STORE, sums)
    blocks = 4 * hidden // BLOCK
    barrier = _parallel_for_shares(matmul_block, blocks, product, thread, threads, barrier)
    for frame in range(0, rows, batch):
        for row in range(batch):
            h = layer.h[row] if frame == 0 else out[frame - batch + row]
            scales[row] = quantise(h, codes[row], layer.peak_code)
        state = Quantised(codes_ptr, 2 * hidden, scales_ptr, batch)
        now = Floats(gates.ptr + frame * gates.stride, gates.stride, batch, gates.width)
        product = Matmul(state, of_state, of_state, now, Epilogue.ADD, sums)
        units = _Units(product, layer, out.ctypes.data + 4 * hidden * frame)
        blocks = hidden // BLOCK
        barrier = _parallel_for_shares(_lstm_units, blocks, units, thread, threads, barrier)


@compiled
def _parallel_for_shares(
    piece: Callable[..., None], count: int, args: Any, thread: int, threads: int, barrier: int
) -> int:
    """As `parallel_for`, but each thread begins with its own share of the pieces.

    It has the same share in every call, so the weights that it reads stay in its cache. Afterwards
    it helps with the others' shares.

    Args:
        piece: a compiled function.
        count: of pieces.
        args: what the pieces read and write.
        thread: number of this thread.
        threads: number of shares.
        barrier: address of as many times BARRIER_BYTES that are 0.

    Returns:
        The address of the next barrier.
    """
    done = barrier + 8
    for turn in range(threads):
        share = (thread + turn) % threads
        begin, end = count * share // threads, count * (share + 1) // threads
        taken = barrier + BARRIER_BYTES * share
        index = begin + atomic_add(taken, 1)
        while index < end:
            piece(index, index + 1, args)
            atomic_add(done, 1)
            index = begin + atomic_add(taken, 1)
    wait_until(done, count)
    return barrier + BARRIER_BYTES * threads


@compiled
def _lstm_units(block: int, next_block: int, args: _Units) -> None:
    """64 units of all rows of a frame: the state's product for their four gates, then the cells."""
    batch, hidden = args.layer.c.shape
    blocks = hidden // BLOCK
    for gate in range(4):
        matmul_block(gate * blocks + block, (gate + 1) * blocks + block, args.product)
    offset, gates = 4 * BLOCK * block, args.product.out
    for row in range(batch):
        c_ptr = args.layer.c.ctypes.data + 4 * hidden * row + offset
        h_ptr = args.h_ptr + 4 * hidden * row + offset
        gates_ptr = gates.ptr + gates.stride * row + offset
        _cells(gates_ptr, args.layer.bias.ctypes.data + offset, hidden, c_ptr, h_ptr)


@compiled
def _sigmoid(x: Any) -> Any:
    return np.float32(1) / (np.float32(1) + exp(at_most(-x, np.float32(87))))


@compiled
def _tanh(x: Any) -> Any:
    e = exp(at_most(np.float32(2) * x, np.float32(87)))
    return np.float32(1) - np.float32(2) / (np.float32(1) + e)


@compiled
def _cells(gates_ptr: int, bias_ptr: int, hidden: int, c_ptr: int, h_ptr: int) -> None:
    """64 units of one row; gates and bias in torch's order: input, forget, cell, output.

    LLVM vectorises loops over arrays of a known size: 0.7 µs for 512 units, not 8 (Zen 5).
    """
    for gate in range(4):
        x = floats(gates_ptr + 4 * hidden * gate, BLOCK)
        bias = floats(bias_ptr + 4 * hidden * gate, BLOCK)
        for u in range(BLOCK):
            x[u] = _tanh(x[u] + bias[u]) if gate == 2 else _sigmoid(x[u] + bias[u])
    input_gate, forget_gate = floats(gates_ptr, BLOCK), floats(gates_ptr + 4 * hidden, BLOCK)
    new, output_gate = floats(gates_ptr + 8 * hidden, BLOCK), floats(gates_ptr + 12 * hidden, BLOCK)
    c, h = floats(c_ptr, BLOCK), floats(h_ptr, BLOCK)
    for u in range(BLOCK):
        c[u] = forget_gate[u] * c[u] + input_gate[u] * new[u]
        new[u] = output_gate[u] * _tanh(c[u])
    for u in range(BLOCK):
        h[u] = new[u]
