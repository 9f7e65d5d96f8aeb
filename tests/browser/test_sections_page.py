"""A piece that changes on its way, in Chromium: sections as rows."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page, expect

from tests.helpers.browser import Open, download, finished, generate, unfold
from tests.helpers.fakes import FakeBackend

TARGETS = """() => [...document.querySelectorAll('.sections :is(input, textarea, button)')]
  .map((each) => each.getBoundingClientRect())
  .filter(({ width, height }) => width < 44 || height < 44).length"""


def rows(page: Page) -> list[list[str]]:
    fields = "[...row.querySelectorAll('input, textarea')].map((field) => field.value)"
    return page.locator(".section-rows li").evaluate_all(f"rows => rows.map((row) => {fields})")


def test_rows_of_sections_reach_the_take_and_come_back(
    open_page: Open, engine: FakeBackend, tmp_path: Path
) -> None:
    page = open_page()
    unfold(page, "Change over time")
    assert rows(page) == [["", ""]]
    # By keyboard alone: a row is added, times are brought into order.
    page.get_by_label("Start of section 1").focus()
    for text in ("0:09", "drums"):
        page.keyboard.type(text)
        page.keyboard.press("Enter")  # on, and at the end a new row
    page.keyboard.type("0")
    page.keyboard.press("Tab")
    expect(page.locator(".section-at").first).to_have_value("0")  # in order of time
    page.keyboard.type("piano")
    assert rows(page) == [["0", "piano"], ["0:09", "drums"]]
    expect(page.get_by_label("Words of section 1")).to_be_focused()
    unfold(page, "Change over time")
    generate(page, "rock", 3)
    wrong = page.locator("#sections .validation-error")
    expect(wrong).to_contain_text("A section starts at 9 s, but the piece ends at 3 s")
    expect(wrong).to_be_in_viewport()  # out of its fold
    start = page.get_by_label("Start of section 2")
    start.fill("soon")
    start.press("Tab")
    expect(start).to_have_attribute("aria-invalid", "true")
    start.fill("0:01.5")
    page.get_by_role("button", name="Generate", exact=True).click()
    finished(page)
    assert engine.requests[-1].sections == ((0.0, "piano"), (1.5, "drums"))
    expect(page.locator("#take_facts")).to_contain_text("from 1.5 s")
    drawn = '[[0,"piano"],[1.5,"drums"]]'
    page.wait_for_function(f"JSON.stringify(musicgenPlayer.shown.sections) === '{drawn}'")
    file = download(page, "wav", tmp_path)
    again = open_page("phone")
    unfold(again, "Advanced")
    with again.expect_file_chooser() as choosing:
        again.locator("#restore").click()
    choosing.value.set_files(file)
    expect(again.get_by_label("Prompt", exact=True)).to_have_value("rock")
    unfold(again, "Change over time")
    expect(again.get_by_label("Start of section 2")).to_have_value("0:01.5")
    again.get_by_role("button", name="Add a section").tap()
    expect(again.get_by_label("Start of section 3")).to_be_focused()
    assert again.evaluate(TARGETS) == 0
    again.get_by_role("button", name="Remove section 1").tap()
    assert rows(again) == [["0:01.5", "drums"], ["", ""]]
    expect(again.get_by_role("button", name="Remove section 1")).to_be_focused()
    again.locator("#generate").click()
    finished(again)
    assert engine.requests[-1].sections == ((1.5, "drums"),)
