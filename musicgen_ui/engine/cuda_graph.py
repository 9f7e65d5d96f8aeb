"""Steps as one captured graph: the stepper of CUDA.

Everything that a step reads or writes lies in buffers that never move: in `Slots` each variation
has its columns, its position, its sampling parameters, the random numbers drawn ahead, its KV cache
and its prompt's keys and values. The step is one function of those buffers without a host
synchronisation; it is captured once for a few numbers of variations, and replayed. The host runs a
few steps ahead of the device and reads the codes when the codec wants them. A graph covers the
slots from 0 to the highest in use, so variations take the lowest free slot; what it computes for
slots that are not ready is ignored.

The step itself is `gpu.step.TritonStep` where Triton is installed, eight launches a layer.
Elsewhere, and for variations with an adapter, it is plain torch, some 25 launches a layer, whose
attention reads a fixed number of positions, so that graph is captured for a few lengths too. Off
CUDA, or with `capture` off, the same functions run uncaptured.

An audio prompt, and what else is known of a variation's columns, is taken in on a stream of its
own, and it is stepped once that is done: the steps of the others do not wait for it. Slots that are
not ready write their keys and values at the position after the known ones, so the two do not meet.

A slot has two rows, cond and uncond. A variation that mixes several prompts needs more, so it is
stepped by an `EagerStepper` while it does; its slot waits for it.

The strict graph around a step follows moshi's `CUDAGraphed` (Kyutai), the static buffers follow
gpt-fast (PyTorch).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen_ui.engine import faults, sampling
from musicgen_ui.engine.conditioning import Conditions
from musicgen_ui.engine.delay_pattern import UNWRITTEN
from musicgen_ui.engine.device import side_stream
from musicgen_ui.engine.gpu.slots import ROWS, TEXT_TOKENS, Slots
from musicgen_ui.engine.lora import AppliedAdapter, RowAdapters
from musicgen_ui.engine.sampling import SamplingParams
from musicgen_ui.engine.stepper import EagerStepper, VariationState
from musicgen_ui.engine.transformer import Decoder
from musicgen_ui.engine.variation import Slot, Variation

if TYPE_CHECKING:
    from musicgen_ui.engine.gpu.step import TritonStep

GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64)  # variations that a graph steps
GRAPH_LENGTHS = (256, 512, 1024, 1536)  # positions that a graph of plain torch attends to
FIRST_ROOM = GRAPH_LENGTHS[1]  # positions that KV caches have room for until more are needed
PREFIX_POSITIONS = 768  # more in a melody checkpoint: 235 of chroma and a prompt's tokens
STEPS_AHEAD = 8  # that the host may be ahead of the device

log = logging.getLogger(__name__)


class CudaGraphStepper:
    """Writes the next column of the variations that it is given.

    Args:
        decoder: on the device where it will run, in a floating precision.
        slots: variations at once; the buffers for all of them are allocated here.
        positions: the longest variation's columns; the KV caches grow up to them when one needs it.
        capture: whether to capture graphs; only CUDA can.
        triton: whether to step with Triton's kernels; None does where CUDA and Triton are.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        positions: int = GRAPH_LENGTHS[-1],
        capture: bool = True,
        triton: bool | None = None,
    ) -> None:
        self.decoder = decoder
        self.capture = capture and decoder.device.type == "cuda"
        self.positions = positions + PREFIX_POSITIONS * decoder.prefixed
        decoder.reserve(self.positions)
        self._free = set(range(slots))
        self._slot: dict[Variation, int] = {}
        self._states: dict[Variation, VariationState] = {}
        self._eager = EagerStepper(decoder)  # its variations are those that mix prompts
        self._stepped: list[int] = []  # slots that are marked ready
        self._graphs: dict[tuple[int, int], Callable[[], object]] = {}
        self._pool: Any = None  # the memory of all graphs; its class is private to torch
        self.side = side_stream(decoder.device)  # of encoders and prefills; None off CUDA
        self._prefilled: dict[Variation, torch.cuda.Event] = {}  # those that steps know nothing of
        self._launched: deque[torch.cuda.Event] = deque()  # an event for each unfinished step
        with torch.inference_mode():
            self.room = min(FIRST_ROOM, self.positions)  # positions in the KV caches
            self.slots = Slots.of(decoder, slots, positions, self.room)
            self.triton = self._triton_step(triton)

    def _triton_step(self, triton: bool | None) -> TritonStep | None:
        available = self.decoder.device.type == "cuda" and importlib.util.find_spec("triton")
        if not (available if triton is None else triton):
            return None
        from musicgen_ui.engine.gpu import step

        return step.TritonStep(self.decoder, self.slots) if step.supports(self.decoder) else None

    @staticmethod
    def slot_nbytes(decoder: Decoder, positions: int = GRAPH_LENGTHS[-1]) -> int:
        """Bytes that a slot takes at most, nearly: its KV cache, its prompt's keys and values."""
        positions += PREFIX_POSITIONS * decoder.prefixed
        tokens = 0 if decoder.prefixed else TEXT_TOKENS[0]
        token = 2 * len(decoder.layers) * decoder.heads * decoder.head_dim * decoder.dtype.itemsize
        return ROWS * (positions * decoder.kv_position_nbytes + tokens * token)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, which hold the variations' KV caches, and of those beside them."""
        return self.slots.nbytes + self._eager.nbytes

    @torch.inference_mode()
    def admit(self, variation: Variation, conditions: Conditions) -> None:
        """Gives a variation the lowest free slot, and its next window the same one.

        Its sampling parameters are those of its request until `set_sampling` changes them.
        """
        self._wait_for_prefills([variation])
        prefix = self.decoder.prefix_length(conditions.states)
        self._make_room(prefix + variation.window.positions)
        state, slots = self._states.get(variation), self.slots
        slot = self._slot[variation] if state else min(self._free)
        params = state.sampling if state else SamplingParams.of(variation.request)
        if not state:
            slots.finite[slot] = True
        if conditions.mixed:
            self._eager.admit(variation, conditions)
            sequence = variation.slot.sequence
        else:
            states, caches = conditions.states, slots.views(slot, len(conditions.states))
            positions = variation.window.positions
            sequence = self.decoder.sequence(states, positions, caches, variation.adapter)
        variation.slot = Slot(sequence, slots.finite[slot])
        slots.prefix[slot] = sequence.prefix.shape[1]
        window, drawn = variation.window, variation.next_uniform
        slots.columns[slot, :, : window.positions + 1] = window.columns
        window.columns = slots.columns[slot, :, : window.positions + 1]
        steps = window.positions - window.written
        slots.uniforms[slot, window.written : window.positions] = variation.uniforms[drawn:][:steps]
        state = VariationState(conditions, params)
        self._place(variation, slot, state)
        self._states[variation] = state
        self._slot[variation] = slot  # at last: one for which there was no memory has no slot
        self._free.discard(slot)

    def _make_room(self, positions: int) -> None:
        """Lengthens the KV caches where a variation has more positions than they have room for.

        One that mixes prompts too, since a graph writes to the slots of those as well.
        """
        if positions <= self.room:
            return
        room = _at_least(GRAPH_LENGTHS, positions, self.positions)
        self._wait_for_prefills(list(self._prefilled))
        self._graphs.clear()  # they use the old memory
        try:
            for cache in self.slots.caches:  # one by one: the memory of each is free then
                cache.lengthen(room)
        finally:  # where there was no memory for all of them, too
            for variation, slot in self._slot.items():
                if variation not in self._eager.states:
                    sequence = variation.slot.sequence
                    sequence.caches = self.slots.views(slot, sequence.rows)
        self.room = room

    @torch.inference_mode()
    def set_conditions(self, variation: Variation, conditions: Conditions) -> None:
        """Conditions the variation's columns from the next one on; not for a melody checkpoint.

        Rows may come and go; see `Conditions.sources` for the past of a new one.
        """
        self._wait_for_prefills([variation])
        state, slot = self._states[variation], self._slot[variation]
        before, state.conditions = state.conditions, conditions
        if conditions.names != before.names:
            sources = conditions.sources(before)
            in_place = sources == list(range(len(before.states))) and not before.mixed
            caches = None
            if not (conditions.mixed or in_place):
                caches = self.slots.views(slot, len(sources))
            sequence = variation.slot.sequence
            self.decoder.change_conditions(sequence, conditions.states, sources, caches)
            self._place(variation, slot, state)

    def set_sampling(self, variation: Variation, params: SamplingParams) -> None:
        """Draws the variation's columns with other parameters from the next one on."""
        state = self._states[variation]
        state.sampling = params
        self._write_sampling(self._slot[variation], state)

    @torch.inference_mode()
    def move(self, variation: Variation) -> None:
        """Goes on from the window's `written`, which was moved over known columns."""
        self.slots.at[self._slot[variation]] = variation.window.written

    def _place(self, variation: Variation, slot: int, state: VariationState) -> None:
        """Has the variation stepped in its slot, or by the eager stepper while it mixes prompts."""
        # Known codes: a graph reads those of idle slots too.
        self.slots.at[slot] = variation.window.written
        if state.conditions.mixed:
            self._eager.states[variation] = state
            return
        self._eager.states.pop(variation, None)
        if self.slots.write_text(slot, variation.slot.sequence.text):
            self._graphs.clear()  # they read the old buffers
        self._write_sampling(slot, state)

    def _write_sampling(self, slot: int, state: VariationState) -> None:
        params = state.sampling
        if not state.conditions.guided:  # the slot's second row holds no uncond logits
            params = dataclasses.replace(params, guidance_scale=1.0)
        with torch.inference_mode():
            self.slots.sampling.write(slot, params)

    @torch.inference_mode()
    def release(self, variation: Variation) -> None:
        """Frees the slot of a variation that has ended."""
        self._wait_for_prefills([variation])
        slot = self._slot.pop(variation)
        del self._states[variation]
        self._eager.states.pop(variation, None)
        # The take is still made of them.
        variation.window.columns = variation.window.columns.clone()
        self._free.add(slot)

    def prefill(self, variation: Variation, most_positions: int) -> None:
        """Takes in so much of what is left of its prefix, else of its known columns."""
        with self._beside(variation):
            self._eager.prefill(variation, most_positions)

    @contextlib.contextmanager
    def _beside(self, variation: Variation) -> Iterator[None]:
        """What is launched within runs beside steps that do not know of it, after those before."""
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream(self.decoder.device))
        try:
            with torch.cuda.stream(self.side):
                yield
        finally:  # after an error too: what was launched uses memory that is freed then
            self._prefilled[variation] = done = torch.cuda.Event()
            done.record(self.side)

    def _wait_for_prefills(self, variations: list[Variation]) -> None:
        """Lets what is launched from now on wait for the prefills of these variations."""
        for variation in variations:
            if done := self._prefilled.pop(variation, None):
                torch.cuda.current_stream(self.decoder.device).wait_event(done)

    def steppable(self, variations: list[Variation]) -> list[Variation]:
        """Those that a step need not wait for; all where there is nothing else to step."""
        pending = self._prefilled
        done = [each for each in variations if each not in pending or pending[each].query()]
        return done or variations

    @torch.inference_mode()
    def step(self, variations: list[Variation]) -> None:
        """Writes the next column of every variation."""
        self._wait_for_prefills(variations)
        # The eager stepper first: it may find no memory, and no slot has moved on then.
        if mixing := [each for each in variations if each in self._eager.states]:
            self._eager.step(mixing)
        if captured := [each for each in variations if each not in self._eager.states]:
            self._step_slots(captured)

    def _step_slots(self, variations: list[Variation]) -> None:
        slots = sorted(self._slot[each] for each in variations)
        if slots != self._stepped:
            for slot in {*slots} ^ {*self._stepped}:  # one by one: a list would be sent over, and
                self.slots.ready[slot] = slot in slots  # the host would wait for the device
            self._stepped = slots
        size = _at_least(GRAPH_SIZES, 1 + slots[-1], len(self.slots.at))
        filled = max(each.slot.sequence.filled for each in variations)
        length = _at_least(GRAPH_LENGTHS, 1 + filled, self.room)
        adapters = [(self._slot[each], each.adapter) for each in variations if each.adapter]
        if adapters:  # not captured: every mix of adapters would need a graph
            self._torch_step(size, length, adapters)
        else:
            self._graph(size, 0 if self.triton else length)()
        for variation in variations:
            variation.slot.sequence.length += 1
        self._limit_steps_ahead()

    def _limit_steps_ahead(self) -> None:
        """Waits for the device while too many steps are unfinished."""
        if self.decoder.device.type != "cuda":
            return
        full = len(self._launched) == STEPS_AHEAD
        event = self._launched.popleft() if full else torch.cuda.Event()
        if full:
            event.synchronize()
        event.record(torch.cuda.current_stream(self.decoder.device))
        self._launched.append(event)

    def _graph(self, size: int, length: int) -> Callable[[], object]:
        """The step of the first `size` slots; `length` is 0 for Triton's."""
        if length:
            step = functools.partial(self._torch_step, size, length)
        else:
            assert self.triton
            step = functools.partial(self.triton, size)
        if not self.capture:
            return step
        key = (size, length)
        if key not in self._graphs:
            self._graphs[key] = self._captured(step)
        return self._graphs[key]

    def _captured(self, step: Callable[[], None]) -> Callable[[], object]:
        """Runs the step once on another stream, as capture requires, then captures it.

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
        """Captures the graphs of a single variation, so that the first one does not wait for them.

        Triton compiles its kernels here. Where it cannot, since there is no C compiler or the
        device is too old for it, every step is plain torch from now on.
        """
        if self.triton:
            try:
                self._graph(1, 0)()
                self.slots.at.zero_()
            except Exception as error:
                if faults.of_the_device(error) or faults.out_of_memory(error):
                    raise
                log.warning("Triton's kernels do not run here; using torch's", exc_info=error)
                self.triton = None
                self._graphs.clear()
        if self.capture and not self.triton:
            for length in sorted({min(length, self.room) for length in GRAPH_LENGTHS}):
                self._graph(1, length)

    def _torch_step(
        self, size: int, length: int, adapters: Sequence[tuple[int, AppliedAdapter]] = ()
    ) -> None:
        """One step of the slots 0 to `size`: reads and writes the buffers and nothing else.

        Args:
            size: slots.
            length: positions that attention reads.
            adapters: of some slots.
        """
        slot_adapters = RowAdapters([(slice(slot, slot + 1), each) for slot, each in adapters])
        row_adapters = RowAdapters(
            [(slice(ROWS * slot, ROWS * (slot + 1)), each) for slot, each in adapters]
        )
        decoder, buffers = self.decoder, self.slots
        at = buffers.at[:size]
        positions = at + buffers.prefix[:size]
        slots = torch.arange(size, device=decoder.device)
        rows = torch.arange(ROWS * size, device=decoder.device)
        row_positions = positions.repeat_interleave(ROWS)
        filled = torch.arange(length, device=decoder.device) <= row_positions[:, None]

        def attend_self(index: int, qkv: Tensor) -> Tensor:
            q, k, v = qkv.view(-1, 3, decoder.heads, decoder.head_dim).unbind(1)
            cache = buffers.caches[index]
            cache.write((rows, slice(None), row_positions), k, v)
            keys, values = cache.read(slice(len(rows)), length)
            return _attend(q, keys, values, filled)  # filled: [rows, length]

        def attend_text(index: int, query: Tensor) -> Tensor:
            q = query.view(-1, decoder.heads, decoder.head_dim)
            keys, values = buffers.text[index, :, : len(rows)]
            return _attend(q, keys, values, buffers.text_mask[: len(rows)])

        x = decoder.embed(buffers.columns[slots, :, at], slot_adapters)
        x = (x + decoder.positions[positions]).repeat_interleave(ROWS, 0)
        x = decoder.forward(x, attend_self, attend_text, row_adapters)
        logits = decoder.logits(x, row_adapters)
        cond, uncond = logits.unflatten(0, (size, ROWS)).unbind(1)  # [slots, codebooks, codes]
        params = buffers.sampling.first(size)
        guided = sampling.guide(cond, uncond, params.guidance_scale)
        guided = torch.where(params.guidance_scale == 1, cond, guided)
        drawn = sampling.draw(guided, params, buffers.uniforms[slots, at])
        given, ready = buffers.columns[slots, :, at + 1], buffers.ready[:size]
        buffers.finite[:size] &= (sampling.finite(guided) | ~ready)[:, None]
        unwritten = (given == UNWRITTEN) & ready[:, None]
        buffers.columns[slots, :, at + 1] = torch.where(unwritten, drawn, given)
        at += ready  # a slot that is not ready stands still


def _at_least(sizes: tuple[int, ...], needed: int, most: int) -> int:
    """The least of `sizes` that holds `needed`, and never more than `most`."""
    return min(next((size for size in sizes if size >= needed), most), most)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """[rows, heads, dim] over [rows, heads, positions, dim], masked [rows, positions]."""
    out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask[:, None, None])
    return out.flatten(1)
