"""MusicGen's decoder: a transformer that takes one step for the rows of all jobs.

The weights are read once from transformers' `MusicgenForCausalLM` or `MusicgenMelodyForCausalLM`
and packed: query, key and value of a layer are one matrix, and so are the embeddings and the heads
of all codebooks. A job's `Sequence` holds its KV cache, allocated once for its whole length. Text
states are attended to by cross-attention, whose keys and values are computed once; a melody
checkpoint has no cross-attention and takes its states as a prefix before the first column.

A job has a row for each of its prompts and, when guided, one for the uncond logits (the null
condition or a negative prompt). A step computes every matrix product for the rows of all jobs
together, which costs little more than for one, and attends row by row to the filled part of the
cache. transformers' model is the reference: greedy codes equal those of its `generate`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from musicgen_ui.engine.finite import require_finite
from musicgen_ui.engine.kv_cache import FloatCache, QuantizedCache
from musicgen_ui.engine.linear import Linear, computing_dtype
from musicgen_ui.engine.lora import NO_ADAPTERS, NO_LAYER, AppliedAdapter, RowAdapters

if TYPE_CHECKING:
    from transformers import (
        MusicgenForCausalLM,
        MusicgenForConditionalGeneration,
        MusicgenMelodyForCausalLM,
        MusicgenMelodyForConditionalGeneration,
    )
    from transformers.models.musicgen.modeling_musicgen import MusicgenDecoderLayer
    from transformers.models.musicgen_melody.modeling_musicgen_melody import (
        MusicgenMelodyDecoderLayer,
    )

    from musicgen_ui.engine.cpu.int8 import Int8Cache, Layers, SequenceCaches

# transformers' classes.
Model: TypeAlias = "MusicgenForConditionalGeneration | MusicgenMelodyForConditionalGeneration"
LanguageModel: TypeAlias = "MusicgenForCausalLM | MusicgenMelodyForCausalLM"
DecoderLayer: TypeAlias = "MusicgenDecoderLayer | MusicgenMelodyDecoderLayer"

Attend: TypeAlias = Callable[[int, Tensor], Tensor]
TextKV: TypeAlias = "list[tuple[Tensor, Tensor]]"  # a layer: [1, heads, tokens, head_dim] each
Caches: TypeAlias = "list[FloatCache] | list[Int8Cache]"  # a layer


@dataclass(frozen=True)
class CrossAttention:
    """The packed weights of a layer's attention to the text states."""

    norm: nn.LayerNorm
    q: Linear
    kv: Linear
    out: Linear


@dataclass(frozen=True)
class Layer:
    """The packed weights of a transformer layer."""

    self_norm: nn.LayerNorm
    qkv: Linear
    self_out: Linear
    ffn_norm: nn.LayerNorm
    up: Linear
    down: Linear
    text: CrossAttention | None  # None in a melody checkpoint

    @classmethod
    def of(cls, layer: DecoderLayer, precision: str, device: torch.device) -> Layer:
        """Packs a layer of transformers' decoder, whose weights may be released afterwards."""
        attention, cross = layer.self_attn, getattr(layer, "encoder_attn", None)
        cross_norm = getattr(layer, "encoder_attn_layer_norm", None)

        def packed(*linears: nn.Linear) -> Linear:
            return Linear(torch.cat([each.weight for each in linears]), precision, device)

        def norm(module: nn.LayerNorm) -> nn.LayerNorm:
            # A copy, even where nothing changes: a view would keep the whole file mapped.
            return copy.deepcopy(module).to(device, computing_dtype(precision))

        return cls(
            self_norm=norm(layer.self_attn_layer_norm),
            qkv=packed(attention.q_proj, attention.k_proj, attention.v_proj),
            self_out=packed(attention.out_proj),
            ffn_norm=norm(layer.final_layer_norm),
            up=packed(layer.fc1),
            down=packed(layer.fc2),
            text=CrossAttention(
                norm=norm(cross_norm),
                q=packed(cross.q_proj),
                kv=packed(cross.k_proj, cross.v_proj),
                out=packed(cross.out_proj),
            )
            if cross and cross_norm
            else None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        modules = [*vars(self).values(), *(vars(self.text).values() if self.text else ())]
        return sum(module.nbytes for module in modules if isinstance(module, Linear))


@dataclass
class Sequence:
    """A job's KV cache and what its rows attend to."""

    caches: Caches
    text: list[TextKV | None]  # a row; None attends to nothing, the null condition
    prefix: Tensor  # states before the first column, [rows, states, hidden]
    positions: int  # that the cache has room for
    length: int = 0  # columns in the cache; below 0 while that many states of the prefix are not
    adapter: AppliedAdapter | None = None
    kernel_caches: SequenceCaches | None = None  # addresses of the above for the int8 kernels

    @property
    def rows(self) -> int:
        """A row for each prompt, and one more when guided."""
        return len(self.prefix)

    @property
    def filled(self) -> int:
        """Positions of the cache that are filled, the prefix included."""
        return self.length + self.prefix.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache."""
        return sum(cache.nbytes for cache in self.caches)


class Decoder:
    """MusicGen's language model, packed in one precision on one device.

    Args:
        lm: transformers' decoder; its layers' weights may be released as they are packed.
        device: where to run.
        precision: see `linear.PRECISIONS`.
        kv_cache_dtype: see `kv_cache.DTYPES`; in precision "int8" it is int8 in any case.

    Raises:
        RequestError: a weight is NaN, infinite or too large for the precision.
    """

    def __init__(
        self,
        lm: LanguageModel,
        device: torch.device,
        precision: str,
        kv_cache_dtype: str = "auto",
    ) -> None:
        config = lm.config
        self.device = device
        self.precision = precision
        self.kv_cache_dtype = kv_cache_dtype
        self.dtype = computing_dtype(precision)
        self.heads: int = config.num_attention_heads
        self.head_dim: int = config.hidden_size // config.num_attention_heads
        self.codebooks: int = config.num_codebooks
        self.codebook_size: int = config.vocab_size
        assert config.pad_token_id is not None
        self.start_token: int = config.pad_token_id
        self.inner: int = config.ffn_dim
        self.activation = ACT2FN[config.activation_function]
        self.gelu: bool = config.activation_function == "gelu"
        inner = lm.model.decoder
        self.positions_of = inner.embed_positions.get_embedding
        for name in ("model.decoder.embed_tokens", "model.decoder.layer_norm", "lm_heads"):
            require_finite(lm.get_submodule(name), f"decoder.{name}", self.dtype)
        with torch.inference_mode():
            tables = torch.stack([e.weight for e in inner.embed_tokens])
            self.embeddings = tables.flatten(0, 1).to(device, self.dtype)  # [K·(size+1), hidden]
            self.offsets = torch.arange(self.codebooks, device=device) * tables.shape[1]
            self.positions = self._sinusoids(2048)
            self.layers = []
            for index, layer in enumerate(inner.layers):
                require_finite(layer, f"decoder.model.decoder.layers.{index}", self.dtype)
                self.layers.append(Layer.of(layer, precision, device))
            self.norm = copy.deepcopy(inner.layer_norm).to(device, self.dtype)
            heads = torch.cat([head.get_parameter("weight") for head in lm.lm_heads])
            self.lm_heads = Linear(heads, precision, device)
        self.prefixed = self.layers[0].text is None  # the states are a prefix of the columns
        self.compiled: Layers | None = None
        if precision == "int8" and self.gelu:
            from musicgen_ui.engine.cpu import int8  # imports numba

            self.compiled = int8.Layers(self.layers, self.heads)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        layers = sum(layer.nbytes for layer in self.layers)
        return self.embeddings.nbytes + layers + self.lm_heads.nbytes

    def _sinusoids(self, count: int) -> Tensor:
        weights: Tensor = self.positions_of(count, self.heads * self.head_dim)
        return weights.to(self.device, self.dtype)

    @torch.inference_mode()
    def sequence(
        self,
        conditions: list[Tensor | None],
        columns: int,
        caches: Caches | None = None,
        adapter: AppliedAdapter | None = None,
    ) -> Sequence:
        """A new sequence of up to `columns` columns.

        Args:
            conditions: the states of each row, [tokens, hidden], or None for the null condition.
                In a melody checkpoint every row has states, and as many as the others.
            columns: that it will hold at most.
            caches: the memory of its KV cache; None allocates it.
            adapter: applied to its rows.
        """
        rows = len(conditions)
        prefix = self.embeddings.new_zeros(rows, 0, self.embeddings.shape[1])
        text: list[TextKV | None] = [None] * rows
        if self.prefixed:
            states = [state for state in conditions if state is not None]
            prefix = torch.stack(states).to(self.device, self.dtype)
        else:
            text = [self.text_kv(states, adapter) for states in conditions]
        positions = prefix.shape[1] + columns
        self.reserve(positions)
        caches = caches or self.new_caches(rows, positions)
        return Sequence(caches, text, prefix, positions, -prefix.shape[1], adapter)

    def prefix_length(self, conditions: list[Tensor | None]) -> int:
        """Positions before the first column of a `sequence` with these states."""
        lengths = [len(states) for states in conditions if states is not None]
        return max(lengths, default=0) * self.prefixed

    @torch.inference_mode()
    def change_conditions(
        self,
        sequence: Sequence,
        conditions: list[Tensor | None],
        sources: list[int],
        caches: Caches | None = None,
    ) -> None:
        """Lets the rows of a sequence attend to other text states from its next column on.

        What is in the KV cache stays as it was computed. Not for a melody checkpoint, whose prefix
        has to be taken in anew.

        Args:
            sequence: to change.
            conditions: the states of each new row, as for `sequence`.
            sources: for each new row, the row whose KV cache it continues.
            caches: other memory for the KV cache, as large as the new rows need; None allocates
                it where the rows change.
        """
        if caches or sources != list(range(sequence.rows)):
            caches = caches or self.new_caches(len(sources), sequence.positions)
            for layer in range(len(caches)):
                caches[layer].copy_rows(sequence.caches[layer], sources, sequence.filled)
            sequence.caches = caches
            sequence.prefix = sequence.prefix[sources]
        sequence.text = [self.text_kv(states, sequence.adapter) for states in conditions]

    @torch.inference_mode()
    def reserve(self, positions: int) -> None:
        """Computes position embeddings for sequences of so many positions, prefix included."""
        if positions > len(self.positions):
            self.positions = self._sinusoids(positions)

    def new_caches(self, rows: int, positions: int) -> Caches:
        """Memory for the KV cache of so many rows and positions, uninitialised."""
        shape = (rows, self.heads, positions, self.head_dim)
        if self.precision == "int8":
            from musicgen_ui.engine.cpu.int8 import Int8Cache

            return Int8Cache.of_layers(len(self.layers), shape)
        kind = QuantizedCache if self.kv_cache_dtype == "int8" else FloatCache
        return [kind.empty(shape, self.dtype, self.device) for _ in self.layers]

    @property
    def kv_position_nbytes(self) -> int:
        """Bytes of a row's keys and values of one position, of all layers."""
        head = self.head_dim * self.dtype.itemsize
        if self.kv_cache_dtype == "int8" or self.precision == "int8":
            head = self.head_dim + torch.float32.itemsize
        return 2 * len(self.layers) * self.heads * head

    def text_kv(
        self, states: Tensor | None, adapter: AppliedAdapter | None = None
    ) -> TextKV | None:
        """Every layer's keys and values for cross-attention to `states`, [tokens, hidden]."""
        if states is None:
            return None
        states = states.to(self.device, self.dtype)
        text_kv, adapters = [], RowAdapters.of([(adapter, len(states))])
        for index, layer in enumerate(self.layers):
            assert layer.text
            both = adapters.product(index, "text_kv", layer.text.kv, states)
            key, value = both.view(len(states), 2, self.heads, -1).unbind(1)
            text_kv.append((key.transpose(0, 1)[None], value.transpose(0, 1)[None]))
        return text_kv

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, columns: Tensor, max_positions: int) -> None:
        """Adds to the KV cache what is left of the prefix, else the next of the known columns.

        Args:
            sequence: to go on with.
            columns: the known ones, from the first on, int64 [codebooks, n].
            max_positions: to add in this call.
        """
        start = sequence.filled
        x = sequence.prefix[:, start : start + max_positions]  # [rows, positions, hidden]
        if sequence.length >= 0:
            columns = columns[:, sequence.length : sequence.length + max_positions]
            adapters = RowAdapters.of([(sequence.adapter, columns.shape[1])])
            x = self.embed(columns.T, adapters).expand(sequence.rows, -1, -1)
        x = x + self.positions[start : start + x.shape[1]]
        self._forward(x.flatten(0, 1), [sequence], x.shape[1])
        sequence.length += x.shape[1]

    @torch.inference_mode()
    def step(self, columns: Tensor, sequences: list[Sequence]) -> Tensor:
        """Adds the next column of every sequence and predicts the one after it.

        Args:
            columns: int64 [jobs, codebooks].
            sequences: of the same jobs.

        Returns:
            Logits, float32 [rows of all jobs, codebooks, codebook_size].
        """
        rows = torch.tensor([s.rows for s in sequences], device=self.device)
        positions = torch.tensor([s.filled for s in sequences], device=self.device)
        adapters = RowAdapters.of([(s.adapter, 1) for s in sequences])
        x = self.embed(columns, adapters) + self.positions[positions]  # [jobs, hidden]
        x = self._forward(x.repeat_interleave(rows, 0), sequences, 1)
        for sequence in sequences:
            sequence.length += 1
        return self.logits(x, RowAdapters.of([(s.adapter, s.rows) for s in sequences]))

    def embed(self, columns: Tensor, adapters: RowAdapters = NO_ADAPTERS) -> Tensor:
        """Embedded columns, int64 [n, codebooks] to [n, hidden], without positions."""
        x = F.embedding(columns + self.offsets, self.embeddings).sum(1)
        return adapters.embedded(columns, x)

    def logits(self, x: Tensor, adapters: RowAdapters = NO_ADAPTERS) -> Tensor:
        """Logits, [rows, hidden] to float32 [rows, codebooks, codebook_size]."""
        logits = adapters.product(NO_LAYER, "lm_heads", self.lm_heads, x)
        return logits.view(len(x), self.codebooks, -1).float()

    def forward(
        self,
        x: Tensor,
        attend_self: Attend,
        attend_text: Attend,
        adapters: RowAdapters = NO_ADAPTERS,
    ) -> Tensor:
        """All layers and the last norm, [n, hidden] to [n, hidden].

        Args:
            x: embedded columns.
            attend_self: self-attention of a layer, from its index and [n, 3 · hidden] of queries,
                keys and values to [n, hidden].
            attend_text: cross-attention of a layer, from its index and queries, [n, hidden].
            adapters: of the n rows.
        """
        for index, layer in enumerate(self.layers):
            product = functools.partial(adapters.product, index)
            qkv = product("qkv", layer.qkv, layer.self_norm(x))
            x = x + product("self_out", layer.self_out, attend_self(index, qkv))
            if text := layer.text:
                query = product("text_q", text.q, text.norm(x))
                x = x + product("text_out", text.out, attend_text(index, query))
            up = product("up", layer.up, layer.ffn_norm(x))
            x = x + product("down", layer.down, self.activation(up))
        normed: Tensor = self.norm(x)
        return normed

    def _forward(self, x: Tensor, sequences: list[Sequence], n: int) -> Tensor:
        """`forward` for n columns of each row, x: [rows · n, hidden]."""
        adapters = RowAdapters.of([(s.adapter, s.rows * n) for s in sequences])
        if self.compiled and not adapters.applied:
            normed: Tensor = self.norm(self.compiled.run(x, sequences, n))
            return normed
        return self.forward(
            x,
            lambda index, qkv: self._attend_self(index, qkv, sequences, n),
            lambda index, query: self._attend_text(index, query, sequences, n),
            adapters,
        )

    def _attend_self(self, index: int, qkv: Tensor, sequences: list[Sequence], n: int) -> Tensor:
        by_job = qkv.view(-1, n, 3, self.heads, self.head_dim).split([s.rows for s in sequences])
        out = [
            sequence.caches[index].attend(of_job, sequence.filled)
            for sequence, of_job in zip(sequences, by_job, strict=True)
        ]
        return torch.cat(out).view(len(qkv), -1)

    def _attend_text(self, index: int, query: Tensor, sequences: list[Sequence], n: int) -> Tensor:
        q = query.view(-1, n, self.heads, self.head_dim).transpose(1, 2)
        out = torch.zeros_like(q)  # what a row of the null condition gets
        rows = [text_kv for sequence in sequences for text_kv in sequence.text]
        for row, text_kv in enumerate(rows):
            if text_kv is not None:
                key, value = text_kv[index]
                out[row] = F.scaled_dot_product_attention(q[row : row + 1], key, value)[0]
        return out.transpose(1, 2).reshape(len(query), -1)
