"""An evening: a take is made, compared, kept, tried again, extended, exported, and found again."""

from __future__ import annotations

import zipfile
from pathlib import Path

import soundfile
from playwright.sync_api import Page, expect

from musicgen_ui import takes
from tests.helpers.browser import Open, download, finished, generate, serving, set_number, unfold
from tests.helpers.fakes import FakeBackend


def cards(page: Page, count: int) -> None:
    expect(page.locator(".card")).to_have_count(count)


def position_s(page: Page) -> float:
    return float(page.evaluate("() => window.musicgenPlayer.sound.position_s"))


def press(page: Page, key: str) -> None:
    page.locator("body").click(position={"x": 2, "y": 2})
    page.keyboard.press(key)


def menu(page: Page, item: str, number: int = 0) -> None:
    card = page.locator(".card").nth(number)
    card.locator("summary").click()
    card.get_by_role("button", name=item, exact=True).click()


def remade(page: Page, button: str, before: int) -> None:
    page.locator(f"#{button}").click()
    cards(page, before + 1)
    finished(page)


def evening(page: Page, folder: Path, downloads: Path) -> None:
    set_number(page, "variations", 3)
    page.locator("#tempo_bpm input").fill("120")
    page.locator("#tempo_bpm input").press("Tab")
    generate(page, "warm jazz", 6)
    finished(page)
    cards(page, 3)

    # Variations under one playhead: the place stays, the take changes, all equally loud.
    expect(page.locator(".strip")).to_have_count(3)
    page.evaluate("() => { window.musicgenPlayer.seek(1); window.musicgenPlayer.sound.play(); }")
    press(page, "2")
    page.wait_for_function("() => window.musicgenPlayer.sound.selected > 0")
    assert position_s(page) > 1 and page.evaluate("() => window.musicgenPlayer.sound.playing")
    expect(page.locator(".strip[aria-checked=true] kbd")).to_have_text("2")
    press(page, "3")
    expect(page.locator(".strip[aria-checked=true] kbd")).to_have_text("3")
    expect(page.locator("#take_variation input").nth(2)).to_be_checked()
    page.locator("#keep_take").click()
    expect(page.locator(".strip")).to_have_count(0)
    expect(page.locator(".card-star[aria-pressed=true]")).to_have_count(1)
    press(page, "Escape")

    # Again from 0:04, then longer: a tree of three.
    page.evaluate("() => window.musicgenPlayer.seek(4)")
    remade(page, "retake", 3)
    remade(page, "extend", 4)
    menu(page, "Versions")
    cards(page, 3)
    facts = page.locator(".card-facts")
    expect(facts.nth(1)).to_contain_text("retaken at 0:04")
    expect(facts.nth(2)).to_contain_text("extended at 0:06")
    page.get_by_role("button", name="All takes").click()
    cards(page, 5)

    # Titles, search, star.
    title = page.locator(".card-title").first
    title.fill("Closing theme")
    title.press("Enter")
    page.locator("#library_words textarea, #library_words input").fill("closing")
    cards(page, 1)
    expect(page.locator(".card-title")).to_have_value("Closing theme")
    page.locator("#library_words textarea, #library_words input").fill("")
    cards(page, 5)

    # A loop of two bars as MP3 and as WAV.
    unfold(page, "Export")
    page.locator("#loop_bars input").fill("2")
    page.locator("#loop_bars input").press("Tab")
    assert page.evaluate("() => window.musicgenPlayer.sound.loop") == [6, 10]
    for ending in ("MP3", "WAV"):
        page.locator("#export_ending").get_by_label(ending).check()
        with page.expect_download() as waiting:
            page.locator("#export").click()
        path = downloads / waiting.value.suggested_filename
        waiting.value.save_as(path)
        settings = takes.read_settings(path)
        assert path.suffix == f".{ending.lower()}"
        assert settings and settings["loop_bars"] == 2 and settings["prompt"] == "warm jazz"
    assert soundfile.info(path).duration == 4
    assert b"smpl" in path.read_bytes()[:200]

    # Several as a ZIP, and one deleted and brought back.
    for number in (0, 1):
        page.locator(".card-check input").nth(number).check()
    page.get_by_label("Format of the archive").select_option(".flac")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download as ZIP").click()
    waiting.value.save_as(downloads / "takes.zip")
    with zipfile.ZipFile(downloads / "takes.zip") as archive:
        assert [Path(name).suffix for name in archive.namelist()] == [".flac", ".flac"]
    menu(page, "Delete", 1)
    cards(page, 4)
    page.get_by_role("button", name="Undo").click()
    cards(page, 5)
    assert len(list(folder.glob("*.wav"))) == 5


def found_again(page: Page, downloads: Path) -> None:
    cards(page, 5)
    page.locator("#library_starred input").check()
    cards(page, 1)
    page.locator("#library_starred input").uncheck()
    cards(page, 5)

    # It plays from the list, gives its settings back, and is compared with another one.
    page.locator(".card-play").first.click()
    page.wait_for_function("() => window.musicgenPlayer.sound.moving")
    expect(page.locator(".card.is-current .card-title")).to_have_value("Closing theme")
    expect(page.locator(".card-play").first).to_have_attribute("aria-label", "Pause Closing theme")
    page.locator(".card-play").first.click()
    expect(page.locator(".card.is-playing")).to_have_count(0)
    expect(page.locator(".take-name")).to_have_text("Closing theme")
    page.locator("#use_settings").click()
    expect(page.locator("#prompt textarea")).to_have_value("warm jazz")
    expect(page.locator("#tempo_bpm input")).to_have_value("120")
    for number in (0, 3):
        page.locator(".card-check input").nth(number).check()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator(".strip")).to_have_count(2)
    expect(page.locator(".strip-label").first).to_have_text("Closing theme")
    assert takes.read_settings(download(page, "flac", downloads))


def test_studio_evening(open_page: Open, tmp_path: Path) -> None:
    folder = tmp_path / "music"
    with serving(FakeBackend(speed=20), output_folder=str(folder)) as url:
        page = open_page(url=url)
        evening(page, folder, tmp_path)
        page.goto("about:blank")
    with serving(FakeBackend(), output_folder=str(folder)) as url:
        page = open_page(url=url)
        found_again(page, tmp_path)
        page.goto("about:blank")
