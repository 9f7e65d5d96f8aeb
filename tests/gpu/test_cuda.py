"""What only a GPU can show: captured graphs compute what the plain steps do."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from musicgen_ui.engine.batch import Batch
from musicgen_ui.engine.events import Finished
from musicgen_ui.engine.graph import Graphed
from musicgen_ui.engine.worker import stream
from musicgen_ui.request import GenerationRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def make_batch(folder, **options):
    model = MusicgenForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Batch(model, tokenizer, checkpoint="tiny", **options)


def takes(batch, request):
    events = [event for event in stream(batch, request) if isinstance(event, Finished)]
    return sorted(events, key=lambda finished: finished.variation)


@pytest.mark.parametrize("folder_name", ["tiny_mono", "tiny_stereo"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_captured_float32_steps_are_the_cpus(request, folder_name, do_sample):
    folder = request.getfixturevalue(folder_name)
    asked = GenerationRequest(
        "80s rock", duration_s=6, variations=3, seed=5, do_sample=do_sample
    )  # long enough for graphs of two lengths
    captured = make_batch(folder, device="cuda")
    assert isinstance(captured.stepper, Graphed) and captured.stepper.capture
    for ours, theirs in zip(takes(captured, asked), takes(make_batch(folder), asked), strict=True):
        assert abs(ours.clip.samples - theirs.clip.samples).max() < 1e-3


def test_bfloat16_makes_the_same_take_every_time(tiny_mono):
    batch = make_batch(tiny_mono, device="cuda", precision="bfloat16")
    asked = GenerationRequest("80s rock", duration_s=2, seed=5)
    first, second = (takes(batch, asked)[0].clip.samples for _ in range(2))
    assert (first == second).all()


def test_memory_does_not_grow(tiny_mono):
    batch = make_batch(tiny_mono, device="cuda", precision="bfloat16")
    asked = GenerationRequest("80s rock", duration_s=1)
    takes(batch, asked)
    held = torch.cuda.memory_allocated()
    for _ in range(20):
        takes(batch, asked)
    assert torch.cuda.memory_allocated() <= held


def test_captured_steps_are_the_plain_ones_and_can_be_switched_off(tiny_mono):
    """The same function, replayed and run: the same codes for jobs that come and go."""
    asked = GenerationRequest("80s rock", duration_s=3, variations=5, seed=9, top_p=0.9)
    captured, plain = make_batch(tiny_mono, device="cuda"), make_batch(tiny_mono, device="cuda")
    plain.stepper.capture = False
    for ours, theirs in zip(takes(captured, asked), takes(plain, asked), strict=True):
        assert (ours.clip.samples == theirs.clip.samples).all()
    assert captured.stepper._graphs and not plain.stepper._graphs


def test_a_step_never_waits_for_the_device(tiny_mono):
    batch = make_batch(tiny_mono, device="cuda")
    asked = GenerationRequest("80s rock", duration_s=3, seed=5)
    takes(batch, asked)  # captures what it needs
    step = batch.stepper.step

    def strict(jobs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(jobs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    batch.stepper._stepped = []
    warm = iter([True])  # the first step may tell the device which slots are ready
    batch.stepper.step = lambda jobs: step(jobs) if next(warm, False) else strict(jobs)
    assert len(takes(batch, asked)) == 1


def test_other_threads_may_allocate_while_a_graph_is_captured(tiny_mono):
    batch, done = make_batch(tiny_mono, device="cuda"), threading.Event()

    def allocate():
        while not done.is_set():
            torch.empty(1 << 20, device="cuda").cpu()
            torch.cuda.empty_cache()

    other = threading.Thread(target=allocate)
    other.start()
    try:
        assert len(takes(batch, GenerationRequest("80s rock", duration_s=6, variations=3))) == 3
    finally:
        done.set()
        other.join()
