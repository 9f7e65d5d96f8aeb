"""The faster precisions against float32: close, and never leaking from row to row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

from musicgen_ui.engine import linear
from musicgen_ui.engine.cpu.int8 import Int8Cache
from musicgen_ui.engine.kv_cache import FloatCache, QuantizedCache
from musicgen_ui.engine.linear import Linear
from musicgen_ui.engine.transformer import Decoder
from tests.helpers.engine import CPU, made_in_whole_numbers

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("kind", ["cpu", "torch"])
@pytest.mark.parametrize("columns", [[1] * 9, [5, 1, 1, 2], [130]])
def test_int8_cache_attends_like_the_float_cache(columns, kind):
    shape = (2, 4, sum(columns), 16)
    exact, (packed,) = FloatCache.empty(shape, torch.float32, CPU), Int8Cache.of_layers(1, shape)
    if kind == "torch":
        packed = QuantizedCache.empty(shape, torch.float32, CPU)
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
    assert packed.nbytes < FloatCache.empty(shape, torch.float32, CPU).nbytes / 3


BOUNDS = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.0}  # of the logits' own size


@pytest.fixture(scope="module")
def lm() -> MusicgenForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = MusicgenDecoderConfig(**size, vocab_size=64, pad_token_id=64, bos_token_id=64)
    return MusicgenForCausalLM(config).eval()


@torch.inference_mode()
def steps(decoder: Decoder, columns: torch.Tensor, jobs: int, loud: int | None) -> torch.Tensor:
    """The first job's logits [steps, 2, codebooks, codes] beside others, one of them loud."""
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(3 + job, 64, generator=generator) for job in range(jobs)]
    embed = decoder.embed
    size = torch.tensor([1000.0 if job == loud else 1.0 for job in range(jobs)])[:, None]
    decoder.embed = lambda column, *worn: (embed(column, *worn) * size[: len(column)]).to(
        decoder.dtype
    )
    try:
        sequences = [
            decoder.sequence([state * (100 if job == loud else 1), None], columns.shape[-1])
            for job, state in enumerate(states)
        ]
        seen = [
            decoder.step(columns[:jobs, :, at], sequences)[:2] for at in range(columns.shape[-1])
        ]
    finally:
        decoder.embed = embed
    return torch.stack(seen)


@pytest.mark.parametrize("precision", list(BOUNDS))
def test_logits_beside_seven_others_are_those_alone_but_for_rounding(lm, precision):
    """One of the others is 1000 times as loud; in int8 there is no difference at all."""
    decoder = Decoder(lm, CPU, precision)
    columns = torch.randint(64, (8, 4, 6), generator=torch.Generator().manual_seed(2))
    alone, beside = steps(decoder, columns, 1, None), steps(decoder, columns, 8, loud=3)
    assert (beside - alone).norm() <= BOUNDS[precision] * alone.norm()


def test_int8_is_the_same_on_any_number_of_threads(lm):
    decoder, columns = Decoder(lm, CPU, "int8"), torch.randint(64, (8, 4, 6))
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(steps(decoder, columns, 8, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_int8_logits_are_near_those_of_float32(lm):
    columns = torch.randint(64, (1, 4, 80), generator=torch.Generator().manual_seed(3))
    exact, packed = (steps(Decoder(lm, CPU, p), columns, 1, None) for p in ("float32", "int8"))
    assert (packed - exact).norm() / exact.norm() < 0.02


WITHOUT_AVX512 = """
import sys, llvmlite.binding as llvm
features = llvm.get_host_cpu_features()
features.update({name: False for name in features if name.startswith("avx512")})
llvm.get_host_cpu_features = lambda: features
from tests.helpers.engine import made_in_whole_numbers
import numpy
numpy.savez(sys.argv[1], *made_in_whole_numbers())
"""


def test_a_processor_without_avx512_computes_the_same(tmp_path):
    """Its registers hold smaller tiles, so weights are laid out in another way."""
    file = tmp_path / "found.npz"
    subprocess.run([sys.executable, "-c", WITHOUT_AVX512, file], check=True, cwd=ROOT)
    for found, expected in zip(np.load(file).values(), made_in_whole_numbers(), strict=True):
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_precision_that_onednn_lacks_still_multiplies(monkeypatch):
    monkeypatch.setattr(linear, "_multiplies", lambda dtype: False)
    weight, x = torch.randn(48, 32).bfloat16(), torch.randn(3, 32).bfloat16()
    found, expected = Linear(weight, "bfloat16", CPU)(x), x.float() @ weight.float().T
    assert torch.allclose(found.float(), expected, atol=0.1)
