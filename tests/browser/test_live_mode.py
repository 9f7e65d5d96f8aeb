"""A live piece in a browser: begun, changed while it plays, recorded, ended."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import expect

from musicgen_ui.engine.protocol import NO_LIVE_MODE
from musicgen_ui.steering import Steering
from tests.helpers.browser import Open, download, serving, unfold
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import wait_for

PLAYED = "() => musicgenPlayer.sound.position_s > {}"


CALM_HZ, DRUMS_HZ = 138.6, 196.0  # of the fake's tones for these prompts


def level(samples: np.ndarray, rate: int, hz: float) -> float:
    """How much of a frequency there is."""
    turns = np.exp(2j * np.pi * hz * np.arange(len(samples)) / rate)
    return float(np.abs(samples @ turns)) / len(samples)


def test_play_steer_record_and_stop(open_page: Open, engine: FakeBackend, tmp_path: Path) -> None:
    page = open_page()
    page.get_by_label("Prompt", exact=True).fill("calm")
    page.get_by_label("Live mode").check()
    expect(page.locator("#live_prompt_1 textarea")).to_have_value("calm")
    page.locator("#live_prompt_2 textarea").fill("loud drums")
    page.locator("#live_start").click()
    page.wait_for_function(PLAYED.format(0.3))
    for of_take in ("#take_title", "#take_actions", "#export_fold"):
        expect(page.locator(of_take)).to_be_hidden()  # another take's
    page.locator("#live_record").click()
    expect(page.locator("#live_record")).to_have_text("End recording")
    at_s = page.evaluate("musicgenPlayer.sound.position_s")
    page.locator("#live_fader input[type=number]").fill("1")
    page.locator("#live_fader input[type=number]").press("Tab")
    expect(page.locator("#live_line")).to_contain_text(re.compile(r"[01]\.\d s ahead · 125 ms"))
    wait_for(lambda: [row for row in engine.changes if row[0]], 30)
    ((changed_s, change),) = [row for row in engine.changes if row[0]]
    assert change.prompts == (("loud drums", 1.0),) and changed_s >= at_s
    page.wait_for_function(PLAYED.format(max(changed_s + 1, at_s + 3)))
    page.locator("#live_store_2").click()
    expect(page.locator("#live_recall_2")).to_be_enabled()
    # What the piece said before then may come after it: a click on a disabled button is lost.
    made_s = page.evaluate("musicgenPlayer.state.done_s")
    page.wait_for_function(f"() => musicgenPlayer.state.done_s > {made_s + 0.5}")
    page.locator("#live_recall_2").click()
    wait_for(lambda: [change for _, change in engine.changes if change.recall], 30)
    page.locator("#live_record").click()
    # The first take that a process saves imports what it needs.
    expect(page.locator("#live_line")).to_contain_text("s are kept as a take", timeout=60_000)
    assert page.evaluate("musicgenPlayer.sound.track.lost") == 0
    unfold(page, "More prompts")
    page.locator("#live_prompt_3 textarea").fill("strings")
    pad = page.get_by_role("slider", name="Mix of the prompts")
    expect(pad).to_have_attribute("aria-valuetext", "calm 34 %, loud drums 33 %, strings 33 %")
    pad.press("3")
    expect(pad).to_have_attribute("aria-valuetext", "calm 0 %, loud drums 0 %, strings 100 %")
    pad.press("Shift+ArrowUp")
    expect(pad).to_have_attribute("aria-valuetext", "calm 1 %, loud drums 0 %, strings 99 %")
    wait_for(lambda: engine.changes[-1][1].prompts == (("calm", 0.01), ("strings", 0.99)))
    page.locator("#live_stop").click()
    expect(page.locator(".player-text")).to_have_text(
        "The live piece has ended; the recording is a take"
    )
    slots = [change for _, change in engine.changes if change.store or change.recall]
    assert slots == [Steering(store=2), Steering(recall=2)]
    expect(page.locator("#take_title")).to_have_text("calm")
    expect(page.locator("#take_title")).to_be_visible()
    samples, rate = soundfile.read(download(page, "wav", tmp_path))
    assert len(samples) > 2 * rate
    first, last = samples[: rate // 4], samples[-rate // 2 :]
    assert level(first, rate, CALM_HZ) > 3 * level(first, rate, DRUMS_HZ)
    assert level(last, rate, DRUMS_HZ) > 3 * level(last, rate, CALM_HZ)  # it was recorded
    assert page.locator("#live_start").is_visible()


def test_zerogpu_says_why_there_is_no_live_mode(
    open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    with serving(FakeBackend()) as url:
        page = open_page(url=url)
        expect(page.locator("#no_live_mode")).to_have_text(NO_LIVE_MODE)
        expect(page.get_by_label("Live mode")).to_have_count(0)
        page.close()  # before its server
