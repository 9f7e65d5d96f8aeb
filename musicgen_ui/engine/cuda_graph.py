"""Steps as one captured graph: CUDA's way.

Everything that a step reads or writes lies in buffers that never move, `Slots`: a slot for each job
with its columns, its position, its settings, the random numbers drawn ahead, its caches and those
of its prompt. The step is one function of those buffers without a host synchronisation; it is
captured once for a few numbers of jobs, and replayed. The host runs a few steps ahead of the device
and reads the codes when the codec wants them. A graph covers the slots from 0 to the highest in
use, so jobs take the lowest free slot; what it computes for a slot without a ready job is thrown
away.

The step itself is that of `gpu.step` where Triton is installed, eight launches a layer. Elsewhere,
and for jobs with an adapter, it is plain torch, some 25 launches a layer, whose attention reads a
fixed number of positions, so that graph is captured for a few lengths too. Off CUDA, or with
`capture` off, the same functions run as they are.

The idea of a strict graph around a step is that of moshi's `CUDAGraphed` (Kyutai) and of gpt-fast's
static caches (PyTorch).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_ui.engine import faults, sampling
from musicgen_ui.engine.attention import FloatCache
from musicgen_ui.engine.delay_pattern import UNWRITTEN
from musicgen_ui.engine.job import Job
from musicgen_ui.engine.layers import Memory
from musicgen_ui.engine.lora import Rows, Worn
from musicgen_ui.engine.slots import ROWS, TOKENS, Slots
from musicgen_ui.engine.transformer import Caches, Decoder

if TYPE_CHECKING:
    from musicgen_ui.engine.gpu.step import Step

SIZES = (1, 2, 4, 8, 16, 32, 64)  # jobs that a graph steps
LENGTHS = (256, 512, 1024, 1536)  # positions that a graph of plain torch attends to
PREFIX = 768  # a melody checkpoint's more positions: 235 of chroma and a prompt's tokens
STEPS_AHEAD = 8  # that the host may be ahead of the device

log = logging.getLogger(__name__)


class Graphed:
    """Writes the next column of the jobs that it is given.

    Args:
        decoder: on the device where it will run, in a floating precision.
        slots: jobs at once; the buffers for all of them are allocated here.
        positions: the longest job's columns.
        capture: whether to capture graphs; only CUDA can.
        triton: whether to step with Triton's kernels; None is where CUDA and Triton are.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        positions: int = LENGTHS[-1],
        capture: bool = True,
        triton: bool | None = None,
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
        self._launched: deque[torch.cuda.Event] = deque()  # an event for each step under way
        with torch.inference_mode():
            self.slots = Slots.of(decoder, slots, positions, self.positions)
            self.triton = self._triton_step(triton)

    def _triton_step(self, wanted: bool | None) -> Step | None:
        there = self.decoder.device.type == "cuda" and importlib.util.find_spec("triton")
        if not (there if wanted is None else wanted):
            return None
        from musicgen_ui.engine.gpu import step

        return step.Step(self.decoder, self.slots) if step.supports(self.decoder) else None

    @staticmethod
    def slot_nbytes(decoder: Decoder, positions: int = LENGTHS[-1]) -> int:
        """Bytes that a slot takes, nearly: its caches and its prompts'."""
        told = PREFIX if decoder.prefixed else TOKENS[0]
        numbers = 2 * ROWS * (positions + told) * decoder.heads * decoder.head_dim
        return numbers * len(decoder.layers) * decoder.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, which hold every job's caches."""
        return self.slots.nbytes

    @torch.inference_mode()
    def admit(self, job: Job, conditions: list[Tensor | None]) -> None:
        """Gives the job the lowest free slot, and its new window the same one.

        `conditions` are as for `Decoder.sequence`.
        """
        new, slots = job not in self._slot, self.slots
        slot = min(self._free) if new else self._slot[job]
        if new:
            slots.finite[slot] = True
            job.sane = slots.finite[slot]
        rows = slice(ROWS * slot, ROWS * slot + len(conditions))
        views: Caches = [_view(cache, rows) for cache in slots.caches]
        job.sequence = self.decoder.sequence(conditions, job.positions, views, job.worn)
        self._hear(slot, job.sequence.text)
        slots.prefix[slot] = job.sequence.prefix.shape[1]
        slots.columns[slot, :, : job.positions + 1] = job.columns
        job.columns = slots.columns[slot, :, : job.positions + 1]
        steps, drawn = job.positions - job.written, job.next_uniform
        slots.uniforms[slot, job.written : job.positions] = job.uniforms[drawn : drawn + steps]
        slots.at[slot] = job.written
        own = sampling.Settings.of([job.request], slots.settings.candidates, self.decoder.device)
        for name in ("guidance_scale", "temperature", "top_k", "top_p", "greedy"):
            getattr(slots.settings, name)[slot] = getattr(own, name)[0]
        if len(conditions) == 1:
            slots.settings.guidance_scale[slot] = 1
        if new:  # at last: a job for which there was no memory has no slot
            self._slot[job] = slot
            self._free.remove(slot)

    @torch.inference_mode()
    def tell(self, job: Job, conditions: list[Tensor | None]) -> None:
        """Lets the job attend to other states from its next column on."""
        job.sequence.text = [self.decoder.text_memory(states, job.worn) for states in conditions]
        self._hear(self._slot[job], job.sequence.text)

    def _hear(self, slot: int, memories: list[Memory | None]) -> None:
        """Lays the prompts' keys and values into the slot's rows."""
        slots = self.slots
        tokens = [memory[0][0].shape[2] if memory else 0 for memory in memories]
        if max(tokens) > slots.text.shape[4]:
            more = TOKENS[1] - slots.text.shape[4]
            slots.text = F.pad(slots.text, (0, 0, 0, more))
            slots.heard = F.pad(slots.heard, (0, more))
            self._graphs.clear()  # they read the old buffers
        own = slice(ROWS * slot, ROWS * (slot + 1))
        slots.text[:, :, own] = 0
        slots.heard[own] = False
        # The null condition attends to a token whose value is 0: nothing, and never NaN.
        slots.heard[own, 0] = True
        slots.tokens[own] = 0
        for row, memory in enumerate(memories, start=own.start):
            if not memory:
                continue
            states = torch.stack([torch.cat(parts) for parts in memory], dim=1)
            told = states.shape[3]  # states: [2, layers, heads, tokens, head_dim]
            slots.text[:, :, row, :, :told] = states.transpose(0, 1)
            slots.heard[row, :told] = True
            slots.tokens[row] = told

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
            self.slots.ready.zero_()
            self.slots.ready[slots] = True
        size = _enough(SIZES, 1 + slots[-1], len(self.slots.at))
        filled = max(job.sequence.filled for job in jobs)
        length = 0 if self.triton else _enough(LENGTHS, 1 + filled, self.positions)
        worn = [(self._slot[job], job.worn) for job in jobs if job.worn]
        if worn:  # not captured: any mix of adapters would want a graph of its own
            self._step(size, _enough(LENGTHS, 1 + filled, self.positions), worn)
        else:
            self._graph(size, length)()
        for job in jobs:
            job.sequence.length += 1
        self._keep_pace()

    def _keep_pace(self) -> None:
        """Waits for the device while too many steps are under way."""
        if self.decoder.device.type != "cuda":
            return
        full = len(self._launched) == STEPS_AHEAD
        event = self._launched.popleft() if full else torch.cuda.Event()
        if full:
            event.synchronize()
        event.record(torch.cuda.current_stream(self.decoder.device))
        self._launched.append(event)

    def _graph(self, size: int, length: int) -> Callable[[], Any]:
        """The step of the first `size` slots; `length` is 0 for Triton's."""
        if length:
            step = functools.partial(self._step, size, length)
        else:
            assert self.triton
            step = functools.partial(self.triton, size)
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
        slots = self.slots
        kept = [(buffer, buffer.clone()) for buffer in (slots.at, slots.columns, slots.finite)]
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

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures the graphs of a single job, so that the first one does not wait for them.

        Triton compiles its kernels here. Where it cannot, since it lacks a compiler of C or the
        device is too old for it, plain torch steps from now on.
        """
        if self.triton:
            try:
                self._graph(1, 0)()
                self.slots.at.zero_()
            except Exception as error:
                if faults.of_the_device(error) or faults.out_of_memory(error):
                    raise
                log.warning("Triton's kernels do not run here, torch's do", exc_info=error)
                self.triton = None
                self._graphs.clear()
        if self.capture and not self.triton:
            for length in sorted({*LENGTHS, self.positions}):
                self._graph(1, length)

    def _step(self, size: int, length: int, adapters: Sequence[tuple[int, Worn]] = ()) -> None:
        """One step of the slots 0 to `size`: reads and writes the buffers and nothing else."""
        own = Rows([(slice(slot, slot + 1), worn) for slot, worn in adapters])
        worn = Rows([(slice(ROWS * slot, ROWS * (slot + 1)), worn) for slot, worn in adapters])
        decoder, buffers = self.decoder, self.slots
        at = buffers.at[:size]
        places = at + buffers.prefix[:size]
        slots = torch.arange(size, device=decoder.device)
        rows = torch.arange(ROWS * size, device=decoder.device)
        at_rows = places.repeat_interleave(ROWS)
        filled = torch.arange(length, device=decoder.device) <= at_rows[:, None]  # [rows, length]

        def attend_self(index: int, qkv: Tensor) -> Tensor:
            q, k, v = qkv.view(-1, 3, decoder.heads, decoder.head_dim).unbind(1)
            cache = buffers.caches[index]
            cache.keys[rows, :, at_rows] = k
            cache.values[rows, :, at_rows] = v
            keys, values = (
                cache.keys[: len(rows), :, :length],
                cache.values[: len(rows), :, :length],
            )
            return _attend(q, keys, values, filled)

        def attend_text(index: int, query: Tensor) -> Tensor:
            q = query.view(-1, decoder.heads, decoder.head_dim)
            keys, values = buffers.text[index, :, : len(rows)]
            return _attend(q, keys, values, buffers.heard[: len(rows)])

        x = decoder.embed(buffers.columns[slots, :, at], own) + decoder.positions[places]
        x = decoder.forward(x.repeat_interleave(ROWS, 0), attend_self, attend_text, worn)
        logits = decoder.logits(x, worn).unflatten(
            0, (size, ROWS)
        )  # [slots, rows, codebooks, codes]
        settings = buffers.settings.of_first(size)
        guided = sampling.guide(logits[:, 0], logits[:, 1], settings.guidance_scale)
        guided = torch.where(settings.guidance_scale == 1, logits[:, 0], guided)
        drawn = sampling.draw(guided, settings, buffers.uniforms[slots, at])
        given, ready = buffers.columns[slots, :, at + 1], buffers.ready[:size]
        buffers.finite[:size] &= (sampling.finite(guided) | ~ready)[:, None]
        unwritten = (given == UNWRITTEN) & ready[:, None]
        buffers.columns[slots, :, at + 1] = torch.where(unwritten, drawn, given)
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
