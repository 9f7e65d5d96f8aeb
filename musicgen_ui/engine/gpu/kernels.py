"""The Triton kernels of a decoder step: embed, linear, attend and sample.

A step for one job reads every weight once for two rows (cond and uncond), so it is bound by memory
and by the number of launches. Each kernel therefore does everything between two points where every
program must wait for every other: before a matrix product it normalises the input or merges the
partial results of attention, after it it adds the residual, applies the activation or writes the KV
cache. A layer is eight launches (six without cross-attention).

`pdl` is CUDA's programmatic dependent launch (compute capability 9.0 and above): a kernel is
started while the one before it still runs, loads what does not depend on that one (its weights),
and waits at `gdc_wait` before it reads or writes what other kernels use. Every program of every
kernel waits, so a wait for the last kernel is a wait for all kernels before it.

All kernels run on a CPU under Triton's interpreter (`TRITON_INTERPRET=1`), where the tests compare
each of them with torch.

Attention is split over the positions as in flash-decoding (Dao et al. 2023); thresholds for top-k
and top-p are found by bisection over the bits of the scores, so that nothing is sorted.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the arguments' annotations: only those that are compile-time constants have one.

from __future__ import annotations

import enum

import triton
import triton.language as tl


class Input(enum.IntEnum):
    """What `linear` does to its input first."""

    PLAIN = 0  # float32 [rows, inputs]
    NORM = 1  # layer norm of float32 [rows, inputs]
    MERGE = 2  # partial attention: see `attend`


class Output(enum.IntEnum):
    """What `linear` does with its result, float32 [rows, outputs]."""

    STORE = 0
    GELU = 1  # stores the exact (erf) GELU
    ADD = 2  # adds it to what is there: the residual
    CACHE = 3  # stores queries; keys and values go into the cache at each row's position


MERGE = tl.constexpr(int(Input.MERGE))
NORM = tl.constexpr(int(Input.NORM))
STORE = tl.constexpr(int(Output.STORE))
GELU = tl.constexpr(int(Output.GELU))
ADD = tl.constexpr(int(Output.ADD))
LOWEST = tl.constexpr(-(2**31))
UNWRITTEN = tl.constexpr(-1)


@triton.jit
def embed(
    columns_ptr,  # int64 [slots, codebooks, columns]
    next_ptr,  # int64 [slots]: the column that is stepped next; incremented for a ready slot
    ready_ptr,  # bool [slots]
    prefix_ptr,  # int64 [slots]: positions before the first column
    embeddings_ptr,  # [codebooks * table, hidden]
    positions_ptr,  # [positions, hidden]
    column_ptr,  # int64 [slots]: gets the column of this step
    length_ptr,  # int32 [rows]: gets the positions that a row attends to
    x_ptr,  # float32 [rows, hidden]: gets the embedded column
    codebooks: tl.constexpr,
    columns: tl.constexpr,
    table: tl.constexpr,  # codes of a codebook, the start token included
    hidden: tl.constexpr,
    rows_per_slot: tl.constexpr,
    block: tl.constexpr,
    pdl: tl.constexpr,
):
    """The sum of a column's embeddings and its position, for all rows of a slot; grid (slots,)."""
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.program_id(0)
    column = tl.load(next_ptr + slot)
    ready = tl.load(ready_ptr + slot).to(tl.int64)
    position = column + tl.load(prefix_ptr + slot)
    h = tl.arange(0, block)
    mask = h < hidden
    x = tl.zeros([block], tl.float32)
    for k in tl.static_range(codebooks):
        code = tl.load(columns_ptr + (slot * codebooks + k) * columns + column)
        entry = embeddings_ptr + (k * table + code) * hidden + h
        x += tl.load(entry, mask, 0.0).to(tl.float32)
    x += tl.load(positions_ptr + position * hidden + h, mask, 0.0).to(tl.float32)
    for r in tl.static_range(rows_per_slot):
        row = slot * rows_per_slot + r
        tl.store(x_ptr + row * hidden + h, x, mask)
        tl.store(length_ptr + row, (position + 1).to(tl.int32))
    tl.store(column_ptr + slot, column)
    tl.store(next_ptr + slot, column + ready)


@triton.jit
def linear(
    x_ptr,  # [rows, inputs]; with MERGE [splits, rows, inputs]
    weight_ptr,  # [outputs, inputs]
    out_ptr,  # [rows, outputs]; with CACHE the queries, [rows, inputs]
    scale_ptr,  # the norm's [inputs], with NORM
    sums_ptr,  # float32 [2, outputs], with NORM: see below
    epsilon,  # of the norm
    log_sum_ptr,  # float32 [splits, rows, inputs], with MERGE: see `attend`
    keys_ptr,  # [rows, heads, positions, head_dim], with CACHE
    values_ptr,  # the same
    length_ptr,  # int32 [rows], with CACHE: positions filled, this one included
    positions,  # that the cache has room for
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    rows: tl.constexpr,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    splits: tl.constexpr,
    input_kind: tl.constexpr,
    output_kind: tl.constexpr,
    block_rows: tl.constexpr,  # a power of two that holds all rows
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,  # a power of two that holds all inputs
    pdl: tl.constexpr,
):
    """A product of a few rows with a matrix, [rows, inputs] by [outputs, inputs].

    Grid (outputs / block_outputs,). A program loads its part of the matrix into registers before it
    waits for the kernel that computes its input. So that there is a single reduction after the
    wait, the norm is moved out of the product: with scale g, shift b, mean m and deviation s of x,
    sum(w ((x - m) / s g + b)) = (sum(w g x) - m sum(w g)) / s + sum(w b). The sums without x are
    `sums_ptr`'s.
    """
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    k = tl.arange(0, block_inputs)
    r = tl.arange(0, block_rows)
    is_output = n < outputs
    is_input = (k < inputs)[None, :]
    is_row = r < rows
    weight = tl.load(
        weight_ptr + n[:, None] * inputs + k[None, :], is_output[:, None] & is_input, 0.0
    )
    if input_kind == NORM:
        scale = tl.load(scale_ptr + k[None, :], is_input, 0.0)
        scaled = tl.load(sums_ptr + n, is_output, 0.0)
        shifted = tl.load(sums_ptr + outputs + n, is_output, 0.0)
    if pdl:
        tl.extra.cuda.gdc_wait()
    place = r[:, None] * inputs + k[None, :]  # [rows, inputs]
    mask = is_row[:, None] & is_input
    result = r[:, None] * outputs + n[None, :]  # [rows, outputs]
    stored = is_row[:, None] & is_output[None, :]
    if output_kind == ADD:
        before = tl.load(out_ptr + result, stored, 0.0)
    if input_kind == MERGE:
        best = tl.load(log_sum_ptr + place, mask, 0.0)
        for s in tl.static_range(1, splits):
            best = tl.maximum(best, tl.load(log_sum_ptr + s * rows * inputs + place, mask, 0.0))
        total = tl.zeros([block_rows, block_inputs], tl.float32)
        x = tl.zeros([block_rows, block_inputs], tl.float32)
        for s in tl.static_range(splits):
            part = s * rows * inputs + place
            share = tl.exp(tl.load(log_sum_ptr + part, mask, 0.0) - best)
            total += share
            x += share * tl.load(x_ptr + part, mask, 0.0)
        x = x / total
    else:
        x = tl.load(x_ptr + place, mask, 0.0).to(tl.float32)
    if input_kind == NORM:
        mean = tl.sum(x, 1) / inputs
        variance = tl.maximum(tl.sum(x * x, 1) / inputs - mean * mean, 0.0)
        rate = tl.rsqrt(variance + epsilon)
        x = x * scale.to(tl.float32)
    y = tl.sum(x[:, None, :] * weight.to(tl.float32)[None, :, :], 2)  # [rows, outputs]
    if input_kind == NORM:
        y = (y - mean[:, None] * scaled[None, :]) * rate[:, None] + shifted[None, :]
    if output_kind == STORE:
        tl.store(out_ptr + result, y, stored)
    elif output_kind == GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        tl.store(out_ptr + result, y.to(out_ptr.dtype.element_ty), stored)
    elif output_kind == ADD:
        tl.store(out_ptr + result, before + y, stored)
    else:
        part = (n // inputs)[None, :]  # queries, keys, values
        unit = n % inputs
        at = tl.load(length_ptr + r, is_row, 1).to(tl.int64) - 1
        row = r[:, None] * heads + (unit // head_dim)[None, :]
        cached = (row * positions + at[:, None]) * head_dim + (unit % head_dim)[None, :]
        tl.store(out_ptr + r[:, None] * inputs + unit[None, :], y, stored & (part == 0))
        tl.store(keys_ptr + cached, y.to(keys_ptr.dtype.element_ty), stored & (part == 1))
        tl.store(values_ptr + cached, y.to(values_ptr.dtype.element_ty), stored & (part == 2))


@triton.jit
def quantize(x):
    """`kv_cache.quantize` of a head: whole numbers up to 127 and their scale, in float32."""
    scale = tl.max(tl.abs(x), 0) / 127.0
    inverse = tl.where(scale > 1e-30, 1.0 / tl.maximum(scale, 1e-30), 0.0)
    return tl.floor(x * inverse + 0.5), scale


@triton.jit
def attend(
    query_ptr,  # [rows, query_stride]: a row begins with its queries, [heads * head_dim]
    keys_ptr,  # [rows, heads, positions, head_dim]
    values_ptr,  # the same
    key_scales_ptr,  # float32 [rows, heads, positions], where keys and values are int8
    value_scales_ptr,  # the same
    length_ptr,  # int32 [rows]: positions to attend to; 0 is none
    out_ptr,  # [splits, rows, heads * head_dim]
    log_sum_ptr,  # float32, the same, with more than one split
    scale,  # of the scores
    query_stride,
    row_stride,  # numbers from one row's keys to the next one's
    head_stride,
    rows,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    splits: tl.constexpr,
    append: tl.constexpr,  # keys and values follow the queries and go into the cache
    quantized: tl.constexpr,  # keys and values of the cache are int8; see `kv_cache`
    block: tl.constexpr,  # positions at once
    pdl: tl.constexpr,
):
    """Attention of one query a row over a part of its positions; grid (rows, heads, splits).

    With the output of each split its log-sum-exp is stored, once for each output, so that `linear`,
    which merges the splits, reads both alike. For a split without positions they are 0 and -1e30.
    Every position of a block keeps its own softmax over the blocks, so that programs reduce over
    positions once, after the loop. With `append` the first split attends to the new position too;
    every one stores it, which are the same numbers.

    The scale of int8 keys and values is that of a whole head, of which a program of `linear` has
    a few numbers only: there `append` writes the cache.
    """
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(length_ptr + row)
    d = tl.arange(0, head_dim)
    p = tl.arange(0, block)
    qkv_ptr = query_ptr + row * query_stride + head * head_dim + d
    query = tl.load(qkv_ptr).to(tl.float32) * scale
    offset = row.to(tl.int64) * row_stride + head * head_stride
    scales = offset // head_dim
    best = tl.full([block], -1e30, tl.float32)
    total = tl.zeros([block], tl.float32)
    out = tl.zeros([block, head_dim], tl.float32)
    if append:
        key = tl.load(qkv_ptr + heads * head_dim)
        value = tl.load(qkv_ptr + 2 * heads * head_dim)
        last = offset + (length - 1) * head_dim + d
        if quantized:
            key, key_scale = quantize(key.to(tl.float32))
            value, value_scale = quantize(value.to(tl.float32))
            tl.store(key_scales_ptr + scales + length - 1, key_scale)
            tl.store(value_scales_ptr + scales + length - 1, value_scale)
        tl.store(keys_ptr + last, key.to(keys_ptr.dtype.element_ty))
        tl.store(values_ptr + last, value.to(values_ptr.dtype.element_ty))
        if quantized:
            key *= key_scale
            value *= value_scale
        first = (p == 0) & (split == 0)
        best = tl.where(first, tl.sum(key.to(tl.float32) * query, 0), best)
        total = tl.where(first, 1.0, total)
        out = tl.where(first[:, None], value.to(tl.float32)[None, :], out)
        length -= 1  # the others
    share = tl.cdiv(tl.cdiv(length, splits), block) * block
    begin = split * share
    end = tl.minimum(begin + share, length)
    # A block is loaded while the one before it is computed. Beyond the end the last position is
    # read again and masked out.
    place = offset + d[None, :]
    at = tl.maximum(tl.minimum(begin + p, end - 1), 0)
    keys = tl.load(keys_ptr + place + at[:, None] * head_dim)
    values = tl.load(values_ptr + place + at[:, None] * head_dim)
    if quantized:
        key_scales = tl.load(key_scales_ptr + scales + at)
        value_scales = tl.load(value_scales_ptr + scales + at)
    for start in range(begin, end, block):
        at = tl.minimum(start + block + p, end - 1)
        next_keys = tl.load(keys_ptr + place + at[:, None] * head_dim)
        next_values = tl.load(values_ptr + place + at[:, None] * head_dim)
        there = start + p < end
        scores = tl.sum(keys.to(tl.float32) * query[None, :], 1)
        if quantized:
            scores *= key_scales
        scores = tl.where(there, scores, -1e30)
        higher = tl.maximum(best, scores)
        weights = tl.where(there, tl.exp(scores - higher), 0.0)
        kept = tl.exp(best - higher)
        total = total * kept + weights
        if quantized:
            weights *= value_scales
            key_scales = tl.load(key_scales_ptr + scales + at)
            value_scales = tl.load(value_scales_ptr + scales + at)
        out = out * kept[:, None] + values.to(tl.float32) * weights[:, None]
        best = higher
        keys = next_keys
        values = next_values
    highest = tl.max(best, 0)
    kept = tl.exp(best - highest)
    sum_ = tl.sum(total * kept, 0)
    positive = tl.where(sum_ > 0.0, sum_, 1.0)
    result = tl.sum(out * kept[:, None], 0) / positive
    part = ((split * rows + row) * heads + head) * head_dim + d
    tl.store(out_ptr + part, result.to(out_ptr.dtype.element_ty))
    if splits > 1:
        tl.store(log_sum_ptr + part, tl.zeros_like(result) + highest + tl.log(positive))


@triton.jit
def attend_prompt(
    query_ptr,  # [rows, heads * head_dim]
    keys_ptr,  # [rows, heads, tokens, head_dim]
    values_ptr,  # the same
    tokens_ptr,  # int32 [rows]: tokens to attend to; 0 is none
    out_ptr,  # [rows, heads * head_dim]
    scale,  # of the scores
    row_stride,  # numbers from one row's keys to the next one's
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,  # tokens there is room for, a power of two
    pdl: tl.constexpr,
):
    """Attention to a prompt's few tokens; grid (rows, heads).

    No kernel of a step writes the prompt's keys and values, so they are read before the wait.
    """
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, head_dim)
    p = tl.arange(0, block)
    there = p < tl.load(tokens_ptr + row)
    offset = row.to(tl.int64) * row_stride + head * block * head_dim
    place = offset + p[:, None] * head_dim + d[None, :]
    keys = tl.load(keys_ptr + place, there[:, None], 0.0).to(tl.float32)
    values = tl.load(values_ptr + place, there[:, None], 0.0).to(tl.float32)
    if pdl:
        tl.extra.cuda.gdc_wait()
    at = (row * heads + head) * head_dim + d
    query = tl.load(query_ptr + at).to(tl.float32) * scale
    scores = tl.where(there, tl.sum(keys * query[None, :], 1), -1e30)
    weights = tl.where(there, tl.exp(scores - tl.max(scores, 0)), 0.0)
    total = tl.sum(weights, 0)
    out = tl.sum(values * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty))


@triton.jit
def sample(
    logits_ptr,  # float32 [slots, 2, codebooks, codes]: cond, uncond
    columns_ptr,  # int64 [slots, codebooks, columns]: gets the codes, one column on
    column_ptr,  # int64 [slots]: the column of this step
    ready_ptr,  # bool [slots]
    finite_ptr,  # bool [slots, codebooks]: stays true while all logits are finite
    uniforms_ptr,  # float32 [slots, steps, codebooks]
    guidance_ptr,  # float32 [slots]
    temperature_ptr,  # float32 [slots]
    top_k_ptr,  # int64 [slots]: 1 and more
    top_p_ptr,  # float32 [slots]: 1 is off
    greedy_ptr,  # bool [slots]
    codebooks: tl.constexpr,
    codes: tl.constexpr,
    columns: tl.constexpr,
    steps: tl.constexpr,
    block: tl.constexpr,  # a power of two that holds all codes
    pdl: tl.constexpr,
):
    """Guidance, temperature, top-k, top-p and the draw of a codebook; grid (slots, codebooks).

    The draw is the inverse of the cumulative distribution in the order of the codebook, as
    `sampling.draw` has it. A code that is already given is left as it is.
    """
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.program_id(0)
    codebook = tl.program_id(1)
    v = tl.arange(0, block)
    inside = v < codes
    cond = tl.load(logits_ptr + (slot * 2 * codebooks + codebook) * codes + v, inside, 0.0)
    uncond = tl.load(logits_ptr + ((slot * 2 + 1) * codebooks + codebook) * codes + v, inside, 0.0)
    guidance = tl.load(guidance_ptr + slot)
    logits = tl.where(guidance == 1.0, cond, uncond + (cond - uncond) * guidance)
    finite = tl.abs(tl.sum(tl.where(inside, logits, 0.0), 0)) < float("inf")
    best = tl.argmax(tl.where(inside, logits, float("-inf")), 0, tie_break_left=True)

    scores = tl.where(inside, logits / tl.load(temperature_ptr + slot), float("-inf"))
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)  # integers in the order of the scores
    order = tl.where(inside, order, LOWEST)
    # Top-k keeps the scores from the largest threshold that k of them reach.
    top_k = tl.load(top_k_ptr + slot)
    low = tl.full([], -(2**31), tl.int64)
    high = tl.full([], 2**31 - 1, tl.int64)
    for _ in range(32):
        middle = low + ((high - low + 1) >> 1)
        reached = tl.sum((order.to(tl.int64) >= middle).to(tl.int32), 0) >= top_k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    kept = inside & (order.to(tl.int64) >= low)
    weights = tl.where(kept, tl.exp(scores - tl.max(scores, 0)), 0.0)
    # Top-p keeps those before which less than p of the rest lies: the least threshold above which
    # less than that share is.
    top_p = tl.load(top_p_ptr + slot)
    if top_p < 1.0:
        share = top_p * tl.sum(weights, 0)
        high = tl.full([], 2**31 - 1, tl.int64)
        for _ in range(32):
            middle = low + ((high - low) >> 1)
            less = tl.sum(tl.where(order.to(tl.int64) > middle, weights, 0.0), 0) < share
            high = tl.where(less, middle, high)
            low = tl.where(less, low, middle + 1)
        weights = tl.where(order.to(tl.int64) >= high, weights, 0.0)

    column = tl.load(column_ptr + slot)
    uniform = tl.load(uniforms_ptr + (slot * steps + column) * codebooks + codebook)
    rising = tl.cumsum(weights.to(tl.float64), 0)
    edge = uniform.to(tl.float64) * tl.max(rising, 0)
    drawn = tl.min(tl.where((rising > edge) & (weights > 0.0), v, block), 0)
    code = tl.where(tl.load(greedy_ptr + slot) | (drawn == block), best, drawn)

    ready = tl.load(ready_ptr + slot)
    place = columns_ptr + (slot * codebooks + codebook) * columns + column + 1
    given = tl.load(place)
    tl.store(place, tl.where(ready & (given == UNWRITTEN), code.to(tl.int64), given))
    flag = finite_ptr + slot * codebooks + codebook
    tl.store(flag, tl.load(flag) & (finite | (ready == 0)))
