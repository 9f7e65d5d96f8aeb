"""README's picture of live mode, taken of the page with the bundled model.

`python -m tests.helpers.pictures` writes assets/live_mode.png.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from musicgen_ui.files import ASSETS
from tests.helpers.browser import serving

PROMPTS = (
    "lo-fi hip hop, mellow electric piano",
    "techno with a hard kick",
    "funk with slap bass",
    "ambient pads, calm",
)
PATH = (
    (0.08, 0.92),
    (0.92, 0.9),
    (0.95, 0.12),
    (0.78, 0.3),
)  # of the pad, one by one
STEP_S = 4
COLOURS = 160  # of the file: half its size, no difference to the eye


def live_mode(page: Page) -> bytes:
    """The page while a piece of four prompts plays, as PNG."""
    page.locator("#live_mode input").check()
    page.locator("#live_more button").first.click()
    for number, words in enumerate(PROMPTS, 1):
        page.locator(f"#live_prompt_{number} textarea").fill(words)
    page.locator("#live_more button").first.click()
    page.locator("#live_temperature input[type=number]").fill("1")
    page.locator("#live_temperature input[type=number]").press("Tab")
    pad = page.locator(".pad-area")
    pad.wait_for()
    page.locator(".pad-field").press("3")
    page.evaluate("document.querySelector('#live_mode').scrollIntoView()")
    page.locator("#live_start").click()
    page.wait_for_function("() => window.musicgenPlayer.sound.position_s > 1", timeout=60_000)
    box = pad.bounding_box()
    assert box
    for x, y in PATH:
        page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.wait_for_timeout(1000 * STEP_S)
    page.mouse.move(0, 0)
    picture = page.screenshot()
    page.locator("#live_stop").click()
    page.wait_for_timeout(1000)
    return picture


def main(target: Path = ASSETS / "live_mode.png") -> None:
    """Takes the picture."""
    music = tempfile.mkdtemp()
    with serving(None, checkpoint="bundled", output_folder=music) as url, sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--headless=new", "--no-sandbox", "--autoplay-policy=no-user-gesture-required"],
        )
        page = browser.new_page(viewport={"width": 1280, "height": 850})
        page.goto(url)
        page.wait_for_function("() => window.musicgenPlayer")
        page.wait_for_timeout(3000)
        picture = Image.open(io.BytesIO(live_mode(page))).convert("RGB")
        browser.close()
    picture.quantize(COLOURS).save(target, optimize=True)


if __name__ == "__main__":
    main()
