"""Steps as one captured graph: CUDA's way.

A step of MusicGen is some 25 small kernels a layer, which take longer to launch than to run. Here
everything that a step reads or writes lies in buffers that never move: a slot for each job with
its columns, its position, its settings, the random numbers drawn ahead, its caches and those of
its prompt. The step is one function of those buffers without a host synchronisation; it is
captured once for a few numbers of jobs and lengths, and replayed. A graph covers the slots from 0
to the highest in use, so jobs take the lowest free slot; what it computes for a slot without a
ready job is thrown away. Off CUDA, or with `capture` off, the same function runs as it is.

The idea of a strict graph around a step of plain torch is that of moshi's `CUDAGraphed` (Kyutai)
and of gpt-fast's static caches (PyTorch).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_ui.engine import sampling
from musicgen_ui.engine.adapter import Rows, Worn
from musicgen_ui.engine.attention import FloatCache
from musicgen_ui.engine.decoder import Caches, Decoder
from musicgen_ui.engine.delay import UNWRITTEN
from musicgen_ui.engine.job import Job
from musicgen_ui.engine.layers import Memory

SIZES = (1, 2, 4, 8, 16, 32, 64)  # jobs that a graph steps
LENGTHS = (256, 512, 1024, 1536)  # positions that a graph attends to
TOKENS = (64, 512)  # of the prompts: room at first, and at most
PREFIX = 768  # a melody checkpoint's more positions: 235 of chroma and a prompt's tokens
ROWS = 2  # a slot's: what is wanted and what is not


class Graphed:
    """Writes the next column of the jobs that it is given.

    Args:
        decoder: on the device where it will run, in a floating precision.
        slots: jobs at once; the buffers for all of them are allocated here.
        positions: the longest job's columns.
        capture: whether to capture graphs; only CUDA can.
    """

    def __init__(
        self, decoder: Decoder, slots: int, positions: int = LENGTHS[-1], capture: bool = True
    ) -> None:
        self.decoder = decoder
        self.capture = capture and decoder.device.type == "cuda"
        self.positions = positions + PREFIX * decoder.prefixed
        decoder.reserve(self.positions)
        self._free = set(range(slots))
        self._slot: dict[Job, int] = {}
        self._stepped: list[int] = []  # slots whose jobs are ready
        self._graphs: dict[tuple[int, int], Callable[[], Any]] = {}
        self._pool: Any = None  # the memory of all graphs
        device, codebooks = decoder.device, decoder.codebooks
        zeros = functools.partial(torch.zeros, device=device)
        with torch.inference_mode():
            shape = (ROWS * slots, decoder.heads, self.positions, decoder.head_dim)
            self.caches = [FloatCache(shape, decoder.dtype, device) for _ in decoder.layers]
            layers = 0 if decoder.prefixed else len(decoder.layers)
            text = (layers, 2, ROWS * slots, decoder.heads, TOKENS[0])
            self.text = zeros((*text, decoder.head_dim), dtype=decoder.dtype)
            self.heard = zeros((ROWS * slots, TOKENS[0]), dtype=torch.bool)
            self.columns = zeros((slots, codebooks, positions + 1), dtype=torch.int64)
            self.uniforms = zeros((slots, positions, codebooks))
            self.at = zeros(slots, dtype=torch.int64)  # the column that is stepped next
            self.prefix = zeros(slots, dtype=torch.int64)  # positions before the first column
            self.ready = zeros(slots, dtype=torch.bool)
            self.sane = zeros(slots, dtype=torch.bool)
            self.settings = sampling.Settings(
                guidance_scale=zeros(slots, 1, 1) + 1,
                temperature=zeros(slots, 1, 1) + 1,
                top_k=zeros(slots, 1, 1, dtype=torch.int64) + 1,
                top_p=zeros(slots, 1, 1) + 1,
                greedy=zeros(slots, 1, dtype=torch.bool),
                candidates=decoder.codebook_size,
                alike=False,
                nucleus=True,
                draws=True,
                chooses=True,
            )
            for cache in self.caches:  # what was never written is multiplied by 0, so no NaN
                cache.keys.zero_(), cache.values.zero_()

    @staticmethod
    def slot_nbytes(decoder: Decoder, positions: int = LENGTHS[-1]) -> int:
        """Bytes that a slot takes, nearly: its caches and its prompts'."""
        told = PREFIX if decoder.prefixed else TOKENS[0]
        numbers = 2 * ROWS * (positions + told) * decoder.heads * decoder.head_dim
        return numbers * len(decoder.layers) * decoder.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, which hold every job's caches."""
        held = [self.text, self.columns, self.uniforms]
        return sum(cache.nbytes for cache in self.caches) + sum(buffer.nbytes for buffer in held)

    @torch.inference_mode()
    def admit(self, job: Job, conditions: list[Tensor | None]) -> None:
        """Gives the job the lowest free slot, and its new window the same one.

        `conditions` are as for `Decoder.sequence`.
        """
        if job not in self._slot:
            self._slot[job] = min(self._free)
            self._free.remove(self._slot[job])
            self.sane[self._slot[job]] = True
            job.sane = self.sane[self._slot[job]]
        slot = self._slot[job]
        rows = slice(ROWS * slot, ROWS * slot + len(conditions))
        views: Caches = [_view(cache, rows) for cache in self.caches]
        job.sequence = self.decoder.sequence(conditions, job.positions, views, job.worn)
        self._hear(slot, job.sequence.text)
        self.prefix[slot] = job.sequence.prefix.shape[1]
        self.columns[slot, :, : job.positions + 1] = job.columns
        job.columns = self.columns[slot, :, : job.positions + 1]
        steps, drawn = job.positions - job.written, job.next_uniform
        self.uniforms[slot, job.written : job.positions] = job.uniforms[drawn : drawn + steps]
        self.at[slot] = job.written
        own = sampling.Settings.of([job.request], self.settings.candidates, self.decoder.device)
        for name in ("guidance_scale", "temperature", "top_k", "top_p", "greedy"):
            getattr(self.settings, name)[slot] = getattr(own, name)[0]
        if len(conditions) == 1:
            self.settings.guidance_scale[slot] = 1

    @torch.inference_mode()
    def tell(self, job: Job, conditions: list[Tensor | None]) -> None:
        """Lets the job attend to other states from its next column on."""
        job.sequence.text = [self.decoder.text_memory(states, job.worn) for states in conditions]
        self._hear(self._slot[job], job.sequence.text)

    def _hear(self, slot: int, memories: list[Memory | None]) -> None:
        """Lays the prompts' keys and values into the slot's rows."""
        tokens = [memory[0][0].shape[2] for memory in memories if memory]
        if max(tokens, default=0) > self.text.shape[4]:
            more = TOKENS[1] - self.text.shape[4]
            self.text = F.pad(self.text, (0, 0, 0, more))
            self.heard = F.pad(self.heard, (0, more))
            self._graphs.clear()  # they read the old buffers
        own = slice(ROWS * slot, ROWS * (slot + 1))
        self.text[:, :, own] = 0
        self.heard[own] = False
        # The null condition attends to a token whose value is 0: nothing, and never NaN.
        self.heard[own, 0] = True
        for row, memory in enumerate(memories, start=own.start):
            for layer, parts in enumerate(memory or ()):
                for part, states in enumerate(parts):
                    self.text[layer, part, row, :, : states.shape[2]] = states[0]
                    self.heard[row, : states.shape[2]] = True

    @torch.inference_mode()
    def release(self, job: Job) -> None:
        """Frees the slot of a job that has ended."""
        slot = self._slot.pop(job)
        job.columns = job.columns.clone()  # the take is still made of them
        self._free.add(slot)

    @torch.inference_mode()
    def step(self, jobs: list[Job]) -> None:
        """Writes the next column of every job."""
        slots = sorted(self._slot[job] for job in jobs)
        if slots != self._stepped:
            self._stepped = slots
            self.ready.zero_()
            self.ready[slots] = True
        size = _enough(SIZES, 1 + slots[-1], len(self.at))
        filled = max(job.sequence.filled for job in jobs)
        length = _enough(LENGTHS, 1 + filled, self.positions)
        worn = [(self._slot[job], job.worn) for job in jobs if job.worn]
        if worn:  # not captured: any mix of adapters would want a graph of its own
            self._step(size, length, worn)
        else:
            self._graph(size, length)()
        for job in jobs:
            job.sequence.length += 1

    def _graph(self, size: int, length: int) -> Callable[[], Any]:
        step = functools.partial(self._step, size, length)
        if not self.capture:
            return step
        key = (size, length)
        if key not in self._graphs:
            self._graphs[key] = self._captured(step)
        return self._graphs[key]

    def _captured(self, step: Callable[[], None]) -> Callable[[], Any]:
        """Runs the step once on a stream of its own, as capture wants, then captures it.

        The graphs share their memory, since they run one after the other and leave their results
        in the buffers. Other threads, which may load a model meanwhile, do not disturb a capture.
        """
        kept = [(buffer, buffer.clone()) for buffer in (self.at, self.columns, self.sane)]
        device = torch.cuda.device(self.decoder.device)  # which need not be the current one
        with device:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    step()
                torch.cuda.current_stream().wait_stream(side)
            finally:
                for buffer, before in kept:
                    buffer.copy_(before)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()

        def replay() -> None:
            with device:
                graph.replay()

        return replay

    def warm_up(self) -> None:
        """Captures the graphs of a single job, so that the first one does not wait for them."""
        for length in sorted({*LENGTHS, self.positions}) if self.capture else ():
            self._graph(1, length)

    def _step(self, size: int, length: int, adapters: Sequence[tuple[int, Worn]] = ()) -> None:
        """One step of the slots 0 to `size`: reads and writes the buffers and nothing else."""
        own = Rows([(slice(slot, slot + 1), worn) for slot, worn in adapters])
        worn = Rows([(slice(ROWS * slot, ROWS * (slot + 1)), worn) for slot, worn in adapters])
        decoder, at = self.decoder, self.at[:size]
        places = at + self.prefix[:size]
        slots = torch.arange(size, device=decoder.device)
        rows = torch.arange(ROWS * size, device=decoder.device)
        at_rows = places.repeat_interleave(ROWS)
        filled = torch.arange(length, device=decoder.device) <= at_rows[:, None]  # [rows, length]

        def attend_self(index: int, qkv: Tensor) -> Tensor:
            q, k, v = qkv.view(-1, 3, decoder.heads, decoder.head_dim).unbind(1)
            cache = self.caches[index]
            cache.keys[rows, :, at_rows] = k
            cache.values[rows, :, at_rows] = v
            keys, values = (
                cache.keys[: len(rows), :, :length],
                cache.values[: len(rows), :, :length],
            )
            return _attend(q, keys, values, filled)

        def attend_text(index: int, query: Tensor) -> Tensor:
            q = query.view(-1, decoder.heads, decoder.head_dim)
            keys, values = self.text[index, :, : len(rows)]
            return _attend(q, keys, values, self.heard[: len(rows)])

        x = decoder.embed(self.columns[slots, :, at], own) + decoder.positions[places]
        x = decoder.forward(x.repeat_interleave(ROWS, 0), attend_self, attend_text, worn)
        logits = decoder.logits(x, worn).unflatten(
            0, (size, ROWS)
        )  # [slots, rows, codebooks, codes]
        settings = self.settings.of_first(size)
        guided = sampling.guide(logits[:, 0], logits[:, 1], settings.guidance_scale)
        guided = torch.where(settings.guidance_scale == 1, logits[:, 0], guided)
        drawn = sampling.draw(guided, settings, self.uniforms[slots, at])
        given, ready = self.columns[slots, :, at + 1], self.ready[:size]
        self.sane[:size] &= sampling.finite(guided) | ~ready
        unwritten = (given == UNWRITTEN) & ready[:, None]
        self.columns[slots, :, at + 1] = torch.where(unwritten, drawn, given)
        at += ready  # a slot whose job is not ready stands still


def _view(cache: FloatCache, rows: slice) -> FloatCache:
    view = FloatCache.__new__(FloatCache)
    view.keys, view.values = cache.keys[rows], cache.values[rows]
    return view


def _enough(sizes: tuple[int, ...], needed: int, most: int) -> int:
    """The least of `sizes` that holds `needed`, and never more than `most`."""
    return min(next((size for size in sizes if size >= needed), most), most)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """[rows, heads, dim] over [rows, heads, positions, dim], masked [rows, positions]."""
    out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask[:, None, None])
    return out.flatten(1)
