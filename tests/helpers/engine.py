"""Batches of jobs on tiny checkpoints, and the same through transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    MusicgenForConditionalGeneration,
)

from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine import delay_pattern
from musicgen_ui.engine.cpu.codec_kernels import Convolution16
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.linear import Linear
from musicgen_ui.engine.protocol import Event, Failed, Finished
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.engine.variation import Variation
from musicgen_ui.engine.worker import Worker
from musicgen_ui.request import GenerationRequest

ROCK = "80s rock with drums and bass"


PIANO = "slow piano"


def load(folder: Path) -> MusicgenForConditionalGeneration:
    return MusicgenForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def make_batch(folder: Path, **options: object) -> Scheduler:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Scheduler(load(folder), tokenizer, checkpoint=folder.name, **options)


def noise(duration_s: float, channels: int = 1, seed: int = 0) -> Clip:
    samples = np.random.default_rng(seed).normal(0, 0.2, (channels, round(32000 * duration_s)))
    return Clip(samples.astype(np.float32), 32000)


def submit(
    scheduler: Scheduler,
    request: GenerationRequest,
    deliver: Callable[[Event | Exception], object],
) -> LoggedJob:
    """Submits a request; every event is delivered as it comes, a failure as its error."""
    job = LoggedJob(request)
    append = job.log.append

    def append_and_deliver(event: Event) -> None:
        append(event)
        deliver(event.error if isinstance(event, Failed) else event)

    job.log.append = append_and_deliver  # type: ignore[method-assign]
    scheduler.add(job, scheduler.encode(job.request))
    return job


def stream(
    scheduler: Scheduler, request: GenerationRequest, stop: threading.Event | None = None
) -> Iterator[Event]:
    """The events of a request on a scheduler that nothing else steps; raises its failure."""
    job = scheduler.submit(request)

    def step() -> None:
        if stop and stop.is_set():
            job.stop()
        scheduler.poll()

    try:
        for event in job.follow(poll=step):
            if isinstance(event, Failed):
                raise event.error
            yield event
    finally:
        job.stop()
        scheduler.poll()


def listen(worker: Worker, request: GenerationRequest) -> list[Event | Exception]:
    """The events of a request to a worker, a failure as its error."""
    job = LoggedJob(request)
    try:
        worker.add(job)
    except Exception as error:
        return [error]
    return [e.error if isinstance(e, Failed) else e for e in job.follow()]


def run_job(
    batch: Scheduler, request: GenerationRequest
) -> tuple[Variation, torch.Tensor, Finished]:
    """The finished job, its codes [codebooks, frames] and its take."""
    events: list[Event | Exception] = []
    submit(batch, request, events.append)
    batch.step()
    (job,) = batch.running
    while batch.running:
        batch.step()
    assert isinstance(events[-1], Finished), events[-1]
    codes = delay_pattern.undelayed(job.window.columns, 0, job.window.frames, batch.codec.channels)
    return job, codes, events[-1]


def generated(
    model: MusicgenForConditionalGeneration,
    folder: Path,
    prompts: list[str],
    frames: int,
    guidance_scale: float,
    clip: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' greedy codes [prompts, codebooks, frames] and audio."""
    inputs = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    if clip is not None:
        inputs["input_values"] = torch.from_numpy(clip)[None].repeat(len(prompts), 1, 1)
    inputs = inputs.to(model.device)
    seen, decode = [], model.audio_encoder.decode

    def spy(codes: torch.Tensor, **kwargs: object) -> object:
        seen.append(codes[0])
        return decode(codes, **kwargs)

    model.audio_encoder.decode = spy
    try:
        audio = model.generate(
            **inputs,
            do_sample=False,
            guidance_scale=guidance_scale,
            max_new_tokens=frames + 3,
        )
    finally:
        model.audio_encoder.decode = decode
    codes = seen[0] if len(seen) == 1 else torch.stack(seen, 2).flatten(1, 2)
    return codes, audio


def beside(
    batch: Scheduler, request: GenerationRequest, others: list[GenerationRequest]
) -> Variation:
    """The job of `request` when three others run too; two begin before it, one after it."""
    events: list[Event | Exception] = []
    submit(batch, others[0], events.append)
    for _ in range(5):
        batch.step()
    submit(batch, others[1], events.append)
    submit(batch, request, events.append)
    batch.step(), batch.step()
    job = next(job for job in batch.running if job.request.seed == request.seed)
    submit(batch, others[2], events.append)
    while batch.step():
        pass
    assert sum(isinstance(event, Finished) for event in events) == 4
    return job


def run(
    batch: Scheduler, request: GenerationRequest
) -> tuple[dict[int, torch.Tensor], Finished, Variation]:
    """The codes of each window by its first frame, the take and its job."""
    events: list[Event | Exception] = []
    submit(batch, request, events.append)
    batch.step()
    (job,) = batch.running
    windows = {}
    while batch.running:
        batch.step()
        windows[job.window.start] = codes_of(job)
    assert isinstance(events[-1], Finished), events[-1]
    return windows, events[-1], job


def codes_of(job: Variation) -> torch.Tensor:
    return delay_pattern.undelayed(
        job.window.columns, 0, job.window.window_frames, job._codec.channels
    )


def whole(windows: dict[int, torch.Tensor]) -> torch.Tensor:
    """All codes of the piece, from windows that overlap."""
    codes = torch.zeros_like(windows[0][:, :0])
    for start, window in windows.items():
        codes = torch.cat([codes[:, :start], window], dim=1)
    return codes


CPU = torch.device("cpu")


def made_in_whole_numbers():
    generator = torch.Generator().manual_seed(0)
    drawn = partial(torch.randn, generator=generator)
    product, convolution = (
        Linear(drawn(72, 66), "int8", CPU),
        Convolution16(drawn(48, 32, 3), drawn(48), elu=False),  # which would round otherwise
    )
    found = [product(drawn(rows, 66)) for rows in (1, 2, 9)] + [convolution(drawn(1, 70, 32))]
    return [each.numpy() for each in found]
