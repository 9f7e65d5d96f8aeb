"""The temporary folder does not grow for ever, and memory that is free goes back."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from musicgen_ui.server import cleanup
from musicgen_ui.server.cleanup import YOUNG_S, sweep


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch):
    """Has the sweep run so many seconds later than it is."""

    def choose(seconds: float) -> None:
        now_s = time.time() + seconds
        monkeypatch.setattr(cleanup.time, "time", lambda: now_s)

    return choose


def test_sweep_deletes_old_files_and_empty_folders(tmp_path: Path, later) -> None:
    file, skipped = tmp_path / "a" / "old.wav", tmp_path / "takes" / "kept.wav"
    for path in (file, skipped):
        path.parent.mkdir()
        path.write_bytes(b"x")
    os.utime(file, (1, 1))  # a copy has the time of its original
    assert sweep(tmp_path, kept_s=100, skip=tmp_path / "takes") == 0
    later(101)
    assert sweep(tmp_path, kept_s=100, skip=tmp_path / "takes") == 1
    assert not file.parent.exists() and skipped.exists()


def test_sweep_deletes_the_oldest_takes_of_too_many(tmp_path: Path, later) -> None:
    for name in ("z", "b", "a"):  # the oldest first
        for suffix in ("wav", "flac"):
            (tmp_path / f"{name}.{suffix}").write_bytes(bytes(100))
        time.sleep(0.02)
    later(YOUNG_S - 1)
    assert sweep(tmp_path, kept_s=1e6, kept_bytes=500) == 0
    later(YOUNG_S + 1)
    assert sweep(tmp_path, kept_s=1e6, kept_bytes=500) == 2
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"b.wav", "b.flac", "a.wav", "a.flac"}
    assert sweep(tmp_path, kept_s=1e6, kept_bytes=500) == 0


def test_cleaning_goes_on_after_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[Path] = []

    def sweep(folder: Path, *_: object, **__: object) -> int:
        swept.append(folder)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(cleanup, "sweep", sweep)
    monkeypatch.setattr(cleanup, "SWEEP_EVERY_S", 0.0)
    cleanup.clean_while(lambda: len(swept) < 2, tmp_path, 1e9)
    assert len(swept) == 2
