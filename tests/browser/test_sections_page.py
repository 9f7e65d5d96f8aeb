"""A piece that changes on its way, in Chromium."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page, expect

from tests.helpers.browser import Open, download, finished, generate, unfold
from tests.helpers.fakes import FakeBackend


def fill(page: Page, row: int, start: str, words: str) -> None:
    """Types into a row, from one click on."""
    page.get_by_test_id(f"cell-{row}-0").click()
    for text, end in ((start, "Tab"), (words, "Enter")):
        expect(page.get_by_label("Edit cell")).to_be_focused()
        page.keyboard.type(text, delay=20)
        page.keyboard.press(end)
    for column, text in enumerate((start, words)):
        expect(page.get_by_test_id(f"cell-{row}-{column}").locator("span").first).to_have_text(text)


def test_a_table_of_sections_reaches_the_take_and_comes_back_from_its_file(
    open_page: Open, engine: FakeBackend, tmp_path: Path
) -> None:
    page = open_page()
    unfold(page, "Change over time")
    rows = page.locator("#sections .virtual-row")
    expect(rows).to_have_count(3)
    page.get_by_role("button", name="Add a row").click()
    expect(rows).to_have_count(4)
    fill(page, 0, "0", "piano")
    fill(page, 2, "9", "drums")  # beyond the end; a row between is left empty
    unfold(page, "Change over time")
    generate(page, "rock", 3)
    wrong = page.locator("#sections .validation-error")
    expect(wrong).to_contain_text("A section starts at 9 s, but the piece ends at 3 s")
    expect(wrong).to_be_in_viewport()  # out of its fold
    page.get_by_test_id("cell-2-0").click()
    expect(page.get_by_label("Edit cell")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("1.5")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Generate", exact=True).click()
    finished(page)
    assert engine.requests[-1].sections == ((0.0, "piano"), (1.5, "drums"))
    expect(page.locator("#take_facts")).to_contain_text("from 1.5 s")
    file = download(page, "wav", tmp_path)
    again = open_page()
    unfold(again, "Advanced")
    with again.expect_file_chooser() as choosing:
        again.locator("#restore").click()
    choosing.value.set_files(file)
    expect(again.get_by_label("Prompt", exact=True)).to_have_value("rock")
    unfold(again, "Change over time")
    expect(again.get_by_test_id("cell-1-0")).to_have_text("1.5")
    expect(again.get_by_test_id("cell-1-1")).to_have_text("drums")
