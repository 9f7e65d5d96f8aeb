"""The form's panels in Chromium: presets, recent prompts, undo, trimming, the real model."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from playwright.sync_api import Browser, Page, Route, expect

from tests.helpers.browser import Open, finished, generate, mounted, set_number, settled, unfold
from tests.helpers.fakes import FakeBackend


def choose(page: Page, name: str, option: str) -> None:
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_presets_and_prompts_stay_in_the_browser_with_undo(open_page: Open) -> None:
    page = open_page()
    prompt, said = page.get_by_label("Prompt", exact=True), page.locator(".notice-words")
    temperature = page.locator("#temperature input[type=number]")
    unfold(page, "Presets and recent prompts")
    unfold(page, "Sampling")
    set_number(page, "temperature", 0.7)
    generate(page, "slow waltz", 1)
    finished(page)
    page.locator("#preset_name textarea, #preset_name input").first.fill("evening")
    page.locator("#preset_save").click()
    expect(said).to_contain_text("“evening” is saved")
    page.reload()
    settled(page)
    unfold(page, "Presets and recent prompts")
    unfold(page, "Sampling")
    set_number(page, "temperature", 1.3)
    prompt.fill("rock")
    choose(page, "preset", "evening")
    page.locator("#preset_use").click()
    expect(said).to_contain_text("Prompt: “slow waltz” instead of “rock”.")
    expect(said).to_contain_text("Temperature: 0.7 instead of 1.3.")
    expect(temperature).to_have_value("0.7")
    page.locator(".notice-undo").click()
    expect(temperature).to_have_value("1.3")
    expect(prompt).to_have_value("rock")
    expect(page.locator(".notice-close")).to_be_focused()
    choose(page, "recent", "slow waltz")
    expect(prompt).to_have_value("slow waltz")
    page.locator("#use_settings").click()
    expect(said).to_contain_text("The settings are filled in.")
    page.locator("#preset_delete").click()
    expect(said).to_contain_text("deleted")
    page.locator(".notice-undo").click()
    expect(page.locator("#preset input")).to_have_value("evening")
    page.locator("#recent_clear").click()
    page.locator("#recent input").click()
    expect(page.get_by_role("option", name="slow waltz")).to_have_count(0)


def test_enter_takes_the_checkpoint_that_was_typed(open_page: Open, engine: FakeBackend) -> None:
    page = open_page()
    field, line = page.get_by_label("Checkpoint", exact=True), page.locator("#checkpoint_line")
    expect(field).to_have_value("auto · auto · mono or stereo")  # entries have more than the name
    for typed, entries, said in (
        ("mono", 2, "Tones"),  # a name that other entries contain
        ("someone/mono", 0, "someone/mono"),  # no entry
        ("wid", 1, "sets temperature 0.7"),  # one entry alone
    ):
        field.click()
        page.keyboard.press("Control+A")
        page.keyboard.type(typed)
        expect(page.locator("#checkpoint [role=option]")).to_have_count(entries)
        page.keyboard.press("Enter")
        expect(line).to_contain_text(said)
    field.fill("mono")
    field.press("Enter")
    generate(page, "calm", 1)
    finished(page)
    assert engine.requests[-1].checkpoint == "mono"


@pytest.fixture
def tune(tmp_path: Path) -> Path:
    path = tmp_path / "tune.wav"
    soundfile.write(path, 0.3 * np.sin(np.arange(16_000 * 100) / 9), 16_000)
    return path


def test_clip_is_trimmed_by_keys_times_and_dragging(
    open_page: Open, engine: FakeBackend, tune: Path
) -> None:
    page = open_page()
    unfold(page, "Start from audio")
    page.locator("#audio_prompt input[type=file]").set_input_files(tune)
    expect(page.locator("#clip_line")).to_contain_text("of 100.0 s")
    unfold(page, "Trim the clip")
    start, end = (page.get_by_role("slider", name=f"{n} of the part") for n in ("Start", "End"))
    expect(end).to_have_attribute("aria-valuetext", "1:40.0 of 1:40.0")  # the whole clip
    expect(page.locator(".trim-cut")).to_be_disabled()
    page.locator(".trim-to").fill("1:02.5")
    page.locator(".trim-to").press("Tab")
    start.focus()
    for key in ("PageUp", "PageUp", "ArrowRight", "Shift+ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator(".trim-from")).to_have_value("0:11.1")
    expect(page.locator(".trim-length")).to_have_text("51.4 s")
    box = page.locator(".trim-wave").bounding_box()
    assert box
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.2 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], middle, steps=4)
    page.mouse.up()
    expect(page.locator(".trim-from")).to_have_value("0:20.0")
    expect(page.locator(".trim-to")).to_have_value("0:50.0")
    page.locator(".trim-cut").click()
    expect(page.locator("#clip_line")).to_contain_text("of 30.0 s")
    expect(page.locator(".notice-words")).to_contain_text("trimmed to 30.0 s")
    expect(end).to_have_attribute("aria-valuetext", "0:30.0 of 0:30.0")
    generate(page, "calm", 1)
    finished(page)
    clip = engine.requests[-1].audio_prompt
    assert clip is not None and clip.duration_s == pytest.approx(30, abs=0.2)
    page.locator(".trim-from").fill("0:05")
    page.locator(".trim-from").press("Tab")
    page.locator(".trim-cut").click()
    expect(page.locator("#clip_line")).to_contain_text("of 25.0 s")
    page.locator(".notice-undo").click()
    expect(page.locator("#clip_line")).to_contain_text("of 30.0 s")


def test_a_late_answer_to_the_load_replaces_no_choice(open_page: Open) -> None:
    page = open_page()
    prompt, key = page.get_by_label("Prompt", exact=True), page.locator("#key input")
    guidance = page.locator("#guidance_scale input[type=number]")
    stereo, tempo = page.get_by_label("Stereo"), page.locator("#tempo_bpm input")
    prompt.fill("first waltz")
    tempo.fill("90")
    tempo.press("Tab")
    page.wait_for_function("() => sessionStorage.musicgenForm.includes('90')")
    late: list[Route] = []
    held = [True]
    page.route(
        "**/gradio_api/run/**", lambda route: late.append(route) if held else route.continue_()
    )
    page.reload()
    expect(prompt).to_have_value("first waltz")  # without an answer of the server
    expect(tempo).to_have_value("90")
    prompt.fill("second waltz")
    set_number(page, "guidance_scale", 5)
    choose(page, "key", "C minor")
    stereo.check()
    page.locator("#length_choice").get_by_label("20 s").check()
    held.clear()
    for route in late:
        route.continue_()
    expect(page.locator("#checkpoint_line")).to_contain_text("Tones for testing")
    expect(prompt).to_have_value("second waltz")
    expect(guidance).to_have_value("5")
    expect(key).to_have_value("C minor")
    expect(stereo).to_be_checked()
    expect(page.locator("#duration_s input[type=number]")).to_have_value("20")
    expect(tempo).to_have_value("90")


def test_a_late_answer_to_the_load_replaces_no_take(
    chromium: Browser, served: tuple[str, FakeBackend], engine: FakeBackend
) -> None:
    """What a page shows of its tab must be there before it makes another take."""
    url = served[0]
    events = httpx.get(f"{url}config", timeout=30).json()["dependencies"]
    enter = next(event["id"] for event in events if event["api_name"] == "enter")
    page, late = chromium.new_context().new_page(), []

    def hold(route: Route) -> None:
        asked = json.loads(route.request.post_data or "{}")
        if asked.get("fn_index") == enter:
            late.append((route, route.fetch()))
        else:
            route.continue_()

    page.goto(url)
    settled(page)
    generate(page, "first waltz", 1)
    finished(page)
    page.route("**/gradio_api/run/**", hold)
    page.reload()
    page.locator("#generate").wait_for()
    mounted(page)
    page.get_by_label("Prompt", exact=True).fill("second waltz")
    page.locator("#generate").click()
    page.wait_for_timeout(1500)  # in which the second take would be made
    while not late:
        page.wait_for_timeout(100)
    for route, answer in late:
        route.fulfill(response=answer)
    expect(page.locator("#take_title")).to_have_text("second waltz")
    finished(page)
    expect(page.locator("#take_history label")).to_have_count(2)
    assert page.evaluate("musicgenPlayer.take.title") == "second waltz"
    page.context.close()
