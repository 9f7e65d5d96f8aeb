"""A tab finds its takes again; jobs outlive their page for a while, and no longer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from musicgen_ui.backends.admission import Desk, Visitor
from musicgen_ui.request import FIELDS
from musicgen_ui.ui import pages, sessions
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.pages import Pages
from musicgen_ui.ui.sessions import Recall
from tests.helpers.fakes import FakeEngine
from tests.helpers.local import wait_for

KEY, OTHER = "a" * 32, "b" * 32
BEFORE, AFTER = SimpleNamespace(session_hash="before"), SimpleNamespace(session_hash="after")


def values(**changes: Any) -> dict[str, Any]:
    return {n: s.default for n, s in FIELDS.items()} | {"duration_s": 1.0, "seed": 7} | changes


@pytest.fixture
def stopped() -> list[str]:
    return []


@pytest.fixture
def tabs(stopped: list[str]) -> Recall:
    return Recall(lambda session: stopped.append(session) or 1)


@pytest.mark.parametrize("key", ["", None, "short", "A" * 32, "a" * 33, "../" * 11])
def test_a_key_that_no_page_makes_opens_nothing(tabs: Recall, key: Any) -> None:
    assert tabs.enter("one", key) is None and tabs.of("one") is None


def test_who_has_no_key_is_stopped_at_once_and_no_other_tab_is(
    tabs: Recall, stopped: list[str]
) -> None:
    tabs.enter("page", KEY)
    tabs.lost("client")
    assert stopped == ["client"]


@pytest.mark.parametrize("way", ["lost", "left"])
@pytest.mark.parametrize("lent", [True, False])
def test_a_lent_gpu_makes_nothing_for_a_page_that_is_gone(
    lent: bool, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", "true" if lent else "")
    desk = Desk(1)
    tabs = Handlers(FakeEngine(), tmp_path, desk).recall
    tab = tabs.enter("page", KEY)
    tab.jobs = 1
    with desk.place(Visitor("page")) as stop:
        tabs.lost("page") if way == "lost" else tabs.left(KEY)
        assert stop.wait(5 if lent else 0.2) == lent
    tab.cancel()


@pytest.mark.parametrize("way", ["lost", "left"])
def test_a_tab_that_is_gone_is_stopped_after_its_grace_unless_it_comes_back(
    tabs: Recall, stopped: list[str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(sessions, "GRACE_S", 0.05)
    monkeypatch.setattr(sessions, "LEFT_S", 0.05)
    go = {"lost": lambda: tabs.lost("two"), "left": lambda: tabs.left(KEY)}[way]
    tabs.enter("one", KEY).jobs = 1
    tabs.enter("two", KEY)
    tabs.lost("one")  # an earlier page's connection: the tab has another one
    go()
    tabs.enter("two", KEY)
    time.sleep(0.1)
    assert stopped == []
    go()
    wait_for(lambda: stopped)
    assert set(stopped) == {"one", "two"}


def test_tabs_are_bounded(tabs: Recall, monkeypatch: pytest.MonkeyPatch) -> None:
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
    tabs: Recall, stopped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "TABS", 5)
    tabs.enter("busy", KEY).jobs = 1
    tabs.enter("done", OTHER, "192.0.2.1").history = [[]]
    for number in range(20):
        tabs.enter(f"flood-{number}", f"{number:032x}")
    assert stopped == [f"flood-{number}" for number in range(17)]
    for number in range(20):  # takes of its own: the flood loses them first
        tabs.enter(f"more-{number}", f"{number:031x}f", "192.0.2.2").history = [[]]
    assert tabs.of("busy").jobs == 1 and tabs.of("done").history and len(tabs._tabs) == 5
    assert "busy" not in stopped and "done" not in stopped


def test_a_session_that_takes_many_keys_is_in_one_tab(tabs: Recall) -> None:
    for key in (KEY, OTHER, KEY + OTHER):
        tab = tabs.enter("page", key)
    assert tabs.of("page") is tab and [t.sessions for t in tabs._tabs.values()] == [[], ["page"]]


@pytest.mark.parametrize("closed", ["first", "second"])
def test_a_duplicated_tab_that_closes_ends_nothing_of_the_other(
    tabs: Recall, stopped: list[str], monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    monkeypatch.setattr(sessions, "LEFT_S", 0.02)
    monkeypatch.setattr(sessions, "GRACE_S", 0.02)
    pages_of = {"first": KEY + "1" * 32, "second": KEY + "2" * 32}  # the copy has the same key
    for session, key in pages_of.items():
        tabs.enter(session, key).jobs = 1
    tabs.left(pages_of[closed])
    tabs.lost(closed)
    time.sleep(0.1)
    assert stopped == []
    (other,) = pages_of.keys() - {closed}
    tabs.left(pages_of[other])
    wait_for(lambda: set(stopped) == {"first", "second"})


def test_stop_ends_the_jobs_of_its_own_page(stopped: list[str]) -> None:
    tabs = Recall(lambda session: stopped.append(session) or session == "first")
    for session in ("first", "second"):
        tabs.enter(session, KEY)
    assert tabs.stop("first") == 1 and stopped == ["first"]
    assert tabs.stop("second") == 1  # it has none: the one that it shows is its tab's


def test_a_job_goes_on_when_its_page_is_gone_and_the_next_page_shows_its_take(
    tmp_path: Path,
) -> None:
    engine = FakeEngine(speed=5.0, chunk_s=0.1)
    handlers = Handlers(engine, tmp_path, Desk(3))
    page = Pages(handlers.recall)

    async def run() -> dict[str, Any]:
        assert page.enter(KEY, BEFORE) == {}
        job = handlers.compose([], {}, BEFORE, **values(prompt="mine"))
        async for update in job:
            if update.get("live", {}).get("chunks"):
                break
        await job.aclose()
        handlers.closed(BEFORE)
        assert page.enter(OTHER, SimpleNamespace(session_hash="other")) == {}
        found = page.enter(KEY, AFTER)
        assert found["live"]["text"] == pages.UNDER_WAY and not found["generate"]["visible"]
        assert page.news(AFTER) == {}
        while not (news := page.news(AFTER)):
            await asyncio.sleep(0.02)
        return news

    news = asyncio.run(run())
    assert news["history"][0][0].settings["prompt"] == "mine"
    assert news["live"]["text"] == pages.DONE and news["generate"]["visible"]
    assert news["live"]["done_s"] == news["live"]["total_s"]
    assert news["history"][0][0].settings["made_s"] == 1.0
    assert engine.running == 0 and len(handlers.desk) == 0
    again = page.enter(KEY, SimpleNamespace(session_hash="third"))
    assert again["take_audio"] == news["take_audio"] and again["prompt"] == "mine"


def test_a_job_that_breaks_off_while_its_page_is_gone_is_told(tmp_path: Path) -> None:
    engine = FakeEngine(speed=5.0, chunk_s=0.1)
    handlers = Handlers(engine, tmp_path, Desk(3))
    page = Pages(handlers.recall)

    async def run() -> dict[str, Any]:
        page.enter(KEY, BEFORE)
        job = handlers.compose([], {}, BEFORE, **values())
        async for update in job:
            if update.get("live", {}).get("chunks"):
                break
        await job.aclose()
        engine.failure = ValueError("a bug")
        page.enter(KEY, AFTER)
        while not (news := page.news(AFTER)):
            await asyncio.sleep(0.02)
        return news

    news = asyncio.run(run())
    assert news["live"]["text"] == pages.BROKEN and news["generate"]["visible"]


def test_updates_that_nobody_reads_are_not_kept() -> None:
    made = []

    async def updates() -> AsyncGenerator[int, None]:
        for number in range(100):
            made.append(number)
            yield number
            await asyncio.sleep(0)

    async def run() -> int:
        tab = sessions.Tab()
        reading = sessions.outliving(tab, updates())
        await anext(reading)
        await reading.aclose()
        while tab.jobs:
            await asyncio.sleep(0)
        return len(made)

    assert asyncio.run(run()) == 100
