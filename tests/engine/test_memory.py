"""Memory: weights are held once, nothing grows with the jobs, unloading gives all of it back."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch
from torch import Tensor

from musicgen_ui.backends.local import LocalBackend, load_scheduler
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.protocol import Event, Finished
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import submit


def tensors() -> dict[int, Tensor]:
    """Every tensor alive, by its memory."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return {each.untyped_storage().data_ptr() if each.layout == torch.strided else id(each): each
            for each in found}  # fmt: skip


def load(folder, precision: str, max_jobs: int = 8) -> Scheduler:
    source = Source(str(folder), folder)
    return load_scheduler(source, devices.choose("cpu", precision), max_jobs, lambda note: None)


def run(batch: Scheduler, jobs: int) -> list[Finished]:
    events: list[Event | Exception] = []
    for seed in range(jobs):
        request = GenerationRequest("80s rock", duration_s=0.5, seed=seed)
        submit(batch, request, events.append)
    while batch.step():
        pass
    return [event for event in events if isinstance(event, Finished)]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_weights_are_held_once(tiny_mono, precision):
    before = set(tensors())
    batch = load(tiny_mono, precision)
    new = sum(each.nbytes for at, each in tensors().items() if at not in before)
    counted = batch.nbytes + batch.decoder.positions.nbytes
    if precision == "int8":  # those weights lie in numpy's arrays
        layers = batch.decoder.layers
        products = [p for each in layers for p in (each.qkv, each.self_out, each.up, each.down)]
        counted -= sum(product.nbytes for product in products)
    assert new <= 1.02 * counted


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_hundred_jobs_leave_nothing_behind(tiny_mono, precision):
    batch, process = load(tiny_mono, precision), psutil.Process()
    assert len(run(batch, 50)) == 50  # pools and arenas fill up
    devices.give_memory_back()
    held, kept, rss = batch.nbytes, len(tensors()), process.memory_info().rss
    assert len(run(batch, 100)) == 100
    devices.give_memory_back()
    assert (batch.nbytes, len(tensors())) == (held, kept)
    assert process.memory_info().rss - rss < 4_000_000  # a take each would be 6.4 MB


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_unload_gives_everything_back(tiny_mono, precision):
    before = set(tensors())
    manager = LocalBackend(device="cpu", precision=precision)
    with manager.use(str(tiny_mono)) as batch:
        run(batch, 3)
    del batch
    assert set(tensors()) - before
    manager.unload()
    manager.close()
    left = [each.shape for at, each in tensors().items() if at not in before]
    assert not left
