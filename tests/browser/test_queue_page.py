"""Takes that are queued from one page: rows with buttons, found again after a reload."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from tests.helpers.browser import Open, generate, serving
from tests.helpers.fakes import FakeBackend


def test_takes_are_queued_from_one_page(open_page: Open) -> None:
    engine = FakeBackend(speed=1.0, max_jobs=1)
    with serving(engine) as url:
        page = open_page(url=url)
        generate(page, "one", 30)
        # The spectrogram is drawn while the music arrives, where the finished one will be.
        page.wait_for_function("() => musicgenPlayer.arriving?.analyser.columns > 20")
        drawn = page.evaluate("""() => {
          const { image, edges } = musicgenPlayer.shown;
          return [image.width, edges.start_s, edges.end_s];
        }""")
        assert drawn == [30 * 16_000 // 256 + 1, -0.008, 30.008]
        expect(page.locator(".job")).to_have_count(1)
        expect(page.locator(".jobs")).to_be_hidden()  # the player says it all
        for number, prompt in enumerate(("two", "three"), 2):
            page.get_by_label("Prompt", exact=True).fill(prompt)
            page.locator("#generate").click()
            expect(page.locator(".job")).to_have_count(number)
        expect(page.locator(".job").nth(2)).to_contain_text("Waiting at place 2")
        page.get_by_role("button", name="Cancel three").press("Enter")
        expect(page.locator(".job")).to_have_count(2)
        focused = "() => document.activeElement.getAttribute('aria-label')"
        assert page.evaluate(focused) == "Cancel two"
        page.reload()
        expect(page.locator(".job-title")).to_have_text(["one", "two"])
        page.get_by_role("button", name="Stop one").click()
        expect(page.locator(".take-name")).to_have_text("one")
        expect(page.locator(".job")).to_have_text([re.compile("two.*Composing")])
        page.get_by_role("button", name="Listen to two").click()
        page.wait_for_function("() => musicgenPlayer.streaming === musicgenPlayer.state.job")
        page.locator("#stop").click()
        expect(page.locator(".take-name")).to_have_text("two")
        expect(page.locator("#take_history label")).to_have_count(2)
        page.close()
