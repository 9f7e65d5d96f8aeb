"""Files that are handed to the page: dropped anywhere, too large, refused on the way; recording."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Page, expect

from tests.helpers.browser import Open, serving
from tests.helpers.fakes import FakeBackend

DROP = """([target, name, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type: 'audio/wav' }));
  const event = (kind) => new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer });
  const there = document.querySelector(target);
  there.dispatchEvent(event('dragover'));
  return !there.dispatchEvent(event('drop')); // whether the browser is kept from opening it
}"""


def drop(page: Page, target: str, name: str, content: bytes) -> None:
    assert page.evaluate(DROP, [target, name, base64.b64encode(content).decode()])


@pytest.fixture
def tune(tmp_path: Path) -> Path:
    path = tmp_path / "tune.wav"
    soundfile.write(path, 0.2 * np.sin(np.arange(32_000) / 9), 16_000)
    return path


def test_a_file_is_taken_wherever_it_is_dropped_and_what_fails_says_why(
    open_page: Open, tune: Path
) -> None:
    with serving(FakeBackend(), max_upload_mb=1) as url:
        page = open_page(url=url)
        told, line = page.locator(".notice-words"), page.locator("#clip_line")
        drop(page, "#prompt textarea", "large.wav", bytes(1_200_000))
        expect(told).to_contain_text("1 MB")
        drop(page, "#take_title", "tune.wav", tune.read_bytes())
        expect(line).to_contain_text("of 2.0 s")  # the fold opened
        page.locator("#audio_prompt").get_by_label("Clear").click()
        expect(line).not_to_contain_text("of 2.0 s")
        expect(page.locator("#audio_prompt").get_by_label("Record audio")).to_be_visible()
        expect(page.locator("#unrecorded")).to_be_hidden()
        page.locator(".notice-close").click()
        large = tune.with_name("large.wav")
        large.write_bytes(bytes(1_200_000))
        page.locator("#audio_prompt input[type=file]").set_input_files(large)
        expect(told).to_contain_text("large.wav")
        page.locator(".notice-close").click()
        drop(page, "body", "letter.docx", b"Dear")
        expect(line.get_by_role("alert")).to_be_visible()
        sent = "**/gradio_api/upload*"
        page.route(sent, lambda r: r.fulfill(status=413, content_type="text/html", body="<p>no"))
        page.locator("#audio_prompt input[type=file]").set_input_files(tune)
        expect(told).to_contain_text("larger than")


def test_a_page_without_a_microphone_says_why_and_offers_none(open_page: Open) -> None:
    """As over http from another computer."""
    page = open_page(script="Object.defineProperty(window, 'isSecureContext', { value: false })")
    page.get_by_role("button", name="Start from audio").click()
    expect(page.locator("#unrecorded")).to_contain_text("https")
    expect(page.locator("#audio_prompt").get_by_label("Record audio")).to_be_hidden()
