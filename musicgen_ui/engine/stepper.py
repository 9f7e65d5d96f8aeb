"""Steps, operation by operation: every job has a KV cache of its own length, freed when it ends.

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
class JobState:
    """What a stepper keeps of a job, and changes when the job is steered."""

    conditions: Conditions
    sampling: SamplingParams


class EagerStepper:
    """Writes the next column of the jobs that it is given."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.jobs: dict[Variation, JobState] = {}
        self._gathered: tuple[list[SamplingParams], SamplingTensors] | None = None  # last step's

    @property
    def nbytes(self) -> int:
        """Bytes of the jobs' KV caches."""
        return sum(job.slot.sequence.nbytes for job in list(self.jobs))

    def admit(self, job: Variation, conditions: Conditions) -> None:
        """Gives a job, or its next window, a KV cache.

        Its sampling parameters are those of its request until `set_sampling` changes them.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.decoder.device)
        if known := self.jobs.pop(job, None):
            finite = job.slot.finite
            job.slot.sequence.caches.clear()  # before the new one takes memory
        states = conditions.states
        sequence = self.decoder.sequence(states, job.window.positions, adapter=job.adapter)
        job.slot = Slot(sequence, finite)
        params = known.sampling if known else SamplingParams.of(job.request)
        self.jobs[job] = JobState(conditions, params)

    def set_conditions(self, job: Variation, conditions: Conditions) -> None:
        """Conditions the job's columns from the next one on; not for a melody checkpoint.

        Rows may come and go; see `Conditions.sources` for the past of a new one.
        """
        state = self.jobs[job]
        if conditions.names != state.conditions.names:
            sources = conditions.sources(state.conditions)
            self.decoder.change_conditions(job.slot.sequence, conditions.states, sources)
        state.conditions = conditions

    def set_sampling(self, job: Variation, params: SamplingParams) -> None:
        """Draws the job's columns with other parameters from the next one on."""
        self.jobs[job].sampling = params

    def move(self, job: Variation) -> None:
        """Goes on from the window's `written`, which was moved over known columns."""

    def release(self, job: Variation) -> None:
        """Frees the KV cache of a job that has ended."""
        self.jobs.pop(job, None)
        job.slot.sequence.caches.clear()

    @torch.inference_mode()
    def step(self, jobs: list[Variation]) -> None:
        """Writes the next column of every job."""
        params = self._sampling_of(jobs)
        columns = torch.stack([job.window.columns[:, job.window.written] for job in jobs])
        logits = self.decoder.step(columns, [job.slot.sequence for job in jobs])
        cond, uncond = self._cond_and_uncond(logits, jobs)
        logits = sampling.guide(cond, uncond, params.guidance_scale)
        finite = sampling.finite(logits)
        uniform = torch.stack([job.uniforms[job.next_uniform] for job in jobs])
        drawn = sampling.draw(logits, params, uniform)
        for job, codes, is_finite in zip(jobs, drawn, finite, strict=True):
            job.slot.finite &= is_finite
            column = job.window.columns[:, job.window.written + 1]
            column.copy_(torch.where(column == UNWRITTEN, codes, column))

    def _cond_and_uncond(self, logits: Tensor, jobs: list[Variation]) -> tuple[Tensor, Tensor]:
        """The logits of all rows as the cond and uncond logits of each job.

        Where a job is not guided, its uncond logits are its cond logits.
        """
        conditions = [self.jobs[job].conditions for job in jobs]
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

    def _sampling_of(self, jobs: list[Variation]) -> SamplingTensors:
        params = [self.jobs[job].sampling for job in jobs]
        if self._gathered is None or self._gathered[0] != params:
            size, device = self.decoder.codebook_size, self.decoder.device
            self._gathered = (params, SamplingTensors.of(params, size, device))
        return self._gathered[1]
