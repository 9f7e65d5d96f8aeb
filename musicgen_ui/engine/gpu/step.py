"""A decoder step as Triton launches over the buffers of `Slots`, without a host synchronisation.

Up to `FUSED_ROWS` rows every product is `kernels.linear`, eight launches a layer. With more rows
products need the tensor cores, so cuBLAS computes them; attention, embedding and sampling are
`kernels` in both cases.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from musicgen_ui.engine.gpu import kernels
from musicgen_ui.engine.gpu.kernels import Input, Output
from musicgen_ui.engine.gpu.slots import ROWS, Slots
from musicgen_ui.engine.kv_cache import FloatCache, QuantizedCache
from musicgen_ui.engine.linear import Linear
from musicgen_ui.engine.transformer import Decoder

FUSED_ROWS = 4  # that `kernels.linear` multiplies
THREAD_WEIGHTS = 64  # that a thread of `linear` holds in registers
SPLIT_PROGRAMS = 128  # that attention should have at least, while rows and heads are few
MAX_SPLITS = 8  # of the positions
POSITIONS = (128, 64)  # in a block of attention: with few rows, with many
SHORT_PROMPT = 64  # tokens that one program attends to at once


def supports(decoder: Decoder) -> bool:
    """Whether these kernels compute what the decoder does."""
    plain = decoder.precision in ("float32", "bfloat16", "float16")
    return plain and decoder.gelu and decoder.head_dim == triton.next_power_of_2(decoder.head_dim)


def tile(outputs: int, inputs: int) -> tuple[int, int, int]:
    """Outputs and inputs of a product that a program computes, and its warps."""
    block_inputs = triton.next_power_of_2(inputs)
    block_outputs = min(triton.next_power_of_2(outputs), 8 if block_inputs <= 2048 else 4)
    warps = block_outputs * block_inputs // (THREAD_WEIGHTS * 32)
    return block_outputs, block_inputs, max(1, min(warps, 16))


class TritonStep:
    """A step of the first slots, each time it is called.

    Args:
        decoder: see `supports`.
        slots: the buffers, whose `text` may be replaced by a longer one.
        pdl: programmatic dependent launch; None uses it where the device has it.
    """

    def __init__(self, decoder: Decoder, slots: Slots, pdl: bool | None = None) -> None:
        self.decoder, self.slots = decoder, slots
        on_cuda = decoder.device.type == "cuda" and torch.version.cuda is not None
        has = on_cuda and torch.cuda.get_device_capability(decoder.device) >= (9, 0)
        self.pdl = has if pdl is None else pdl
        self.hidden = decoder.heads * decoder.head_dim
        rows, device = ROWS * len(slots.at), decoder.device
        few = min(rows, FUSED_ROWS)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.column = empty(len(slots.at), dtype=torch.int64)
        self.length = empty(rows, dtype=torch.int32)
        self.x = empty(rows, self.hidden)
        self.query = empty(few, self.hidden)
        self.quantized = isinstance(slots.caches[0], QuantizedCache)
        self.qkv = empty(few if self.quantized else 0, 3 * self.hidden)
        self.inner = empty(few, decoder.inner, dtype=decoder.dtype)
        self.logits = empty(rows, decoder.codebooks, decoder.codebook_size)
        partial_rows = self._splits(ROWS) * few
        self.partial = empty(partial_rows, self.hidden)
        self.log_sum = empty(partial_rows, self.hidden)
        self.out = empty(rows, self.hidden, dtype=decoder.dtype)
        self.sums: dict[Linear, Tensor] = {}  # of products after a norm: see `kernels.linear`
        for layer in decoder.layers:
            self._sum(layer.self_norm, layer.qkv)
            self._sum(layer.ffn_norm, layer.up)
            if layer.text:
                self._sum(layer.text.norm, layer.text.q)
        self._sum(decoder.norm, decoder.lm_heads)

    def _sum(self, norm: torch.nn.LayerNorm, linear: Linear) -> None:
        weight = linear.weight.float()
        self.sums[linear] = torch.stack([weight @ norm.weight.float(), weight @ norm.bias.float()])

    def __call__(self, slots: int) -> None:
        """Writes the next column of the ready ones among the first slots."""
        rows = ROWS * slots
        self._embed(slots)
        if rows <= FUSED_ROWS:
            self._fused(rows)
        else:
            self._with_torch(rows)
        self._sample(slots)

    def _fused(self, rows: int) -> None:
        """All layers and the heads by `kernels`: `x` to `logits`."""
        slots, splits = self.slots, self._splits(rows)
        for index, layer in enumerate(self.decoder.layers):
            cache, norm = slots.caches[index], layer.self_norm
            if self.quantized:
                self._linear(rows, layer.qkv, self.x, self.qkv, Output.STORE, norm=norm)
                self._attend(rows, self.qkv, cache, self.length, splits, append=True)
            else:
                self._linear(
                    rows, layer.qkv, self.x, self.query, Output.CACHE, norm=norm, cache=cache
                )
                self._attend(rows, self.query, cache, self.length, splits)
            self._linear(rows, layer.self_out, self.partial, self.x, Output.ADD, splits=splits)
            if text := layer.text:
                self._linear(rows, text.q, self.x, self.query, Output.STORE, norm=text.norm)
                self._attend_prompt(rows, index, self.query, self.partial)
                self._linear(rows, text.out, self.partial, self.x, Output.ADD)
            self._linear(rows, layer.up, self.x, self.inner, Output.GELU, norm=layer.ffn_norm)
            self._linear(rows, layer.down, self.inner, self.x, Output.ADD)
        heads = self.decoder.lm_heads
        self._linear(rows, heads, self.x, self.logits, Output.STORE, norm=self.decoder.norm)

    def _with_torch(self, rows: int) -> None:
        """The same with torch's products, for many rows."""
        slots, decoder = self.slots, self.decoder
        out = self.out[:rows]
        x = self.x[:rows].to(decoder.dtype)
        for index, layer in enumerate(decoder.layers):
            cache = slots.caches[index]
            qkv = layer.qkv(layer.self_norm(x))
            self._attend(rows, qkv, cache, self.length, 1, out=out, append=True)
            x.addmm_(out, layer.self_out.weight.t())
            if text := layer.text:
                query = text.q(text.norm(x))
                self._attend_prompt(rows, index, query, out)
                x.addmm_(out, text.out.weight.t())
            up = F.gelu(layer.up(layer.ffn_norm(x)))
            x.addmm_(up, layer.down.weight.t())
        self.logits[:rows] = decoder.logits(decoder.norm(x))

    def _splits(self, rows: int) -> int:
        """Splits of the positions, so that there are enough programs for the device."""
        splits = SPLIT_PROGRAMS // (rows * self.decoder.heads) if rows <= FUSED_ROWS else 1
        return max(1, min(splits, MAX_SPLITS))

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if self.pdl:
            options["launch_pdl"] = True
        kernel[grid](*args, **options, pdl=self.pdl)

    def _embed(self, slots: int) -> None:
        decoder, buffers = self.decoder, self.slots
        self._launch(
            kernels.embed,
            (slots,),
            buffers.columns,
            buffers.at,
            buffers.ready,
            buffers.prefix,
            decoder.embeddings,
            decoder.positions,
            self.column,
            self.length,
            self.x,
            codebooks=decoder.codebooks,
            columns=buffers.columns.shape[2],
            table=len(decoder.embeddings) // decoder.codebooks,
            hidden=self.hidden,
            rows_per_slot=ROWS,
            block=triton.next_power_of_2(self.hidden),
        )

    def _linear(
        self,
        rows: int,
        linear: Linear,
        x: Tensor,
        out: Tensor,
        output: Output,
        *,
        norm: torch.nn.LayerNorm | None = None,
        cache: Any = None,
        splits: int = 1,
    ) -> None:
        """`out` of `x` [rows, inputs], normalised by `norm`, or merged where there are splits."""
        weight = linear.weight
        outputs, inputs = weight.shape
        block_outputs, block_inputs, warps = tile(outputs, inputs)
        kind = Input.NORM if norm else Input.MERGE if splits > 1 else Input.PLAIN
        keys, values = (cache.keys, cache.values) if cache else (x, x)
        self._launch(
            kernels.linear,
            (triton.cdiv(outputs, block_outputs),),
            x,
            weight,
            out,
            norm.weight if norm else x,
            self.sums[linear] if norm else x,
            norm.eps if norm else 0.0,
            self.log_sum,
            keys,
            values,
            self.length,
            inputs=inputs,
            outputs=outputs,
            rows=rows,
            heads=self.decoder.heads,
            head_dim=self.decoder.head_dim,
            positions=keys.shape[2] if cache else 0,
            splits=splits,
            input_kind=int(kind),
            output_kind=int(output),
            block_rows=triton.next_power_of_2(rows),
            block_outputs=block_outputs,
            block_inputs=block_inputs,
            num_warps=warps,
        )

    def _attend(
        self,
        rows: int,
        query: Tensor,
        cache: FloatCache,
        length: Tensor,
        splits: int,
        *,
        out: Tensor | None = None,
        append: bool = False,
    ) -> None:
        """Attention to the positions so far, in `splits` parts."""
        decoder, keys = self.decoder, cache.keys
        scales = keys, keys
        if quantized := isinstance(cache, QuantizedCache):
            scales = cache.key_scales, cache.value_scales
        self._launch(
            kernels.attend,
            (rows, decoder.heads, splits),
            query,
            keys,
            cache.values,
            *scales,
            length,
            self.partial if out is None else out,
            self.log_sum,
            1 / math.sqrt(decoder.head_dim),
            query.stride(0),
            keys.stride(0),
            keys.stride(1),
            rows,
            heads=decoder.heads,
            head_dim=decoder.head_dim,
            splits=splits,
            append=append,
            quantized=quantized,
            block=POSITIONS[splits == 1],
            num_warps=POSITIONS[splits == 1] // 16,
        )

    def _attend_prompt(self, rows: int, index: int, query: Tensor, out: Tensor) -> None:
        """Cross-attention of a layer; the row of a null prompt gives zeros."""
        decoder, slots = self.decoder, self.slots
        keys, values = slots.text[index]
        if keys.shape[2] > SHORT_PROMPT:
            self._attend(rows, query, FloatCache(keys, values), slots.tokens, 1, out=out)
            return
        self._launch(
            kernels.attend_prompt,
            (rows, decoder.heads),
            query,
            keys,
            values,
            slots.tokens,
            out,
            1 / math.sqrt(decoder.head_dim),
            keys.stride(0),
            heads=decoder.heads,
            head_dim=decoder.head_dim,
            block=keys.shape[2],
        )

    def _sample(self, slots: int) -> None:
        decoder, buffers, params = self.decoder, self.slots, self.slots.sampling
        self._launch(
            kernels.sample,
            (slots, decoder.codebooks),
            self.logits,
            buffers.columns,
            self.column,
            buffers.ready,
            buffers.finite,
            buffers.uniforms,
            params.guidance_scale,
            params.temperature,
            params.top_k,
            params.top_p,
            params.greedy,
            codebooks=decoder.codebooks,
            codes=decoder.codebook_size,
            columns=buffers.columns.shape[2],
            steps=buffers.uniforms.shape[1],
            block=triton.next_power_of_2(decoder.codebook_size),
        )
