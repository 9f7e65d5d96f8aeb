"""Each int8 kernel against ten lines of numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from musicgen_ui.engine.cpu import int8, kernels
from musicgen_ui.engine.cpu.int8 import Int8Cache, Kind, Layers, Product
from musicgen_ui.engine.cpu.machine_code import kernel
from musicgen_ui.engine.cpu.microkernel import parallel_for
from musicgen_ui.engine.linear import Linear
from musicgen_ui.engine.transformer import CrossAttention, Layer

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)


# numpy references


def reference_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def reference_quantise(x, peak_code):
    """Rows as int16 codes and their scales."""
    peak = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-12)
    return np.rint(x * (peak_code / peak)), peak / peak_code


def reference_norm(x, weight, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * weight + bias


def reference_product(x, weight):
    codes, scales = reference_quantise(x, 2047)
    weight_codes, weight_scales = reference_quantise(weight, 127)
    return codes @ weight_codes.T * scales * weight_scales[:, 0]


def reference_attention(query, keys, values):
    """float [dim] over [positions, dim]; keys and values are quantised as they are kept."""
    codes, scale = reference_quantise(query, 2047)
    key_codes, key_scales = reference_quantise(keys, 127)
    value_codes, value_scales = reference_quantise(values, 127)
    scores = key_codes @ codes * scale * key_scales[:, 0] / math.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    weight_codes, weight_scale = reference_quantise(weights * value_scales[:, 0], 8191)
    return weight_codes @ value_codes * weight_scale / weights.sum()


def near(found, expected, limit=1e-5):
    """Within rounding; a code of 12 bits may fall on the other side of a half."""
    return np.linalg.norm(found - expected) <= limit * np.linalg.norm(expected)


# Arithmetic


@kernel
def _arithmetic(x, norm, exps, gelus, found, codes, out):
    for i in range(len(x)):
        exps[i] = kernels.exp(x[i])
        gelus[i] = x[i]
    kernels.gelu(gelus)
    found[0] = kernels.maximum(x, len(x) - 3)
    found[1] = kernels.max_magnitude(x, len(x) - 3)
    found[2] = kernels.quantise(x, codes, 2047)
    kernels.normalise(x, norm, 1e-5, out)


def arithmetic(x):
    """exp, GELU, (maximum, magnitude, scale), codes and layer norm of a row, and the norm."""
    norm = RANDOM.normal(0, 1, (2, len(x))).astype(np.float32)
    exps, gelus, out = (np.zeros_like(x) for _ in range(3))
    found, codes = np.zeros(3, np.float32), np.zeros(len(x), np.int16)
    _arithmetic(x, norm, exps, gelus, found, codes, out)
    return exps, gelus, found, codes, out, norm


@pytest.mark.parametrize("offset", [-40.0, 0.0, 40.0])
def test_arithmetic_equals_numpy(offset):
    x = RANDOM.normal(offset, 12, 83).astype(np.float32)
    x[-3:] = 85.0  # beyond the numbers whose maximum is asked for
    exps, gelus, found, codes, out, norm = arithmetic(x)
    held = x > -40
    assert np.allclose(exps[held], np.exp(x[held].astype(float)), rtol=1e-5)
    assert np.allclose(gelus, reference_gelu(x.astype(float)), atol=1e-5)
    assert found[0] == x[:-3].max() and found[1] == np.abs(x[:-3]).max()
    expected, scale = reference_quantise(x.astype(float), 2047)
    assert np.abs(codes - expected).max() <= 1 and np.allclose(found[2], scale)
    assert near(out, reference_norm(x.astype(float), *norm, 1e-5), 1e-4)


def test_arithmetic_passes_nan_on():
    x = RANDOM.normal(0, 1, 40).astype(np.float32)
    x[17] = np.nan
    exps, gelus, found, codes, out, _ = arithmetic(x)
    assert np.isnan(exps[17]) and np.isnan(gelus[17]) and np.isfinite(np.delete(exps, 17)).all()
    assert np.isnan(found[1:]).all() and not codes.any() and np.isnan(out).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_product_of_a_row_that_is_not_finite_is_nan(value):
    x = torch.ones(2, 40)
    x[1, 17] = value
    found = Product(np.eye(40, dtype=np.float32))(x)
    assert found[0].isfinite().all() and found[1].isnan().all()


# Sharing work


@kernel
def _mark(marks, pieces, lookahead, barriers):
    parallel_for(_mark_piece, pieces, (marks, pieces), barriers.ctypes.data, lookahead)


@kernels.compiled
def _mark_piece(index, next_index, args):
    args[0][index] += 1


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("pieces", [0, 1, 2, 100])
def test_parallel_for_does_every_piece_once(pieces, lookahead):
    marks = np.zeros(100, np.int64)
    int8.run(_mark, 1, marks, pieces, lookahead)
    assert marks.tolist() == [1] * pieces + [0] * (100 - pieces)


# Products and attention


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("shape", [(72, 66), (1, 5), (200, 256)])
def test_product_equals_numpy(shape, rows):
    weight = RANDOM.normal(0, 1, shape).astype(np.float32)
    x = RANDOM.normal(0, 3, (rows, shape[1])).astype(np.float32)
    product = Product(weight)
    assert near(product(torch.from_numpy(x)).numpy(), reference_product(x, weight), 1e-3)
    assert np.abs(product.unpacked() - weight).max() < np.abs(weight).max() / 250


@pytest.mark.parametrize("dim", [15, 16, 80])
@pytest.mark.parametrize("columns", [[1] * 9, [5, 1, 1, 2], [130]])
def test_attention_equals_numpy(dim, columns):
    rows, heads = 2, 3
    (cache,) = Int8Cache.of_layers(1, (rows, heads, sum(columns), dim))
    seen = np.zeros((rows, 0, 3, heads, dim), np.float32)
    for n in columns:
        qkv = RANDOM.normal(0, 1, (rows, n, 3, heads, dim)).astype(np.float32)
        found = cache.attend(torch.from_numpy(qkv), seen.shape[1]).numpy()
        found = found.reshape(rows, n, heads, dim)
        seen = np.concatenate([seen, qkv], 1)
        for row, column, head in np.ndindex(rows, n, heads):
            keys, values = (seen[row, : seen.shape[1] - n + column + 1, i, head] for i in (1, 2))
            expected = reference_attention(qkv[row, column, 0, head], keys, values)
            assert near(found[row, column, head], expected, 5e-3)


# All layers


@kernel
def _attend(qkv, caches, sums, scores, codes, out):
    workspace = kernels.Workspace(sums, scores, codes)
    source, to = int8.floats_of(qkv, qkv.shape[1]), int8.floats_of(out, out.shape[1])
    kernels.attend_head(0, 1, kernels.Attention(caches, 0, False, source, to, 1, 1, workspace, 0))


def test_attention_is_equal_wherever_memory_lies():
    """LLVM has a second loop, not vectorised, for arrays that may overlap; it must round alike."""
    dim, positions = 32, 150
    query = RANDOM.normal(0, 1, (1, dim)).astype(np.float32)
    cache = Int8Cache.of_layers(1, (1, 1, positions, dim))[0]
    cache.fill(*RANDOM.normal(0, 1, (2, 1, 1, positions, dim)).astype(np.float32))
    records = cache.records(positions)[:, None]

    def attend(gap):
        """Scores and output where the sums begin so many numbers behind the scores."""
        memory, out = np.zeros(2048, np.float32), np.zeros((1, dim), np.float32)
        scores = memory[: cache.capacity + 2]
        sums = memory[len(scores) + gap :][:256].view(np.int32)
        _attend(query, records, sums, scores, np.zeros(cache.capacity + 2, np.int16), out)
        return scores[:positions].tobytes() + out.tobytes()

    assert {attend(gap) for gap in range(0, 512, 4)} == {attend(1024)}


class _Sequence:
    """What `Layers` reads of a `transformer.Sequence`."""

    def __init__(self, caches, text, filled=0):
        self.caches, self.text, self.filled = caches, text, filled
        self.rows, self.kernel_caches = len(text), None


HIDDEN, HEADS, FFN, TOKENS = 32, 2, 70, 5


def make_layer(cross_attention: bool) -> Layer:
    def linear(outputs, inputs):
        return Linear(torch.randn(outputs, inputs) / 8, "int8", CPU)

    def norm():
        made = torch.nn.LayerNorm(HIDDEN)
        torch.nn.init.normal_(made.weight), torch.nn.init.normal_(made.bias)
        return made.requires_grad_(False)

    square = (HIDDEN, HIDDEN)
    text = CrossAttention(norm(), linear(*square), linear(2 * HIDDEN, HIDDEN), linear(*square))
    qkv, up, down = linear(3 * HIDDEN, HIDDEN), linear(FFN, HIDDEN), linear(HIDDEN, FFN)
    text = text if cross_attention else None
    return Layer(norm(), qkv, linear(*square), norm(), up, down, text)


def reference_layer(layer, x, past, prompt):
    """One column of one row: float64 [hidden]; `past` collects keys and values."""

    def normed(norm):
        return reference_norm(x, norm.weight.numpy(), norm.bias.numpy(), norm.eps)

    def product(linear, inputs):
        return reference_product(inputs[None], linear.packed.unpacked())[0]

    def attend(query, keys, values):
        heads = (reference_attention(query[h], keys[:, h], values[:, h]) for h in range(HEADS))
        return np.concatenate(list(heads))

    query, key, value = product(layer.qkv, normed(layer.self_norm)).reshape(3, HEADS, -1)
    past.append((key, value))
    x = x + product(layer.self_out, attend(query, *map(np.stack, zip(*past, strict=True))))
    if layer.text:
        out = np.zeros(HIDDEN)
        if prompt:
            query = product(layer.text.q, normed(layer.text.norm)).reshape(HEADS, -1)
            out = attend(query, *(part[0].numpy().swapaxes(0, 1) for part in prompt))
        x = x + product(layer.text.out, out)
    return x + product(layer.down, reference_gelu(product(layer.up, normed(layer.ffn_norm))))


@pytest.mark.parametrize("cross_attention", [True, False])
def test_layers_equal_numpy(cross_attention):
    torch.manual_seed(0)
    layers = [make_layer(cross_attention) for _ in range(2)]
    caches = Int8Cache.of_layers(2, (2, HEADS, 9, HIDDEN // HEADS))
    shape = (1, HEADS, TOKENS, HIDDEN // HEADS)
    memory = [(torch.randn(shape), torch.randn(shape)) for _ in layers]
    sequence = _Sequence(caches, [memory, None] if cross_attention else [None, None])
    compiled, past = Layers(layers, HEADS), [[[] for _ in layers] for _ in range(2)]
    for columns in (3, 1, 1):
        x = torch.randn(2 * columns, HIDDEN)
        found = compiled.run(x, [sequence], columns).numpy()
        sequence.filled += columns
        for row, column in np.ndindex(2, columns):
            expected = x[row * columns + column].double().numpy()
            for index, layer in enumerate(layers):
                prompt = sequence.text[row] and sequence.text[row][index]
                expected = reference_layer(layer, expected, past[row][index], prompt)
            assert near(found[row * columns + column], expected, 0.01)


def test_weights_outlive_the_objects_that_were_packed():
    """The addresses in a model belong to arrays that `Layers` holds."""
    layers = [make_layer(True)]
    compiled = Layers(layers, HEADS)
    kinds = [kind for kind, *_ in compiled._blocks]
    assert kinds == [Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION, Kind.FEED_FORWARD]
    x, caches = torch.randn(2, HIDDEN), Int8Cache.of_layers(1, (2, HEADS, 4, HIDDEN // HEADS))
    before = compiled.run(x, [_Sequence(caches, [None, None])], 1)
    layers.clear()
    ballast = [np.full(HIDDEN * 99, 7, np.int8) for _ in range(99)]
    assert torch.equal(compiled.run(x, [_Sequence(caches, [None, None])], 1), before) and ballast
