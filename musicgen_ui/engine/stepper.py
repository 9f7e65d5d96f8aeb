"""Steps, operation by operation: a variation's KV cache has its own length, freed when it ends.

This is the stepper of CPUs and of Apple's GPUs. A step takes them far longer than the host needs to
issue its operations, so what saves most is to read no more of the KV cache than is filled. CUDA has
`cuda_graph.CudaGraphStepper`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_ui.engine import sampling
from musicgen_ui.engine.conditioning import Conditions
from musicgen_ui.engine.delay_pattern import UNWRITTEN
from musicgen_ui.engine.sampling import SamplingParams, SamplingTensors
from musicgen_ui.engine.transformer import Decoder
from musicgen_ui.engine.variation import Slot, Variation


@dataclass
class VariationState:
    """What a stepper keeps of a variation, and changes when the variation is steered."""

    conditions: Conditions
    sampling: SamplingParams


class EagerStepper:
    """Writes the next column of the variations that it is given."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.side = None  # there is nothing beside the steps
        self.states: dict[Variation, VariationState] = {}
        self._gathered: tuple[list[SamplingParams], SamplingTensors] | None = None  # last step's

    @property
    def nbytes(self) -> int:
        """Bytes of the variations' KV caches."""
        return sum(each.slot.sequence.nbytes for each in list(self.states))

    def admit(self, variation: Variation, conditions: Conditions) -> None:
        """Gives a variation, or its next window, a KV cache.

        Its sampling parameters are those of its request until `set_sampling` changes them.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.decoder.device)
        if known := self.states.pop(variation, None):
            finite = variation.slot.finite
            variation.slot.sequence.caches.clear()  # before the new one takes memory
        positions, adapter = variation.window.positions, variation.adapter
        sequence = self.decoder.sequence(conditions.states, positions, adapter=adapter)
        variation.slot = Slot(sequence, finite)
        params = known.sampling if known else SamplingParams.of(variation.request)
        self.states[variation] = VariationState(conditions, params)

    def set_conditions(self, variation: Variation, conditions: Conditions) -> None:
        """Conditions the variation's columns from the next one on; not for a melody checkpoint.

        Rows may come and go; see `Conditions.sources` for the past of a new one.
        """
        state = self.states[variation]
        if conditions.names != state.conditions.names:
            sources = conditions.sources(state.conditions)
            self.decoder.change_conditions(variation.slot.sequence, conditions.states, sources)
        state.conditions = conditions

    def set_sampling(self, variation: Variation, params: SamplingParams) -> None:
        """Draws the variation's columns with other parameters from the next one on."""
        self.states[variation].sampling = params

    def move(self, variation: Variation) -> None:
        """Goes on from the window's `written`, which was moved over known columns."""

    def release(self, variation: Variation) -> None:
        """Frees the KV cache of a variation that has ended."""
        self.states.pop(variation, None)
        variation.slot.sequence.caches.clear()

    def prefill(self, variation: Variation, most_positions: int) -> None:
        """Takes in so much of what is left of its prefix, else of its known columns."""
        window = variation.window
        known = window.columns[:, : window.written]
        self.decoder.prefill(variation.slot.sequence, known, most_positions)

    def steppable(self, variations: list[Variation]) -> list[Variation]:
        """Those that a step need not wait for."""
        return variations

    @torch.inference_mode()
    def step(self, variations: list[Variation]) -> None:
        """Writes the next column of every variation."""
        params = self._sampling_of(variations)
        columns = torch.stack([each.window.columns[:, each.window.written] for each in variations])
        logits = self.decoder.step(columns, [each.slot.sequence for each in variations])
        cond, uncond = self._cond_and_uncond(logits, variations)
        logits = sampling.guide(cond, uncond, params.guidance_scale)
        finite = sampling.finite(logits)
        uniform = torch.stack([each.uniforms[each.next_uniform] for each in variations])
        drawn = sampling.draw(logits, params, uniform)
        for variation, codes, is_finite in zip(variations, drawn, finite, strict=True):
            variation.slot.finite &= is_finite
            column = variation.window.columns[:, variation.window.written + 1]
            column.copy_(torch.where(column == UNWRITTEN, codes, column))

    def _cond_and_uncond(
        self, logits: Tensor, variations: list[Variation]
    ) -> tuple[Tensor, Tensor]:
        """The logits of all rows as the cond and uncond logits of each variation.

        Where a variation is not guided, its uncond logits are its cond logits.
        """
        conditions = [self.states[each].conditions for each in variations]
        first, last, row = [], [], 0
        for each in conditions:
            first.append(row)
            row += len(each.states)
            last.append(row - 1)
        cond, uncond = logits[first], logits[last]
        for index, each in enumerate(conditions):
            if each.mixed:
                rows = slice(first[index], first[index] + len(each.prompts))
                cond[index] = sampling.mix(logits[rows], each.weights)
                if not each.guided:
                    uncond[index] = cond[index]
        return cond, uncond

    def _sampling_of(self, variations: list[Variation]) -> SamplingTensors:
        params = [self.states[each].sampling for each in variations]
        if self._gathered is None or self._gathered[0] != params:
            size, device = self.decoder.codebook_size, self.decoder.device
            self._gathered = (params, SamplingTensors.of(params, size, device))
        return self._gathered[1]
