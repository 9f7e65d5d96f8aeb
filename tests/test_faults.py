"""Faults, each brought about on purpose: what is lost is what broke, and everybody is told."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import soundfile
from fakes import FakeEngine

from musicgen_ui import files, takes
from musicgen_ui.request import FIELDS
from musicgen_ui.ui import form
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.visitors import Desk

ROOT = Path(__file__).parents[1]
TAB = SimpleNamespace(session_hash="a")


def values(**changes: Any) -> dict[str, Any]:
    form_values = {name: spec.default for name, spec in FIELDS.items()}
    return form_values | {"duration_s": 1.0, "seed": 7} | changes


def shown(handlers: Handlers, **changes: Any) -> dict[str, Any]:
    """What the page shows after a job, and under "heard" how many chunks came."""

    async def run() -> dict[str, Any]:
        state: dict[str, Any] = {"heard": 0}
        async for update in handlers.compose([], TAB, **values(**changes)):
            state |= update
            state["heard"] += len(update.get("live", {}).get("chunks", [])) > 0
        return state

    return asyncio.run(run())


# The disk


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Makes the disk under a folder refuse to be written to."""

    def refuse(folder: Path, code: int) -> None:
        whole = tempfile.mkstemp

        def mkstemp(*args: Any, **options: Any) -> Any:
            if Path(options["dir"]) == folder:
                raise OSError(code, os.strerror(code))
            return whole(*args, **options)

        monkeypatch.setattr(tempfile, "mkstemp", mkstemp)

    return refuse


@pytest.mark.parametrize(
    ("code", "said"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "Read-only")]
)
def test_a_take_that_cannot_be_saved_is_heard_and_its_seed_is_told(
    tmp_path: Path, full: Callable, code: int, said: str
) -> None:
    handlers = Handlers(FakeEngine(), tmp_path, Desk(3))
    full(tmp_path, code)
    end = shown(handlers, seed=41)
    assert end["heard"] >= 4  # all of the music came before
    assert said in end["live"]["text"] and end["live"]["stage"] == "finished"
    assert said in end["take_notes"]["value"]
    assert "seed</dt><dd>41<" in end["take_facts"]
    assert end["take_audio"] is None and not end["wav"]["interactive"]
    assert end["generate"]["visible"] and len(handlers.desk) == 0
    assert form.same_seed(end["history"], end["chosen"]) == {"seed": 41}
    assert form.continue_take(end["history"], end["chosen"]) == {}
    assert list(tmp_path.iterdir()) == []


def test_where_the_folder_of_takes_is_full_the_visitor_downloads_from_another(
    tmp_path: Path, full: Callable
) -> None:
    spare = tmp_path / "spare"
    handlers = Handlers(FakeEngine(), tmp_path, Desk(3), spare=spare)
    full(tmp_path, errno.ENOSPC)
    end = shown(handlers)
    assert soundfile.info(end["take_audio"]).duration == 1.0
    assert Path(end["wav"]["value"]).parent == spare
    assert "download it here" in end["take_notes"]["value"]


def test_the_api_is_told_that_nothing_could_be_saved(tmp_path: Path, full: Callable) -> None:
    handlers = Handlers(FakeEngine(), tmp_path, Desk(3))
    full(tmp_path, errno.ENOSPC)

    async def run() -> None:
        async for _ in handlers.generate(TAB, **values()):
            pass

    with pytest.raises(gr.Error, match="disk is full"):
        asyncio.run(run())


# A killed process

SAVING = """
import sys, numpy as np
from pathlib import Path
from musicgen_ui import files, takes
from musicgen_ui.engine.events import Finished
from musicgen_ui.request import Clip, GenerationRequest
clip = Clip(np.random.default_rng(0).uniform(-.5, .5, (2, 32000 * 5)).astype(np.float32), 32000)
print(files.private_folder(), flush=True)
while True:
    takes.save(Finished(0, clip, GenerationRequest(seed=1), 0.0, 1.0), Path(sys.argv[1]))
    print("saved", flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_whole_takes_and_the_next_one_clears_up(
    tmp_path: Path,
) -> None:
    draw = np.random.default_rng(0)
    private = []
    for _ in range(2):
        command = [sys.executable, "-c", SAVING, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout
            private.append(Path(process.stdout.readline().strip()))
            process.stdout.readline()
            time.sleep(draw.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
    (tmp_path / f".{process.pid}-abc-def{files.PART}").write_bytes(b"half a take")
    wavs, flacs = (sorted(tmp_path.glob(f"*.{kind}")) for kind in ("wav", "flac"))
    assert len(wavs) >= 2 and len(flacs) >= 2
    for path in (*wavs, *flacs):
        assert len(soundfile.read(path)[0]) == 160_000
        assert takes.read_settings(path)
    assert all(folder.is_dir() for folder in private)
    mine = files.private_folder()
    part = files.write_part(tmp_path, b"being written now")
    files.delete_leftovers(tmp_path)
    assert not any(folder.exists() for folder in private)
    assert list(tmp_path.glob(".*")) == [part] and mine.is_dir()
    mine.rmdir()
