"""One journey with nothing faked: the bundled checkpoint, from a server that has just started.

Over a Ray cluster too: `python -m pytest -m ray tests/browser/test_real_engine.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import expect

from musicgen_ui import takes
from musicgen_ui.checkpoints import registry
from tests.helpers.backends import CLUSTER
from tests.helpers.browser import Open, serving

TAKE_DOWN = """() => {
  window.said = [];
  const look = () => window.said.push(document.querySelector(".player-text").textContent);
  new MutationObserver(look).observe(document.querySelector(".player"),
    {subtree: true, childList: true, characterData: true});
}"""


@pytest.fixture(params=["local", CLUSTER])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    cluster = {"backend": "ray", "replicas": 1} if request.param == "ray" else {}
    chosen = {"device": "cpu", "precision": "float32"}  # int8 is 20 s of compiling
    with serving(checkpoint="bundled", **chosen, **cluster) as url:
        yield url


def test_a_click_before_the_engine_is_there_becomes_music(
    open_page: Open, url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page = open_page(url=url)
    page.get_by_label("Prompt", exact=True).fill("techno with a hard kick and synth bass")
    length = page.locator("#duration_s input[type=number]")
    length.fill("8")  # long enough for its progress to be said
    length.press("Tab")
    page.evaluate(TAKE_DOWN)  # they are composed faster than a look from here
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator(".player[data-stage=finished]")).to_be_visible(
        timeout=400_000 if "ray" in request.node.name else 120_000
    )
    assert "Composing" in page.evaluate("() => window.said.join()")
    page.wait_for_function("() => musicgenPlayer.sound.position_s > 7.9")
    expect(page.locator("#engine")).to_contain_text("bundled")
    with page.expect_download() as waiting:
        page.locator("#wav").click()
    path = tmp_path / "take.wav"
    waiting.value.save_as(path)
    samples, rate = soundfile.read(path)
    assert len(samples) == 8 * rate and np.std(samples) > 0.001
    its_own = registry.describe(registry.resolve("bundled")).defaults
    made = takes.read_settings(path)
    assert made and its_own and its_own.items() <= made.items()
