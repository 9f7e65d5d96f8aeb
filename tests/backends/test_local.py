"""The manager turns requests into events, whatever must be found, loaded or refused first."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from pathlib import Path

import numpy as np
import pytest

from musicgen_ui.backends import local as module
from musicgen_ui.backends.local import ModelManager, load_batch
from musicgen_ui.engine.protocol import Chunk, Event, Finished, Progress
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers import tiny


def ask(checkpoint: Path | str, **settings) -> GenerationRequest:
    asked = {"prompt": "80s pop", "duration_s": 0.5, "seed": 7, **settings}
    return GenerationRequest(checkpoint=str(checkpoint), **asked)


def collect(manager: ModelManager, request: GenerationRequest, stop=None) -> list[Event]:
    async def run() -> list[Event]:
        return [event async for event in manager.stream(request, stop)]

    return asyncio.run(run())


def takes(events: list[Event]) -> list[Finished]:
    return [event for event in events if isinstance(event, Finished)]


def leases(manager: ModelManager) -> int:
    return sum(resident.leases for resident in manager._residents.all())


class HeldLoad:
    """The real load, which waits half-way until it may go on."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.count = 0

    def __call__(self, source, place, max_jobs, say: Callable[[str], None]):
        self.count += 1
        for step in range(10_000):
            say(f"downloading {source.name}: {step}")
            if self.go.wait(0.005):
                break
        return load_batch(source, place, max_jobs, say)


@pytest.fixture
def manager() -> Iterator[ModelManager]:
    made = ModelManager(device="cpu", precision="float32")
    yield made
    made.close()


@pytest.fixture
def held() -> Iterator[tuple[ModelManager, HeldLoad]]:
    load = HeldLoad()
    made = ModelManager(device="cpu", precision="float32", load=load)
    yield made, load
    load.go.set()
    made.close()


def test_a_request_loads_composes_and_names_what_made_it(manager, tiny_mono):
    events = collect(manager, ask(tiny_mono))
    stages = [event.stage for event in events if isinstance(event, Progress)]
    assert stages[0] == "loading" and stages[-1] == "composing"
    assert stages == sorted(stages, key=["loading", "waiting", "composing"].index)
    (take,) = takes(events)
    assert take.clip.samples.shape == (1, 16_000)
    assert take.request.checkpoint == str(tiny_mono)
    assert manager.describe(take.request.checkpoint).checkpoint == str(tiny_mono)
    again = collect(manager, ask(tiny_mono))
    assert not any(isinstance(e, Progress) and e.stage == "loading" for e in again)
    assert np.array_equal(takes(again)[0].clip.samples, take.clip.samples)
    assert leases(manager) == 0


def test_the_synchronous_twin_gives_the_same(manager, tiny_mono):
    events = list(manager.stream_sync(ask(tiny_mono)))
    assert isinstance(events[0], Progress) and events[0].stage == "loading"
    with closing(ModelManager(device="cpu", precision="float32")) as other:
        expected = collect(other, ask(tiny_mono))
    for one, two in zip(takes(events), takes(expected), strict=True):
        assert np.array_equal(one.clip.samples, two.clip.samples)
    chunks = [event.clip.samples for event in events if isinstance(event, Chunk)]
    assert sum(chunk.shape[1] for chunk in chunks) == 16_000
    assert leases(manager) == 0


def test_a_stereo_checkpoint_gives_two_channels_with_the_toggle_on_or_off(manager, tiny_stereo):
    for stereo in (False, True):
        (take,) = takes(collect(manager, ask(tiny_stereo, stereo=stereo)))
        assert take.clip.samples.shape == (2, 16_000)
    assert len(manager._residents.all()) == 1


def test_weights_trained_again_in_the_same_folder_are_heard(manager, tiny_mono, tmp_path):
    folder = Path(shutil.copytree(tiny_mono, tmp_path / "training"))
    first = takes(collect(manager, ask(folder, do_sample=False)))[0].clip.samples
    (folder / "trainer_state.json").write_text("{}")  # not what makes the music
    events = collect(manager, ask(folder, do_sample=False))
    assert not any(isinstance(e, Progress) and e.stage == "loading" for e in events)
    shutil.copy(tiny.build(tmp_path / "later", seed=5) / "model.safetensors", folder)
    second = takes(collect(manager, ask(folder, do_sample=False)))[0].clip.samples
    assert not np.array_equal(first, second)
    assert len(manager._residents.all()) == 1


def test_many_callers_share_one_model(held, tiny_mono):
    manager, load = held
    load.go.set()

    async def run() -> list[list[Event]]:
        async def one(seed: int) -> list[Event]:
            return [event async for event in manager.stream(ask(tiny_mono, seed=seed))]

        return await asyncio.gather(*(one(seed) for seed in range(6)))

    answers = asyncio.run(run())
    assert [len(takes(events)) for events in answers] == [1] * 6
    assert load.count == 1
    assert leases(manager) == 0


def test_progress_of_the_load_is_told_live_and_the_event_loop_goes_on(held, tiny_mono):
    manager, _ = held

    async def run() -> tuple[list[str], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        notes = []
        async with aclosing(manager.stream(ask(tiny_mono))) as events:
            async for event in events:
                if isinstance(event, Progress) and event.stage == "loading":
                    notes.append(event.note)
                    assert manager.status().startswith(("loading", "downloading", "reading"))
                if len(notes) == 4:
                    break
        ticking.cancel()
        return notes, ticks

    notes, ticks = asyncio.run(run())
    assert len(set(notes)) == 4
    assert any("downloading" in note for note in notes)
    assert ticks > 5


def test_stop_during_the_load_ends_the_stream_without_a_take(held, tiny_mono):
    manager, load = held
    for drive in (collect, lambda made, *asked: list(made.stream_sync(*asked))):
        stop = threading.Event()
        threading.Timer(0.1, stop.set).start()
        events = drive(manager, ask(tiny_mono), stop)
        assert all(isinstance(e, Progress) and e.stage == "loading" for e in events)
        assert leases(manager) == 0
    load.go.set()
    assert takes(collect(manager, ask(tiny_mono)))


def test_one_callers_stop_leaves_the_others_load(held, tiny_mono):
    manager, load = held
    stop = threading.Event()

    async def run() -> list[Event]:
        async def stopped() -> list[Event]:
            return [event async for event in manager.stream(ask(tiny_mono), stop)]

        async def other() -> list[Event]:
            return [event async for event in manager.stream(ask(tiny_mono))]

        first, second = asyncio.create_task(stopped()), asyncio.create_task(other())
        await asyncio.sleep(0.1)
        stop.set()
        assert not takes(await first)
        load.go.set()
        return await second

    assert takes(asyncio.run(run()))
    assert load.count == 1


@pytest.mark.parametrize("how", ["close", "cancel"])
@pytest.mark.parametrize("stage", ["loading", "composing"])
def test_a_stream_that_is_left_gives_its_lease_back(tiny_mono, manager, how, stage):
    async def run() -> None:
        reached = asyncio.Event()

        async def listen() -> None:
            async with aclosing(manager.stream(ask(tiny_mono, duration_s=20))) as events:
                async for event in events:
                    if isinstance(event, Progress) and event.stage == stage:
                        reached.set()
                        if how == "close":
                            return

        task = asyncio.create_task(listen())
        await asyncio.wait_for(reached.wait(), 30)
        assert how == "close" or leases(manager) == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert leases(manager) == 0


def test_a_failed_load_is_a_sentence_and_the_next_request_is_served(tiny_mono):
    failures = [RequestError("The disk is full: free some room.")]

    def load(*settings):
        if failures:
            raise failures.pop()
        return load_batch(*settings)

    manager = ModelManager(device="cpu", load=load)
    with pytest.raises(RequestError, match="disk is full"):
        collect(manager, ask(tiny_mono))
    assert takes(collect(manager, ask(tiny_mono)))
    manager.close()


def test_an_unknown_checkpoint_is_refused_by_every_way_in(manager):
    for call in (
        lambda: collect(manager, ask("nonsense")),
        lambda: list(manager.stream_sync(ask("nonsense"))),
        lambda: manager.describe("nonsense"),
        lambda: manager.preload("nonsense"),
    ):
        with pytest.raises(RequestError, match='no checkpoint or folder "nonsense"'):
            call()
    assert manager._residents.all() == []


def test_stereo_without_a_sibling_is_refused(manager, tiny_mono):
    for drive in (collect, lambda made, request: list(made.stream_sync(request))):
        with pytest.raises(RequestError, match="no stereo sibling"):
            drive(manager, ask(tiny_mono, stereo=True))


def test_a_checkpoint_that_never_fits_is_refused_before_it_is_fetched():
    loads: list[object] = []
    manager = ModelManager(
        device="cpu", budget_bytes=5_000_000_000, load=lambda *a: loads.append(a)
    )
    with pytest.raises(RequestError, match=r"large needs 5\.1 GB .* int8 .* 5\.0 GB here: choose"):
        manager.preload("large")
    assert loads == []


def test_a_public_server_offers_the_listed_checkpoints_alone(tiny_mono, tiny_stereo, monkeypatch):
    manager = ModelManager(device="cpu", allow_any=False, also=[str(tiny_mono), "melody"])
    assert manager.checkpoints()[:3] == ["auto", str(tiny_mono), "melody"]
    for name in [*manager.checkpoints(), "facebook/musicgen-melody", "bundled-stereo"]:
        assert manager.describe(name)
    assert manager.describe("bundled").stereo == "choice"

    def touched(*_: object) -> None:
        raise AssertionError("nothing outside the list may be looked at")

    monkeypatch.setattr(module.registry, "resolve", touched)
    for name in (str(tiny_stereo), "someone/model", "/", "~", str(tiny_mono) + "/"):
        with pytest.raises(RequestError, match="these checkpoints alone"):
            manager.describe(name)


def test_visitors_of_a_public_server_have_nothing_downloaded(monkeypatch):
    """Published checkpoints are offered where they are on the computer, or in the host's list."""
    here = {"facebook/musicgen-medium", "facebook/musicgen-stereo-large"}
    monkeypatch.setattr(module.hub, "cached", lambda name: Path("/") if name in here else None)
    loads: list[str] = []

    def load(source, *_: object) -> None:
        loads.append(source.name)
        raise RequestError("enough")

    manager = ModelManager(device="cpu", allow_any=False, also=["small"], load=load)
    offered = {"small", "medium", "stereo-large"}
    for word, source in module.registry.known().items():
        if source.folder:
            continue
        for name in (word, source.name, word.upper()):
            with pytest.raises(RequestError):
                collect(manager, ask(name, duration_s=1))
        with pytest.raises(RequestError):
            collect(manager, ask(word, stereo=True))
        if "stereo" not in word:
            assert (source.name in manager.checkpoints()) == (word in offered)
    offered_names = {f"facebook/musicgen-{word}" for word in offered}
    assert set(loads) <= offered_names
    assert manager.describe("small").stereo == manager.describe("medium").stereo == "never"


def test_status_says_what_is_loaded_where_and_how_large(manager, tiny_mono):
    assert manager.status().startswith("nothing loaded · CPU (")
    with manager.use(str(tiny_mono)) as batch:
        manager.unload()  # not what is in use
        assert batch.checkpoint == str(tiny_mono)
    name, device, precision, size = manager.status().split(" · ")
    assert (name, precision) == (str(tiny_mono), "float32")
    assert device.startswith("CPU (") and size.endswith(" MB")
    manager.unload()
    assert manager.status().startswith("nothing loaded")


def test_describe_loads_nothing(manager):
    assert manager.describe("auto").checkpoint == "bundled"
    assert manager.checkpoints()[:2] == ["auto", "bundled"]
    assert manager.describe("small").stereo == "choice"
    assert manager.describe("stereo-small").stereo == "always"
    assert manager.status().startswith("nothing loaded")


def test_no_thread_stays_after_close(tiny_mono):
    before = set(threading.enumerate())
    manager = ModelManager(device="cpu", idle_s=60)
    collect(manager, ask(tiny_mono))
    manager.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
