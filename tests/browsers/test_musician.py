"""What a musician does with the page, in Firefox and in WebKit, with music of the bundled model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from musicgen_ui import takes
from tests.helpers.played import PLAYED, RECORD, samples
from tests.helpers.webdriver import Tab

TECHNO = "techno with a hard kick and synth bass"  # which the bundled model knows
POSITION = "musicgenPlayer.sound.position_s"
pytestmark = pytest.mark.timeout(600)


def generate(tab: Tab, prompt: str, length_s: float) -> None:
    tab.fill("#prompt textarea", prompt)
    tab.fill("#duration_s input[type=number]", f"{length_s:g}")
    tab.fill("#seed input", "7")
    tab.click("#generate")


def finished(tab: Tab, stage: str = "finished", seconds: float = 90) -> None:
    tab.wait(f"document.querySelector('.player[data-stage={stage}]')", seconds)
    tab.find("#generate")


def newest(music: Path) -> Path:
    return max(music.glob("*.wav"), key=lambda path: path.stat().st_mtime_ns)


def slider(tab: Tab) -> str:
    return str(tab.find(".player-picture").get_attribute("aria-valuetext"))


def test_a_take_is_heard_whole_while_it_is_made(tab: Tab, music: Path) -> None:
    tab.driver.execute_script(RECORD)
    generate(tab, TECHNO, 30)
    tab.wait(f"{POSITION} > 0.5", 120)  # the first click waits for the engine
    first_s = tab.js(POSITION)
    tab.wait(f"{POSITION} > {first_s} + 0.3")  # the clock runs
    assert not tab.js("musicgenPlayer.sound.blocked")
    tab.wait("!musicgenPlayer.sound.playing", 300)
    finished(tab)
    assert tab.js("musicgenPlayer.take.as_streamed")
    assert tab.js("musicgenPlayer.sound.track.lost") == 0
    made, rate = soundfile.read(newest(music), dtype="int16")
    settings = takes.read_settings(newest(music))
    assert settings and settings["seed"] == 7  # not drawn again
    assert len(made) == 30 * rate
    assert np.array_equal(samples(tab.js(f"({PLAYED})()")), made)


def test_the_player_by_pointer_and_keys(tab: Tab) -> None:
    tab.click(".player-play")  # the example: 8 s
    tab.wait(f"{POSITION} > 0.2")
    tab.click(".player-play")
    tab.wait("!musicgenPlayer.sound.moving")
    picture = tab.find(".player-picture")
    tab.click(".player-picture")  # in its middle
    assert abs(tab.js(POSITION) - 4) < 0.05

    width, height = picture.size["width"], picture.size["height"]
    ruler = ActionChains(tab.driver).move_to_element_with_offset(
        picture, -width // 4, 8 - height // 2
    )
    ruler.click_and_hold().move_by_offset(width // 8, 0).move_by_offset(width // 8, 0)
    ruler.release().perform()
    first_s, last_s = tab.js("musicgenPlayer.sound.loop")
    assert abs(first_s - 2) < 0.05 and abs(last_s - 4) < 0.05
    tab.js("musicgenPlayer.seek(3.9)")
    tab.click(".player-play")
    tab.wait(f"{POSITION} >= 2 && {POSITION} < 3.8")  # it went round
    tab.click(".player-loop")
    assert tab.js("musicgenPlayer.sound.loop") is None

    tab.click(".player-stop")
    assert not tab.js("musicgenPlayer.sound.playing")
    tab.driver.execute_script("document.querySelector('.player-picture').focus()")
    tab.press(Keys.SPACE)
    tab.wait(f"{POSITION} > 0.1")
    tab.press(Keys.SPACE)
    tab.wait("!musicgenPlayer.sound.moving")
    for key, shift, time in (
        *((Keys.HOME, "", "0:00"), (Keys.ARROW_RIGHT, "", "0:01")),
        *((Keys.ARROW_RIGHT, Keys.SHIFT, "0:06"), (Keys.ARROW_LEFT, "", "0:05")),
        *((Keys.END, "", "0:07"), (Keys.ARROW_LEFT, Keys.SHIFT, "0:02")),
    ):
        tab.press(shift + key)
        assert slider(tab) == f"{time} of 0:08"
    tab.press("l")
    assert tab.js("musicgenPlayer.sound.loop") == [0, 8]
    tab.press("+")
    assert tab.js("musicgenPlayer.picture.span.to_s") < 8
    tab.press(Keys.ESCAPE)
    assert slider(tab) == "0:00 of 0:08"
    tab.fill("#prompt textarea", "a b", Keys.ARROW_LEFT)
    assert tab.find("#prompt textarea").get_attribute("value") == "a b"
    assert not tab.js("musicgenPlayer.sound.playing")


def test_stop_keeps_the_take_and_it_is_continued(tab: Tab, music: Path) -> None:
    generate(tab, TECHNO, 60)
    tab.wait(f"{POSITION} > 0.5", 120)
    tab.click(".player-stop")
    assert not tab.js("musicgenPlayer.sound.playing")
    finished(tab, "stopped")
    assert re.search("Stopped: .* kept as a take", tab.text(".player-text"))
    kept = newest(music)
    kept_s = soundfile.info(kept).duration
    assert 0.5 < kept_s < 60 and tab.js(POSITION) == 0

    tab.click("#continue")
    tab.wait("/of [0-9.]+ s/.test(document.querySelector('#clip_line')?.textContent)")
    tab.fill("#duration_s input[type=number]", "4")
    tab.click("#generate")
    tab.wait(f"{POSITION} > 0.3 && musicgenPlayer.streaming")
    finished(tab)
    tab.wait(f"{POSITION} > {kept_s} + 0.5", 30)  # the same music goes on, now after its clip
    assert abs(soundfile.info(newest(music)).duration - kept_s - 4) < 0.1
    tab.press(Keys.ESCAPE)


def test_takes_are_compared_starred_and_renamed(tab: Tab, music: Path) -> None:
    tab.fill("#variations input[type=number]", "2")
    generate(tab, "jazz trio", 5)
    tab.wait("document.querySelectorAll('.strip').length === 2", 120)
    finished(tab)
    tab.js("musicgenPlayer.seek(1)")
    tab.js("musicgenPlayer.sound.play()")
    tab.wait("musicgenPlayer.sound.moving")
    tab.driver.execute_script("document.activeElement.blur()")
    tab.press("2")
    tab.wait("musicgenPlayer.sound.selected > 0")
    assert tab.js(POSITION) > 1 and tab.js("musicgenPlayer.sound.playing")
    assert tab.text(".strip[aria-checked=true] kbd") == "2"
    tab.press(Keys.ESCAPE)

    tab.wait(f"document.querySelector('.card').dataset.name === '{newest(music).stem}'")
    tab.click(".card-star")
    tab.wait("document.querySelector('.card-star').ariaPressed === 'true'")
    tab.fill(".card-title", "Closing theme", Keys.ENTER)
    tab.wait("document.querySelector('.card-title').defaultValue === 'Closing theme'")
    tab.open(tab.driver.current_url)
    tab.find(".card")
    tab.click("#library_starred input")
    tab.wait("document.querySelectorAll('.card').length === 1")
    assert tab.find(".card-title").get_attribute("value") == "Closing theme"
    tab.click(".card-play")
    tab.wait("musicgenPlayer.sound.moving")
    tab.click(".card-play")
    tab.wait("!musicgenPlayer.sound.moving")
    tab.click(".card-star")  # the next browser begins without
    tab.wait("!document.querySelector('.card')")


def test_a_live_piece_is_steered_and_recorded(tab: Tab, music: Path) -> None:
    known = set(music.glob("*.wav"))
    tab.fill("#prompt textarea", "calm piano")
    tab.click("#live_mode input")
    tab.fill("#live_prompt_2 textarea", "hard techno")
    tab.click("#live_start")
    tab.wait(f"{POSITION} > 0.5", 120)
    tab.click("#live_record")
    tab.wait("document.querySelector('#live_record').textContent.trim() === 'End recording'")
    tab.fill("#live_fader input[type=number]", "1")
    at_s = tab.js(POSITION)
    tab.wait(f"{POSITION} > {at_s} + 4", 90)  # with pauses on a busy machine
    tab.click("#live_record")
    tab.wait("document.querySelector('#live_line').textContent.includes('kept as a take')")
    assert tab.js("musicgenPlayer.sound.track.lost") == 0
    tab.click("#live_stop")
    tab.wait("!musicgenPlayer.sound.playing")
    finished(tab, "stopped")
    (made,) = set(music.glob("*.wav")) - known
    settings = takes.read_settings(made)
    assert settings
    rows = settings["automation"]
    prompts = [change["prompts"] for _, change in rows if "prompts" in change]
    assert prompts[-1] == [["hard techno", 1.0]]
    assert soundfile.info(made).duration > 4
