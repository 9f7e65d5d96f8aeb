"""Convolutions in whole numbers against torch's, and what makes them fit for streams."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from musicgen_ui.engine.cpu.codec_kernels import Convolution16

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
