"""axe-core finds nothing serious in the main states of the page, light and dark, desk and phone."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from musicgen_ui.ui.take_panel import EXAMPLE
from tests.helpers.browser import Open, finished, generate, serving, set_number, unfold
from tests.helpers.fakes import FakeBackend

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
FOLDS = ("Presets and recent prompts", "Start from audio", "Change over time")
FOLDS += ("Sampling", "Advanced", "Export")


@cache
def axe() -> Path | None:
    """The script of axe-core, if npm has it."""
    if not shutil.which("npm"):
        return None
    asked = ["npm", "root", "--global"]
    root = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    script = Path(root) / "axe-core" / "axe.min.js"
    return script if script.is_file() else None


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if axe() is None:
        pytest.skip("needs axe-core: npm install --global axe-core@4.11.4")
    folder = tmp_path_factory.mktemp("music")
    with serving(FakeBackend(), output_folder=str(folder)) as url:
        yield url


def serious(page: Page) -> list[str]:
    script = axe()
    assert script
    page.evaluate(script.read_text(encoding="utf-8"))
    only = {"runOnly": RULES, "resultTypes": ["violations"]}  # what passes costs as much again
    found = page.evaluate("only => axe.run(only)", only)["violations"]
    return [
        f"{each['id']}: {node['target']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def focus_stays(page: Page) -> None:
    """A card that is used by keys has the focus when the list is drawn anew."""
    star = page.locator(".card-star").first
    star.press("Enter")
    expect(star).to_have_attribute("aria-pressed", "true")
    page.wait_for_function("() => document.activeElement !== document.body")
    assert page.evaluate("() => document.activeElement.className") == "card-star"
    page.locator(".card-more summary").first.press("Enter")
    page.keyboard.press("Escape")
    expect(page.locator(".card-more[open]")).to_have_count(0)
    assert page.evaluate("() => document.activeElement.tagName") == "SUMMARY"


@pytest.mark.parametrize(("screen", "scheme"), [("desk", "light"), ("phone", "dark")])
def test_axe_finds_nothing_serious_and_focus_stays(
    open_page: Open, studio: str, screen: str, scheme: str
) -> None:
    page = open_page(screen, scheme, studio)
    expect(page.locator("#library_cards")).to_contain_text("Takes are kept in")
    known = page.locator(".card").count()
    set_number(page, "variations", 2)
    generate(page, "calm", 1)
    finished(page)
    expect(page.locator(".card")).to_have_count(known + 2)  # they stand before the others
    expect(page.locator(".card.is-current")).to_have_count(1)
    focus_stays(page)
    page.locator(".card-check input").first.check()
    page.locator(".card-more summary").last.click()
    assert serious(page) == []
    page.locator(".card-more summary").last.click()
    for fold in FOLDS:
        unfold(page, fold)
    page.locator("#audio_prompt input[type=file]").set_input_files(EXAMPLE)
    expect(page.locator("#clip_line")).to_contain_text("of 8.0 s")
    unfold(page, "Trim the clip")
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.goto("about:blank")


@pytest.mark.parametrize(("screen", "scheme"), [("desk", "dark"), ("phone", "light")])
def test_axe_finds_nothing_in_queue_and_pad(
    open_page: Open, engine: FakeBackend, screen: str, scheme: str
) -> None:
    if axe() is None:
        pytest.skip("needs axe-core: npm install --global axe-core@4.11.4")
    engine.speed = 0.5
    page = open_page(screen, scheme)
    generate(page, "calm", 60)
    expect(page.locator("#generate")).to_have_text("Queue another")
    for queued in (2, 3):
        page.locator("#generate").click()
        expect(page.locator(".job")).to_have_count(queued)
    page.get_by_label("Live mode").check()
    unfold(page, "More prompts")
    page.locator("#live_prompt_2 textarea").fill("loud drums")
    page.locator("#live_prompt_3 textarea").fill("strings")
    page.locator("#live_prompt_3 textarea").press("Tab")
    expect(page.get_by_role("slider", name="Mix of the prompts")).to_be_visible()
    # Generate stays at the screen's lower edge: nothing is half behind it at the page's end.
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# The name of what has the focus, and whether the bar of Generate covers a part of it.
FOCUSED = """() => {
  const field = document.activeElement, box = field.getBoundingClientRect();
  const bar = document.querySelector('#go').getBoundingClientRect();
  const is_behind = !field.closest('#go, #take, #library, #teach')
    && box.bottom > bar.top && box.top < bar.bottom && box.width > 0;
  return [field.closest('[id]')?.id ?? field.tagName, is_behind];
}"""


def test_keys_reach_every_field_of_the_form(open_page: Open) -> None:
    page = open_page("phone")
    page.get_by_label("Prompt", exact=True).focus()
    stops = []
    while "generate" not in stops and len(stops) < 60:
        page.keyboard.press("Tab")
        stop, is_behind = page.evaluate(FOCUSED)
        assert not is_behind, f"{stop} is behind Generate"
        stops.append(stop)
    assert "BODY" not in stops
    assert {"tempo_bpm", "key", "seed", "guidance_scale", "checkpoint"} <= set(stops)
    assert stops.count("length_choice") == 1
    help_texts = {
        "#guidance_scale input": "1 is off",
        "#stereo input": "left and right",
        "#seed input": "-1",
    }
    for field, words in help_texts.items():
        tied = page.locator(field).first.get_attribute("aria-describedby")
        expect(page.locator(f"#{tied}")).to_contain_text(words)
    page.locator("#length_choice input:checked").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#duration_s input[type=number]")).to_have_value("20")
