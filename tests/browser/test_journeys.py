"""What people do with the page, in Chromium."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Page, expect

from musicgen_ui.ui import sessions
from tests.helpers.browser import Open, download, finished, generate, set_number, unfold
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import wait_for

HEARD = "() => musicgenPlayer.sound.position_s"


NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, img')]
  .filter(e => e.offsetParent && e.type !== 'file')
  .filter(e => !(e.ariaLabel || e.innerText || e.title || e.alt || e.labels?.length))
  .filter(e => !e.querySelector('img[alt]'))
  .map(e => e.outerHTML.slice(0, 120))"""
TARGETS = "all => all.map(e => e.getBoundingClientRect()).map(b => Math.min(b.width, b.height))"
PLACES = """['#live', '.player-picture', '.player-foot', '#take_title', '#go'].map(s =>
  Math.round(document.querySelector(s).getBoundingClientRect().top + scrollY))"""


def fits(page: Page, screen: str, scheme: str) -> None:
    """The page at rest: its colors, what is above the fold, sizes and names."""
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == scheme
    for name in ("#prompt", "#generate"):  # above the fold
        box = page.locator(name).bounding_box()
        assert box is not None and box["y"] >= 0
        assert box["y"] + box["height"] <= page.evaluate("innerHeight")
    sizes = page.locator(".player-foot :is(button, input)").evaluate_all(TARGETS)
    assert len(sizes) == 7 and min(sizes) >= (44 if screen == "phone" else 24)
    unfold(page, "Start from audio")
    unfold(page, "Advanced")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(NAMELESS) == []
    expect(page.locator(".player-said")).to_have_attribute("aria-live", "polite")
    unfold(page, "Start from audio")  # closed again
    unfold(page, "Advanced")


@pytest.mark.parametrize(("screen", "scheme"), [("phone", "dark"), ("desk", "light")])
def test_page_fits_and_a_take_is_made_heard_and_downloaded(
    open_page: Open, engine: FakeBackend, tmp_path: Path, screen: str, scheme: str
) -> None:
    page = open_page(screen, scheme)
    fits(page, screen, scheme)
    engine.speed = 2.0
    page.get_by_label("Prompt", exact=True).fill("slow waltz")
    set_number(page, "duration_s", 4)
    before = page.evaluate(PLACES)
    generate(page, "slow waltz", 4)
    expect(page.locator(".player-text")).to_have_text(
        re.compile(r"^Composing [123]\.\d of 4.0 s at 2")
    )
    page.wait_for_function("() => musicgenPlayer.sound.position_s > 0.5")
    assert page.evaluate(PLACES) == before  # streaming moves nothing
    heard_s = page.evaluate(HEARD)
    page.wait_for_function(f"() => musicgenPlayer.sound.position_s > {heard_s} + 0.3")
    finished(page)
    expect(page.locator("#take_title")).to_have_text("slow waltz")
    assert page.evaluate(PLACES)[3] == before[3]
    expect(page.locator("#player-alt")).to_contain_text("Mel spectrogram")
    page.wait_for_function("() => musicgenPlayer.sound.position_s > 3.9")
    assert page.evaluate("musicgenPlayer.sound.track.lost") == 0
    wav, flac = (download(page, kind, tmp_path) for kind in ("wav", "flac"))
    assert wav.name.startswith("slow-waltz")
    for path in (wav, flac):
        samples, rate = soundfile.read(path)
        assert len(samples) == 4 * rate and np.abs(samples).max() > 0.1


def test_slower_than_real_time_buffers_first(open_page: Open, engine: FakeBackend) -> None:
    page = open_page()
    engine.speed = 0.6
    generate(page, length_s=3)
    page.wait_for_function("() => musicgenPlayer.sound.track?.received_s > 0.5")
    assert page.evaluate(HEARD) == 0
    page.wait_for_function("() => musicgenPlayer.sound.position_s > 2.9")
    assert page.evaluate("musicgenPlayer.sound.track.lost") == 0


def test_stop_is_acknowledged_at_once_and_keeps_the_partial(
    open_page: Open, engine: FakeBackend, tmp_path: Path
) -> None:
    page = open_page()
    engine.speed = 1.0
    generate(page, length_s=25)
    page.wait_for_function("() => musicgenPlayer.sound.position_s > 0.2")
    page.locator("#stop").click()
    finished(page, "stopped")
    expect(page.locator(".player-text")).to_have_text(re.compile("Stopped: .* kept as a take"))
    made_s = soundfile.info(download(page, "wav", tmp_path)).duration
    assert 0.2 < made_s < 15
    generate(page, "again", 1)  # the page is ready for more
    expect(page.locator("#take_title")).to_have_text("again")
    expect(page.locator("#take_history label")).to_have_count(2)


def test_two_tabs_do_not_stop_each_other(open_page: Open, engine: FakeBackend) -> None:
    engine.speed = 2.0
    one, two = open_page(), open_page()
    generate(one, "one", 20)
    generate(two, "two", 5)
    one.wait_for_function("() => musicgenPlayer.sound.position_s > 0.2")
    two.wait_for_function("() => musicgenPlayer.sound.position_s > 0.2")
    one.locator("#stop").click()
    finished(one, "stopped")
    finished(two)
    expect(two.locator("#take_facts")).to_contain_text("5.0 s")


def test_a_closed_tab_stops_its_job(
    open_page: Open, engine: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LEFT_S", 0.5)
    engine.speed = 1.0
    page = open_page()
    generate(page, length_s=30)
    page.wait_for_function("() => musicgenPlayer.sound.track?.received > 0")
    page.close()
    wait_for(lambda: engine.running == 0, 20)


def test_an_upload_is_continued_and_a_take_too(
    open_page: Open, engine: FakeBackend, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, 0.2 * np.sin(np.arange(32_000) / 9), 16_000)
    page = open_page()
    unfold(page, "Start from audio")
    page.locator("#audio_prompt input[type=file]").set_input_files(clip)
    expect(page.locator("#clip_line")).to_contain_text("last 2.0 s of 2.0 s, 10.0 s new")
    expect(page.locator("#audio_prompt").get_by_label("Play", exact=True)).to_be_visible()
    set_number(page, "duration_s", 29)
    expect(page.locator("#clip_line")).to_contain_text("last 2.0 s of 2.0 s, 29.0 s new, 30 s at")
    generate(page, length_s=3)
    expect(page.locator("#take_facts")).to_contain_text("after your clip of")
    finished(page)
    assert soundfile.info(download(page, "wav", tmp_path)).duration == 5.0
    page.locator("#continue").click()
    expect(page.locator("#clip_line")).to_contain_text("of 5.0 s")
    expect(page.locator("#offer")).to_have_text(re.compile("use its settings"))
    page.locator("#same_seed").click()
    seed = str(engine.requests[-1].seed)
    expect(page.locator("#seed input")).to_have_value(seed)
    lock = page.get_by_label("Keep this seed")
    expect(lock).to_be_checked()
    lock.uncheck()
    expect(page.locator("#seed input")).to_have_value("-1")


def test_a_melody_is_followed_where_the_checkpoint_can(
    open_page: Open, engine: FakeBackend, tmp_path: Path
) -> None:
    clip = tmp_path / "tune.wav"
    soundfile.write(clip, 0.2 * np.sin(np.arange(32_000) / 9), 16_000)
    page = open_page()
    unfold(page, "Start from audio")
    page.locator("#audio_prompt input[type=file]").set_input_files(clip)
    expect(page.locator("#clip_line")).to_contain_text("last 2.0 s")
    expect(page.locator("#clip_use")).to_be_hidden()
    choose_checkpoint(page, "wide")
    page.locator("#clip_use").get_by_label("follow its melody").click()
    expect(page.locator("#melody_line")).to_contain_text("2.0 s is repeated for 10.0 s")
    generate(page, length_s=3)
    expect(page.locator("#take_facts")).to_contain_text("follows a melody of")
    finished(page)
    page.wait_for_function("() => musicgenPlayer.shown.melody?.classes.length")
    assert engine.requests[-1].melody is not None and engine.requests[-1].audio_prompt is None
    choose_checkpoint(page, "mono")
    expect(page.locator("#clip_use")).to_be_hidden()
    expect(page.locator("#clip_line")).to_contain_text("last 2.0 s")


def choose_checkpoint(page: Page, name: str) -> None:
    page.locator("#checkpoint input").fill(name)
    page.locator("#checkpoint input").press("Enter")
    page.locator("#checkpoint input").blur()


def test_mistakes_are_said_at_the_field_and_lose_nothing(
    open_page: Open, engine: FakeBackend, tmp_path: Path
) -> None:
    page = open_page()
    bad = tmp_path / "bad.wav"
    bad.write_text("<html>not audio</html>")
    unfold(page, "Start from audio")
    page.locator("#audio_prompt input[type=file]").set_input_files(bad)
    expect(page.locator("#clip_line [role=alert]")).to_be_visible()
    asked = len(engine.requests)
    page.evaluate("document.querySelector('#prompt textarea').removeAttribute('maxlength')")
    generate(page, "x" * 2001)
    expect(page.locator("#prompt")).to_contain_text("2,001 characters")
    prompt = page.locator("#prompt textarea")  # its label now holds the sentence
    expect(prompt).to_have_value("x" * 2001)
    assert len(engine.requests) == asked
    expect(prompt).to_be_in_viewport()
    prompt.fill("kept")
    engine.failure = RuntimeError("broken")
    page.locator("#generate").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("Something went wrong")
    expect(page.locator("#generate")).to_be_visible()
    said = page.locator(
        ".player[data-stage=failed] .player-text"
    )  # in full, once the toast is gone
    assert said.evaluate("e => e.scrollWidth <= e.clientWidth && e.scrollHeight <= e.clientHeight")
    expect(prompt).to_have_value("kept")


def test_variations_ideas_and_the_keyboard(open_page: Open, engine: FakeBackend) -> None:
    page = open_page()
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("rainy evening.")
    page.get_by_role("button", name="Lo-fi", exact=True).click()
    expect(prompt).to_have_value(re.compile("^rainy evening, lo-fi hip hop"))
    expect(page.locator("#prompt_count")).to_have_text(re.compile("[0-9]+ of 2,000"))
    page.get_by_role("button", name="Jazz", exact=True).click()
    page.get_by_role("button", name="Lo-fi", exact=True).click()  # taken out again
    expect(prompt).to_have_value(re.compile("^rainy evening, swing jazz"))
    page.locator("#length_choice").get_by_label("2 min").check()
    expect(page.locator("#duration_s input[type=number]")).to_have_value("120")
    set_number(page, "variations", 3)
    set_number(page, "seed", 40)
    set_number(page, "duration_s", 1)
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    chips = page.locator(".strip")
    expect(chips).to_have_count(3)
    finished(page)
    chips.nth(2).click()
    expect(page.locator("#take_facts")).to_contain_text("seed42")
    page.locator("#generate").scroll_into_view_if_needed()  # below the open fold
    expect(page.locator("#live")).to_be_in_viewport()
    assert [engine.requests[-1].seed, engine.requests[-1].variations] == [40, 3]
