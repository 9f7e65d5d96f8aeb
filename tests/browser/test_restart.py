"""What a page shows whose server broke off and was started again."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, expect

from musicgen_ui.server import gradio_patches
from musicgen_ui.server.app import close, launch
from musicgen_ui.server.settings import Settings
from tests.helpers.browser import generate, set_number, settled, unfold
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import free_port


def test_what_was_typed_outlives_the_server(
    chromium: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # noted, to be set back
    settings = Settings(port=free_port())
    demo, temporary = launch(settings, FakeBackend(speed=1.0))
    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    try:
        page.goto(f"http://127.0.0.1:{settings.port}/")
        settled(page)
        unfold(page, "Advanced")
        page.get_by_label("Negative prompt").fill("vocals")
        set_number(page, "variations", 2)
        generate(page, "a take", 30)
        page.wait_for_function("() => musicgenPlayer.sound.position_s > 0.2")
        page.get_by_label("Prompt", exact=True).fill("typed since then")
        page.wait_for_timeout(300)
        gradio_patches.hang_up(demo.server)  # before anybody is told
        close(demo, temporary)
        demo, temporary = launch(settings, FakeBackend())
        page.locator(".player[data-stage=failed]").wait_for()  # it was loaded anew
        expect(page.locator("#generate")).to_be_visible()
        expect(page.get_by_label("Prompt", exact=True)).to_have_value("typed since then")
        unfold(page, "Advanced")
        expect(page.get_by_label("Negative prompt")).to_have_value("vocals")
        expect(page.locator("#variations input[type=number]")).to_have_value("2")
    finally:
        context.close()
        close(demo, temporary)
