"""What a visitor finds who lost the connection, closed the page or loaded it anew."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from musicgen_ui.ui import sessions
from tests.helpers.browser import finished, generate, set_number, settled, unfold
from tests.helpers.fakes import FakeBackend
from tests.helpers.flaky_proxy import Proxy
from tests.helpers.local import wait_for

HEARD = "() => musicgenPlayer.sound.position_s > 0.2"


@pytest.fixture
def line(served: tuple[str, FakeBackend]) -> Iterator[Proxy]:
    """The connection between browser and server."""
    proxy = Proxy(int(served[0].rstrip("/").rpartition(":")[2]))
    yield proxy
    proxy.close()


@pytest.fixture
def page(chromium: Browser, engine: FakeBackend, line: Proxy) -> Iterator[Page]:
    """A page behind it; what the browser logs of a broken connection is nothing odd."""
    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(f"http://127.0.0.1:{line.port}/")
    settled(page)
    yield page
    context.close()


def test_a_take_that_was_finished_while_the_connection_was_lost_is_there_when_it_is_back(
    page: Page, line: Proxy, engine: FakeBackend
) -> None:
    engine.speed = 3.0
    generate(page, "lost and found", 6)
    page.wait_for_function(HEARD)
    line.cut()
    expect(page.get_by_test_id("toast-body")).to_contain_text("Connection to the server was lost")
    wait_for(lambda: not engine.running)
    line.mend()
    expect(page.locator("#take_title")).to_have_text("lost and found")
    expect(page.locator("#take_facts")).to_contain_text("6.0 s")
    expect(page.locator(".player-text")).to_contain_text("Finished while the page was away")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("lost and found")
    generate(page, "another", 1)
    finished(page)
    expect(page.locator("#take_history label")).to_have_count(2)


def test_a_take_under_way_is_waited_for_after_the_connection_is_back_and_can_be_stopped(
    page: Page, line: Proxy, engine: FakeBackend
) -> None:
    engine.speed = 1.0
    generate(page, "still going", 30)
    page.wait_for_function(HEARD)
    line.cut()
    page.wait_for_timeout(500)
    line.mend()
    expect(page.locator(".player-text")).to_contain_text("still being made")
    expect(page.locator("#generate")).to_have_text("Queue another")
    assert engine.running == 1
    page.locator("#stop").click()
    expect(page.locator("#take_title")).to_have_text("still going")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".player-text")).to_contain_text("here is your take")


def test_a_page_that_does_not_come_back_frees_its_place(
    page: Page, line: Proxy, engine: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "GRACE_S", 0.5)
    engine.speed = 1.0
    generate(page, length_s=30)
    page.wait_for_function(HEARD)
    line.cut()
    wait_for(lambda: not engine.running)


def test_a_page_that_is_loaded_anew_keeps_takes_and_settings_and_another_tab_has_none(
    page: Page, line: Proxy, engine: FakeBackend
) -> None:
    engine.speed = 20.0
    unfold(page, "Advanced")
    page.get_by_label("Negative prompt").fill("vocals")
    set_number(page, "variations", 2)
    generate(page, "mine", 1)
    finished(page)
    page.reload()
    expect(page.locator("#take_title")).to_have_text("mine")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("mine")
    unfold(page, "Advanced")
    expect(page.locator("#variations input[type=number]")).to_have_value("2")
    expect(page.get_by_label("Negative prompt")).to_have_value("vocals")
    expect(page.locator("#seed input")).to_have_value("-1")  # as it was asked for, not as drawn
    page.locator("#same_seed").click()
    other = page.context.new_page()
    other.goto(f"http://127.0.0.1:{line.port}/")
    settled(other)
    expect(other.locator("#take_title")).not_to_have_text(re.compile("mine"))
