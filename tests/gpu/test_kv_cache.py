"""What a GPU must show of KV caches in 8 bits and of those that grow, and of a take's start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from musicgen_ui.engine import cuda_graph
from musicgen_ui.engine.cuda_graph import CudaGraphStepper
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import PIANO, ROCK, codes_of, noise, run_job, submit

pytestmark = pytest.mark.gpu

GREEDY = GenerationRequest(ROCK, audio_prompt=noise(1.0), duration_s=0.5, do_sample=False)
FIRST = 2  # frames, until a rounding may move a code


def codes(batch: Scheduler, request: GenerationRequest) -> torch.Tensor:
    return run_job(batch, request)[1].cpu()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_8_bit_cache_makes_the_same_take_every_time(tiny_mono, make, precision):
    batch = make(tiny_mono, precision=precision, kv_cache_dtype="int8")
    asked = GenerationRequest(ROCK, audio_prompt=noise(1.0), duration_s=2, seed=5)
    first, second = (codes(batch, asked) for _ in range(2))
    assert torch.equal(first, second) and len(first.unique()) > 10


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("plain", ["torch", "cpu"])
def test_steps_with_an_8_bit_cache_equal_plain_ones(tiny_mono, make, device, plain, jobs):
    """Captured, alone and with many rows."""
    captured = make(tiny_mono, kv_cache_dtype="int8", max_jobs=jobs)
    other = make(tiny_mono, kv_cache_dtype="int8", device="cpu" if plain == "cpu" else device)
    if plain == "torch":
        other.stepper = CudaGraphStepper(other.decoder, other.max_jobs, triton=False)
    expected = codes(other, GREEDY)
    for _ in range(jobs):
        submit(captured, GREEDY, lambda event: None)
    while len(captured.running) < jobs:
        captured.step()
    running = list(captured.running)
    while captured.step():
        pass
    context = running[0].window.context_frames
    for job in running:
        assert torch.equal(
            codes_of(job).cpu()[:, : context + FIRST], expected[:, : context + FIRST]
        )


def test_kv_caches_grow_while_a_graph_runs(tiny_mono, make, monkeypatch):
    short = GenerationRequest(ROCK, duration_s=1.0, seed=1)
    long = GenerationRequest(PIANO, audio_prompt=noise(1.0), duration_s=1.0, seed=2)
    expected = [codes(make(tiny_mono), request) for request in (short, long)]
    monkeypatch.setattr(cuda_graph, "FIRST_ROOM", 64)
    batch = make(tiny_mono)
    submit(batch, short, lambda event: None)
    for _ in range(20):
        batch.step()
    assert batch.stepper.room == 64
    submit(batch, long, lambda event: None)
    batch.step()
    running = list(batch.running)
    while batch.step():
        pass
    assert batch.stepper.room > 64
    for job, alone in zip(running, expected, strict=True):
        assert torch.equal(codes_of(job).cpu(), alone)


@pytest.mark.cuda_alone
def test_a_start_never_waits_for_the_device(tiny_mono, make):
    """Beside a take that runs: neither the admission nor the prefill."""
    batch = make(tiny_mono, max_jobs=2)
    request = GenerationRequest(PIANO, audio_prompt=noise(3.0), duration_s=0.5, seed=2)
    begun = []

    def strict(name: str) -> None:
        plain: Callable[..., Any] = getattr(batch, name)

        def checked() -> None:
            torch.cuda.set_sync_debug_mode("error" if len(batch.running) > 0 else "default")
            try:
                plain()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            begun.append(name)

        setattr(batch, name, checked)

    for _ in range(2):  # the first captures what the second needs
        submit(batch, GenerationRequest(ROCK, duration_s=2.0, seed=1), lambda event: None)
        for _ in range(10):
            batch.step()
        submit(batch, request, lambda event: None)
        while batch.step():
            pass
        if not begun:
            strict("_admit"), strict("_prefill")
    assert begun
