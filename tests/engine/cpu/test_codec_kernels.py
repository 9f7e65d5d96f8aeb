"""Convolutions in whole numbers against torch's, and what makes them fit for streams."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from musicgen_ui.engine.cpu.codec_kernels import Convolution16, Lstm

SHAPES = [  # inputs, outputs, taps, stride, dilation
    (64, 128, 1, 1, 1),
    (64, 32, 3, 1, 1),
    (33, 80, 7, 1, 1),
    (16, 48, 4, 2, 3),
    (64, 1, 7, 1, 1),  # few outputs: the taps stand beside each other
    (16, 3, 5, 1, 1),
    (16, 8, 1, 1, 1),
    (1024, 64, 2, 1, 1),
]


def in_numpy(x, weight, bias, stride=1, dilation=1, elu=True):
    """[time, inputs] with codes for each time step and output, as the kernel has them."""
    x = np.where(x < 0, np.expm1(np.minimum(x, 0)), x) if elu else x
    peak = min(32767, math.isqrt(5 * 2**31 // x.shape[1]))
    scales = np.maximum(np.abs(x).max(1), 1e-12) / peak
    codes, taps = np.rint(x / scales[:, None]) * scales[:, None], weight.shape[2]
    count = (len(x) - (taps - 1) * dilation - 1) // stride + 1
    starts = stride * np.arange(count)
    return bias + sum(codes[starts + tap * dilation] @ weight[:, :, tap].T for tap in range(taps))


def reference(x, weight, bias, stride=1, dilation=1, elu=True):
    x = (F.elu(x) if elu else x).transpose(1, 2)
    return F.conv1d(x, weight, bias, stride, dilation=dilation).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elu", [True, False])
def test_it_is_torchs_convolution(shape, elu):
    torch.manual_seed(0)
    inputs, outputs, taps, *steps = shape
    x, bias = torch.randn(2, 151, inputs), torch.randn(outputs)
    weight = torch.randn(outputs, inputs, taps) * torch.rand(outputs, 1, 1)
    expected = reference(x, weight, bias, *steps, elu)
    convolution = Convolution16(weight, bias, *steps, elu)
    found = convolution(x)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).norm() < 1e-3 * expected.norm()  # 60 dB
    for row in range(2):
        numbers = (each.double().numpy() for each in (x[row], weight, bias))
        near = in_numpy(*numbers, *steps, elu)
        assert np.linalg.norm(found[row].numpy() - near) < 1e-3 * np.linalg.norm(near)
    onto = torch.randn(expected.shape)
    both = convolution(x, onto.clone())
    assert (both - expected - onto).norm() < 1e-3 * expected.norm()


def test_an_output_depends_on_its_own_inputs_alone_to_the_bit():
    torch.manual_seed(0)
    convolution = Convolution16(torch.randn(48, 64, 3), torch.randn(48))
    x, threads = torch.randn(1, 300, 64), torch.get_num_threads()
    whole = convolution(x)
    x[:, 200:] *= 100  # a loud neighbour
    assert torch.equal(convolution(x)[:, :198], whole[:, :198])
    for start, end in ((0, 3), (5, 70), (131, 198)):
        assert torch.equal(convolution(x[:, start : end + 2]), whole[:, start:end])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(convolution(x)[:, :198], whole[:, :198])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("inputs", [1, 32, 63, 1024, 4096])
def test_the_largest_sums_fit(inputs):
    weight, bias = torch.full((16, inputs, 2), -0.7), torch.zeros(16)
    weight[1] = 0  # an output that hears nothing
    found = Convolution16(weight, bias)(torch.full((1, 9, inputs), 5.0))
    expected = torch.full((16,), -7.0 * inputs)
    expected[1] = 0
    assert torch.allclose(found, expected, rtol=1e-3)


def test_silence_gives_the_bias():
    bias = torch.tensor([0.5, -2.0])
    found = Convolution16(torch.randn(2, 8, 3), bias)(torch.zeros(1, 10, 8))
    assert torch.equal(found, bias.expand(1, 8, 2))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_lstm(x, h, c, weights):
    """A layer over [time, hidden] from a state, in float64; torch's order of weights."""
    of_inputs, of_state, *biases = (each.detach().double().numpy() for each in weights)
    out = []
    for frame in x:
        gates = of_inputs @ frame + of_state @ h + sum(biases)
        entered, kept, new, shown = np.split(gates, 4)
        c = sigmoid(kept) * c + sigmoid(entered) * np.tanh(new)
        h = sigmoid(shown) * np.tanh(c)
        out.append(h)
    return np.stack(out), h, c


@pytest.mark.parametrize("batch", [1, 2])
def test_lstm_equals_numpy(batch):
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(64, 64).eval()
    x, state = torch.randn(30, batch, 64), torch.randn(2, 1, batch, 64)
    found, (h, c) = Lstm(lstm)(x, (state[0], state[1]))
    for row in range(batch):
        start = (each[0, row].double().numpy() for each in state)
        expected = reference_lstm(x[:, row].double().numpy(), *start, list(lstm.parameters()))
        for made, exact in zip((found[:, row], h[0, row], c[0, row]), expected, strict=True):
            assert np.linalg.norm(made.numpy() - exact) < 0.01 * np.linalg.norm(exact)


def test_lstm_passes_nan_on():
    x = torch.randn(3, 1, 64)
    x[1, 0, 5] = float("nan")
    out, _ = Lstm(torch.nn.LSTM(64, 64).eval())(x, None)
    assert out[0].isfinite().all() and out[1:].isnan().all()
