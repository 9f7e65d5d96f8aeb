"""The faster precisions against float32: close, and never leaking from row to row."""

from __future__ import annotations

import pytest
import torch

from musicgen_ui.engine.attention import FloatCache
from musicgen_ui.engine.compiled import Int8Cache
from musicgen_ui.engine.linear import Linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_float32_product_is_exact(rows):
    weight, x = torch.randn(48, 32), torch.randn(rows, 32)
    assert torch.allclose(Linear(weight, "float32", CPU)(x), x @ weight.T, atol=1e-5)


def test_int8_product_is_close_and_a_row_of_zeros_stays_zero():
    weight, x = torch.randn(256, 256), torch.randn(3, 256)
    x[1] = 0
    found, expected = Linear(weight, "int8", CPU)(x), x @ weight.T
    assert (found - expected).norm() / expected.norm() < 0.02
    assert not found[1].any()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_loud_neighbour_changes_nothing_but_rounding(precision):
    """Alone and beside seven rows, one of them 1000 times louder."""
    weight, x = torch.randn(256, 256), torch.randn(8, 256)
    product = Linear(weight, precision, CPU)
    exact = x[:1] @ weight.T
    rounding = (product(x[:1]) - exact).norm()
    x[1] *= 1000
    beside = product(x)[:1]
    # Rounding error of its own size, where a shared scale would make it hundreds of times larger.
    assert (beside - exact).norm() <= 2 * rounding + 1e-4 * exact.norm()


@pytest.mark.parametrize("columns", [[1] * 9, [5, 1, 1, 2], [130]])
def test_int8_cache_attends_like_the_float_cache(columns):
    shape = (2, 4, sum(columns), 16)
    exact, (packed,) = FloatCache(shape, torch.float32, CPU), Int8Cache.of_layers(1, shape)
    generator, start = torch.Generator().manual_seed(0), 0
    for n in columns:
        qkv = torch.randn(2, n, 3, 4, 16, generator=generator)
        expected, found = exact.attend(qkv, start), packed.attend(qkv, start)
        assert found.shape == expected.shape
        assert (found - expected).norm() / expected.norm() < 0.03
        start += n


def test_int8_cache_holds_a_third_of_the_bytes():
    shape = (2, 16, 1500, 64)
    (packed,) = Int8Cache.of_layers(1, shape)
    assert packed.nbytes < FloatCache(shape, torch.float32, CPU).nbytes / 3
