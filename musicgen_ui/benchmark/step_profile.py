"""The kernels of one decoder step of our engine, how long each takes, and the gaps between them.

The steps are those of takes in flight, between two calls of the codec. They are timed first, as a
profiler slows them down, then run again under torch's profiler, which sees the kernels of a
captured graph as well. On a CPU the operations stand in the kernels' place.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from musicgen_ui.benchmark import machine
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.protocol import Chunk, Failed, Finished
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.request import GenerationRequest

STEPS = 10  # that are timed, and as many that are profiled: fewer than between two chunks
LEAST_S = 3.0  # of music, so that it has a middle
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
SHOWN, WIDTH = 40, 100  # kernels, and characters of a name
Total = tuple[str, float, float]  # name, calls a step, µs a step


def measure(batch: Scheduler, request: GenerationRequest, jobs: int, reading_s: float) -> str:
    """A table of the steps of `jobs` takes in their middle.

    Args:
        batch: warm or not, with nothing in flight.
        request: what each take is of, at least `LEAST_S` long.
        jobs: takes at once, at most 8: of more there is always one in the codec.
        reading_s: how long a step takes to read what it must, at the memory's bandwidth.
    """
    for _ in range(2):  # once to warm up: what is captured, and the profiler's own start
        wall_us, recorded = _recorded(batch, request, jobs)
    kernels, calls = _totals(recorded, batch.device.type != "cpu")
    return _text(batch, request, jobs, reading_s * 1e6, wall_us, kernels, calls)


def _recorded(batch: Scheduler, request: GenerationRequest, jobs: int) -> tuple[float, profile]:
    """A step's time in µs and what the profiler saw of some of them; the takes end after it."""
    submitted = [batch.submit(request) for _ in range(jobs)]
    middle_s = request.duration_s / 2
    _step_until_chunk(batch, submitted[-1], middle_s)
    devices.synchronize(batch.device)
    started_s = time.perf_counter()
    for _ in range(STEPS):
        batch.step()
    devices.synchronize(batch.device)
    wall_us = (time.perf_counter() - started_s) / STEPS * 1e6
    _step_until_chunk(batch, submitted[-1], 0.0)
    devices.synchronize(batch.device)
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if batch.device.type == "cuda" else []
    with profile(activities=kinds) as recorded:
        for _ in range(STEPS):
            batch.step()
        devices.synchronize(batch.device)
    for job in submitted:
        job.stop()
    while batch.step():
        pass
    return wall_us, recorded


def _step_until_chunk(batch: Scheduler, job: LoggedJob, at_least_s: float) -> None:
    """Until another chunk of the job has come, and so much of its music."""
    seen = len(job.log)
    while True:
        batch.step()
        events = job.log.so_far()
        for event in events[seen:]:
            if isinstance(event, Failed):
                raise event.error
            assert not isinstance(event, Finished), "the take is too short"
        heard_s = sum(event.clip.duration_s for event in events if isinstance(event, Chunk))
        if heard_s >= at_least_s and any(isinstance(event, Chunk) for event in events[seen:]):
            return
        seen = len(events)


def _totals(recorded: profile, on_device: bool) -> tuple[list[Total], list[Total]]:
    """Of the device's kernels, and of the host's calls that launch them or wait for them."""
    kernels, calls = [], []
    for row in recorded.key_averages():
        on_it = row.device_type != DeviceType.CPU
        if row.key.startswith((*LAUNCHES, *WAITS)) and not on_it:
            calls.append((row.key, row.count / STEPS, row.self_cpu_time_total / STEPS))
        elif on_it and on_device:
            kernels.append((row.key, row.count / STEPS, row.self_device_time_total / STEPS))
        elif not on_device:
            kernels.append((row.key, row.count / STEPS, row.self_cpu_time_total / STEPS))
    kernels.sort(key=lambda total: -total[2])
    return kernels, sorted(calls)


def _text(
    batch: Scheduler,
    request: GenerationRequest,
    jobs: int,
    reading_us: float,
    wall_us: float,
    kernels: list[Total],
    calls: list[Total],
) -> str:
    busy_us, count = sum(us for _, _, us in kernels), sum(n for _, n, _ in kernels)
    what = "kernels" if batch.device.type != "cpu" else "operations"
    lines = [
        machine.name(),
        f"{_device(batch)}, {batch.checkpoint}, {batch.precision}, jobs {jobs}, "
        f"{request.duration_s / 2:g} s into the music",
        f"step       {wall_us:9.1f} µs, {1e6 / wall_us:.0f} steps a second",
        f"{what:10s} {busy_us:9.1f} µs, {count:.0f} a step",
        f"between    {wall_us - busy_us:9.1f} µs, {(wall_us - busy_us) / max(1, count):.2f} each",
        f"reading    {reading_us:9.1f} µs at the least, {reading_us / wall_us:.0%} of the step",
    ]
    if batch.device.type != "cpu" and not kernels:
        lines.append("The profiler saw no kernels: is CUPTI allowed here?")
    of_host = _lines("the host's calls", calls, wall_us)
    return "\n".join([*lines, "", *_lines(what, kernels[:SHOWN], wall_us), "", *of_host, "", ""])


def _lines(heading: str, totals: Iterable[Total], wall_us: float) -> list[str]:
    rows = [
        f"{calls:8.1f} {us:9.1f} {us / wall_us:6.1%}  {name[:WIDTH]}" for name, calls, us in totals
    ]
    return [f"  a step        µs  share  {heading}", *rows]


def _device(batch: Scheduler) -> str:
    return torch.cuda.get_device_name(batch.device) if batch.device.type == "cuda" else "CPU"
