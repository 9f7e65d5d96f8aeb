"""The lines that CUDA runs, on tensors without numbers: devices, types and shapes go together.

torch's "meta" device stands for the card. Streams and graphs do nothing, so what is captured is run
once. Kernels written in Triton, the order of work on several streams and what needs numbers are
left to a card.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from musicgen_ui.benchmark import runners
from musicgen_ui.engine import code_window, codec, cuda_graph
from musicgen_ui.engine.protocol import Chunk, Finished
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import PIANO, ROCK, noise, stream
from tests.helpers.melody import SCALE, melody_batch

CPU_KERNELS = "musicgen_ui.engine.cpu"


class Nothing:
    """Stands for a stream, an event, a graph: takes every call."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.replayed = 0

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def replay(self) -> None:
        self.replayed += 1

    def query(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Nothing]:
    """Makes of "meta" a card that captures; the graphs that were."""

    made: list[Nothing] = []

    def graph() -> Nothing:
        made.append(Nothing())
        return made[-1]

    for name in ("Stream", "stream", "device", "graph", "current_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    for module in (codec, cuda_graph):
        monkeypatch.setattr(module, "side_stream", Nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    for name in {CPU_KERNELS, *(n for n in sys.modules if n.startswith(CPU_KERNELS))}:
        monkeypatch.setitem(sys.modules, name, None)  # none may be imported
    there = torch.Tensor.cpu, torch.Tensor.__bool__, torch.Tensor.to

    def to(tensor: torch.Tensor, *where: Any, **options: Any) -> torch.Tensor:
        if tensor.is_meta and where == ("cpu",):
            return cpu(tensor)
        return there[2](tensor, *where, **options)

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return there[0](tensor)
        made = torch.ones if tensor.dtype == torch.bool else torch.zeros  # what is asked is so
        return made(tensor.shape, dtype=tensor.dtype, device="cpu")

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: t.is_meta or there[1](t))
    return made


def on_card(batch: Scheduler) -> Scheduler:
    """Captured as on CUDA."""
    batch.stepper.capture = True  # type: ignore[union-attr]
    batch.stepper.warm_up()  # type: ignore[union-attr]
    return batch


@pytest.mark.parametrize(
    ("precision", "kv_cache_dtype"),
    [("float32", "auto"), ("bfloat16", "auto"), ("float16", "int8")],
)
def test_cuda_lines_make_music_on_meta_tensors(precision, kv_cache_dtype, graphs, monkeypatch):
    """An audio prompt, sections, further windows, neighbours that come and go."""
    monkeypatch.setattr(code_window, "WINDOW_S", 2.0)
    monkeypatch.setattr(cuda_graph, "FIRST_ROOM", 80)  # a window of the long take has more
    made = runners.RandomWeights("tiny").loaded("cpu", torch.float32)
    place = {"device": "meta", "precision": precision, "max_jobs": 3}
    place["kv_cache_dtype"] = kv_cache_dtype
    batch = on_card(Scheduler(made.model, made.tokenizer, checkpoint="tiny", graphs=True, **place))
    captured = len(graphs)
    assert captured
    request = GenerationRequest(
        ROCK, duration_s=0.8, audio_prompt=noise(0.5), sections=[(0.3, PIANO)], variations=2
    )
    kinds = [type(event) for event in stream(batch, request)]
    assert kinds.count(Finished) == 2 and kinds.count(Chunk) >= 2
    long = GenerationRequest("", duration_s=3, overlap_s=1, top_p=0.9, negative_prompt=PIANO)
    (take,) = [event for event in stream(batch, long) if isinstance(event, Finished)]
    assert take.clip.samples.shape == (1, 3 * 32_000) and not take.fault
    assert batch.stepper.room == 256
    assert len(graphs) > captured and all(graph.replayed for graph in graphs[captured:])
    batch.free_model()


def test_cuda_lines_follow_a_melody_on_meta_tensors(tiny_melody, graphs):
    batch = on_card(melody_batch(tiny_melody, device="meta", graphs=True, precision="bfloat16"))
    request = GenerationRequest(ROCK, melody=SCALE, duration_s=0.6)
    for asked in (request, dataclasses.replace(request, melody=None, guidance_scale=1.0)):
        *_, take = stream(batch, asked)
        assert isinstance(take, Finished) and not take.fault
    assert np.isfinite(take.clip.samples).all()


def test_tensor_on_another_device_is_found(graphs):
    made = runners.RandomWeights("tiny").loaded("cpu", torch.float32)
    batch = Scheduler(made.model, made.tokenizer, checkpoint="tiny", device="meta", graphs=True)
    batch.decoder.norm.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="meta"):
        list(stream(batch, GenerationRequest(ROCK, duration_s=0.5)))
