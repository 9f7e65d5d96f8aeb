"""Faults, each brought about on purpose: what is lost is what broke, and everybody is told."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from musicgen_ui import files, takes
from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.admission import Admission
from musicgen_ui.backends.model_cache import ModelCache
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.engine import faults
from musicgen_ui.engine.codec import CodecStream
from musicgen_ui.engine.protocol import Chunk, Event, Finished, Trouble
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.engine.variation import Variation
from musicgen_ui.engine.worker import Worker
from musicgen_ui.errors import Fault, RequestError
from musicgen_ui.request import FIELDS, GenerationRequest
from musicgen_ui.server.app import FAILED, wait_for_end
from musicgen_ui.ui import audio_panel, request_form
from musicgen_ui.ui.handlers import Handlers
from tests.helpers.engine import listen, stream, submit
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import wait_for

ROOT = Path(__file__).parents[1]
TAB = SimpleNamespace(session_hash="a")


def values(**changes: Any) -> dict[str, Any]:
    form_values = {name: spec.default for name, spec in FIELDS.items()}
    return form_values | {"duration_s": 1.0, "seed": 7} | changes


def shown(handlers: Handlers, **changes: Any) -> dict[str, Any]:
    """What the page shows after a job, and under "streamed" how many chunks it can fetch."""

    async def run() -> dict[str, Any]:
        state: dict[str, Any] = {}
        async for update in handlers.compose({}, TAB, **values(**changes)):
            state |= update
        async for update in handlers.land(state["landed"], [], [0, 0], False, TAB):
            state |= update
        job = handlers.sessions.job(state["live"]["job"], TAB.session_hash)
        assert job is not None
        state["streamed"] = sum(isinstance(event, Chunk) for event in job.follow())
        return state

    return asyncio.run(run())


# The disk


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Makes the disk under a folder refuse to be written to."""

    def refuse(folder: Path, code: int) -> None:
        whole = files.write_part

        def write_part(where: Path, content: bytes) -> Path:
            if where == folder:
                raise OSError(code, os.strerror(code))
            return whole(where, content)

        monkeypatch.setattr(files, "write_part", write_part)

    return refuse


@pytest.mark.parametrize(
    ("code", "said"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "Read-only")]
)
def test_a_take_that_cannot_be_saved_is_heard_and_its_seed_is_told(
    tmp_path: Path, full: Callable, code: int, said: str
) -> None:
    handlers = Handlers(Admission(FakeBackend(), tmp_path))
    full(tmp_path, code)
    end = shown(handlers, seed=41)
    assert end["streamed"] == 4  # all of the music came before
    assert said in end["live"]["text"] and end["live"]["stage"] == "finished"
    assert said in end["take_notes"]["value"]
    assert "seed</dt><dd>41<" in end["take_facts"]
    assert end["take_audio"]["wav"] is None and not end["wav"]["interactive"]
    assert not end["stop"]["visible"] and len(handlers.backend) == 0
    assert request_form.same_seed(end["history"], end["chosen"])["seed"] == 41
    assert audio_panel.continue_take(end["history"], end["chosen"], 10.0, 0.0, 12.0) == {}
    assert list(tmp_path.iterdir()) == []


def test_where_the_folder_of_takes_is_full_the_visitor_downloads_from_another(
    tmp_path: Path, full: Callable
) -> None:
    spare = tmp_path / "spare"
    handlers = Handlers(Admission(FakeBackend(), tmp_path, spare=spare))
    full(tmp_path, errno.ENOSPC)
    end = shown(handlers)
    assert soundfile.info(end["take_audio"]["wav"]["path"]).duration == 1.0
    assert Path(end["wav"]["value"]).parent == spare
    assert "download it here" in end["take_notes"]["value"]


def test_the_api_is_told_that_nothing_could_be_saved(tmp_path: Path, full: Callable) -> None:
    handlers = Handlers(Admission(FakeBackend(), tmp_path))
    full(tmp_path, errno.ENOSPC)

    async def run() -> None:
        async for _ in handlers.generate(TAB, **values()):
            pass

    with pytest.raises(gr.Error, match="disk is full"):
        asyncio.run(run())


# A killed process

SAVING = """
import sys, numpy as np
from pathlib import Path
from musicgen_ui import files, takes
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.audio.clip import Clip
from musicgen_ui.request import GenerationRequest
clip = Clip(np.random.default_rng(0).uniform(-.5, .5, (2, 32000 * 5)).astype(np.float32), 32000)
print(files.private_folder(), flush=True)
while True:
    takes.save(Finished(0, clip, GenerationRequest(seed=1), 0.0, 1.0), Path(sys.argv[1]))
    print("saved", flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_whole_takes_and_the_next_one_clears_up(
    tmp_path: Path,
) -> None:
    draw = np.random.default_rng(0)
    private = []
    for _ in range(2):
        command = [sys.executable, "-c", SAVING, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout
            private.append(Path(process.stdout.readline().strip()))
            process.stdout.readline()
            time.sleep(draw.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
    (tmp_path / f".{process.pid}-abc-def{files.PART}").write_bytes(b"half a take")
    wavs, flacs = (sorted(tmp_path.glob(f"*.{kind}")) for kind in ("wav", "flac"))
    assert len(wavs) >= 2 and len(flacs) >= 2
    for path in (*wavs, *flacs):
        assert len(soundfile.read(path)[0]) == 160_000
        assert takes.read_settings(path)
    assert all(folder.is_dir() for folder in private)
    mine = files.private_folder()
    part = files.write_part(tmp_path, b"being written now")
    files.delete_leftovers(tmp_path)
    assert not any(folder.exists() for folder in private)
    assert list(tmp_path.glob(".*")) == [part] and mine.is_dir()
    files.drop(part)
    assert files.delete(mine) and not part.exists()


ELSEWHERE = """
import os, sys, time
from pathlib import Path
os.getpid = lambda: 2**22 + 1  # as in another container: no process here has that number
from musicgen_ui import files
print(files.private_folder(), files.write_part(Path(sys.argv[1]), b"a take"), flush=True)
time.sleep(60)
"""


def test_what_a_live_process_of_another_container_holds_is_left_to_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        folder, part = map(Path, process.stdout.readline().split())
        files.delete_leftovers(tmp_path)
        assert folder.is_dir() and part.read_bytes() == b"a take"
        process.send_signal(signal.SIGKILL)
    files.delete_leftovers(tmp_path)
    assert not folder.exists() and not part.exists()


def test_folders_that_others_named_alike_are_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = files.private_folder()
    alike = tmp_path / f"{files.PRIVATE}backup-of-takes"
    alike.mkdir()
    os.mkfifo(tmp_path / f"{files.PRIVATE}1-abc-pipe")
    files.delete_leftovers(None)
    assert mine.is_dir() and alike.is_dir()
    files.delete_private()
    assert not mine.exists() and alike.is_dir()


@pytest.mark.parametrize(("late", "goes"), [(2, True), (10**9, False)])
def test_a_folder_goes_though_a_thread_still_writes_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int, goes: bool
) -> None:
    folder, files_written, rmtree = tmp_path / "private", 0, shutil.rmtree
    folder.mkdir()

    def overtaken(path: Path, ignore_errors: bool) -> None:
        nonlocal files_written
        rmtree(path, ignore_errors=ignore_errors)
        if files_written < late:  # what was emptied is not empty when it should go
            path.mkdir()
            (path / "take.wav").touch()
            files_written += 1

    monkeypatch.setattr(files.shutil, "rmtree", overtaken)
    assert files.delete(folder, patience_s=0.5) is goes
    assert folder.exists() is not goes and files_written >= 2


def test_private_folders_are_deleted_while_threads_still_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks: dict[Path, int] = {}

    class Saving(type(tmp_path)):  # type: ignore[misc]
        """A file beside which another one is begun when its name is asked for."""

        @property
        def name(self) -> str:
            locks[tmp_path / f"{len(locks)}"] = -1
            return "part"

    locks[Saving(tmp_path / "a")] = -1
    monkeypatch.setattr(files, "_LOCKS", locks)
    files.delete_private()
    assert len(locks) == 2


def test_a_server_whose_device_is_lost_ends_to_be_restarted() -> None:
    health = SimpleNamespace(trouble=Trouble.DEVICE_LOST)
    backend = SimpleNamespace(health=lambda: health, backend=None)
    server = SimpleNamespace(thread=SimpleNamespace(is_alive=lambda: True))
    demo = SimpleNamespace(backend=backend, server=server)
    assert wait_for_end(demo, SimpleQueue(), check_every_s=0.01) == FAILED


# The clock


def test_no_duration_is_measured_on_a_clock_that_can_be_set() -> None:
    """Ages, waits, shares of an hour: all of them would jump with it."""
    # When a process began and when a file was changed, the system says by that clock.
    # The events of a training run carry the time of day; replicas of several machines compare it.
    free = ("zerogpu_worker.py", "cleanup.py", "progress.py", "ray_scaling.py")
    for path in (ROOT / "musicgen_ui").rglob("*.py"):
        set_by_people = re.search(r"time\.time\(|datetime\.now|utcnow", path.read_text())
        assert path.name in free or not set_by_people, path


# The engine

ROCK = "80s rock with drums and bass"
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
DEVICE = "CUDA error: an illegal memory access was encountered"


def make_batch(folder: Path, **options: Any) -> Scheduler:
    model = MusicgenForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Scheduler(model, tokenizer, checkpoint=folder.name, **options)


@pytest.fixture(scope="module", params=["eager", "graph"])
def any_batch(tiny_mono: Path, request: pytest.FixtureRequest) -> Scheduler:
    """Both ways of stepping; the graph's as it runs before it is captured."""
    return make_batch(tiny_mono, graphs=request.param == "graph", max_jobs=4)


@pytest.fixture
def batch(any_batch: Scheduler) -> Iterator[Scheduler]:
    yield any_batch
    assert not any_batch.busy and any_batch.places == any_batch.max_jobs


class Caller:
    """Submits a request to a batch and keeps what comes back."""

    def __init__(self, batch: Scheduler, seed: int, **settings: Any) -> None:
        self.events: list[Event | Exception] = []
        self.request = GenerationRequest(
            **{"prompt": ROCK, "duration_s": 1.0} | settings, seed=seed
        )
        submit(batch, self.request, self.events.append)

    @property
    def chunks(self) -> list[np.ndarray]:
        return [event.clip.samples for event in self.events if isinstance(event, Chunk)]

    @property
    def end(self) -> Finished:
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return self.events[-1]

    @property
    def error(self) -> str:
        (error,) = (event for event in self.events if isinstance(event, Exception))
        assert isinstance(error, RequestError)
        return str(error)


def run(batch: Scheduler, until: Callable[[], object] = lambda: False) -> None:
    while not until() and batch.step():
        pass


def whole(batch: Scheduler, seed: int, **settings: Any) -> np.ndarray:
    """The take of a seed where nothing breaks."""
    caller = Caller(batch, seed, **settings)
    run(batch)
    assert not caller.end.stopped
    return caller.end.clip.samples


def same(caller: Caller, expected: np.ndarray) -> bool:
    return not caller.end.fault and bool(np.abs(caller.end.clip.samples - expected).max() < 1e-4)


def seeds(jobs: list[Variation]) -> list[int]:
    return [job.request.seed for job in jobs]


@pytest.mark.parametrize("error", [MEMORY, ValueError("a bug"), MemoryError()])
def test_a_step_that_fails_for_all_but_not_for_each_costs_nothing(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    expected = [whole(batch, seed) for seed in range(3)]
    step = batch.stepper.step

    def small(jobs: list[Variation]) -> None:
        step(jobs)  # it has counted the step already when it fails
        if len(jobs) > 1 and jobs[0].window.written % 5 == 0:
            raise error

    monkeypatch.setattr(batch.stepper, "step", small)
    callers = [Caller(batch, seed) for seed in range(3)]
    run(batch)
    assert all(map(same, callers, expected))


def test_a_job_that_finds_no_memory_waits_until_fewer_run_and_is_then_the_same(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [whole(batch, seed) for seed in range(3)]
    step = batch.stepper.step

    def small(jobs: list[Variation]) -> None:
        if 1 in seeds(jobs) and len(batch.running) > 1:
            raise MEMORY
        step(jobs)

    monkeypatch.setattr(batch.stepper, "step", small)
    callers = [Caller(batch, seed) for seed in range(3)]
    run(batch)
    assert all(map(same, callers, expected))


@pytest.mark.parametrize("error", [MEMORY, ValueError("a bug")])
def test_a_job_that_was_heard_ends_with_what_was_heard_and_the_others_finish(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    expected = [whole(batch, seed) for seed in range(3)]
    step = batch.stepper.step

    def broken(jobs: list[Variation]) -> None:
        if 1 in seeds(jobs) and callers[1].chunks:
            raise error
        step(jobs)

    monkeypatch.setattr(batch.stepper, "step", broken)
    callers = [Caller(batch, seed) for seed in range(3)]
    run(batch)
    broken_off = callers.pop(1)
    assert all(map(same, callers, [expected[0], expected[2]]))
    heard = np.concatenate(broken_off.chunks, axis=1)
    assert np.array_equal(broken_off.end.clip.samples, heard) and heard.shape[1] < 32_000
    assert broken_off.end.stopped and broken_off.end.fault == faults.sentence(error)


def test_memory_that_does_not_suffice_for_one_is_told_with_advice(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch.stepper, "admit", raiser(MEMORY))
    caller = Caller(batch, 1)
    run(batch)
    assert "shorter length" in caller.error


def raiser(error: BaseException) -> Callable:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("place", ["admit", "prefill"])
def test_memory_that_is_used_up_while_a_job_begins_lets_it_begin_later(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    clip = Clip(np.random.default_rng(0).normal(0, 0.2, (1, 32_000)).astype(np.float32), 32_000)
    settings = {"audio_prompt": clip, "include_prompt": False}
    expected = whole(batch, 1, **settings)
    owner = batch.stepper if place == "admit" else batch.decoder
    begin = getattr(owner, place)

    def small(*args: Any, **options: Any) -> Any:
        if batch.running and min(seeds(list(batch.running))) == 0:  # the other one runs still
            raise MEMORY
        return begin(*args, **options)

    monkeypatch.setattr(owner, place, small)
    other = Caller(batch, 0)
    run(batch, lambda: other.chunks)
    caller = Caller(batch, 1, **settings)
    run(batch)
    assert same(caller, expected) and not other.end.fault


def test_a_job_that_breaks_while_it_is_admitted_takes_no_place(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as there are places; then all of them are there still."""
    monkeypatch.setattr(batch.decoder, "sequence", raiser(MEMORY))
    for seed in range(batch.max_jobs):
        caller = Caller(batch, seed)
        run(batch)
        assert "memory" in caller.error
    monkeypatch.undo()
    callers = [Caller(batch, seed) for seed in range(batch.max_jobs)]
    run(batch)
    assert not any(caller.end.fault for caller in callers)


def test_one_broken_variation_leaves_the_others(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [whole(batch, seed) for seed in (5, 7)]
    step = batch.stepper.step

    def broken(jobs: list[Variation]) -> None:
        if 6 in seeds(jobs):
            raise ValueError("a bug")
        step(jobs)

    monkeypatch.setattr(batch.stepper, "step", broken)
    caller = Caller(batch, 5, variations=3)
    run(batch)
    ends = {e.variation: e for e in caller.events if isinstance(e, Finished)}
    assert ends[1].fault == Fault.OTHER.sentence and not ends[1].clip.samples.size
    for variation, samples in ((0, expected[0]), (2, expected[1])):
        assert np.abs(ends[variation].clip.samples - samples).max() < 1e-4


class Panic(BaseException):
    """What a library in Rust raises where it is wrong: pyo3's PanicException is no Exception."""


def panics(of: Callable) -> Callable:
    """The same, but for what has to do with a panic."""

    def call(asked: Any, *args: Any, **options: Any) -> Any:
        request = getattr(asked, "request", asked)
        if "panic" in getattr(request, "prompt", request):
            raise Panic("index out of bounds")
        return of(asked, *args, **options)

    return call


@pytest.mark.parametrize("place", ["tokenizer", "states", "chroma", "section"])
def test_a_panic_ends_the_job_that_it_came_up_in_and_no_other(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    expected = [whole(batch, seed) for seed in (0, 2)]
    ill: dict[str, Any] = {"prompt": "panic"}
    if place == "section":
        ill = {"prompt": "calm", "sections": ((0.6, "panic"),)}
        monkeypatch.setattr(batch.conditioner, "states", panics(batch.conditioner.states))
    else:
        kept = getattr(batch.conditioner, place)
        monkeypatch.setattr(batch.conditioner, place, panics(kept))
    first, broken, last = Caller(batch, 0), Caller(batch, 1, **ill), Caller(batch, 2)
    run(batch)
    assert same(first, expected[0]) and same(last, expected[1])
    if place == "section":  # what was heard before is kept
        assert broken.end.fault and broken.end.clip.samples.size
    else:
        assert isinstance(broken.events[-1], RequestError)


def test_the_words_that_a_tokenizer_cannot_read_are_what_is_told(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch.conditioner, "tokenizer", raiser(Panic()))
    caller = Caller(batch, 1, prompt="these words")
    run(batch)
    (error,) = caller.events
    assert isinstance(error, RequestError) and error.field == "prompt"
    assert isinstance(error.__cause__, Panic)


def test_a_tokenizer_of_another_text_encoder_is_refused_before_a_gpu_fails(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = SimpleNamespace(input_ids=[5, 100_000])
    monkeypatch.setattr(batch.conditioner, "tokenizer", lambda *_, **options: more)
    caller = Caller(batch, 1, prompt="words of another model")
    run(batch)
    (error,) = caller.events
    assert isinstance(error, RequestError) and error.field == "checkpoint"


def test_a_take_that_cannot_be_joined_leaves_its_caller_an_answer_and_the_others_their_takes(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(batch, 0)
    finished = Variation.finished

    def broken(job: Variation, *args: Any) -> Finished:
        if job.request.seed == 1:
            raise MemoryError
        return finished(job, *args)

    monkeypatch.setattr(Variation, "finished", broken)
    callers = [Caller(batch, seed) for seed in range(2)]
    run(batch)
    assert same(callers[0], expected)
    assert callers[1].end.fault == Fault.MEMORY.sentence


@pytest.mark.parametrize(("error", "again"), [(RuntimeError(DEVICE), True), (SystemExit(), False)])
def test_what_ends_everybody_while_a_job_is_admitted_leaves_it_an_answer(
    tiny_mono: Path, error: BaseException, again: bool
) -> None:
    """A device that fails is loaded anew and the job begins again; twice ends it."""
    for times in (1, 2):
        batches, left = [make_batch(tiny_mono)], [error] * times

        def admit(job: Variation, conditions: list, left=left, batches=batches) -> None:
            if left:
                raise left.pop()
            type(batches[-1].stepper).admit(batches[-1].stepper, job, conditions)

        def reload(batches=batches, admit=admit) -> Scheduler:
            batches.append(make_batch(tiny_mono))
            batches[-1].stepper.admit = admit  # type: ignore[method-assign]
            return batches[-1]

        batches[0].stepper.admit = admit  # type: ignore[method-assign]
        worker = Worker(batches[0], reload)
        end = listen(worker, asked(1))[-1]
        worker.close()
        if again and times == 1:
            assert isinstance(end, Finished) and not end.fault
        else:
            assert isinstance(end, RequestError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("heard", [False, True])
def test_logits_that_are_no_numbers_end_their_job_with_a_sentence_and_without_noise(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch, value: float, heard: bool
) -> None:
    expected = [whole(batch, seed) for seed in range(2)]
    logits = batch.decoder.logits

    def broken(*args: Any) -> torch.Tensor:
        told = logits(*args).clone()
        if bool(callers[0].chunks) >= heard and callers[0].events[-1:] and len(batch.running) == 2:
            told[0, 2, 5] = value  # of the first job's first row
        return told

    monkeypatch.setattr(batch.decoder, "logits", broken)
    callers = [Caller(batch, seed) for seed in range(2)]
    run(batch)
    assert same(callers[1], expected[1])
    if heard:
        music = callers[0].end.clip.samples
        assert "overflowed" in callers[0].end.fault and 0 < music.shape[1] < 32_000
        assert np.abs(music - expected[0][:, : music.shape[1]]).max() < 1e-4
    else:
        assert "overflowed" in callers[0].error and not callers[0].chunks


def test_audio_that_is_no_numbers_ends_its_job_and_is_not_heard(
    batch: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(batch, 1)
    push = CodecStream.push

    def broken(stream: CodecStream, *args: Any, **options: Any) -> torch.Tensor:
        audio = push(stream, *args, **options)
        first = next((job for job in batch.running if job.request.seed == 0), None)
        if first and stream is first.recorder.stream and callers[0].chunks:
            audio[:, -1] = float("nan")
        return audio

    monkeypatch.setattr(CodecStream, "push", broken)
    callers = [Caller(batch, seed) for seed in range(2)]
    run(batch)
    assert same(callers[1], expected)
    assert "overflowed" in callers[0].end.fault
    assert np.isfinite(callers[0].end.clip.samples).all()


# The device and the worker


@pytest.mark.parametrize(
    ("error", "memory", "device"),
    [
        (MEMORY, True, False),
        (MemoryError(), True, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling …"), True, False),
        (RuntimeError(DEVICE), False, True),
        (torch.AcceleratorError(DEVICE), False, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False, True),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (ValueError(DEVICE), False, False),
    ],
)
def test_memory_device_and_the_rest_are_told_apart(
    error: Exception, memory: bool, device: bool
) -> None:
    assert (faults.out_of_memory(error), faults.of_the_device(error)) == (memory, device)


def crowd(worker: Worker, requests: list[GenerationRequest]) -> list[list[Event | Exception]]:
    """The events of requests that are made side by side."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda request: listen(worker, request), requests))


def has_audio(scheduler: Scheduler) -> bool:
    jobs = [variation.job for variation in tuple(scheduler.running)]
    return any(isinstance(event, Chunk) for job in jobs for event in job.log.so_far())


def asked(seed: int, duration_s: float = 1.0) -> GenerationRequest:
    return GenerationRequest(ROCK, seed=seed, duration_s=duration_s)


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_a_device_that_fails_is_loaded_anew_and_the_queue_lives_on(
    tiny_mono: Path, kind: type[Exception]
) -> None:
    made = [make_batch(tiny_mono, max_jobs=2), make_batch(tiny_mono, max_jobs=2)]
    expected = {seed: whole(made[1], seed) for seed in range(4)}
    step, loads, troubles = made[0].stepper.step, [], []

    def poisoned(jobs: list[Variation]) -> None:
        step(jobs)
        if has_audio(made[0]) and len(jobs) == 2:
            raise kind(DEVICE)

    made[0].stepper.step = poisoned  # type: ignore[method-assign]

    def reload() -> Scheduler:
        loads.append(made[0].nbytes)
        troubles.append(worker.trouble)
        return made[1]

    worker = Worker(made[0], reload)
    try:
        with ThreadPoolExecutor() as pool:
            first = pool.submit(listen, worker, asked(0, 2.0))
            wait_for(lambda: has_audio(made[0]))
            others = crowd(worker, [asked(seed) for seed in (1, 2, 3)])
            heard = first.result(60)
    finally:
        worker.close()
    assert isinstance(heard[-1], Finished) and heard[-1].fault == Fault.DEVICE.sentence
    assert heard[-1].clip.samples.shape[1] > 0
    for seed, events in enumerate(others, start=1):
        assert isinstance(events[-1], Finished) and not events[-1].fault, events[-1]
        assert np.abs(events[-1].clip.samples - expected[seed]).max() < 1e-4
    assert loads == [0]  # what had failed was let go before
    assert troubles == [Trouble.RELOADING] and worker.trouble is None


def test_a_job_that_breaks_the_device_each_time_does_so_twice_at_most(tiny_mono: Path) -> None:
    loads = []

    def poisoned() -> Scheduler:
        batch = make_batch(tiny_mono)
        batch.stepper.step = raiser(RuntimeError(DEVICE))  # type: ignore[method-assign]
        loads.append(batch)
        return batch

    worker = Worker(poisoned(), poisoned)
    (error,) = [e for e in listen(worker, asked(1)) if isinstance(e, Exception)]
    assert str(error) == Fault.DEVICE.sentence
    worker.close()
    assert len(loads) == 3


def test_a_device_that_does_not_come_back_is_told_to_all_and_to_health(tiny_mono: Path) -> None:
    loads: list[str] = []

    def load(source: Source, say: Callable[[str], None]) -> Scheduler:
        loads.append(source.name)
        if len(loads) in (2, 3):
            raise RuntimeError(DEVICE)
        batch = make_batch(tiny_mono, max_jobs=1)
        if len(loads) == 1:
            batch.stepper.step = raiser(RuntimeError(DEVICE))  # type: ignore[method-assign]
        return batch

    cache = ModelCache(load, lambda source: 10, 10**9, 0.0)

    def make() -> list[list[Event | Exception]]:
        with cache.acquire(Source("A")) as model:
            model.loaded()
            return crowd(cache.worker(model), [asked(seed) for seed in range(3)])

    for events in make():
        assert isinstance(events[-1], RequestError)
    assert cache.trouble is Trouble.DEVICE_LOST
    with pytest.raises(RequestError, match="started again"):
        make()
    for events in make():  # the device is back
        assert isinstance(events[-1], Finished)
    assert cache.trouble is None and len(loads) == 4
    cache.close()


@pytest.mark.parametrize("error", [SystemExit(1), KeyError("a bug"), KeyboardInterrupt()])
def test_callers_of_a_worker_that_dies_are_told_and_another_takes_its_place(
    tiny_mono: Path, error: BaseException
) -> None:
    batch = make_batch(tiny_mono, max_jobs=1)
    worker, stop = Worker(batch), batch._stop
    deaths = [error]

    def die() -> None:
        if batch.queue.waiting() and deaths:
            raise deaths.pop()
        stop()

    batch._stop = die  # type: ignore[method-assign]
    before = worker._thread

    requests = [asked(seed) for seed in range(3)]
    ends = [events[-1] for events in crowd(worker, requests)]
    told = [end for end in ends if isinstance(end, RequestError)]
    assert told and {str(end) for end in told} == {Fault.WORKER.sentence}
    for events in crowd(worker, requests):
        assert isinstance(events[-1], Finished) and not events[-1].fault
    assert worker.alive and worker._thread is not before
    worker.close()


def test_a_command_keeps_what_was_made_before_the_device_failed(tiny_mono: Path) -> None:
    batch = make_batch(tiny_mono)
    events: list[Event] = []
    for event in stream(batch, asked(1)):
        events.append(event)
        if isinstance(event, Chunk):
            batch.stepper.step = raiser(RuntimeError(DEVICE))  # type: ignore[method-assign]
    assert isinstance(events[-1], Finished) and events[-1].fault == Fault.DEVICE.sentence
    assert events[-1].clip.samples.size
