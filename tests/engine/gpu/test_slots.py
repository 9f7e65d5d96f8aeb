"""The buffers of a captured step: room for the longest job so far, and 8 bits in place of 16."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from musicgen_ui.engine import cuda_graph, device
from musicgen_ui.engine.cuda_graph import CudaGraphStepper
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import PIANO, ROCK, codes_of, make_batch, noise, run_job, submit

SHORT = GenerationRequest(ROCK, duration_s=0.3, seed=1)  # 18 positions
LONG = GenerationRequest(PIANO, audio_prompt=noise(0.4), duration_s=0.4, seed=2)  # 43


def test_kv_caches_grow_while_jobs_run(tiny_mono, monkeypatch):
    expected = [codes_of(run_job(make_batch(tiny_mono, graphs=True), r)[0]) for r in (SHORT, LONG)]
    monkeypatch.setattr(cuda_graph, "FIRST_ROOM", 20)
    batch = make_batch(tiny_mono, graphs=True)
    before, ends = batch.nbytes, []
    submit(batch, SHORT, ends.append)
    for _ in range(5):
        batch.step()
    (short,) = batch.running
    assert batch.stepper.room == 20
    submit(batch, LONG, ends.append)
    batch.step()
    _, long = batch.running
    while batch.step():
        pass
    assert batch.stepper.room == 256 and batch.nbytes > before
    for job, codes in zip((short, long), expected, strict=True):
        assert torch.equal(codes_of(job), codes)
    assert sum(isinstance(event, Finished) for event in ends) == 2


def test_caches_that_find_no_memory_to_grow_cost_the_running_job_nothing(tiny_mono, monkeypatch):
    expected = codes_of(run_job(make_batch(tiny_mono, graphs=True), SHORT)[0])
    monkeypatch.setattr(cuda_graph, "FIRST_ROOM", 20)
    batch, ends = make_batch(tiny_mono, graphs=True, max_jobs=2), []
    submit(batch, SHORT, ends.append)
    for _ in range(5):
        batch.step()
    (short,) = batch.running
    last = batch.stepper.slots.caches[-1]
    lengthen, refused = last.lengthen, []

    def full(positions: int) -> None:
        if not refused:
            refused.append(positions)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        lengthen(positions)

    monkeypatch.setattr(last, "lengthen", full)
    submit(batch, LONG, ends.append)
    while batch.step():
        pass
    assert refused == [256] and torch.equal(codes_of(short), expected)
    assert sum(isinstance(event, Finished) and not event.fault for event in ends) == 2


@pytest.mark.parametrize("graphs", [False, True])
def test_jobs_with_an_8_bit_cache_are_alike_alone_and_beside_others(tiny_mono, graphs):
    """An audio prompt, sections whose text changes, two prompts in a mix: all in 8 bits."""
    batch = make_batch(tiny_mono, graphs=graphs, max_jobs=3, kv_cache_dtype="int8")
    requests = [
        LONG,
        GenerationRequest(ROCK, sections=[(0.1, PIANO)], duration_s=0.3, do_sample=False),
        dataclasses.replace(SHORT, guidance_scale=1.0),
    ]
    expected = [codes_of(run_job(batch, request)[0]) for request in requests]
    for request in requests:
        submit(batch, request, lambda event: None)
        batch.step()
    jobs = list(batch.running)
    while batch.step():
        pass
    for job, codes in zip(jobs, expected, strict=True):
        assert torch.equal(codes_of(job), codes)


def test_8_bit_cache_takes_little_more_than_half_of_the_bytes(tiny_mono):
    sizes = {}
    for kind in ("auto", "int8"):
        batch = make_batch(tiny_mono, graphs=True, precision="bfloat16", kv_cache_dtype=kind)
        decoder = batch.decoder
        slot = CudaGraphStepper.slot_nbytes(decoder)
        held = sum(cache.nbytes for cache in batch.stepper.slots.caches)
        rows = cuda_graph.ROWS * batch.max_jobs * batch.stepper.room
        assert held == rows * decoder.kv_position_nbytes
        sizes[kind] = held, slot
        head = decoder.head_dim
    assert sizes["int8"][0] / sizes["auto"][0] == (head + 4) / (2 * head)
    assert sizes["int8"][1] < sizes["auto"][1]


def test_text_encoder_takes_up_bfloat16_and_not_float16(tiny_mono):
    states = {
        precision: make_batch(tiny_mono, precision=precision).conditioner.states(ROCK, None)
        for precision in ("float32", "bfloat16", "float16")
    }
    assert [each.dtype for each in states.values()] == [
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ]
    exact, half = states["float32"], states["bfloat16"].float()
    assert (half - exact).norm() / exact.norm() < 0.02


def test_unknown_type_of_the_kv_cache_is_refused():
    with pytest.raises(RequestError, match="auto, int8"):
        device.choose("cpu", "float32", "int4")
    assert device.choose("cpu", "float32", "int8").kv_cache_dtype == "int8"
