"""A run in a process of its own, for the page: started, paused and followed by its files.

This module imports no torch: the server stays quick, and a run that takes all memory ends alone.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from musicgen_ui import files
from musicgen_ui.errors import RequestError
from musicgen_ui.finetune import dataset

MUSIC, LOG = "music", "log.txt"  # in a run's folder
_CAPTIONS = (".txt", ".json")
_PAUSE_S = 30.0  # a step under way, and the saving


class Runs:
    """The runs in a folder, by name; one trains at a time. Methods may be called from any thread.

    Args:
        folder: of all runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._running = ""

    def path(self, name: str) -> Path:
        """The folder of a run.

        Raises:
            RequestError: it cannot be the name of a folder.
        """
        plain = " ".join(name.split())
        if not re.fullmatch(r"\w[\w .-]{0,59}", plain) or plain.endswith("."):
            raise RequestError(
                "Name the style with letters, digits, spaces and dashes, at most 60 of them."
            )
        return self.folder / plain

    def songs(self, name: str) -> list[tuple[str, str]]:
        """File name and caption of each song of a run.

        Raises:
            RequestError: a caption cannot be read.
        """
        music = self.path(name) / MUSIC
        found = dataset.find([music]) if _has_audio(music) else []
        return [(path.name, dataset.written_caption(path)) for path in found]

    def add(self, name: str, uploads: Sequence[str]) -> None:
        """Copies audio files, and captions beside them, into a run.

        Raises:
            RequestError: there is no room for them, or no audio among all files.
        """
        music = self.path(name) / MUSIC
        paths = [Path(upload) for upload in uploads]
        audio = [path for path in paths if path.suffix.lower() in dataset.ENDINGS]
        captions = [path for path in paths if path.suffix.lower() in _CAPTIONS]
        if not audio and not _has_audio(music):
            raise RequestError("There is no audio among these files: choose WAV, FLAC, MP3 or OGG.")
        try:
            music.mkdir(parents=True, exist_ok=True)
            for path in (*audio, *captions):
                shutil.copyfile(path, music / path.name)
        except OSError as error:
            raise RequestError(f"The files cannot be kept: {error.strerror}.") from error

    def write_captions(self, name: str, captions: Mapping[str, str]) -> None:
        """Writes the captions of songs, by file name; an empty one is left to be suggested.

        Raises:
            RequestError: one is too long, or the folder cannot be written to.
        """
        music = self.path(name) / MUSIC
        for path in dataset.find([music]):
            caption = " ".join(captions.get(path.name, "").split())
            dataset.require_short(caption, path.name)
            file = path.with_suffix(".txt")
            if caption != dataset.written_caption(path):
                try:
                    files.replace(file, f"{caption}\n".encode())
                except OSError as error:
                    raise RequestError(f"{file} cannot be written: {error.strerror}.") from error

    @property
    def running(self) -> str:
        """The name of the run that trains; "" if none does."""
        with self._lock:
            alive = self._process is not None and self._process.poll() is None
            return self._running if alive else ""

    def start(self, name: str, flags: Sequence[str]) -> None:
        """Starts `finetune` on a run's music, or goes on with it.

        Raises:
            RequestError: another run trains, there is no music, or no process can be started.
        """
        folder = self.path(name)
        dataset.find([folder / MUSIC])
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                raise RequestError(f"“{self._running}” is being trained: pause it first.")
            command = [sys.executable, "-m", "musicgen_ui", "finetune", str(folder / MUSIC)]
            command += ["-o", str(folder), "--quiet", *flags]
            try:
                with (folder / LOG).open("wb") as log:
                    self._process = subprocess.Popen(command, stdout=log, stderr=log)
            except OSError as error:
                raise RequestError(f"The training cannot be started: {error.strerror}.") from error
            self._running = " ".join(name.split())

    def pause(self) -> None:
        """Has the run save its state and end; returns at once."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Pauses and waits, for a bounded time."""
        self.pause()
        if self._process is not None:
            try:
                self._process.wait(_PAUSE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def ended_badly(self, name: str) -> str:
        """The last line that a run printed, where it ended with an error; else ""."""
        with self._lock:
            process = self._process if self._running == " ".join(name.split()) else None
        if process is None or process.poll() in (None, 0, 130):
            return ""
        try:
            text = (self.path(name) / LOG).read_text(encoding="utf-8", errors="replace")
        except OSError:  # its folder is gone
            text = ""
        lines = text.splitlines()
        return lines[-1] if lines else "The training ended without a message: start it again."


def _has_audio(music: Path) -> bool:
    return music.is_dir() and any(p.suffix.lower() in dataset.ENDINGS for p in music.iterdir())
