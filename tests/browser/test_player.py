"""The player in Chromium: nothing is lost, everything is reached by keys and by the pointer."""

from __future__ import annotations

import base64
import re
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, Route, expect

from musicgen_ui.audio import spectrogram
from musicgen_ui.audio.clip import Clip
from tests.helpers.browser import Open, finished, generate
from tests.helpers.fakes import FakeBackend, tone
from tests.helpers.played import PLAYED, RECORD, samples

POSITION = "musicgenPlayer.sound.position_s"


def sent(engine: FakeBackend) -> np.ndarray:
    """The samples of the last job's first variation, as 16-bit integers."""
    request = engine.requests[-1]
    music = tone(request.seed, request.duration_s, engine.sampling_rate, 1)[0]
    return np.rint(music * 32768).astype(int)


def played(page: Page) -> np.ndarray:
    return samples(page.evaluate(PLAYED))


def ended(page: Page, timeout_s: float = 20) -> None:
    page.wait_for_function("() => !musicgenPlayer.sound.playing", timeout=1000 * timeout_s)


def play_example(page: Page) -> None:
    page.locator(".player-play").click()
    page.wait_for_function(f"() => {POSITION} > 0.1")


@pytest.mark.parametrize(
    ("slower", "length_s"),
    [(4, 3), *(pytest.param(n, 30, marks=pytest.mark.long) for n in (1, 4, 8))],
)
def test_player_loses_nothing_on_a_slow_computer(
    open_page: Open, engine: FakeBackend, slower: int, length_s: int
) -> None:
    page = open_page(script=RECORD)
    engine.speed = 3.0
    generate(page, length_s=length_s)
    page.context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": slower})
    page.wait_for_function(f"() => {POSITION} > 0.5", timeout=60_000)
    ended(page, 3 * length_s + 60)  # the clock of its sound stands still at times
    assert np.array_equal(played(page), sent(engine))
    assert page.evaluate("musicgenPlayer.sound.track.lost") == 0


def test_player_goes_on_where_a_connection_broke(open_page: Open, engine: FakeBackend) -> None:
    page = open_page(script=RECORD)
    asked: list[str] = []

    def broken(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) == 1:  # in the middle of a sample
            answer = route.fetch()
            route.fulfill(response=answer, body=answer.body()[:10_001])
        elif len(asked) == 2:
            route.abort("connectionreset")
        else:
            route.continue_()

    page.route("**/jobs/**", broken)
    engine.speed = 4.0
    generate(page, length_s=3)
    page.wait_for_function(f"() => {POSITION} > 0.1")
    ended(page)
    assert np.array_equal(played(page), sent(engine))
    assert [url.partition("after=")[2] for url in asked[:3]] == ["0", "5000", "5000"]


def test_player_streams_to_the_owner_alone(open_page: Open, engine: FakeBackend) -> None:
    page, other = open_page(), open_page()
    engine.speed = 2.0
    generate(page, length_s=3)
    page.wait_for_function(f"() => {POSITION} > 0.1")
    state = page.evaluate("musicgenPlayer.state")
    stranger = other.evaluate("musicgenPlayer.state?.session ?? 'none'")
    for session, status in (state["session"], 200), ("", 404), ("guessed", 404), (stranger, 404):
        url = f"{page.url}jobs/{state['job']}/audio"
        assert other.request.get(url, headers={"x-session": session}).status == status


def test_player_holds_the_take_and_goes_on_after_its_clip(
    open_page: Open, engine: FakeBackend
) -> None:
    page = open_page()
    page.locator("#continue").click()  # the example: 8 s
    expect(page.locator("#clip_line")).to_contain_text("8.0 s")
    engine.speed = 4.0
    generate(page, length_s=7)
    page.wait_for_function(f"() => {POSITION} > 0.5 && {POSITION} < 7")
    expect(page.locator("#take_facts")).to_contain_text("after your clip of")
    page.wait_for_function(f"() => {POSITION} > 8.5")  # the same music, after the clip
    shown = page.evaluate("musicgenPlayer.shown")
    assert (shown["prompt_s"], shown["context_s"], shown["duration_s"]) == (8, 8, 15)
    ended(page)
    expect(page.get_by_role("slider", name="Position")).to_have_attribute(
        "aria-valuetext", "0:15 of 0:15"
    )


def test_player_goes_on_with_the_take_that_replaces_the_heard_one(
    open_page: Open, engine: FakeBackend
) -> None:
    page = open_page()
    page.evaluate("""{
      const show = musicgenPlayer.show_take; // an unusable take is drawn again: see `ranking`
      musicgenPlayer.show_take = (take) => show.call(musicgenPlayer, { ...take, job: '' });
    }""")
    engine.speed = 4.0
    generate(page, length_s=10)
    page.wait_for_function(f"() => {POSITION} > 0.5 && musicgenPlayer.streaming")
    page.wait_for_function("() => musicgenPlayer.take && !musicgenPlayer.streaming")
    page.wait_for_function(f"() => musicgenPlayer.sound.moving && {POSITION} > 0.1")
    assert not page.evaluate("musicgenPlayer.sound.track.source.live")


def test_player_stop_is_silent_at_once_and_keeps_the_take(
    open_page: Open, engine: FakeBackend
) -> None:
    page = open_page()
    engine.speed = 4.0
    generate(page, length_s=30)
    page.wait_for_function(f"() => {POSITION} > 0.5")
    page.locator(".player-stop").click()
    assert not page.evaluate("musicgenPlayer.sound.playing")
    finished(page, "stopped")
    expect(page.locator(".player-text")).to_have_text(re.compile("Stopped: .* kept as a take"))
    page.wait_for_function("() => musicgenPlayer.take && !musicgenPlayer.sound.moving")
    assert page.evaluate(POSITION) == 0


def test_player_keys(open_page: Open) -> None:
    page = open_page()
    slider = page.get_by_role("slider", name="Position")
    slider.focus()
    page.keyboard.press("Space")
    # Where the browser holds the sound back, Space tries again instead.
    page.wait_for_function(f"() => {POSITION} > 0.1 && !musicgenPlayer.sound.blocked")
    page.keyboard.press("Space")
    page.wait_for_function("() => !musicgenPlayer.sound.playing && !musicgenPlayer.sound.moving")
    for key, text in (
        *(("Home", "0:00"), ("ArrowRight", "0:01"), ("Shift+ArrowRight", "0:06")),
        *(("ArrowLeft", "0:05"), ("End", "0:07"), ("Shift+ArrowLeft", "0:02")),
    ):
        page.keyboard.press(key)
        expect(slider).to_have_attribute("aria-valuetext", f"{text} of 0:08")
    # Keys come faster than the audio thread says where it is.
    late = """() => {
      const { sound } = musicgenPlayer, before = { ...sound.report };
      sound.seek(3);
      sound.take_report(before);
      return sound.position_s;
    }"""
    assert page.evaluate(late) == 3
    page.keyboard.press("l")
    expect(page.get_by_role("button", name="Loop")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("+")
    assert page.evaluate("musicgenPlayer.picture.span.to_s") < 8
    page.keyboard.press("Escape")
    expect(slider).to_have_attribute("aria-valuetext", "0:00 of 0:08")
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.focus()
    page.keyboard.type("a b")
    page.keyboard.press("ArrowLeft")
    assert prompt.input_value() == "a b" and not page.evaluate("musicgenPlayer.sound.playing")
    outline = "e => { e.focus(); return getComputedStyle(e).outlineStyle; }"
    page.keyboard.press("Tab")
    assert slider.evaluate(outline) == "solid"


def test_player_pointer_seeks_loops_and_says_what_is_there(open_page: Open) -> None:
    page = open_page()
    play_example(page)
    box = page.locator(".player-picture").bounding_box()
    assert box is not None
    left, top, width = box["x"], box["y"], box["width"]
    page.mouse.click(left + width / 2, top + 200)
    page.wait_for_function(f"() => {POSITION} >= 4 && {POSITION} < 5")
    expect(page.locator(".player-pointer")).to_have_text(re.compile(r"^0:04\.0\d · [\d.]+ k?Hz$"))
    page.mouse.move(left + width / 4, top + 10)  # the ruler
    page.mouse.down()
    page.mouse.move(left + width / 2, top + 12, steps=4)
    page.mouse.up()
    first_s, last_s = page.evaluate("musicgenPlayer.sound.loop")
    assert abs(first_s - 2) < 0.05 and abs(last_s - 4) < 0.05
    page.evaluate("musicgenPlayer.seek(3.8)")
    page.wait_for_function(f"() => {POSITION} > 2 && {POSITION} < 3.5")  # it went round
    page.get_by_role("button", name="Loop").click()
    assert page.evaluate("musicgenPlayer.sound.loop") is None


def test_player_lets_the_clock_rest_and_says_when_the_browser_stops_it(open_page: Open) -> None:
    page = open_page()
    play_example(page)
    page.evaluate("musicgenPlayer.sound.context.suspend()")
    expect(page.locator(".player-hint")).to_contain_text("Press Play")
    page.get_by_role("button", name="Play", exact=True).click()
    expect(page.locator(".player-hint")).to_be_hidden()
    before = page.evaluate(POSITION)
    page.wait_for_function(f"() => {POSITION} > {before} + 0.2")
    page.keyboard.press("Escape")
    page.wait_for_function("() => musicgenPlayer.sound.context.state === 'suspended'")
    expect(page.locator(".player-hint")).to_be_hidden()
    play_example(page)


def test_any_sound_of_the_page_stops_every_other(open_page: Open) -> None:
    page = open_page()
    page.locator("#continue").click()
    play = page.locator("#audio_prompt").get_by_label("Play", exact=True)
    # Gradio stops what begins to play before the length is there.
    expect(page.locator("#audio_prompt #duration")).to_have_text("0:08")
    play_example(page)
    play.click()
    page.wait_for_function("() => !musicgenPlayer.sound.playing")
    expect(page.locator("#audio_prompt").get_by_label("Pause", exact=True)).to_be_visible()
    page.locator(".player-play").click()
    expect(play).to_be_visible()
    assert page.evaluate("musicgenPlayer.sound.playing")


def test_player_answers_media_keys(open_page: Open) -> None:
    page = open_page(
        script="""
      window.keys = {};
      MediaSession.prototype.setActionHandler = (name, answer) => { keys[name] = answer; };"""
    )
    page.evaluate("musicgenPlayer.load()")
    page.evaluate("keys.play()")
    page.wait_for_function(f"() => {POSITION} > 0.1")
    assert page.evaluate("navigator.mediaSession.playbackState") == "playing"
    assert page.evaluate("!musicgenPlayer.sound.media.paused")
    page.evaluate("keys.seekto({ seekTime: 5 }); keys.pause()")
    page.wait_for_function(f"() => Math.abs({POSITION} - 5) < 0.2")
    assert page.evaluate("navigator.mediaSession.playbackState") == "paused"


def test_picture_and_time_axis_agree_to_the_pixel(open_page: Open) -> None:
    page = open_page()
    t = np.arange(64_000) / 16_000
    beep = np.where(np.abs(t - 2) < 0.2, np.sin(2 * np.pi * 1000 * t), 0)[None].astype(np.float32)
    content, edges = spectrogram.png(Clip(beep, 16_000))
    take: dict[str, Any] = page.evaluate("musicgenPlayer.take") | {
        "id": "beep",
        "duration_s": 4.0,
        "edges": vars(edges),
        "picture": {"url": "data:image/png;base64," + base64.b64encode(content).decode()},
    }
    page.evaluate("take => musicgenPlayer.show_take(take)", take)
    page.wait_for_function("() => musicgenPlayer.shown.image && !musicgenPlayer.drawing")
    # The middle of what is bright, in CSS pixels from the left and from the spectrogram's top.
    x, y, middle, hz = page.evaluate("""() => {
      const { picture, shown } = musicgenPlayer, { top, height } = picture.rows(shown).level;
      const density = devicePixelRatio, { pen, canvas } = picture;
      const { data, width } = pen.getImageData(0, top * density, canvas.width, height * density);
      let sum = 0, across = 0, down = 0;
      for (let i = 0; i < data.length; i += 4) {
        const x = i / 4 % width + .5, y = Math.floor(i / 4 / width) + .5;
        const light = data[i] > 200 && x > 60 ? data[i] : 0; // beside the labels
        sum += light; across += light * x; down += light * y;
      }
      const x = across / sum / density, y = down / sum / density;
      return [x, y, picture.x_of(2), picture.at(shown, x, top + y)];
    }""")
    assert abs(x - middle) < 1 and y > 0
    assert re.fullmatch(r"0:0[12]\.\d\d · (9[5-9]\d|10[0-4]\d) Hz|.* · 1\.0 kHz", hz), hz


def test_player_stays_within_reach_on_a_phone(open_page: Open) -> None:
    page = open_page("phone")
    floating = page.locator(".player-float")
    page.evaluate("musicgenPlayer.toggle_loop()")  # it does not end meanwhile
    page.locator(".player-play").click()
    page.wait_for_function(f"() => {POSITION} > 0")
    expect(floating).to_be_hidden()
    page.evaluate("scrollTo(0, 0)")
    expect(floating).to_have_attribute("aria-label", "Pause")
    floating.click()
    expect(floating).to_have_attribute("aria-label", "Play")
    assert not page.evaluate("musicgenPlayer.sound.playing")
