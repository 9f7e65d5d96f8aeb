"""The manager turns requests into events, whatever must be found, loaded or refused first."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from musicgen_ui.backends import local as module
from musicgen_ui.backends import model_cache
from musicgen_ui.backends.local import LocalBackend, load_scheduler
from musicgen_ui.engine.codec import Codec
from musicgen_ui.engine.protocol import Chunk, Progress, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.ui.wording import status_text
from tests.helpers import tiny
from tests.helpers.engine import noise
from tests.helpers.jobs import made, read, takes
from tests.helpers.local import wait_for


def ask(checkpoint: Path | str, **settings) -> GenerationRequest:
    asked = {"prompt": "80s pop", "duration_s": 0.5, "seed": 7, **settings}
    return GenerationRequest(checkpoint=str(checkpoint), **asked)


def users(manager: LocalBackend) -> int:
    return sum(model.users for model in manager._cache.all())


def raiser(error: BaseException) -> Callable:
    def fail(*_: object) -> None:
        raise error

    return fail


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
        return load_scheduler(source, place, max_jobs, say)


@pytest.fixture
def manager() -> Iterator[LocalBackend]:
    backend = LocalBackend(device="cpu", precision="float32")
    yield backend
    backend.close()


@pytest.fixture
def held() -> Iterator[tuple[LocalBackend, HeldLoad]]:
    load = HeldLoad()
    backend = LocalBackend(device="cpu", precision="float32", load=load)
    yield backend, load
    load.go.set()
    backend.close()


def test_a_request_loads_composes_and_names_what_made_it(manager, tiny_mono):
    events = made(manager, ask(tiny_mono))
    stages = [event.stage for event in events if isinstance(event, Progress)]
    assert stages[0] == "loading" and stages[-1] == "composing"
    assert stages == sorted(stages, key=["loading", "waiting", "composing"].index)
    (take,) = takes(events)
    assert take.clip.samples.shape == (1, 16_000)
    assert take.request.checkpoint == str(tiny_mono)
    assert manager.describe(take.request.checkpoint).checkpoint == str(tiny_mono)
    again = made(manager, ask(tiny_mono))
    assert not any(isinstance(e, Progress) and e.stage is Stage.LOADING for e in again)
    assert np.array_equal(takes(again)[0].clip.samples, take.clip.samples)
    wait_for(lambda: users(manager) == 0)


def test_a_stereo_checkpoint_gives_two_channels_with_the_toggle_on_or_off(manager, tiny_stereo):
    for stereo in (False, True):
        (take,) = takes(made(manager, ask(tiny_stereo, stereo=stereo)))
        assert take.clip.samples.shape == (2, 16_000)
    assert len(manager._cache.all()) == 1


def test_weights_trained_again_in_the_same_folder_are_heard(manager, tiny_mono, tmp_path):
    folder = Path(shutil.copytree(tiny_mono, tmp_path / "training"))
    first = takes(made(manager, ask(folder, do_sample=False)))[0].clip.samples
    (folder / "trainer_state.json").write_text("{}")  # not what makes the music
    events = made(manager, ask(folder, do_sample=False))
    assert not any(isinstance(e, Progress) and e.stage is Stage.LOADING for e in events)
    shutil.copy(tiny.build(tmp_path / "later", seed=5) / "model.safetensors", folder)
    second = takes(made(manager, ask(folder, do_sample=False)))[0].clip.samples
    assert not np.array_equal(first, second)
    assert len(manager._cache.all()) == 1


def test_many_callers_share_one_model(held, tiny_mono):
    manager, load = held
    load.go.set()

    jobs = [manager.submit(ask(tiny_mono, seed=seed)) for seed in range(6)]
    answers = [read(job) for job in jobs]
    assert [len(takes(events)) for events in answers] == [1] * 6
    assert load.count == 1
    wait_for(lambda: users(manager) == 0)


def test_progress_of_the_load_is_an_event_at_once(held, tiny_mono):
    manager, _ = held
    job, notes = manager.submit(ask(tiny_mono)), []
    for event in job.follow():
        notes += [event.note]
        assert event.stage is Stage.LOADING and len(manager.status().loading) == 1
        if len(notes) == 4:
            break
    job.stop()
    assert len(set(notes)) == 4 and any("downloading" in note for note in notes)


def test_stop_during_the_load_gives_an_empty_take(held, tiny_mono):
    manager, load = held
    job = manager.submit(ask(tiny_mono))
    threading.Timer(0.1, job.stop).start()
    *before, take = read(job)
    assert {event.stage for event in before} == {Stage.LOADING}
    assert take.stopped and not take.clip.samples.size
    wait_for(lambda: users(manager) == 0)
    load.go.set()
    assert takes(made(manager, ask(tiny_mono)))[0].clip.samples.size


def test_a_stop_leaves_the_load_of_the_others(held, tiny_mono):
    manager, load = held
    stopped, other = manager.submit(ask(tiny_mono)), manager.submit(ask(tiny_mono))
    wait_for(lambda: len(stopped.log) and len(other.log))
    stopped.stop()
    assert not takes(read(stopped))[0].clip.samples.size
    load.go.set()
    assert takes(read(other))[0].clip.samples.size
    assert load.count == 1


@pytest.mark.parametrize("stage", [Stage.LOADING, Stage.COMPOSING])
def test_a_stopped_job_gives_the_model_back(tiny_mono, manager, stage):
    job = manager.submit(ask(tiny_mono, duration_s=20))
    next(e for e in job.follow() if isinstance(e, Progress) and e.stage is stage)
    assert users(manager) == 1
    job.stop()
    read(job)
    wait_for(lambda: users(manager) == 0)


def test_a_clip_is_encoded_once_for_all_variations(manager, tiny_mono, monkeypatch):
    """On a thread of the job, not on the one that steps."""
    threads, encode = [], Codec.encode

    def counted(codec, samples):
        threads.append(threading.current_thread().name)
        return encode(codec, samples)

    monkeypatch.setattr(Codec, "encode", counted)
    clip = noise(0.5)
    found = takes(made(manager, ask(tiny_mono, audio_prompt=clip, variations=4)))
    assert threads == ["musicgen-job"]
    heads = [take.codes[:, : take.context_frames] for take in found]
    assert all(np.array_equal(head, heads[0]) for head in heads) and heads[0].shape[1] == 25
    assert found[0].codes.shape[1] == 50 and found[0].codes.dtype == np.int16


def test_a_take_that_is_continued_is_not_encoded_again(manager, tiny_mono, monkeypatch):
    (first,) = takes(made(manager, ask(tiny_mono)))
    monkeypatch.setattr(Codec, "encode", lambda *_: pytest.fail("it was encoded"))
    (second,) = takes(made(manager, ask(tiny_mono, audio_prompt=first.clip)))
    assert np.array_equal(second.codes[:, :25], first.codes) and second.context_frames == 25


def test_codes_decoded_are_the_take(manager, tiny_mono):
    (take,) = takes(made(manager, ask(tiny_mono)))
    with manager.use(str(tiny_mono)) as scheduler:
        decoded = scheduler.codec.decode(torch.from_numpy(take.codes).long())
    assert np.abs(decoded.numpy() - take.clip.samples).max() < 1e-4


def test_chunks_say_where_they_begin(manager, tiny_mono):
    events = made(manager, ask(tiny_mono, audio_prompt=noise(0.5), duration_s=1.0))
    position = 0
    for chunk in (event for event in events if isinstance(event, Chunk)):
        assert chunk.start_sample == position
        position += chunk.clip.samples.shape[1]
    assert position == 32_000


def test_readers_see_the_same_whenever_they_begin(manager, tiny_mono):
    job = manager.submit(ask(tiny_mono, duration_s=2.0))
    with ThreadPoolExecutor() as pool:
        early = pool.submit(lambda: list(job.follow()))
        next(event for event in job.follow() if isinstance(event, Chunk))
        late = pool.submit(lambda: list(job.follow(after=3)))
        assert early.result(60)[3:] == late.result(60)
    assert list(job.follow()) == early.result()


def test_an_error_while_encoding_ends_its_job_alone(manager, tiny_mono, monkeypatch):
    monkeypatch.setattr(Codec, "encode", raiser(MemoryError()))
    broken = manager.submit(ask(tiny_mono, audio_prompt=noise(0.5)))
    with pytest.raises(RequestError, match="memory of this machine is full"):
        read(broken)
    assert takes(made(manager, ask(tiny_mono)))


def test_a_failed_load_is_a_sentence_and_the_next_request_is_served(tiny_mono):
    failures = [RequestError("The disk is full: free some room.")]

    def load(*settings):
        if failures:
            raise failures.pop()
        return load_scheduler(*settings)

    manager = LocalBackend(device="cpu", precision="float32", load=load)
    with pytest.raises(RequestError, match="disk is full"):
        made(manager, ask(tiny_mono))
    assert takes(made(manager, ask(tiny_mono)))
    manager.close()


def test_an_unknown_checkpoint_is_refused_by_every_way_in(manager):
    for call in (
        lambda: made(manager, ask("nonsense")),
        lambda: manager.describe("nonsense"),
        lambda: manager.preload("nonsense"),
    ):
        with pytest.raises(RequestError, match='no checkpoint or folder "nonsense"'):
            call()
    assert manager._cache.all() == []


def test_stereo_without_a_sibling_is_refused(manager, tiny_mono):
    with pytest.raises(RequestError, match="no stereo sibling"):
        made(manager, ask(tiny_mono, stereo=True))


def test_a_checkpoint_that_never_fits_is_refused_before_it_is_fetched():
    loads: list[object] = []
    manager = LocalBackend(
        device="cpu", budget_bytes=5_000_000_000, load=lambda *a: loads.append(a)
    )
    with pytest.raises(RequestError, match=r"large needs 5\.1 GB .* int8 .* 5\.0 GB here: choose"):
        manager.preload("large")
    assert loads == []


def test_a_public_server_offers_the_listed_checkpoints_alone(tiny_mono, tiny_stereo, monkeypatch):
    manager = LocalBackend(device="cpu", allow_any=False, also=[str(tiny_mono), "melody"])
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

    manager = LocalBackend(device="cpu", allow_any=False, also=["small"], load=load)
    offered = {"small", "medium", "stereo-large"}
    for word, source in module.registry.known().items():
        if source.folder:
            continue
        for name in (word, source.name, word.upper()):
            with pytest.raises(RequestError):
                made(manager, ask(name, duration_s=1))
        with pytest.raises(RequestError):
            made(manager, ask(word, stereo=True))
        if "stereo" not in word:
            assert (source.name in manager.checkpoints()) == (word in offered)
    offered_names = {f"facebook/musicgen-{word}" for word in offered}
    assert set(loads) <= offered_names
    assert manager.describe("small").stereo == manager.describe("medium").stereo == "never"


def test_status_holds_what_is_loaded_and_where(manager, tiny_mono):
    assert not manager.status().loaded and manager.status().device.startswith("CPU (")
    with manager.use(str(tiny_mono)) as scheduler:
        manager.unload()  # not what is in use
        assert scheduler.checkpoint == str(tiny_mono)
    status = manager.status()
    assert (status.loaded, status.precision) == ((str(tiny_mono),), "float32")
    assert status.nbytes > 100_000 and status_text(status).endswith(" MB")
    manager.unload()
    assert status_text(manager.status()).startswith("nothing loaded · CPU (")


def test_describe_loads_nothing(manager):
    assert manager.describe("auto").checkpoint == "bundled"
    assert manager.checkpoints()[:2] == ["auto", "bundled"]
    assert manager.describe("small").stereo == "choice"
    assert manager.describe("stereo-small").stereo == "always"
    assert not manager.status().loaded


def test_close_waits_for_ended_jobs_to_unload(tiny_mono, monkeypatch):
    """A daemon thread inside torch when Python ends aborts the process."""
    returned = model_cache.ModelCache._return

    def slow(*args) -> None:
        time.sleep(0.3)
        returned(*args)

    monkeypatch.setattr(model_cache.ModelCache, "_return", slow)
    before = set(threading.enumerate())
    manager = LocalBackend(device="cpu", precision="float32", idle_s=60)
    made(manager, ask(tiny_mono))
    manager.close()
    named = [t.name for t in set(threading.enumerate()) - before]
    assert not [name for name in named if name in ("musicgen-job", "musicgen-worker")]


def test_no_thread_stays_after_close(tiny_mono):
    before = set(threading.enumerate())
    manager = LocalBackend(device="cpu", idle_s=60)
    made(manager, ask(tiny_mono))
    manager.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
