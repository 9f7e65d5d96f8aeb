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

from musicgen_ui.engine.compiled import Product, Space, run
from musicgen_ui.engine.products import ROWS, multiply
from musicgen_ui.engine.tiles import BLOCK, add, compiled, wait
from musicgen_ui.engine.vectors import exp, quantise

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
        own = Space.of(batch, 0, 0, hidden)
        for layer, (products, bias) in enumerate(zip(self.products, self.biases, strict=True)):
            at = np.array([each.addresses for each in products], np.int64)
            y = np.empty_like(out)
            stages = 2 + 2 * time
            run(_lstm, stages, out, at, bias, h[layer], c[layer], space, own, self.most, y)
            out = y
        state = torch.from_numpy(h), torch.from_numpy(c)
        return torch.from_numpy(out).view(time, batch, hidden), state


@compiled
def _sigmoid(x: Any) -> Any:
    e = exp(-abs(x))
    return np.float32(1) / (np.float32(1) + e) if x > 0 else e / (np.float32(1) + e)


@compiled
def _tanh(x: Any) -> Any:
    e = exp(np.float32(-2) * abs(x))
    y = (np.float32(1) - e) / (np.float32(1) + e)
    return y if x > 0 else -y


@compiled
def _cell(gates: Any, bias: Any, first: Any, h: Any, c: Any, out: Any) -> None:
    """64 units of one row: gates [4 · hidden] in torch's order, input, forget, cell, output."""
    hidden = len(h)
    for u in range(first, first + BLOCK):
        taken = _sigmoid(gates[u] + bias[u])
        kept = _sigmoid(gates[hidden + u] + bias[hidden + u])
        new = _tanh(gates[2 * hidden + u] + bias[2 * hidden + u])
        c[u] = kept * c[u] + taken * new
        h[u] = _sigmoid(gates[3 * hidden + u] + bias[3 * hidden + u]) * _tanh(c[u])
        out[u] = h[u]


@compiled
def _lstm(
    x: Any, at: Any, bias: Any, h: Any, c: Any, space: Any, own: Any, most: Any, out: Any,
    counters: Any,
) -> None:  # fmt: skip
    """A layer over all time: what one of the threads does.

    Stages: quantise the inputs' rows (0), multiply them (1), then for each frame quantise the state
    (even) and multiply it for 64 units at a time, which then are done (odd).
    """
    sums = np.empty(ROWS * BLOCK, np.int32)
    batch, hidden = h.shape
    pairs, blocks, gates = hidden // 2, hidden // BLOCK, space.wide
    bytes_a_block = pairs * 2 * BLOCK
    for stage in range(len(counters)):
        frame = max(0, stage // 2 - 1) * batch
        pieces = len(x) if stage == 0 else 4 * blocks if stage == 1 else blocks
        if stage > 1 and stage % 2 == 0:
            pieces = batch
        taken = counters.ctypes.data + 16 * stage
        piece = add(taken, 1)
        while piece < pieces:
            if stage == 0:
                space.scales[piece] = quantise(x[piece], space.codes[piece], most)
            elif stage == 1:
                then = at[0, 0] + (piece + 1) * bytes_a_block
                multiply(piece, at[0, 0], at[0, 1], space, pairs, 4 * hidden, gates,
                          False, False, sums, then)  # fmt: skip
            elif stage % 2 == 0:
                own.scales[piece] = quantise(h[piece], own.codes[piece], most)
            else:
                now = gates[frame : frame + batch]
                for gate in range(4):
                    block = gate * blocks + piece
                    then = at[1, 0] + (block + blocks) * bytes_a_block
                    multiply(block, at[1, 0], at[1, 1], own, pairs, 4 * hidden, now,
                              True, False, sums, then)  # fmt: skip
                for row in range(batch):
                    _cell(now[row], bias, BLOCK * piece, h[row], c[row], out[frame + row])
            add(taken + 8, 1)
            piece = add(taken, 1)
        wait(taken + 8, pieces)
