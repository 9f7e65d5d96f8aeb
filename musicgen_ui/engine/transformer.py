"""One step of the transformer for all rows.

The weights are read once from transformers' `MusicgenForCausalLM`, or `MusicgenMelodyForCausalLM`,
and packed: `layers`, and all codebooks' embeddings and heads in one matrix each. A job's `Sequence`
holds its keys and values, allocated once for its whole length. What the job is told is taken in
once: by cross-attention, as keys and values of its own, or, in a melody checkpoint, which has none,
as a prefix of states before the first column. A step computes every matrix product for the rows of
all jobs together, which costs little more than for one, and attends row by row to what is filled
and no further.

A job has a row for what is wanted and, when guided, one for what is not (the null condition or a
negative prompt). transformers' model is the reference: greedy codes are equal to its `generate`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from musicgen_ui.engine.attention import FloatCache
from musicgen_ui.engine.finite import require_finite
from musicgen_ui.engine.layers import Layer, Memory
from musicgen_ui.engine.linear import Linear, computing_dtype
from musicgen_ui.engine.lora import BARE, OUTSIDE, Rows, Worn

if TYPE_CHECKING:
    from musicgen_ui.engine.cpu.int8 import Int8Cache, Layers, SequenceCaches

Attend = Callable[[int, Tensor], Tensor]
Caches: TypeAlias = "list[FloatCache] | list[Int8Cache]"  # a layer


@dataclass
class Sequence:
    """A job's place in the decoder: the keys and values of its rows."""

    caches: Caches
    text: list[Memory | None]  # a row
    prefix: Tensor  # states before the first column, [rows, states, hidden]
    length: int = 0  # columns filled; below 0 while so many states of the prefix are missing
    worn: Worn | None = None  # an adapter beside the weights
    places: SequenceCaches | None = None  # of the above, as `compiled` wants them

    @property
    def rows(self) -> int:
        """1, or 2 when guided."""
        return len(self.prefix)

    @property
    def filled(self) -> int:
        """Positions of the caches that are filled, the prefix included."""
        return self.length + self.prefix.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory that the keys and values hold, in bytes."""
        return sum(cache.nbytes for cache in self.caches)


class Decoder:
    """MusicGen's language model, packed in one precision on one device.

    Args:
        lm: transformers' decoder; its layers' weights may be released as they are packed.
        device: where to run.
        precision: see `linear.PRECISIONS`.

    Raises:
        RequestError: a weight is no number.
    """

    def __init__(self, lm: Any, device: torch.device, precision: str) -> None:
        config = lm.config
        self.device = device
        self.precision = precision
        self.dtype = computing_dtype(precision)
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.codebooks: int = config.num_codebooks
        self.codebook_size: int = config.vocab_size
        self.start_token: int = config.pad_token_id
        self.inner: int = config.ffn_dim
        self.activation = ACT2FN[config.activation_function]
        self.gelu = config.activation_function == "gelu"
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
            heads = torch.cat([head.weight for head in lm.lm_heads])
            self.lm_heads = Linear(heads, precision, device)
        self.prefixed = self.layers[0].text is None  # what it is told comes before the columns
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
        weights = self.positions_of(count, self.heads * self.head_dim)
        return weights.to(self.device, self.dtype)

    @torch.inference_mode()
    def sequence(
        self,
        conditions: list[Tensor | None],
        columns: int,
        caches: Caches | None = None,
        worn: Worn | None = None,
    ) -> Sequence:
        """A new sequence of up to `columns` columns.

        Args:
            conditions: for each row its states, [tokens, hidden], or None, which is no states. In
                a melody checkpoint every row has as many.
            columns: that it will hold at most.
            caches: where its keys and values go, if not into new ones.
            worn: the adapter beside the weights.
        """
        rows = len(conditions)
        prefix = self.embeddings.new_zeros(rows, 0, self.embeddings.shape[1])
        text: list[Memory | None] = [None] * rows
        if self.prefixed:
            told = [states for states in conditions if states is not None]
            prefix = torch.stack(told).to(self.device, self.dtype)
        else:
            text = [self.text_memory(states, worn) for states in conditions]
        positions = prefix.shape[1] + columns
        self.reserve(positions)
        shape = (rows, self.heads, positions, self.head_dim)
        caches = caches or self._caches(shape)
        return Sequence(caches, text, prefix, -prefix.shape[1], worn)

    @torch.inference_mode()
    def reserve(self, positions: int) -> None:
        """Makes room for sequences of so many positions, prefix included."""
        if positions > len(self.positions):
            self.positions = self._sinusoids(positions)

    def _caches(self, shape: tuple[int, ...]) -> Caches:
        if self.precision == "int8":
            from musicgen_ui.engine.cpu.int8 import Int8Cache

            return Int8Cache.of_layers(len(self.layers), shape)
        return [FloatCache(shape, self.dtype, self.device) for _ in self.layers]

    def text_memory(self, states: Tensor | None, worn: Worn | None = None) -> Memory | None:
        """The keys and values of [tokens, hidden] a layer, each [1, heads, tokens, head_dim]."""
        if states is None:
            return None
        states = states.to(self.device, self.dtype)
        memory, rows = [], Rows.of([(worn, len(states))])
        for index, layer in enumerate(self.layers):
            assert layer.text
            both = rows.product(index, "text_kv", layer.text.kv, states)
            key, value = both.view(len(states), 2, self.heads, -1).unbind(1)
            memory.append((key.transpose(0, 1)[None], value.transpose(0, 1)[None]))
        return memory

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, columns: Tensor, most: int) -> None:
        """Takes in what a sequence has not of its prefix, else of the columns known already.

        Args:
            sequence: to go on with.
            columns: from the first one on, int64 [codebooks, n].
            most: positions to take in now.
        """
        start = sequence.filled
        x = sequence.prefix[:, start : start + most]  # [rows, positions, hidden]
        if sequence.length >= 0:
            columns = columns[:, sequence.length : sequence.length + most]
            worn = Rows.of([(sequence.worn, columns.shape[1])])
            x = self.embed(columns.T, worn).expand(sequence.rows, -1, -1)
        x = x + self.positions[start : start + x.shape[1]]
        self._forward(x.flatten(0, 1), [sequence], x.shape[1])
        sequence.length += x.shape[1]

    @torch.inference_mode()
    def step(self, columns: Tensor, sequences: list[Sequence]) -> Tensor:
        """Takes the next column of every sequence in and says what may follow.

        Args:
            columns: int64 [jobs, codebooks].
            sequences: of the same jobs.

        Returns:
            Logits, float32 [rows of all jobs, codebooks, codebook_size].
        """
        rows = torch.tensor([s.rows for s in sequences], device=self.device)
        at = torch.tensor([s.filled for s in sequences], device=self.device)
        worn = Rows.of([(s.worn, 1) for s in sequences])
        x = (self.embed(columns, worn) + self.positions[at]).repeat_interleave(rows, 0)
        x = self._forward(x, sequences, 1)
        for sequence in sequences:
            sequence.length += 1
        return self.logits(x, Rows.of([(s.worn, s.rows) for s in sequences]))

    def embed(self, columns: Tensor, worn: Rows = BARE) -> Tensor:
        """What goes in: int64 [n, codebooks] to [n, hidden], without positions."""
        return worn.embedded(columns, F.embedding(columns + self.offsets, self.embeddings).sum(1))

    def logits(self, x: Tensor, worn: Rows = BARE) -> Tensor:
        """What comes out: [rows, hidden] to float32 [rows, codebooks, codebook_size]."""
        logits = worn.product(OUTSIDE, "lm_heads", self.lm_heads, x)
        return logits.view(len(x), self.codebooks, -1).float()

    def forward(
        self, x: Tensor, attend_self: Attend, attend_text: Attend, worn: Rows = BARE
    ) -> Tensor:
        """The layers, [n, hidden] to [n, hidden], with the attention handed in.

        Args:
            x: embedded columns.
            attend_self: a layer's number and its [n, 3 · hidden] of queries, keys and values.
            attend_text: a layer's number and its queries, [n, hidden].
            worn: the adapters of the n rows.
        """
        for index, layer in enumerate(self.layers):
            product = functools.partial(worn.product, index)
            qkv = product("qkv", layer.qkv, layer.self_norm(x))
            x = x + product("self_out", layer.self_out, attend_self(index, qkv))
            if text := layer.text:
                query = product("text_q", text.q, text.norm(x))
                x = x + product("text_out", text.out, attend_text(index, query))
            up = product("up", layer.up, layer.ffn_norm(x))
            x = x + product("down", layer.down, self.activation(up))
        return self.norm(x)

    def _forward(self, x: Tensor, sequences: list[Sequence], n: int) -> Tensor:
        worn = Rows.of([(s.worn, s.rows * n) for s in sequences])
        if self.compiled and not worn.worn:
            return self.norm(self.compiled.run(x, sequences, n))
        return self.forward(
            x,
            lambda index, qkv: self._attend_self(index, qkv, sequences, n),
            lambda index, query: self._attend_text(index, query, sequences, n),
            worn,
        )

    def _attend_self(self, index: int, qkv: Tensor, sequences: list[Sequence], n: int) -> Tensor:
        parts = qkv.view(-1, n, 3, self.heads, self.head_dim).split([s.rows for s in sequences])
        out = [
            sequence.caches[index].attend(part, sequence.filled)
            for sequence, part in zip(sequences, parts, strict=True)
        ]
        return torch.cat(out).view(len(qkv), -1)

    def _attend_text(self, index: int, query: Tensor, sequences: list[Sequence], n: int) -> Tensor:
        q = query.view(-1, n, self.heads, self.head_dim).transpose(1, 2)
        out = torch.zeros_like(q)  # a row of the null condition attends to nothing
        memories = [memory for sequence in sequences for memory in sequence.text]
        for row, memory in enumerate(memories):
            if memory is not None:
                key, value = memory[index]
                out[row] = F.scaled_dot_product_attention(q[row : row + 1], key, value)[0]
        return out.transpose(1, 2).reshape(len(query), -1)
