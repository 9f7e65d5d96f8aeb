"""A tab finds its takes again; jobs outlive their page for a while, and no longer."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from musicgen_ui.backends.admission import Admission, Client
from musicgen_ui.request import FIELDS, GenerationRequest
from musicgen_ui.ui import sessions
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.page_jobs import BROKEN, DONE, UNDER_WAY
from musicgen_ui.ui.pages import Pages
from musicgen_ui.ui.sessions import Sessions
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import wait_for
from tests.helpers.page import land, state

KEY, OTHER = "a" * 32, "b" * 32
BEFORE, AFTER = SimpleNamespace(session_hash="before"), SimpleNamespace(session_hash="after")
COPY = SimpleNamespace(session_hash="copy")


def values(**changes: Any) -> dict[str, Any]:
    return {n: s.default for n, s in FIELDS.items()} | {"duration_s": 1.0, "seed": 7} | changes


class FakeJob:
    """A job that is under way until it is stopped."""

    def __init__(self, session: str = "") -> None:
        self.owner = Client(session)
        self.request = GenerationRequest()
        self.ended = self.left = False
        self.id = session


class Stopped(list[str]):
    """Stands for `Admission`: keeps the sessions whose jobs were stopped."""

    left: list[str]

    def stop(self, session: str) -> int:
        self.append(session)
        return 1

    leave = stop


@pytest.fixture
def stopped() -> Stopped:
    return Stopped()


@pytest.fixture
def tabs(stopped: Stopped) -> Sessions:
    return Sessions(stopped)


def busy_tab(tabs: Sessions, session: str, key: str) -> Any:
    tab = tabs.enter(session, key)
    tab.jobs = [FakeJob(session)]
    return tab


@pytest.mark.parametrize("key", ["", None, "short", "A" * 32, "a" * 33, "../" * 11])
def test_a_key_that_no_page_makes_opens_nothing(tabs: Sessions, key: Any) -> None:
    assert tabs.enter("one", key) is None and tabs.of("one") is None


def test_who_has_no_key_is_stopped_at_once_and_no_other_tab_is(
    tabs: Sessions, stopped: Stopped
) -> None:
    tabs.enter("page", KEY)
    tabs.lost("client")
    assert stopped == ["client"]


@pytest.mark.parametrize("way", ["lost", "left"])
@pytest.mark.parametrize("lent", [True, False])
def test_a_lent_gpu_makes_nothing_for_a_page_that_is_gone(
    lent: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", "true" if lent else "")
    backend = Admission(FakeBackend(speed=1.0), None)
    tabs = Handlers(backend).sessions
    tabs.enter("page", KEY)
    job = backend.submit(GenerationRequest(duration_s=20), Client("page"))
    tab = tabs.of("page")
    tab.begin(job)
    tabs.lost("page") if way == "lost" else tabs.left(KEY)
    assert job.stopping.wait(5 if lent else 0.2) == lent
    tab.cancel()
    job.stop()


@pytest.mark.parametrize("way", ["lost", "left"])
def test_a_tab_that_is_gone_is_stopped_after_its_grace_unless_it_comes_back(
    tabs: Sessions, stopped: Stopped, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(sessions, "GRACE_S", 0.05)
    monkeypatch.setattr(sessions, "LEFT_S", 0.05)
    go = {"lost": lambda: tabs.lost("two"), "left": lambda: tabs.left(KEY)}[way]
    busy_tab(tabs, "one", KEY)
    tabs.enter("two", KEY)
    tabs.lost("one")  # an earlier page's connection: the tab has another one
    go()
    tabs.enter("two", KEY)
    time.sleep(0.1)
    assert stopped == []
    go()
    wait_for(lambda: stopped)
    assert set(stopped) == {"one", "two"}


def test_tabs_are_bounded(tabs: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "TABS", 3)
    before = set(threading.enumerate())
    for number in range(10):
        for page in range(10):
            tabs.enter(f"{number}-{page}", f"{number:032x}")
    assert len(tabs._tabs) == 3 and len(tabs._keys) == 3 * sessions.SESSIONS_KEPT
    assert tabs.of("9-9") and not tabs.of("1-9")
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    assert not set(timers) - before


def test_a_flood_of_tabs_forgets_no_job_and_no_take(
    tabs: Sessions, stopped: Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "TABS", 5)
    busy_tab(tabs, "busy", KEY)
    tabs.enter("done", OTHER, "192.0.2.1").history = [[]]
    for number in range(20):
        tabs.enter(f"flood-{number}", f"{number:032x}")
    assert stopped == [f"flood-{number}" for number in range(17)]
    for number in range(20):  # takes of its own: the flood loses them first
        tabs.enter(f"more-{number}", f"{number:031x}f", "192.0.2.2").history = [[]]
    assert tabs.of("busy").is_busy and tabs.of("done").history and len(tabs._tabs) == 5
    assert "busy" not in stopped and "done" not in stopped


def test_tabs_are_opened_by_several_threads(
    tabs: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One opens while another one looks which tab to forget."""
    monkeypatch.setattr(sessions, "TABS", 1)
    opened = threading.Thread(target=tabs.enter, args=("late", f"{9:032x}"))

    class Job(FakeJob):
        @property
        def ended(self) -> bool:
            if not opened.ident:
                opened.start()
                opened.join(0.2)  # it may have to wait for its turn
            return False

        @ended.setter
        def ended(self, _: bool) -> None: ...

    tabs.enter("one", KEY).jobs = [Job("one")]
    tabs.enter("two", OTHER)
    opened.join()
    assert tabs.of("one") and tabs.of("late")


def test_a_session_that_takes_many_keys_is_in_one_tab(tabs: Sessions) -> None:
    for key in (KEY, OTHER, KEY + OTHER):
        tab = tabs.enter("page", key)
    assert tabs.of("page") is tab and [t.sessions for t in tabs._tabs.values()] == [[], ["page"]]


@pytest.mark.parametrize("closed", ["first", "second"])
def test_a_duplicated_tab_that_closes_ends_nothing_of_the_other(
    tabs: Sessions, stopped: Stopped, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    monkeypatch.setattr(sessions, "LEFT_S", 0.02)
    monkeypatch.setattr(sessions, "GRACE_S", 0.02)
    pages_of = {"first": KEY + "1" * 32, "second": KEY + "2" * 32}  # the copy has the same key
    for session, key in pages_of.items():
        busy_tab(tabs, session, key)
    tabs.left(pages_of[closed])
    tabs.lost(closed)
    time.sleep(0.1)
    assert stopped == []
    (other,) = pages_of.keys() - {closed}
    tabs.left(pages_of[other])
    wait_for(lambda: set(stopped) == {"first", "second"})


def test_stop_ends_the_jobs_of_its_own_page(
    stopped: Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = stopped.stop
    monkeypatch.setattr(stopped, "stop", lambda session: stop(session) * (session == "first"))
    tabs = Sessions(stopped)
    for session in ("first", "second"):
        tabs.enter(session, KEY)
    assert tabs.stop("first") == 1 and stopped == ["first"]
    assert tabs.stop("second") == 1  # it has none: the one that it shows is its tab's


async def begun(handlers: Handlers, **changes: Any) -> None:
    """A job whose page loses the connection after the first audio."""
    job = handlers.compose({}, BEFORE, **values(**changes))
    async for update in job:
        if update.get("live", {}).get("stage") == "composing":
            break
    await job.aclose()
    handlers.closed(BEFORE)


async def followed(handlers: Handlers, page: Any = AFTER) -> list[dict[str, Any]]:
    key = handlers.sessions.of(page.session_hash).job.id
    updates = [update async for update in handlers.follow(key, page)]
    return updates + await land(handlers, updates, page=page)


def test_a_job_goes_on_when_its_page_is_gone_and_the_next_page_shows_its_take(
    tmp_path: Path,
) -> None:
    engine = FakeBackend(speed=5.0, chunk_s=0.1)
    handlers = Handlers(Admission(engine, tmp_path))
    page = Pages(handlers.sessions)

    async def run() -> list[list[dict[str, Any]]]:
        assert page.enter(KEY, BEFORE) == {}
        await begun(handlers, prompt="mine")
        assert page.enter(OTHER, SimpleNamespace(session_hash="other")) == {}
        found = page.enter(KEY, AFTER)
        assert found["live"]["text"] == UNDER_WAY
        assert found["job_id"] == handlers.sessions.of("after").job.id
        page.enter(KEY, COPY)
        return await asyncio.gather(followed(handlers), followed(handlers, COPY))

    first, second = asyncio.run(run())
    assert any(UNDER_WAY in update.get("live", {}).get("text", "") for update in first)
    for updates in (first, second):  # two pages of a tab show the same
        end = {name: value for update in updates for name, value in update.items()}
        assert end["history"][0][0].settings["prompt"] == "mine" and len(end["history"]) == 1
        assert end["live"]["text"] == DONE and not end["stop"]["visible"]
        assert end["live"]["done_s"] == end["live"]["total_s"]
        assert end["history"][0][0].settings["made_s"] == 1.0
    assert engine.running == 0 and len(handlers.backend) == 0
    again = page.enter(KEY, SimpleNamespace(session_hash="third"))
    assert again["take_audio"] == end["take_audio"]
    assert not set(again) & set(FIELDS)  # the browser has the form


def test_a_page_that_comes_back_late_shows_the_take_at_once(tmp_path: Path) -> None:
    engine = FakeBackend(speed=20.0, chunk_s=0.1)
    handlers = Handlers(Admission(engine, tmp_path))
    page = Pages(handlers.sessions)
    page.enter(KEY, BEFORE)
    asyncio.run(begun(handlers, prompt="mine"))
    wait_for(lambda: handlers.sessions.of("before").job.ended)
    found = page.enter(KEY, AFTER)
    assert found["live"]["text"] == DONE and "job_id" not in found
    assert Path(found["take_audio"]["wav"]["path"]).exists()


def test_a_job_that_fails_while_its_page_is_gone_says_so(tmp_path: Path) -> None:
    engine = FakeBackend(speed=5.0, chunk_s=0.1)
    handlers = Handlers(Admission(engine, tmp_path))
    page = Pages(handlers.sessions)

    async def run() -> list[dict[str, Any]]:
        page.enter(KEY, BEFORE)
        await begun(handlers)
        page.enter(KEY, AFTER)
        engine.failure = ValueError("a bug")
        return await followed(handlers)

    end = state(asyncio.run(run()))
    assert end["live"]["text"] == BROKEN and not end["stop"]["visible"]
