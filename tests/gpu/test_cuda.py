"""What a GPU must show: the music is that of transformers and of a job alone, whatever runs beside
it, and a fault costs no more than what broke."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MusicgenMelodyForConditionalGeneration

from musicgen_ui.engine import code_window, delay_pattern, faults
from musicgen_ui.engine.cuda_graph import CudaGraphStepper
from musicgen_ui.engine.protocol import Chunk, Finished
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.errors import Fault
from musicgen_ui.request import GenerationRequest
from tests.helpers import long_takes, lora, sections, tiny
from tests.helpers.engine import PIANO, ROCK, generated, noise, run, run_job, stream, submit
from tests.helpers.melody import DOWN, SCALE

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
CLOSE = 1e-4  # of audio, full scale 1: rounding in the codec; another code changes far more


class Caller:
    """Submits a request and keeps what comes back."""

    def __init__(self, batch: Scheduler, request: GenerationRequest) -> None:
        self.request, self.events = request, []
        self.job = submit(batch, request, self.events.append)

    @property
    def heard(self) -> bool:
        return any(isinstance(event, Chunk) for event in self.events)

    @property
    def samples(self) -> np.ndarray:
        """Of the take, which nothing broke off."""
        assert isinstance(self.events[-1], Finished), self.events[-1]
        assert not self.events[-1].fault, self.events[-1].fault
        return self.events[-1].clip.samples


def finish(batch: Scheduler, until: Callable[[], object] = lambda: False) -> None:
    while not until() and batch.step():
        pass


def alone(batch: Scheduler, request: GenerationRequest) -> np.ndarray:
    caller = Caller(batch, request)
    finish(batch)
    return caller.samples


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and bool(np.abs(found - expected).max() < CLOSE)


def codes_of(batch: Scheduler, request: GenerationRequest) -> torch.Tensor:
    return run_job(batch, request)[1].cpu()


# transformers' `generate`


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("with_clip", [False, True])
def test_greedy_codes_equal_generate(folder, batch, reference, guidance_scale, with_clip):
    clip = noise(0.4, batch.codec.channels) if with_clip else None
    request = GenerationRequest(
        ROCK,
        audio_prompt=clip,
        include_prompt=False,
        duration_s=0.6,
        guidance_scale=guidance_scale,
        do_sample=False,
    )
    _, codes, finished = run_job(batch, request)
    samples = clip.samples if clip else None
    expected, audio = generated(reference, folder, [ROCK], 30, guidance_scale, samples)
    assert len(expected[0].unique()) > 10  # a sequence that says something
    assert torch.equal(codes.cpu(), expected[0].cpu())
    new = audio[0, :, -finished.clip.samples.shape[1] :].cpu().numpy()
    assert same(finished.clip.samples, new)


def test_long_audio_prompt_equals_generate(folder, batch, reference):
    """Taken in by pieces, and beyond the shortest graph."""
    clip = noise(6.0, batch.codec.channels)
    request = GenerationRequest(
        ROCK, audio_prompt=clip, include_prompt=False, duration_s=0.5, do_sample=False
    )
    expected, _ = generated(reference, folder, [ROCK], 25, 3.0, clip.samples)
    assert torch.equal(codes_of(batch, request), expected[0].cpu())


def test_long_text_prompt_equals_generate(folder, batch, reference):
    """More tokens than the buffers had room for, and a short one after it."""
    for prompt in (ROCK + " " + "piano with " * 60, PIANO):
        request = GenerationRequest(prompt, duration_s=0.6, do_sample=False)
        expected, _ = generated(reference, folder, [prompt.strip()], 30, 3.0)
        assert torch.equal(codes_of(batch, request), expected[0].cpu())


@pytest.mark.parametrize("name", ["tiny_melody", "tiny_stereo_melody"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_melody_codes_equal_transformers(request, make, device, name, guidance_scale):
    """Every code is the likeliest one of transformers' decoder after those before it."""
    folder = request.getfixturevalue(name)
    batch, on_cpu = make(folder), make(folder, device="cpu", graphs=False)
    asked = GenerationRequest(
        ROCK, melody=SCALE, duration_s=0.6, guidance_scale=guidance_scale, do_sample=False
    )
    columns = run_job(batch, asked)[0].window.columns
    model = MusicgenMelodyForConditionalGeneration.from_pretrained(folder).eval().to(device)
    logits = []
    for states in on_cpu.conditioner.conditions(asked).states:
        with torch.no_grad():
            heard = states[None].to(device)
            found = model.decoder(columns[:, :-1], encoder_hidden_states=heard).logits
        logits.append(found[:, len(states) :])
    wanted, unwanted = logits[0], logits[-1]
    likeliest = (unwanted + guidance_scale * (wanted - unwanted)).argmax(-1)
    channels = batch.codec.channels
    expected = delay_pattern.undelayed(torch.cat([columns[:, :1], likeliest], 1), 0, 30, channels)
    assert torch.equal(delay_pattern.undelayed(columns, 0, 30, channels), expected)
    assert len(expected.unique()) > 10
    other = codes_of(batch, dataclasses.replace(asked, melody=DOWN))
    assert not torch.equal(other, expected.cpu())


# Captured steps


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers and the codebooks of musicgen-small's width."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    return tiny.build(folder, hidden=1024, heads=16, text_hidden=32, codebook_size=2048)


@pytest.mark.parametrize("plain", ["eager", "uncaptured", "torch", "cpu"])
@pytest.mark.parametrize("name", ["tiny_mono", "tiny_stereo", "tiny_melody", "wide"])
def test_captured_steps_equal_plain_ones(request, make, device, name, plain):
    """Jobs that come and go, long enough for graphs of two lengths."""
    folder = request.getfixturevalue(name)
    quickly = name == "wide" and device == "cpu"
    duration_s = 0.5 if quickly else 5.5
    asked = GenerationRequest(ROCK, duration_s=duration_s, variations=3, seed=9, top_p=0.9)
    captured = make(folder)
    assert isinstance(captured.stepper, CudaGraphStepper)
    other = make(folder, device="cpu" if plain == "cpu" else device, graphs=False)
    if plain == "uncaptured":
        other.stepper = CudaGraphStepper(other.decoder, other.max_jobs, capture=False)
    elif plain == "torch":
        other.stepper = CudaGraphStepper(other.decoder, other.max_jobs, triton=False)
    for ours, theirs in zip(takes(captured, asked), takes(other, asked), strict=True):
        assert same(ours, theirs)


def takes(batch: Scheduler, request: GenerationRequest) -> list[np.ndarray]:
    ends = [event for event in stream(batch, request) if isinstance(event, Finished)]
    return [end.clip.samples for end in sorted(ends, key=lambda end: end.variation)]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_makes_the_same_take_every_time(tiny_mono, make, precision):
    batch = make(tiny_mono, precision=precision)
    asked = GenerationRequest(ROCK, duration_s=2, seed=5)
    first, second = (alone(batch, asked) for _ in range(2))
    assert np.isfinite(first).all() and np.array_equal(first, second)
    assert first.std() > 0.001


def test_half_precision_is_close_to_float32(tiny_mono, make):
    """Over the frames until a rounding first moves a code."""
    asked = GenerationRequest(ROCK, duration_s=0.5, do_sample=False)
    exact = codes_of(make(tiny_mono), asked)
    half = codes_of(make(tiny_mono, precision="bfloat16"), asked)
    assert torch.equal(exact[:, :2], half[:, :2])


@pytest.mark.cuda_alone
def test_a_step_never_waits_for_the_device(tiny_mono, make):
    batch = make(tiny_mono)
    asked = GenerationRequest(ROCK, duration_s=3, seed=5)
    alone(batch, asked)  # captures what it needs
    step, stepped = batch.stepper.step, []

    def strict(jobs):
        stepped.append(len(jobs))
        if len(stepped) == 1:  # the first may tell the device which slots are ready
            step(jobs)
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(jobs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    batch.stepper.step = strict
    alone(batch, asked)
    assert len(stepped) > 100


@pytest.mark.cuda_alone
def test_other_threads_may_allocate_while_a_graph_is_captured(tiny_mono, make):
    batch, done = make(tiny_mono), threading.Event()

    def allocate():
        while not done.is_set():
            torch.empty(1 << 20, device="cuda").cpu()
            torch.cuda.empty_cache()

    other = threading.Thread(target=allocate)
    other.start()
    try:
        assert len(takes(batch, GenerationRequest(ROCK, duration_s=6, variations=3))) == 3
    finally:
        done.set()
        other.join()


@pytest.mark.cuda_alone
def test_memory_does_not_grow(tiny_mono, make):
    batch = make(tiny_mono, precision="bfloat16")
    asked = GenerationRequest(ROCK, duration_s=1, variations=3)
    takes(batch, asked)
    held = torch.cuda.memory_allocated()
    for _ in range(10):
        takes(batch, asked)
    assert torch.cuda.memory_allocated() <= held


# Jobs beside each other


def eight(channels: int) -> list[GenerationRequest]:
    """Jobs of different lengths, settings and pasts."""
    return [
        GenerationRequest(ROCK, duration_s=1.2, seed=1),
        GenerationRequest("", duration_s=2.0, seed=2, temperature=1.3),
        GenerationRequest(PIANO, duration_s=0.5, do_sample=False),
        GenerationRequest(PIANO, duration_s=1.0, seed=4, guidance_scale=1.0, top_k=7),
        GenerationRequest(ROCK, duration_s=0.7, seed=5, top_p=0.6, top_k=0),
        GenerationRequest(ROCK, duration_s=0.8, audio_prompt=noise(3.0, channels), seed=6),
        GenerationRequest(ROCK, negative_prompt=PIANO, duration_s=0.9, do_sample=False, seed=7),
        GenerationRequest(ROCK, sections=[(0.4, PIANO)], duration_s=1.1, seed=8),
    ]


def test_eight_jobs_give_beside_each_other_what_each_gives_alone(batch):
    requests = eight(batch.codec.channels)
    expected = [alone(batch, request) for request in requests]
    callers = []
    for request in requests:
        callers.append(Caller(batch, request))
        for _ in range(3):
            batch.step()
    finish(batch)
    for caller, take in zip(callers, expected, strict=True):
        assert same(caller.samples, take), caller.request
    assert not np.array_equal(expected[0][:, :6400], expected[1][:, :6400])


def test_jobs_come_and_go_while_another_runs(batch):
    """Finished, stopped and left alone: the slots are given to others, the long job goes on."""
    request = GenerationRequest(ROCK, duration_s=4.0, seed=3, top_p=0.9)
    expected = alone(batch, request)
    short = GenerationRequest(PIANO, duration_s=0.5, seed=4)
    briefly = alone(batch, short)
    long = Caller(batch, request)
    batch.step()
    first = [Caller(batch, short) for _ in range(3)]
    stopped, left = (Caller(batch, GenerationRequest(PIANO, duration_s=20)) for _ in range(2))
    finish(batch, lambda: stopped.heard and left.heard)
    stopped.job.stop()
    left.job.stop()
    second = [Caller(batch, short) for _ in range(4)]
    finish(batch)
    assert same(long.samples, expected)
    assert all(same(caller.samples, briefly) for caller in (*first, *second))
    end = stopped.events[-1]
    assert isinstance(end, Finished) and end.stopped and 0 < end.clip.duration_s < 4
    assert not batch.busy


# Adapters, sections, windows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its text encoder is narrower than its decoder, so there is a projection."""
    return tiny.build(tmp_path_factory.mktemp("bases") / "base", text_hidden=24)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora.write(base, tmp_path_factory.mktemp("adapters") / "one")


def test_adapters_equal_pefts_merged_model_beside_other_jobs(base, adapter, make, device):
    batch = make(base)
    batch.adapters.add("one", adapter)
    greedy = GenerationRequest(ROCK, duration_s=0.5, do_sample=False)
    wearing = dataclasses.replace(greedy, adapter="one")
    expected, _ = generated(
        lora.merged(base, adapter).to(device), base, [ROCK], 25, greedy.guidance_scale
    )
    assert torch.equal(codes_of(batch, wearing), expected[0].cpu())
    requests = [
        greedy,
        wearing,
        dataclasses.replace(wearing, adapter_strength=0.3, prompt=PIANO),
        dataclasses.replace(wearing, guidance_scale=1.0),
    ]
    each = [alone(batch, request) for request in requests]
    callers = [Caller(batch, request) for request in requests]
    finish(batch)
    assert all(same(c.samples, take) for c, take in zip(callers, each, strict=True))
    assert not same(each[0], each[1])


@pytest.mark.parametrize("modules", [["q_proj", "lm_heads.1"], ["enc_to_dec_proj"]])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_adapters_in_half_precision(base, make, tmp_path, precision, modules):
    folder = lora.write(base, tmp_path / "adapter", target_modules=modules)
    batch = make(base, precision=precision)
    batch.adapters.add("one", folder)
    request = GenerationRequest(ROCK, duration_s=0.6, do_sample=False, adapter="one")
    first, second = (alone(batch, request) for _ in range(2))
    assert np.array_equal(first, second) and np.isfinite(first).all()
    assert not same(first, alone(batch, dataclasses.replace(request, adapter="")))


def test_sections_are_heard_from_their_frame_on(folder, batch):
    request = GenerationRequest(
        ROCK, sections=[(0.3, PIANO), (0.6, "fast drums")], duration_s=1.0, do_sample=False
    )
    assert torch.equal(codes_of(batch, request), sections.switched(folder, request, 50))


def test_windows_equal_generate(folder, batch, reference, monkeypatch):
    """Each is what `generate` makes of the codes that it begins with."""
    monkeypatch.setattr(code_window, "WINDOW_S", 2.0)
    request = GenerationRequest(ROCK, duration_s=4.0, overlap_s=1.0, do_sample=False)
    windows, _, _ = run(batch, request)
    assert list(windows) == [0, 50, 100]
    known = windows[0][:, :0]
    for window in windows.values():
        if known.shape[1]:
            expected = long_takes.generated(reference, folder, known, window.shape[1])
            assert torch.equal(window.cpu(), expected.cpu())
        known = window[:, -50:]


def test_a_piece_beyond_30_s_equals_one_without_graphs(tiny_mono, make):
    request = GenerationRequest(ROCK, duration_s=31, overlap_s=12, seed=5)
    take = alone(make(tiny_mono), request)
    assert take.shape == (1, 31 * 32_000)
    assert same(take, alone(make(tiny_mono, graphs=False), request))


# Memory


@pytest.mark.parametrize("place", ["admit", "prefill", "step"])
def test_a_job_that_finds_no_memory_costs_the_other_nothing(tiny_mono, make, exhausted, place):
    """It waits until the other one has ended, and begins again."""
    batch = make(tiny_mono, max_jobs=2)
    first = GenerationRequest(ROCK, duration_s=1.0, seed=1)
    second = GenerationRequest(PIANO, audio_prompt=noise(0.5), duration_s=0.5, seed=2)
    expected = [alone(make(tiny_mono), request) for request in (first, second)]
    begin, refused = getattr(batch.stepper, place), []

    def small(*args: Any, **options: Any) -> Any:
        short = len(callers) == 2 and running(batch, 1) and touches(args, 2)
        with exhausted() if short else contextlib.nullcontext():
            try:
                return begin(*args, **options)
            except torch.OutOfMemoryError:
                refused.append(place)
                raise

    callers = [Caller(batch, first)]
    finish(batch, lambda: running(batch, 1))
    for _ in range(3):
        batch.step()
    setattr(batch.stepper, place, small)
    callers.append(Caller(batch, second))
    finish(batch)
    assert refused
    for caller, take in zip(callers, expected, strict=True):
        assert same(caller.samples, take)
    crowd = [Caller(batch, first) for _ in range(2)]  # no place was lost
    finish(batch)
    assert all(same(caller.samples, expected[0]) for caller in crowd)


def running(batch: Scheduler, seed: int) -> bool:
    return any(job.request.seed == seed for job in batch.running)


def touches(args: tuple, seed: int) -> bool:
    """Whether a call of the stepper is about the job of this seed."""
    jobs = args[0] if isinstance(args[0], list) else [args[0]]
    return any(job.request.seed == seed for job in jobs)


def test_a_model_that_finds_no_memory_costs_the_one_in_use_nothing(tiny_mono, make, exhausted):
    batch = make(tiny_mono)
    request = GenerationRequest(ROCK, duration_s=1.0, seed=1)
    expected = alone(batch, request)
    caller = Caller(batch, request)
    for _ in range(20):
        batch.step()
    with pytest.raises(torch.OutOfMemoryError) as caught, exhausted():
        make(tiny_mono)
    assert faults.fault_of(caught.value) is Fault.MEMORY
    finish(batch)
    assert same(caller.samples, expected)
    assert same(alone(make(tiny_mono), request), expected)  # there is room again


# A device that fails

POISONED = """
import sys, time, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tests.helpers.engine import make_batch
from musicgen_ui.engine import faults
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.protocol import Chunk, Failed, Finished, Trouble
from musicgen_ui.engine.worker import Worker
from musicgen_ui.errors import Fault, RequestError
from musicgen_ui.request import GenerationRequest

device, folder = sys.argv[1], Path(sys.argv[2])
made = lambda: make_batch(folder, device=device, graphs=True)
batch = made()
step, heard = batch.stepper.step, []

def poisoned(jobs):
    step(jobs)
    if heard:
        if device == "cpu":
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        torch.zeros(8, device=device)[torch.tensor([99], device=device)].cpu()

def reload():
    if device == "cpu":
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    return made()

def listen(worker, seed):
    job = LoggedJob(GenerationRequest("80s rock", duration_s=3, seed=seed))
    try:
        worker.add(job)
    except RequestError as error:
        return str(error)
    for event in job.follow():
        if isinstance(event, Chunk):
            heard.append(seed)
        elif isinstance(event, Failed):
            return str(event.error)
        elif isinstance(event, Finished):
            return event.fault

def main():
    worker = Worker(batch, reload)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(listen, worker, 1)
        while not heard:
            time.sleep(0.001)
        told = first.result(60), pool.submit(listen, worker, 2).result(60)
        later = pool.submit(listen, worker, 3).result(60)
    names = {
        Fault.DEVICE.sentence: "device", Fault.DEVICE_LOST.sentence: "lost",
        Trouble.DEVICE_LOST: "lost",
    }
    print("told", *(names.get(each, each) for each in (*told, later, worker.trouble)))

batch.stepper.step = poisoned
main()
"""


def test_a_poisoned_context_is_told_to_everybody(tiny_mono, device):
    """A device-side assert ends CUDA for the process: all are told, and the app must restart."""
    command = [sys.executable, "-c", POISONED, device, str(tiny_mono)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    said = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("told")]
    assert said, done.stdout + done.stderr
    ((first, second, later, trouble),) = said
    assert first in ("device", "lost") and second in ("device", "lost"), said
    assert (later, trouble) == ("lost", "lost"), said
