"""Several tabs of a real browser that make music at once, with nothing faked."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.helpers.browser import Open, finished, generate, serving

TABS = 6


@pytest.mark.long
@pytest.mark.timeout(600)
def test_each_tab_hears_its_own_music(open_page: Open) -> None:
    with serving(checkpoint="bundled", device="cpu", jobs=4) as url:
        pages = [open_page(url=url) for _ in range(TABS)]
        for number, page in enumerate(pages):
            generate(page, f"techno {number}", 4 + number)
        for page in pages:
            expect(page.locator(".player[data-stage=finished]")).to_be_visible(timeout=200_000)
        for number, page in enumerate(pages):
            finished(page)
            expect(page.locator("#take_title")).to_have_text(f"techno {number}")
            expect(page.locator("#take_facts")).to_contain_text(f"{4 + number}.0 s")
            heard = f"() => musicgenPlayer.sound.position_s > {number + 3.9}"
            page.wait_for_function(heard, timeout=60_000)
