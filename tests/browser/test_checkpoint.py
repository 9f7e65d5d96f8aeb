"""Choosing a checkpoint on the page: its own settings come with it, the user's stay."""

from __future__ import annotations

import re
from pathlib import Path

import soundfile
from playwright.sync_api import Page, expect

from tests.helpers.browser import Open, download, finished, generate, set_number, unfold


def choose(page: Page, checkpoint: str) -> None:
    field = page.get_by_label("Checkpoint", exact=True)
    field.fill(checkpoint)
    field.press("Enter")
    field.press("Tab")


def test_a_chosen_checkpoints_own_settings_come_with_it_and_the_users_stay(
    open_page: Open, tmp_path: Path
) -> None:
    page = open_page()
    stereo = page.get_by_role("checkbox", name="Stereo")
    stereo.check()
    generate(page, length_s=1)
    finished(page)
    assert soundfile.info(download(page, "wav", tmp_path)).channels == 2
    unfold(page, "Sampling")
    temperature, top_k = (
        page.locator(f"#{n} input[type=number]") for n in ("temperature", "top_k")
    )
    expect(temperature).to_have_value("1")
    choose(page, "wide")
    expect(temperature).to_have_value("0.7")
    expect(top_k).to_have_value("50")
    expect(page.locator("#checkpoint_line")).to_contain_text("sets temperature 0.7, top-k 50")
    expect(stereo).to_be_disabled()
    expect(stereo).to_be_checked()
    set_number(page, "temperature", 1.3)
    page.get_by_label("Checkpoint", exact=True).click()
    page.get_by_role("option", name=re.compile("^mono ")).click()
    expect(top_k).to_have_value("250")
    expect(stereo).to_be_disabled()
    expect(stereo).not_to_be_checked()
    expect(temperature).to_have_value("1.3")
    choose(page, "wide")
    expect(top_k).to_have_value("50")
    expect(page.locator("#checkpoint_line")).to_contain_text("temperature 0.7; yours is kept")
    expect(temperature).to_have_value("1.3")
    unfold(page, "Advanced")
    expect(page.locator("#adapter")).to_be_visible()
    choose(page, "nonsense")
    expect(page.locator("#checkpoint_line [role=alert]")).to_contain_text("no checkpoint")
