"""The page behind a reverse proxy with a path of its own, and a password at the door."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import soundfile
from playwright.sync_api import Browser, expect

from tests.helpers.browser import serving
from tests.helpers.fakes import FakeBackend
from tests.helpers.reverse_proxy import under_music


def test_sign_in_generate_hear_and_download_under_music(chromium: Browser, tmp_path: Path) -> None:
    hidden = serving(FakeBackend(speed=4.0), auth="ann:secret", root_path="/music")
    with hidden as own, under_music(urlsplit(own).port) as url:
        page = chromium.new_page()
        page.set_default_timeout(20_000)
        page.goto(f"{url}/")
        page.get_by_label("username").fill("ann")
        page.get_by_label("password").fill("secret")
        page.get_by_role("button", name="Sign in").click()
        page.get_by_label("Prompt", exact=True).fill("waltz")
        page.get_by_role("button", name="Generate", exact=True).click()
        page.wait_for_function("() => window.musicgenPlayer?.sound.position_s > 0.5")
        expect(page.locator("#take_facts")).to_contain_text("10.0 s")
        with page.expect_download() as download:
            page.locator("#wav").click()
        download.value.save_as(tmp_path / "take.wav")
        assert soundfile.info(tmp_path / "take.wav").duration == 10.0
        page.close()
