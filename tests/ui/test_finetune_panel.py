"""The page's fine-tuning: songs and captions in a run's folder, what is shown of its progress."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from musicgen_ui.backends.admission import Admission
from musicgen_ui.errors import RequestError
from musicgen_ui.finetune import process
from musicgen_ui.finetune.process import Runs
from musicgen_ui.finetune.progress import Event, Kind, ProgressFile
from musicgen_ui.ui import page
from musicgen_ui.ui.finetune_panel import Panel, curve_html, status_html
from tests.helpers import songs
from tests.helpers.fakes import FakeBackend

STEPS = [Event(Kind.STEP, step=n, steps=10, loss=3 - n / 10, left_s=120) for n in (1, 2, 3)]


@pytest.fixture
def panel(tmp_path: Path) -> Panel:
    return Panel(Runs(tmp_path / "runs"))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were started; in place of each runs one that waits for SIGTERM."""
    started: list[list[str]] = []
    popen = process.subprocess.Popen

    def fake(command: list[str], **options: Any) -> Any:
        started.append(command)
        wait = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(130));"
        return popen([sys.executable, "-c", f"{wait} print(flush=True); signal.pause()"], **options)

    monkeypatch.setattr(process.subprocess, "Popen", fake)
    return started


def uploads(folder: Path) -> list[str]:
    return [str(path) for path in songs.write(folder, 2, 0.2).iterdir()]


def test_uploaded_songs_are_listed_with_captions(panel, tmp_path):
    files = [name for name in uploads(tmp_path / "up") if "02_song.txt" not in name]
    rows = [["01_song.wav", "slow piano"], ["02_song.wav", ""]]
    assert panel.receive("Sea Blues", files) == (rows, None)
    assert panel.songs("Sea  Blues ") == panel.songs("Sea Blues")  # one folder
    assert panel.songs("another") == []
    (tmp_path / "notes.pdf").write_bytes(b"x")
    with pytest.raises(RequestError, match="no audio among these files"):
        panel.receive("another", [str(tmp_path / "notes.pdf")])


@pytest.mark.parametrize("name", ["", "../up", "a/b", "x" * 61, ".hidden", "end."])
def test_names_that_are_no_folders_are_refused(panel, name):
    with pytest.raises(RequestError, match="Name the style with letters"):
        panel.songs(name)


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM")
def test_start_writes_captions_and_runs_the_command(panel, tmp_path, commands):
    panel.receive("blues", uploads(tmp_path / "up"))
    rows = [["01_song.wav", "loud  piano"], ["02_song.wav", ""]]
    shown = panel.start("blues", rows, "zvara", "cpu", 7, "bundled")
    folder = panel.runs.path("blues")
    assert panel.songs("blues") == [["01_song.wav", "loud piano"], ["02_song.wav", ""]]
    flags = ["--preset", "cpu", "--checkpoint", "bundled", "--activation-word", "zvara"]
    expected = ["finetune", str(folder / "music"), "-o", str(folder), "--quiet", *flags]
    assert commands[0][3:] == [*expected, "--steps", "7"]
    assert shown[4]["visible"] and not shown[3]["visible"] and panel.runs.running == "blues"
    with pytest.raises(RequestError, match="“blues” is being trained: pause it first"):
        panel.start("blues", rows, "", "auto", 0, "auto")
    while not (folder / "log.txt").read_text():
        time.sleep(0.05)
    panel.pause("blues")
    panel.runs.close()
    assert panel.runs.running == "" and not panel.runs.ended_badly("blues")


def test_start_refuses_what_cannot_be_trained(panel, tmp_path, commands):
    with pytest.raises(RequestError, match=r"has no audio files|no file or folder"):
        panel.start("nothing", [], "", "auto", 0, "auto")
    panel.receive("blues", uploads(tmp_path / "up"))
    with pytest.raises(RequestError, match=r"01_song.wav has 5,000 characters"):
        panel.start("blues", [["01_song.wav", "a" * 5000]], "", "auto", 0, "auto")
    assert not commands


def test_look_shows_progress_and_what_can_be_done(panel):
    folder = panel.runs.path("blues")
    write = ProgressFile(folder)
    for event in [*STEPS, Event(Kind.PAUSED, step=3)]:
        write(event)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    status, curve, sample, start, pause, use, timer = panel.look("blues")
    assert "Paused at step 3" in status and "from 2.90 to 2.70" in curve
    assert start["value"] == "Go on" and start["visible"] and not pause["visible"]
    assert not sample["visible"] and use["visible"] and not timer.active
    assert panel.use("blues") == (str(folder / "adapter"), "auto")


def test_status_says_what_matters_and_escapes_it():
    notes = [Event(Kind.NOTE, "<b>.wav was left out")]
    running = status_html([*notes, *STEPS], True, "")
    assert "Step 3 of 10, loss 2.70, 2 min left" in running and "&lt;b&gt;" in running
    assert "It was interrupted" in status_html(STEPS, False, "")
    assert "no memory" in status_html(STEPS, False, "no memory")
    assert status_html([], False, "") == "" and curve_html(STEPS[:1]) == ""


@pytest.mark.parametrize("there", [True, False])
def test_panel_is_there_where_a_folder_is_set(tmp_path, there):
    options = page.PageOptions(finetune_folder=tmp_path if there else None)
    built = page.build(Admission(FakeBackend(), tmp_path), options)
    labels = {getattr(block, "label", "") for block in built.blocks.values()}
    assert ("Teach it your music" in labels) == there == bool(built.finetuning)
