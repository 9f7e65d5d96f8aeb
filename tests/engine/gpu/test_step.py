"""Triton's kernels on a CPU, by Triton's interpreter: each against torch, then the whole step."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_ui.engine import sampling
from musicgen_ui.engine.cuda_graph import CudaGraphStepper
from musicgen_ui.engine.delay_pattern import UNWRITTEN
from musicgen_ui.engine.kv_cache import FloatCache, QuantizedCache
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import CPU, ROCK, make_batch, submit
from tests.helpers.melody import melody_batch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU runs these kernels itself"
)

HEADS, HEAD_DIM = 3, 8
HIDDEN = HEADS * HEAD_DIM  # no power of two, so that blocks are masked


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_linear(x: Tensor, weight: Tensor, out: Tensor, kinds: tuple, **options: object) -> None:
    from musicgen_ui.engine.gpu import kernels

    outputs, inputs = weight.shape
    given = {
        "scale_ptr": x,
        "sums_ptr": x,
        "epsilon": 0.0,
        "log_sum_ptr": x,
        "keys_ptr": x,
        "values_ptr": x,
        "length_ptr": torch.ones(8, dtype=torch.int32),
        "positions": 0,
        "splits": 1,
    } | options
    rows = out.shape[0]
    kernels.linear[(triton.cdiv(outputs, 4),)](
        x,
        weight,
        out,
        inputs=inputs,
        outputs=outputs,
        rows=rows,
        heads=HEADS,
        head_dim=HEAD_DIM,
        input_kind=int(kinds[0]),
        output_kind=int(kinds[1]),
        block_rows=triton.next_power_of_2(rows),
        block_outputs=4,
        block_inputs=triton.next_power_of_2(inputs),
        pdl=False,
        **given,
    )


@pytest.mark.parametrize("rows", [2, 6])
def test_linear_normalises_and_applies_gelu(rows):
    from musicgen_ui.engine.gpu.kernels import Input, Output

    x, weight = normal(rows, HIDDEN) + 0.5, normal(10, HIDDEN, seed=1)
    scale, shift, out = normal(HIDDEN, seed=2), normal(HIDDEN, seed=3), torch.empty(rows, 10)
    sums = torch.stack([weight @ scale, weight @ shift])
    norm = {"scale_ptr": scale, "sums_ptr": sums, "epsilon": 1e-5}
    run_linear(x, weight, out, (Input.NORM, Output.GELU), **norm)
    expected = F.gelu(F.linear(F.layer_norm(x, (HIDDEN,), scale, shift), weight))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_linear_adds_to_the_residual():
    from musicgen_ui.engine.gpu.kernels import Input, Output

    x, weight, residual = normal(2, HIDDEN), normal(10, HIDDEN, seed=1), normal(2, 10, seed=2)
    out = residual.clone()
    run_linear(x, weight, out, (Input.PLAIN, Output.ADD))
    torch.testing.assert_close(out, residual + F.linear(x, weight), atol=1e-5, rtol=1e-5)


def test_linear_writes_keys_and_values_at_each_rows_position():
    from musicgen_ui.engine.gpu.kernels import Input, Output

    x, weight, query = normal(2, HIDDEN), normal(3 * HIDDEN, HIDDEN, seed=1), torch.empty(2, HIDDEN)
    keys, values = torch.zeros(2, 2, HEADS, 5, HEAD_DIM)
    cache = {"keys_ptr": keys, "values_ptr": values, "positions": 5}
    length = torch.tensor([1, 4], dtype=torch.int32)
    run_linear(x, weight, query, (Input.PLAIN, Output.CACHE), length_ptr=length, **cache)
    q, k, v = F.linear(x, weight).view(2, 3, HEADS, HEAD_DIM).unbind(1)
    torch.testing.assert_close(query.view_as(q), q, atol=1e-5, rtol=1e-5)
    for row, at in enumerate(length - 1):
        torch.testing.assert_close(keys[row, :, at], k[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values[row, :, at], v[row], atol=1e-5, rtol=1e-5)
    assert keys.count_nonzero() == values.count_nonzero() == 2 * HIDDEN  # nothing elsewhere


def run_attend(
    query: Tensor, cache: FloatCache, length: Tensor, splits: int, append: bool = False
) -> Tensor:
    """Attention whose splits are merged, [rows, HIDDEN]."""
    from musicgen_ui.engine.gpu import kernels
    from musicgen_ui.engine.gpu.kernels import Input, Output

    rows, keys = len(query), cache.keys
    quantized = isinstance(cache, QuantizedCache)
    scales = (cache.key_scales, cache.value_scales) if quantized else (keys, keys)
    parts, log_sum = torch.empty(2, splits, rows, HIDDEN)
    kernels.attend[(rows, HEADS, splits)](
        *(query, keys, cache.values, *scales, length, parts, log_sum, 1 / math.sqrt(HEAD_DIM)),
        *(query.stride(0), keys.stride(0), keys.stride(1), rows),
        **{"heads": HEADS, "head_dim": HEAD_DIM, "splits": splits},
        **{"append": append, "quantized": quantized},
        block=8,
        pdl=False,
    )
    merged = torch.zeros(rows, HIDDEN)
    kind = Input.MERGE if splits > 1 else Input.PLAIN
    run_linear(
        parts, torch.eye(HIDDEN), merged, (kind, Output.ADD), splits=splits, log_sum_ptr=log_sum
    )
    return merged


def filled_cache(kind: type[FloatCache], rows: int, positions: int) -> FloatCache:
    """A cache whose positions are all written."""
    shape = (rows, HEADS, positions, HEAD_DIM)
    cache = kind.empty(shape, torch.float32, CPU)
    at = (slice(None), slice(None), slice(positions))
    cache.write(at, normal(*shape, seed=1), normal(*shape, seed=2) * 3)
    return cache


@pytest.mark.parametrize("kind", [FloatCache, QuantizedCache])
@pytest.mark.parametrize("splits", [1, 4])
def test_attention_over_each_rows_length(splits, kind):
    length, rows = torch.tensor([37, 5, 0], dtype=torch.int32), 3
    query, cache = normal(rows, HIDDEN), filled_cache(kind, rows, 40)
    found = run_attend(query, cache, length, splits)
    for row, filled in enumerate(length):
        expected = F.scaled_dot_product_attention(
            query[row : row + 1].view(1, HEADS, 1, HEAD_DIM),
            *cache.read(slice(row, row + 1), int(filled)),
        )
        expected = expected.flatten() if filled else torch.zeros(HIDDEN)  # the null condition
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "splits"), [(FloatCache, 1), (QuantizedCache, 1), (QuantizedCache, 4)]
)
def test_attention_that_appends_its_own_position(kind, splits):
    """As the cache in torch, which holds the same afterwards."""
    length, qkv = torch.tensor([30, 1], dtype=torch.int32), normal(2, 3 * HIDDEN)
    cache, expected = (filled_cache(kind, 2, 32) for _ in range(2))
    found = run_attend(qkv, cache, length, splits, append=True)
    for row, filled in enumerate(length.tolist()):
        rows = slice(row, row + 1)
        own = qkv[rows].view(1, 1, 3, HEADS, HEAD_DIM)
        attended = expected.view(rows).attend(own, filled - 1)
        torch.testing.assert_close(found[row], attended.flatten(), atol=1e-5, rtol=1e-5)
    for name, numbers in expected.tensors.items():
        assert torch.equal(cache.tensors[name], numbers), name


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy computes with it
def test_appended_numbers_that_are_not_finite_stay_so():
    """A number that is too large must not become music."""
    qkv = normal(1, 3 * HIDDEN)
    qkv[0, HIDDEN] = torch.inf  # of a key
    cache = filled_cache(QuantizedCache, 1, 4)
    found = run_attend(qkv, cache, torch.tensor([3], dtype=torch.int32), 1, append=True)
    assert not found.isfinite().all()


def test_sample_draws_as_torch_does():
    """Every setting beside every other, with ties and with a code that is given already."""
    from musicgen_ui.engine.gpu import kernels

    requests = [
        GenerationRequest("", do_sample=False),
        GenerationRequest("", guidance_scale=1, top_k=0),
        GenerationRequest("", top_k=5, temperature=0.3),
        GenerationRequest("", top_k=0, top_p=0.6, temperature=1.7),
        GenerationRequest("", top_k=20, top_p=0.9),
    ]
    slots, codebooks, codes = len(requests), 2, 50
    logits = (normal(slots, 2, codebooks, codes) * 3).round(decimals=1)
    uniforms = torch.rand(slots, 3, codebooks, generator=torch.Generator().manual_seed(1))
    params = [sampling.SamplingParams.of(request) for request in requests]
    settings = sampling.SamplingTensors.of(params, codes, torch.device("cpu"))
    columns = torch.full((slots, codebooks, 4), UNWRITTEN)
    columns[4, 1, 2] = 7
    column, ready = torch.ones(slots, dtype=torch.int64), torch.tensor([True] * slots)
    finite = torch.ones(slots, codebooks, dtype=torch.bool)
    kernels.sample[(slots, codebooks)](
        *(logits, columns, column, ready, finite, uniforms),
        *(settings.guidance_scale, settings.temperature, settings.top_k, settings.top_p),
        settings.greedy,
        **{"codebooks": codebooks, "codes": codes, "columns": 4, "steps": 3, "block": 64},
        pdl=False,
    )
    guided = sampling.guide(logits[:, 0], logits[:, 1], settings.guidance_scale)
    expected = sampling.draw(guided, settings, uniforms[:, 1])
    expected[4, 1] = 7
    assert torch.equal(columns[:, :, 2], expected)
    assert (columns[:, :, [0, 1, 3]] == UNWRITTEN).all()
    assert finite.all()


def test_sample_marks_nan_and_skips_idle_slots():
    from musicgen_ui.engine.gpu import kernels

    requests = [GenerationRequest("")] * 2
    logits = normal(2, 2, 2, 50)
    logits[:, 0, 1, 3] = torch.nan
    columns, finite = torch.full((2, 2, 3), UNWRITTEN), torch.ones(2, 2, dtype=torch.bool)
    params = [sampling.SamplingParams.of(request) for request in requests]
    settings = sampling.SamplingTensors.of(params, 50, torch.device("cpu"))
    kernels.sample[(2, 2)](
        *(logits, columns, torch.zeros(2, dtype=torch.int64), torch.tensor([True, False])),
        *(finite, torch.rand(2, 2, 2), settings.guidance_scale, settings.temperature),
        *(settings.top_k, settings.top_p, settings.greedy),
        **{"codebooks": 2, "codes": 50, "columns": 3, "steps": 2, "block": 64},
        pdl=False,
    )
    assert finite.tolist() == [[True, False], [True, True]]
    assert (columns[1] == UNWRITTEN).all() and columns[0, 0, 1] >= 0


def stepped(batch: Scheduler, requests: list[GenerationRequest], steps: int) -> list[Tensor]:
    """The columns of each job after so many steps."""
    for request in requests:
        submit(batch, request, lambda event: None)
    for _ in range(steps):
        batch.step()
    return [job.window.columns.clone() for job in batch.running]


@pytest.mark.parametrize(
    ("kind", "rows", "kv_cache_dtype"),
    [
        ("mono", "few", "auto"),
        ("mono", "many", "auto"),
        ("melody", "few", "auto"),
        ("mono", "few", "int8"),
    ],
)
def test_triton_step_equals_the_torch_step(request, monkeypatch, kind, rows, kv_cache_dtype):
    """Jobs that were admitted one after the other, with other settings and positions."""
    from musicgen_ui.engine.gpu import step

    monkeypatch.setattr(step, "MAX_SPLITS", 2)
    monkeypatch.setattr(step, "FUSED_ROWS", {"few": 8, "many": 0}[rows])
    folder: Path = request.getfixturevalue(f"tiny_{kind}")
    make = melody_batch if kind == "melody" else make_batch
    asked = [
        GenerationRequest(ROCK, duration_s=0.5, do_sample=False),
        GenerationRequest("piano", duration_s=0.5, guidance_scale=1, seed=3, top_p=0.9),
    ]
    made = []
    for with_triton in (False, True):
        batch = make(folder, graphs=True, max_jobs=2, kv_cache_dtype=kv_cache_dtype)
        batch.stepper = CudaGraphStepper(batch.decoder, 2, triton=with_triton)
        assert bool(batch.stepper.triton) == with_triton
        made.append(stepped(batch, asked, steps=4))
    for plain, ours in zip(*made, strict=True):
        assert (plain[:, 1:4] != UNWRITTEN).any()
        assert torch.equal(plain, ours)
