"""Models are loaded once, lent while in use, evicted when idle; failures leave nothing behind."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from musicgen_ui.backends.model_cache import ModelCache
from musicgen_ui.checkpoints.hub import Abandoned
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.errors import RequestError
from tests.helpers.local import wait_for

A, B, C, D = (Source(name) for name in "ABCD")


class Model:
    """Stands for a Scheduler: what the cache asks of one is its size."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class Loader:
    """Loads models of 10 bytes, as slowly and with as many failures as a test wants."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.failures: list[Exception] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, source: Source, say: Callable[[str], None]) -> Model:
        self.loads.append(source.name)
        while not self.go.wait(0.005):
            say(f"reading {source.name}")
        if self.failures:
            raise self.failures.pop(0)
        return Model(10)


def cache_of(loader: Loader, budget_bytes: int = 1000, idle_s: float = 0.0) -> ModelCache:
    return ModelCache(loader, lambda source: 10, budget_bytes, idle_s)


def use(cache: ModelCache, source: Source) -> None:
    with cache.acquire(source) as model:
        model.loaded()


def names(cache: ModelCache) -> list[str]:
    return [model.source.name for model in cache.all()]


def timers_of(cache: ModelCache) -> list[threading.Timer]:
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    return [timer for timer in timers if timer.function == cache._expire]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection takes half a second beside torch, and these models hold no memory."""
    monkeypatch.setattr("musicgen_ui.backends.model_cache.give_memory_back", lambda: None)


@pytest.fixture
def loader() -> Loader:
    return Loader()


def test_twenty_callers_at_once_share_one_load(loader):
    loader.go.clear()
    cache = cache_of(loader)

    def ask(_: int) -> Model:
        with cache.acquire(A) as model:
            return model.loaded()

    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(ask, i) for i in range(20)]
        wait_for(lambda: cache.all() and cache.all()[0].users == 20)
        loader.go.set()
        models = {answer.result() for answer in answers}
    assert len(models) == 1
    assert loader.loads == ["A"]
    assert cache.all()[0].users == 0


def test_the_longest_unused_model_makes_room(loader):
    cache = cache_of(loader, budget_bytes=30)
    for source in (A, B, C, A):
        use(cache, source)
    assert names(cache) == ["A", "B", "C"]
    use(cache, D)
    assert sorted(names(cache)) == ["A", "C", "D"]
    use(cache, B)
    assert sorted(names(cache)) == ["A", "B", "D"]
    assert loader.loads == ["A", "B", "C", "D", "B"]


def test_a_model_alone_is_loaded_whatever_the_estimate(loader):
    cache = cache_of(loader, budget_bytes=5)
    use(cache, A)
    use(cache, B)
    assert names(cache) == ["B"]


def test_a_lent_model_stays_until_its_lease_ends(loader):
    cache = cache_of(loader, budget_bytes=10)
    started, leave, stayed = threading.Event(), threading.Event(), []

    def hold() -> None:
        with cache.acquire(A) as model:
            loaded = model.loaded()
            started.set()
            leave.wait(5)
            assert model.scheduler is loaded
            stayed.append(names(cache))

    holder = threading.Thread(target=hold)
    holder.start()
    started.wait(5)
    with cache.acquire(B) as model:
        wait_for(lambda: "waiting for memory" in model.note)
        leave.set()
        model.loaded()
        assert names(cache) == ["B"]
    holder.join()
    assert stayed == [["A", "B"]]


def test_a_failed_load_is_told_to_every_caller_and_tried_again(loader):
    loader.go.clear()
    loader.failures = [RequestError("The disk is on fire: get some water.")]
    cache = cache_of(loader)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(use, cache, A) for _ in range(4)]
        wait_for(lambda: cache.all() and cache.all()[0].users == 4)
        loader.go.set()
        for answer in answers:
            with pytest.raises(RequestError, match="on fire"):
                answer.result()
    assert names(cache) == []
    use(cache, A)
    assert loader.loads == ["A", "A"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate …"),
    ],
)
def test_a_load_without_memory_unloads_what_is_idle_and_tries_once_more(loader, error):
    cache = cache_of(loader)
    use(cache, A)
    loader.failures = [error]
    use(cache, B)
    assert names(cache) == ["B"]
    loader.failures = [error, error]
    with pytest.raises(RequestError, match="not enough free memory for C"):
        use(cache, C)
    assert loader.loads == ["A", "B", "B", "C", "C"]
    use(cache, C)
    assert names(cache) == ["C"]


def test_weights_that_changed_are_loaded_anew_and_the_old_ones_go(loader):
    cache = cache_of(loader)
    first, second = (Source("A", contents=(("w", 1, time),)) for time in (1, 2))
    with cache.acquire(first) as held:
        old = held.loaded()
        with cache.acquire(second) as model:
            assert model.loaded() is not old and held.scheduler is old  # it plays on
        assert names(cache) == ["A", "A"]
    assert names(cache) == ["A"]
    use(cache, second)
    assert loader.loads == ["A", "A"]
    use(cache, first)  # an idle one goes at once
    assert names(cache) == ["A"]
    assert loader.loads == ["A", "A", "A"]


def test_other_errors_are_not_tried_again(loader):
    loader.failures = [KeyError("a bug")]
    with pytest.raises(KeyError):
        use(cache_of(loader), A)
    assert loader.loads == ["A"]


def test_an_unused_model_goes_after_its_time_and_a_used_one_does_not(loader):
    cache = cache_of(loader, idle_s=0.05)
    with cache.acquire(A) as model:
        model.loaded()
        time.sleep(0.12)
        assert names(cache) == ["A"]
    wait_for(lambda: not names(cache))
    use(cache, A)
    assert loader.loads == ["A", "A"]
    cache.close()
    wait_for(lambda: not timers_of(cache))


def test_a_busy_day_leaves_one_timer_a_model(loader):
    cache = cache_of(loader, idle_s=60)
    for _ in range(10):
        use(cache, A)
    assert sum(not timer.finished.is_set() for timer in timers_of(cache)) == 1
    cache.close()


def test_a_model_is_gone_before_its_memory_is_given_back(loader, monkeypatch):
    cache = cache_of(loader)
    use(cache, A)
    reference = weakref.ref(cache.all()[0].scheduler)
    gone: list[bool] = []
    monkeypatch.setattr(
        "musicgen_ui.backends.model_cache.give_memory_back",
        lambda: gone.append(reference() is None),
    )
    cache.unload()
    assert gone == [True]


def test_unload_frees_the_idle_and_keeps_the_lent(loader):
    cache = cache_of(loader)
    use(cache, A)
    with cache.acquire(B) as model:
        model.loaded()
        cache.unload()
        assert names(cache) == ["B"]
    cache.unload()
    assert names(cache) == []


def test_a_load_that_nobody_waits_for_is_given_up(loader):
    loader.go.clear()
    cache = cache_of(loader)
    with cache.acquire(A) as model:
        wait_for(lambda: model.note == "reading A")
        with cache.acquire(A):
            pass
        time.sleep(0.02)
        assert not model.ready.done()  # one of two still waits
    wait_for(model.ready.done)
    assert isinstance(model.ready.exception(), Abandoned)
    assert names(cache) == []
    loader.go.set()
    use(cache, A)
    assert names(cache) == ["A"]


def test_a_model_whose_callers_left_during_the_last_of_its_load_goes_after_its_time():
    reading, left = threading.Event(), threading.Event()

    def load(source: Source, say: Callable[[str], None]) -> Model:
        reading.set()
        left.wait(5)
        return Model(10)

    cache = ModelCache(load, lambda source: 10, 1000, idle_s=0.02)
    with cache.acquire(A) as model:
        reading.wait(5)
    left.set()
    model.loaded()
    wait_for(lambda: not names(cache))


def test_a_download_that_hangs_holds_no_other_model_up(loader):
    gate = threading.Event()

    def fetch(source: Source, say: Callable[[str], None]) -> None:
        if source is A:
            gate.wait(5)

    cache = ModelCache(loader, lambda source: 10, 1000, 0.0, fetch=fetch)
    with cache.acquire(A) as slow:
        use(cache, B)
        assert loader.loads == ["B"] and not slow.ready.done()
        gate.set()
        slow.loaded()
    assert loader.loads == ["B", "A"]


def test_a_load_given_up_does_not_harm_the_next_one(loader):
    loader.go.clear()
    cache = cache_of(loader)
    for _ in range(20):
        with cache.acquire(A):
            time.sleep(0.003)
    with cache.acquire(A) as model:
        loader.go.set()
        assert model.loaded().nbytes == 10


def test_close_unloads_now_and_later_and_refuses(loader):
    cache = cache_of(loader)
    use(cache, A)
    with cache.acquire(B) as model:
        model.loaded()
        cache.close()
        assert names(cache) == ["B"]
    assert names(cache) == []
    with pytest.raises(RequestError, match="closing"):
        use(cache, A)


def test_a_lease_that_ends_after_close_starts_no_timer(loader, monkeypatch):
    """It may end while Python shuts down, where a thread cannot be started any more."""
    cache = cache_of(loader, idle_s=60)
    with cache.acquire(A) as model:
        model.loaded()
        cache.close()
        monkeypatch.setattr(threading.Timer, "start", lambda timer: pytest.fail("a timer"))
    assert not model.scheduler


def test_a_crowd_with_little_room_gets_what_it_asks_for(loader):
    cache = cache_of(loader, budget_bytes=20, idle_s=0.01)

    def ask(i: int) -> bool:
        with cache.acquire((A, B, C, D)[i % 4]) as model:
            loaded = model.loaded()
            time.sleep(0.001)
            return model.scheduler is loaded

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(ask, range(100)))
    assert all(model.users == 0 for model in cache.all())
