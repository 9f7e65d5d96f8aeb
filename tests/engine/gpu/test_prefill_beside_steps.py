"""A new job's prefill runs beside the steps of others: on which stream, after what, and who waits.

A CPU has no streams, so these are recorded in order: what is launched where, and the waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from musicgen_ui.engine import cuda_graph
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import PIANO, ROCK, codes_of, make_batch, noise, run_job, submit


class Event:
    """Is done once the stream that it was recorded on has caught up."""

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def query(self) -> bool:
        return not self.stream.behind

    def synchronize(self) -> None:
        pass


class Stream:
    """Notes who waits for it, and `behind`, whether it has work left."""

    current: Stream

    def __init__(self, *_: object) -> None:
        self.behind = False
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)

    def wait_event(self, event: Event) -> None:
        self.waited_for.append(event.stream)


@contextlib.contextmanager
def on(stream: Stream) -> Iterator[None]:
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The stream of the steps."""
    Stream.current = Stream()
    monkeypatch.setattr(cuda_graph, "side_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    return Stream.current


@pytest.fixture
def batch(tiny_mono, main) -> Scheduler:
    return make_batch(tiny_mono, graphs=True)


REQUEST = GenerationRequest(PIANO, audio_prompt=noise(0.4), duration_s=0.3, seed=2)


def test_prefill_is_launched_behind_the_steps_and_steps_wait_for_it(batch, main):
    side, streams, prefill = batch.stepper.side, [], batch.decoder.prefill

    def prefilled(*args):
        streams.append(Stream.current)
        prefill(*args)

    batch.decoder.prefill = prefilled
    expected = codes_of(run_job(batch, REQUEST)[0])
    assert set(streams) == {side} and main in side.waited_for and side in main.waited_for
    assert torch.equal(codes_of(run_job(batch, REQUEST)[0]), expected)


def test_running_job_is_stepped_while_a_prefill_is_under_way(batch):
    side = batch.stepper.side
    submit(batch, GenerationRequest(ROCK, duration_s=1.0, seed=1), lambda event: None)
    batch.step()
    side.behind = True
    submit(batch, REQUEST, lambda event: None)
    for _ in range(5):
        batch.step()
    running, new = batch.running
    assert running.window.written == 6 and new.ready
    assert new.window.written == new.window.known_frames  # it is not stepped yet
    side.behind = False
    batch.step()
    assert (running.window.written, new.window.written) == (7, new.window.known_frames + 1)


def test_job_alone_is_stepped_without_asking_whether_its_prefill_is_done(batch, main):
    batch.stepper.side.behind = True
    submit(batch, REQUEST, lambda event: None)
    batch.step()
    (job,) = batch.running
    assert job.window.written == job.window.known_frames + 1
    assert main.waited_for == [batch.stepper.side]  # the device waits


def test_stopped_job_gives_its_slot_back_behind_its_prefill(batch, main):
    submit(batch, GenerationRequest(ROCK, duration_s=1.0, seed=1), lambda event: None)
    batch.step()
    batch.stepper.side.behind = True
    stopped = submit(batch, REQUEST, lambda event: None)
    batch.step()
    assert main.waited_for == []
    stopped.stop()
    batch.step()
    assert main.waited_for == [batch.stepper.side] and len(batch.running) == 1


def test_texts_are_encoded_before_a_job_is_queued(batch):
    """On the thread of the encoders: a step finds the states ready."""
    request = GenerationRequest(ROCK, negative_prompt=PIANO, sections=[(0.2, "drums")])
    batch.encode(request)
    encoded = batch.conditioner.states.cache_info().currsize
    assert encoded == 3
    batch.conditioner.conditions(request)
    assert batch.conditioner.states.cache_info().currsize == encoded
