"""Markup wherever the page shows back what somebody typed or uploaded: it stays text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from playwright.sync_api import Page, expect

from musicgen_ui import takes
from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers.browser import Open, finished, generate, unfold
from tests.helpers.fakes import FakeBackend

MARKUP = (
    "<img src=x onerror=\"window.hacked='img'\"><script>window.hacked='script'</script>"
    "<svg onload=\"window.hacked='svg'\"></svg><b id=hostile>b</b>"
    "[link](javascript:window.hacked='link') ${window.hacked='template'} {{window.hacked=1}}"
)


def untouched(page: Page) -> None:
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#hostile, img[src=x], a[href^=javascript]").count() == 0


def test_markup_is_shown_as_text(open_page: Open, engine: FakeBackend, tmp_path: Path) -> None:
    """In a prompt, in an error, and in the name and settings of a clip that is a take."""
    page = open_page()
    unfold(page, "Advanced")
    page.get_by_label("Negative prompt").fill(MARKUP)
    for _ in range(2):  # the second one brings the list of takes
        generate(page, MARKUP, 1)
        finished(page)
        expect(page.locator("#player-alt")).to_contain_text("Mel spectrogram")  # the click's end
    expect(page.locator("#take_title")).to_contain_text("<img src=x onerror")
    expect(page.locator("#take_facts")).to_contain_text("<svg onload")
    expect(page.locator("#take_history label")).to_have_count(2)
    engine.failure = RequestError(f"There is no checkpoint “{MARKUP}”: choose another.")
    generate(page, "calm", 1)
    expect(page.get_by_test_id("toast-body")).to_contain_text("There is no checkpoint")
    finished(page, "failed")
    untouched(page)
    request = GenerationRequest(MARKUP, seed=5, negative_prompt=MARKUP, checkpoint="auto")
    tone = Clip(0.2 * np.sin(np.arange(16_000) / 9, dtype=np.float32)[None], 16_000)
    take = takes.save(Finished(0, tone, request, 0.0, 1.0), tmp_path)
    hostile = take.wav.rename(tmp_path / "<img src=x onerror=window.hacked='name'>.flac")
    unfold(page, "Start from audio")
    page.locator("#audio_prompt input[type=file]").set_input_files(hostile)
    expect(page.locator("#clip_line")).to_contain_text("but holds WAV")
    page.get_by_role("button", name="This is a take with seed 5").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(MARKUP)
    untouched(page)
