"""Steps, operation by operation: each job has a cache of its own length, freed when it ends.

The way of CPUs and of Apple's GPUs, where a step takes far longer than telling the device what to
do, and reading no more of the caches than is filled saves most. `graph` is CUDA's way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from musicgen_ui.engine import sampling
from musicgen_ui.engine.delay_pattern import UNWRITTEN
from musicgen_ui.engine.job import Job
from musicgen_ui.engine.transformer import Decoder


class Eager:
    """Writes the next column of the jobs that it is given."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._jobs: set[Job] = set()
        self._settings: tuple[list[Job], sampling.Settings] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the jobs' caches."""
        return sum(job.sequence.nbytes for job in list(self._jobs))

    def admit(self, job: Job, conditions: list[Tensor | None]) -> None:
        """Gives the job, or its new window, a place; `conditions` as for `Decoder.sequence`."""
        if job in self._jobs:
            self.release(job)
        job.sequence = self.decoder.sequence(conditions, job.positions, worn=job.worn)
        self._jobs.add(job)

    @torch.inference_mode()
    def tell(self, job: Job, conditions: list[Tensor | None]) -> None:
        """Lets the job attend to other states from its next column on."""
        job.sequence.text = [self.decoder.text_memory(states, job.worn) for states in conditions]

    def release(self, job: Job) -> None:
        """Frees the cache of a job that has ended."""
        self._jobs.discard(job)
        job.sequence.caches.clear()

    @torch.inference_mode()
    def step(self, jobs: list[Job]) -> None:
        """Writes the next column of every job."""
        settings = self._settings_of(jobs)
        columns = torch.stack([job.columns[:, job.written] for job in jobs])
        logits = self.decoder.step(columns, [job.sequence for job in jobs])
        wanted, unwanted, row = [], [], 0
        for job in jobs:  # an unguided job has a single row, which stands for both
            wanted.append(row)
            row += job.sequence.rows
            unwanted.append(row - 1)
        logits = sampling.guide(logits[wanted], logits[unwanted], settings.guidance_scale)
        finite = sampling.finite(logits)
        uniform = torch.stack([job.uniforms[job.next_uniform] for job in jobs])
        drawn = sampling.draw(logits, settings, uniform)
        for job, codes, sane in zip(jobs, drawn, finite, strict=True):
            job.sane &= sane
            column = job.columns[:, job.written + 1]
            column.copy_(torch.where(column == UNWRITTEN, codes, column))

    def _settings_of(self, jobs: list[Job]) -> sampling.Settings:
        if self._settings is None or self._settings[0] != jobs:
            requests = [job.request for job in jobs]
            made = sampling.Settings.of(requests, self.decoder.codebook_size, self.decoder.device)
            self._settings = (jobs, made)
        return self._settings[1]
