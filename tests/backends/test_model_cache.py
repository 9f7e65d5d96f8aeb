"""Models are loaded once, lent while in use, evicted when idle; failures leave nothing behind."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from musicgen_ui.backends.model_cache import Residents
from musicgen_ui.checkpoints.hub import Abandoned
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.errors import RequestError
from tests.helpers.local import wait_for

A, B, C, D = (Source(name) for name in "ABCD")


class Model:
    """Stands for a Batch: what residents ask of one is its size."""

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


def residents_of(loader: Loader, budget_bytes: int = 1000, idle_s: float = 0.0) -> Residents:
    return Residents(loader, lambda source: 10, budget_bytes, idle_s)


def use(residents: Residents, source: Source) -> None:
    with residents.lease(source) as resident:
        resident.loaded()


def names(residents: Residents) -> list[str]:
    return [resident.source.name for resident in residents.all()]


def timers_of(residents: Residents) -> list[threading.Timer]:
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    return [timer for timer in timers if timer.function == residents._expire]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection takes half a second beside torch, and these models hold no memory."""
    monkeypatch.setattr("musicgen_ui.backends.model_cache.give_memory_back", lambda: None)


@pytest.fixture
def loader() -> Loader:
    return Loader()


def test_twenty_callers_at_once_share_one_load(loader):
    loader.go.clear()
    residents = residents_of(loader)

    def ask(_: int) -> Model:
        with residents.lease(A) as resident:
            return resident.loaded()

    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(ask, i) for i in range(20)]
        wait_for(lambda: residents.all() and residents.all()[0].leases == 20)
        loader.go.set()
        models = {answer.result() for answer in answers}
    assert len(models) == 1
    assert loader.loads == ["A"]
    assert residents.all()[0].leases == 0


def test_the_longest_unused_model_makes_room(loader):
    residents = residents_of(loader, budget_bytes=30)
    for source in (A, B, C, A):
        use(residents, source)
    assert names(residents) == ["A", "B", "C"]
    use(residents, D)
    assert sorted(names(residents)) == ["A", "C", "D"]
    use(residents, B)
    assert sorted(names(residents)) == ["A", "B", "D"]
    assert loader.loads == ["A", "B", "C", "D", "B"]


def test_a_model_alone_is_loaded_whatever_the_estimate(loader):
    residents = residents_of(loader, budget_bytes=5)
    use(residents, A)
    use(residents, B)
    assert names(residents) == ["B"]


def test_a_lent_model_stays_until_its_lease_ends(loader):
    residents = residents_of(loader, budget_bytes=10)
    started, leave, stayed = threading.Event(), threading.Event(), []

    def hold() -> None:
        with residents.lease(A) as resident:
            model = resident.loaded()
            started.set()
            leave.wait(5)
            assert resident.batch is model
            stayed.append(names(residents))

    holder = threading.Thread(target=hold)
    holder.start()
    started.wait(5)
    with residents.lease(B) as resident:
        wait_for(lambda: "waiting for room" in resident.note)
        leave.set()
        resident.loaded()
        assert names(residents) == ["B"]
    holder.join()
    assert stayed == [["A", "B"]]


def test_a_failed_load_is_told_to_every_caller_and_tried_again(loader):
    loader.go.clear()
    loader.failures = [RequestError("The disk is on fire: get some water.")]
    residents = residents_of(loader)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(use, residents, A) for _ in range(4)]
        wait_for(lambda: residents.all() and residents.all()[0].leases == 4)
        loader.go.set()
        for answer in answers:
            with pytest.raises(RequestError, match="on fire"):
                answer.result()
    assert names(residents) == []
    use(residents, A)
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
    residents = residents_of(loader)
    use(residents, A)
    loader.failures = [error]
    use(residents, B)
    assert names(residents) == ["B"]
    loader.failures = [error, error]
    with pytest.raises(RequestError, match="not enough free memory for C"):
        use(residents, C)
    assert loader.loads == ["A", "B", "B", "C", "C"]
    use(residents, C)
    assert names(residents) == ["C"]


def test_weights_that_changed_are_loaded_anew_and_the_old_ones_go(loader):
    residents = residents_of(loader)
    first, second = (Source("A", contents=(("w", 1, time),)) for time in (1, 2))
    with residents.lease(first) as held:
        old = held.loaded()
        with residents.lease(second) as resident:
            assert resident.loaded() is not old and held.batch is old  # it plays on
        assert names(residents) == ["A", "A"]
    assert names(residents) == ["A"]
    use(residents, second)
    assert loader.loads == ["A", "A"]
    use(residents, first)  # an idle one goes at once
    assert names(residents) == ["A"]
    assert loader.loads == ["A", "A", "A"]


def test_other_errors_are_not_tried_again(loader):
    loader.failures = [KeyError("a bug")]
    with pytest.raises(KeyError):
        use(residents_of(loader), A)
    assert loader.loads == ["A"]


def test_an_unused_model_goes_after_its_time_and_a_used_one_does_not(loader):
    residents = residents_of(loader, idle_s=0.05)
    with residents.lease(A) as resident:
        resident.loaded()
        time.sleep(0.12)
        assert names(residents) == ["A"]
    wait_for(lambda: not names(residents))
    use(residents, A)
    assert loader.loads == ["A", "A"]
    residents.close()
    wait_for(lambda: not timers_of(residents))


def test_a_busy_day_leaves_one_timer_a_model(loader):
    residents = residents_of(loader, idle_s=60)
    for _ in range(10):
        use(residents, A)
    assert sum(not timer.finished.is_set() for timer in timers_of(residents)) == 1
    residents.close()


def test_a_model_is_gone_before_its_memory_is_given_back(loader, monkeypatch):
    residents = residents_of(loader)
    use(residents, A)
    reference = weakref.ref(residents.all()[0].batch)
    gone: list[bool] = []
    monkeypatch.setattr(
        "musicgen_ui.backends.model_cache.give_memory_back",
        lambda: gone.append(reference() is None),
    )
    residents.unload()
    assert gone == [True]


def test_unload_frees_the_idle_and_keeps_the_lent(loader):
    residents = residents_of(loader)
    use(residents, A)
    with residents.lease(B) as resident:
        resident.loaded()
        residents.unload()
        assert names(residents) == ["B"]
    residents.unload()
    assert names(residents) == []


def test_a_load_that_nobody_waits_for_is_given_up(loader):
    loader.go.clear()
    residents = residents_of(loader)
    with residents.lease(A) as resident:
        wait_for(lambda: resident.note == "reading A")
        with residents.lease(A):
            pass
        time.sleep(0.02)
        assert not resident.ready.done()  # one of two still waits
    wait_for(resident.ready.done)
    assert isinstance(resident.ready.exception(), Abandoned)
    assert names(residents) == []
    loader.go.set()
    use(residents, A)
    assert names(residents) == ["A"]


def test_a_model_whose_callers_left_during_the_last_of_its_load_goes_after_its_time():
    reading, left = threading.Event(), threading.Event()

    def load(source: Source, say: Callable[[str], None]) -> Model:
        reading.set()
        left.wait(5)
        return Model(10)

    residents = Residents(load, lambda source: 10, 1000, idle_s=0.02)
    with residents.lease(A) as resident:
        reading.wait(5)
    left.set()
    resident.loaded()
    wait_for(lambda: not names(residents))


def test_a_download_that_hangs_holds_no_other_model_up(loader):
    gate = threading.Event()

    def fetch(source: Source, say: Callable[[str], None]) -> None:
        if source is A:
            gate.wait(5)

    residents = Residents(loader, lambda source: 10, 1000, 0.0, fetch=fetch)
    with residents.lease(A) as slow:
        use(residents, B)
        assert loader.loads == ["B"] and not slow.ready.done()
        gate.set()
        slow.loaded()
    assert loader.loads == ["B", "A"]


def test_a_load_given_up_does_not_harm_the_next_one(loader):
    loader.go.clear()
    residents = residents_of(loader)
    for _ in range(20):
        with residents.lease(A):
            time.sleep(0.003)
    with residents.lease(A) as resident:
        loader.go.set()
        assert resident.loaded().nbytes == 10


def test_close_unloads_now_and_later_and_refuses(loader):
    residents = residents_of(loader)
    use(residents, A)
    with residents.lease(B) as resident:
        resident.loaded()
        residents.close()
        assert names(residents) == ["B"]
    assert names(residents) == []
    with pytest.raises(RequestError, match="closing"):
        use(residents, A)


def test_a_lease_that_ends_after_close_starts_no_timer(loader, monkeypatch):
    """It may end while Python shuts down, where a thread cannot be started any more."""
    residents = residents_of(loader, idle_s=60)
    with residents.lease(A) as resident:
        resident.loaded()
        residents.close()
        monkeypatch.setattr(threading.Timer, "start", lambda timer: pytest.fail("a timer"))
    assert not resident.batch


def test_a_crowd_with_little_room_gets_what_it_asks_for(loader):
    residents = residents_of(loader, budget_bytes=20, idle_s=0.01)

    def ask(i: int) -> bool:
        with residents.lease((A, B, C, D)[i % 4]) as resident:
            loaded = resident.loaded()
            time.sleep(0.001)
            return resident.batch is loaded

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(ask, range(100)))
    assert all(resident.leases == 0 for resident in residents.all())
