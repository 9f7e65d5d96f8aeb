"""The codec's LSTM on the CPU: its weights in int8, read by all threads together.

A frame waits for the reading of the weights that meet the state. torch's cells read them on one
thread, as float32; here `products` do on all, a block of 64 units of all four gates a piece. Inputs
and state have as many bits as the sums of a layer's width allow, 14 for Meta's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musicgen_ui.engine.cpu.int8 import Product, Space, run
from musicgen_ui.engine.cpu.microkernel import BLOCK, add, compiled, kernel, wait
from musicgen_ui.engine.cpu.products import ROWS, multiply
from musicgen_ui.engine.cpu.vectors import at_most, exp, floats, quantise

State = tuple[Tensor, Tensor]


class Lstm:
    """`nn.LSTM` of equal widths, a multiple of 64: [time, batch, hidden] and a state in and out."""

    def __init__(self, lstm: nn.LSTM) -> None:
        weights = [each.detach().float().numpy() for each in lstm.parameters()]
        self.hidden = lstm.hidden_size
        self.most = min(32767, (2**31 - 1) // (127 * self.hidden))
        layers = [weights[i : i + 4] for i in range(0, len(weights), 4)]
        self.products = [(Product(inputs), Product(state)) for inputs, state, *_ in layers]
        self.biases = [one + other for _, _, one, other in layers]

    def __call__(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """As `nn.LSTM`."""
        time, batch, hidden = x.shape
        zeros = np.zeros((len(self.products), batch, hidden), np.float32)
        h, c = (zeros, zeros.copy()) if state is None else (each.numpy().copy() for each in state)
        out = np.ascontiguousarray(x.reshape(-1, hidden).numpy())
        space = Space.of(time * batch, 0, 4 * hidden, hidden)
        parts = torch.get_num_threads()
        for layer, (products, bias) in enumerate(zip(self.products, self.biases, strict=True)):
            at = np.array([each.addresses for each in products], np.int64)
            y = np.empty_like(out)
            rows = (2 + time) * parts + 1
            run(_lstm, rows, out, at, bias, h[layer], c[layer], space, parts, self.most, y)
            h[layer] = y[-batch:]
            out = y
        state = torch.from_numpy(h), torch.from_numpy(c)
        return torch.from_numpy(out).view(time, batch, hidden), state


@compiled
def _sigmoid(x: Any) -> Any:
    return np.float32(1) / (np.float32(1) + exp(at_most(-x, np.float32(87))))


@compiled
def _tanh(x: Any) -> Any:
    e = exp(at_most(np.float32(2) * x, np.float32(87)))
    return np.float32(1) - np.float32(2) / (np.float32(1) + e)


@compiled
def _cell(gates: Any, bias: Any, hidden: Any, c: Any, h: Any) -> None:
    """64 units of one row, from addresses: gates in torch's order, input, forget, cell, output.

    Of loops over arrays of a known size LLVM makes vectors: 0.7 µs for 512 units, not 8 (Zen 5).
    """
    for gate in range(4):
        x, shift = floats(gates + 4 * hidden * gate, BLOCK), floats(bias + 4 * hidden * gate, BLOCK)
        for u in range(BLOCK):
            x[u] = _tanh(x[u] + shift[u]) if gate == 2 else _sigmoid(x[u] + shift[u])
    taken, kept = floats(gates, BLOCK), floats(gates + 4 * hidden, BLOCK)
    new, told = floats(gates + 8 * hidden, BLOCK), floats(gates + 12 * hidden, BLOCK)
    cell, out = floats(c, BLOCK), floats(h, BLOCK)
    for u in range(BLOCK):
        cell[u] = kept[u] * cell[u] + taken[u] * new[u]
        new[u] = told[u] * _tanh(cell[u])
    for u in range(BLOCK):
        out[u] = new[u]


@compiled
def _units(
    block: Any, frame: Any, at: Any, bias: Any, c: Any, gates: Any, own: Any, out: Any, sums: Any
) -> None:
    """64 units of all rows of a frame: their four gates of the state's product, then the cell."""
    batch, hidden = c.shape
    blocks, pairs = hidden // BLOCK, hidden // 2
    now = gates[frame : frame + batch]
    for gate in range(4):
        which = gate * blocks + block
        then = at[1, 0] + (which + blocks) * pairs * 2 * BLOCK
        multiply(which, at[1, 0], at[1, 1], own, pairs, 4 * hidden, now,
                 True, False, sums, then)  # fmt: skip
    first = 4 * BLOCK * block
    for row in range(batch):
        to, of = out.ctypes.data + 4 * hidden * (frame + row), c.ctypes.data + 4 * hidden * row
        _cell(
            now[row].ctypes.data + first, bias.ctypes.data + first, hidden, of + first, to + first
        )


@kernel
def _lstm(
    x: Any, at: Any, bias: Any, h: Any, c: Any, space: Any, parts: Any, most: Any, out: Any,
    counters: Any,
) -> None:  # fmt: skip
    """A layer over all time: what one of the threads does.

    Stages: quantise the inputs' rows (0), multiply them (1), then for each frame multiply the
    state, which every thread quantises for itself, for 64 units at a time, which then are done.

    A thread begins with its own part of a stage's pieces, so that its weights stay in its cache,
    then helps with the others': each part has a counter, and the last one numbers the threads.
    """
    sums, (batch, hidden) = np.empty(ROWS * BLOCK, np.int32), h.shape
    own = Space(space.y, space.y, np.empty((batch, hidden), np.int16), np.empty(batch, np.float32))
    pairs, blocks, gates = hidden // 2, hidden // BLOCK, space.wide
    number = add(counters.ctypes.data + 16 * (len(counters) - 1), 1)
    for stage in range((len(counters) - 1) // parts):
        pieces = len(x) if stage == 0 else 4 * blocks if stage == 1 else blocks
        frame, first = (stage - 2) * batch, counters.ctypes.data + 16 * parts * stage
        if stage > 1:
            for row in range(batch):
                state = h[row] if stage == 2 else out[frame - batch + row]
                own.scales[row] = quantise(state, own.codes[row], most)
        for turn in range(parts):
            part = (number + turn) % parts
            begin, end = pieces * part // parts, pieces * (part + 1) // parts
            taken = first + 16 * part
            piece = begin + add(taken, 1)
            while piece < end:
                if stage == 0:
                    space.scales[piece] = quantise(x[piece], space.codes[piece], most)
                elif stage == 1:
                    then = at[0, 0] + (piece + 1) * pairs * 2 * BLOCK
                    multiply(piece, at[0, 0], at[0, 1], space, pairs, 4 * hidden, gates,
                             False, False, sums, then)  # fmt: skip
                else:
                    _units(piece, frame, at, bias, c, gates, own, out, sums)
                add(first + 8, 1)
                piece = begin + add(taken, 1)
        wait(first + 8, pieces)
