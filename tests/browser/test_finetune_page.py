"""Teach it your music: songs are uploaded, captions edited, a run is followed and paused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from musicgen_ui.finetune import process
from tests.helpers import songs
from tests.helpers.browser import Open, serving
from tests.helpers.fakes import FakeBackend

RUN = """
import pathlib, signal, sys, threading, time
from musicgen_ui.finetune.progress import Event, Kind, ProgressFile
pause = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: pause.set())
write = ProgressFile(pathlib.Path(sys.argv[1]))
for step in range(1, 1000):
    if pause.wait(0.1):
        break
    write(Event(Kind.STEP, step=step, steps=1000, loss=3 - step / 1000, left_s=60))
write(Event(Kind.PAUSED, "Paused: the same command goes on."))
sys.exit(130)
"""


def test_a_style_is_taught_and_paused(
    open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training itself is a stand-in that writes its progress file."""
    popen = process.subprocess.Popen

    def started(command: list[str], **options: Any) -> Any:
        folder = command[command.index("-o") + 1]
        return popen([sys.executable, "-c", RUN, folder], **options)

    monkeypatch.setattr(process.subprocess, "Popen", started)
    files = [str(path) for path in songs.write(tmp_path / "up", 2, 0.3).iterdir()]
    with serving(FakeBackend(), output_folder=str(tmp_path)) as url:
        page = open_page(url=url)
        page.get_by_text("Teach it your music").click()
        page.locator("#finetune_files input[type=file]").set_input_files(files)
        table = page.locator("#finetune_captions")
        expect(table).to_contain_text("01_song.wav")
        expect(table).to_contain_text("slow piano")
        page.locator("#finetune_start").click()
        status = page.locator("#finetune_status")
        expect(status).to_contain_text("Step")
        expect(page.locator("#finetune_curve svg polyline")).to_be_visible()
        page.locator("#finetune_pause").click()
        expect(status).to_contain_text("Paused")
        expect(page.locator("#finetune_start")).to_have_text("Go on")
