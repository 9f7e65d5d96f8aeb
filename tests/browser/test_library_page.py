"""The library's cards in the browser."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import expect

from tests.helpers.browser import Open, finished, generate, serving
from tests.helpers.fakes import FakeBackend

# What a folder or another program is handed when the element is dragged there.
DRAGGED = """(element) => {
  const dataTransfer = new DataTransfer();
  element.dispatchEvent(new DragEvent('dragstart', { dataTransfer, bubbles: true }));
  return dataTransfer.getData('DownloadURL');
}"""


def test_what_is_done_with_a_card_follows_its_take(open_page: Open, tmp_path: Path) -> None:
    """The list changes while a title is typed: every element stands for another take then."""
    with serving(FakeBackend(speed=2.0), output_folder=str(tmp_path)) as url:
        page = open_page(url=url)
        generate(page, "calm", 1)
        finished(page)
        expect(page.locator(".card")).to_have_count(1)
        name = page.locator(".card").get_attribute("data-name")
        first = page.locator(f".card[data-name='{name}']")
        other = page.locator(f".card:not([data-name='{name}'])")
        generate(page, "calm", 6)
        first.locator(".card-check input").check()
        first.locator(".card-title").press("End")
        first.locator(".card-title").press_sequentially(" sea")
        first.locator(".card-title").press("ArrowLeft")
        expect(page.locator(".card")).to_have_count(2)
        expect(other).to_have_count(1)
        assert first.locator(".card-check input").is_checked()
        assert not other.locator(".card-check input").is_checked()
        expect(page.locator(".library-count")).to_have_text("1 selected")
        expect(other.locator(".card-title")).to_have_value("calm")
        expect(first.locator(".card-title")).to_have_value("calm sea")
        expect(first.locator(".card-title")).to_be_focused()
        page.keyboard.type("t")  # where the caret was
        page.keyboard.press("Enter")
        title = "[...document.querySelectorAll('.card-title')].map((input) => input.defaultValue)"
        page.wait_for_function(f"() => {title}.join() === 'calm,calm seta'")
        dragged = first.locator(".card-grip").evaluate(DRAGGED)
        assert dragged == f"application/octet-stream:{name}.wav:{url}takes/{name}.wav"
        page.locator(".card.is-current").wait_for()
        current = page.locator(".card.is-current").get_attribute("data-name")
        kind, file, address = page.locator("#wav").evaluate(DRAGGED).split(":", 2)
        assert (kind, file) == ("application/octet-stream", f"{current}.wav")
        assert page.request.get(address).body() == (tmp_path / f"{current}.wav").read_bytes()
        # Another take comes into the player, with nothing else that the library would hear of.
        page.evaluate(
            """id => {
              musicgenPlayer.sound.stop();
              musicgenPlayer.streaming = 'job';
              const { take } = musicgenPlayer;
              musicgenPlayer.show_take({ ...take, id, job: 'job', as_streamed: true });
            }""",
            name,
        )
        expect(first).to_have_class(re.compile("is-current"))
        page.close()
