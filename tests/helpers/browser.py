"""Servers and gestures that the browser tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from musicgen_ui.server.app import close, launch
from musicgen_ui.server.settings import Settings
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import free_port

Open = Callable[..., Page]
# Until nothing was added to the page for ten frames.
MOUNTED = """() => new Promise((done) => {
  let count = 0, quiet = 0, frames = 0;
  const look = () => {
    const now = document.getElementsByTagName('*').length;
    quiet = now === count ? quiet + 1 : 0;
    count = now;
    if (quiet === 10 || ++frames === 300) done();
    else requestAnimationFrame(look);
  };
  look();
})"""


@contextmanager
def serving(engine: FakeBackend | None = None, **settings: Any) -> Iterator[str]:
    """A server of its own; the address.

    Gradio takes the folder of its uploads from the environment, so of two servers in a process
    only the one that began last takes files: afterwards it is the other's turn again.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", "")  # noted, to be set back
        chosen = Settings(port=free_port(), **{"output_folder": "temporary"} | settings)
        demo, temporary = launch(chosen, engine)
        try:
            yield f"http://127.0.0.1:{chosen.port}/"
        finally:
            close(demo, temporary)


def settled(page: Page) -> None:
    """The page is there, and has been given what its tab had before."""
    page.wait_for_function("() => window.musicgenPlayer && window.musicgenForm")


def mounted(page: Page) -> None:
    """Nothing is added to the page any more: fields that are being mounted forget what is typed."""
    page.evaluate(MOUNTED)


def generate(page: Page, prompt: str = "calm", length_s: float = 3.0) -> None:
    page.evaluate("() => { window.before = window.musicgenPlayer?.take?.id; }")
    page.get_by_label("Prompt", exact=True).fill(prompt)
    set_number(page, "duration_s", length_s)
    page.get_by_role("button", name="Generate", exact=True).click()


def set_number(page: Page, name: str, value: float) -> None:
    field = page.locator(f"#{name} input[type=number]")
    field.fill(f"{value:g}")
    field.press("Tab")


def unfold(page: Page, name: str) -> None:
    page.get_by_role("button", name=name).click()
    mounted(page)


def finished(page: Page, stage: str = "finished") -> None:
    """The followed job has ended, and what it made is in the player and behind the buttons."""
    expect(page.locator(f".player[data-stage={stage}]")).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()
    if stage != "failed":  # the take comes after the word that it is finished
        another = "() => ![undefined, window.before].includes(musicgenPlayer.take?.id)"
        page.wait_for_function(another)


def download(page: Page, name: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator(f"#{name}").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path
