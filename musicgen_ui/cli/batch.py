"""The command line's `generate --batch`: many requests, several at a time.

Rows that cannot be run are reported before anything is loaded, and the others run: as many jobs
of the backend at once as `--jobs` says, so that every step of the model is shared. A job is the
same as that of a single `generate`, hence a row's take is the same here and there. A take that the
folder holds already is not made again, and one that was not finished is not kept, so an
interrupted batch goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

from musicgen_ui import takes
from musicgen_ui.audio import load
from musicgen_ui.audio.clip import ENDINGS
from musicgen_ui.cli import generate, rows
from musicgen_ui.cli.generate import DONE, FAILED, INTERRUPTED, STDOUT, Bar, Interruption
from musicgen_ui.cli.rows import Piece
from musicgen_ui.engine.protocol import Backend, Failed, Finished, Progress, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CLIP_FIELDS, FIELDS, GenerationRequest, completed

MAX_JOBS = 512
SHOWN_LINES = 20  # failed ones named in the summary


def run(flags: argparse.Namespace) -> int:
    """Makes what the file asks for and saves it; returns the exit code.

    Raises:
        RequestError: the file cannot be read, or the output is not a folder.
    """
    if flags.output == STDOUT or Path(flags.output).suffix.lower() in ENDINGS:
        raise RequestError("A batch is many takes: name a folder after -o.")
    if flags.loop_bars or flags.fade_out:
        raise RequestError("A batch makes whole takes: leave out --loop-bars and --fade-out.")
    jobs, tally = _jobs(flags.jobs), Tally(flags.quiet)
    pieces = _pieces(vars(flags), tally)
    folder = generate.output_path(flags.output)
    made = {file.stem.partition("-")[2] for file in folder.glob("*.flac")}  # the last to be written
    waiting = [piece for piece in pieces if piece.asked not in made]
    tally.before = _count(pieces) - _count(waiting)
    with generate.stop_on_interrupt() as interruption:
        if waiting:
            _make(waiting, flags, jobs, Batch(folder, interruption, tally))
        tally.tell(interruption.pressed)
        if interruption.pressed:
            return INTERRUPTED
        return FAILED if tally.failed else DONE


def _count(pieces: list[Piece]) -> int:
    return sum(len(piece.names) for piece in pieces)


def _jobs(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_JOBS:
        raise RequestError(f"--jobs must be between 1 and {MAX_JOBS}, not “{text[:40]}”.")
    return int(text)


def _pieces(flags: Mapping[str, object], tally: Tally) -> list[Piece]:
    """What is to be made, those of one checkpoint together; the others are reported."""
    file = Path(str(flags["batch"]))
    of_rows = rows.Pieces({name: flags[name] for name in FIELDS}, file.parent)
    # A cluster has checkpoints of its own, and refuses when it is asked.
    refusal = functools.cache(_refusal) if not flags["ray_address"] else lambda *_: ""
    pieces: list[Piece] = []
    for row in rows.read(file):
        try:
            found = of_rows.of(row)
            if said := refusal(_asked(found[0].request)):
                raise RequestError(said)
            pieces += found
        except Exception as error:
            tally.fail(row.line, _why(error))
    return sorted(pieces, key=_model)


def _why(error: Exception) -> str:
    """What is reported of a row that failed: none stops the others."""
    if isinstance(error, RequestError):
        return str(error)
    return f"It failed ({type(error).__name__}: {error})."


def _model(piece: Piece) -> tuple[str, bool]:
    return piece.request.checkpoint, piece.request.stereo


def _asked(request: GenerationRequest) -> GenerationRequest:
    """What a checkpoint must be able to do, alike for many rows."""
    return GenerationRequest(
        prompt="words" if any(request.texts) else "",
        audio_prompt=request.audio_prompt,
        melody=request.melody,
        chords=request.chords,
        style=request.style,
        style_codebooks=request.style_codebooks,
        checkpoint=request.checkpoint,
        stereo=request.stereo,
    )


def _refusal(asked: GenerationRequest) -> str:
    try:
        generate.check_checkpoint(asked)
    except RequestError as error:
        return str(error)
    return ""


def _make(pieces: list[Piece], flags: argparse.Namespace, jobs: int, batch: Batch) -> None:
    with contextlib.closing(generate.backend_of(flags, jobs)) as backend:
        asyncio.run(batch.make(backend, pieces, jobs))


class Tally:
    """What has become of the rows, reported as it happens and in the end."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.before = self.made = 0  # takes: of an earlier run, of this one
        self.made_s = 0.0
        self.failed: dict[int, None] = {}  # lines
        self.bar: Bar | None = None
        self._started_s = time.monotonic()

    def fail(self, line: int, sentence: str) -> None:
        """Tells why a row has no take."""
        self.failed[line] = None
        self._say([f"Line {line}: {sentence}"], sys.stderr)

    def saved(self, piece: Piece, take: takes.Take, new_s: float) -> None:
        """Tells a take's file, and what is to be said about it."""
        self.made += 1
        self.made_s += new_s
        self._say([f"{take.wav}  seed {take.settings['seed']}"], sys.stdout)
        if not self.quiet:
            self._say((f"Line {piece.line}: {note}" for note in take.notes), sys.stderr)

    def tell(self, stopped: bool) -> None:
        """The summary."""
        worked_s = time.monotonic() - self._started_s
        parts = [f"{_takes(self.made)} made, {self.made_s:.1f} s of music in {worked_s:.0f} s"]
        if self.before:
            parts.append(f"{_takes(self.before)} there already")
        if self.failed:
            lines = ", ".join(map(str, itertools.islice(self.failed, SHOWN_LINES)))
            more = ", …" if len(self.failed) > SHOWN_LINES else ""
            parts.append(f"failed: line {lines}{more}")
        if stopped:
            parts.append("stopped: the same command goes on with the rest")
        self._say([] if self.quiet else ["; ".join(parts) + "."], sys.stderr)

    def _say(self, lines: Iterable[str], file: TextIO) -> None:
        for line in lines:
            if self.bar:
                self.bar.say([line], file)
            else:
                print(line, file=file)


def _takes(count: int) -> str:
    return "1 take" if count == 1 else f"{count:,} takes"


class _CannotSaveError(Exception):
    """The folder takes no more files."""


class Batch:
    """Makes pieces and saves them in `folder`, until Ctrl+C is pressed."""

    def __init__(self, folder: Path, interruption: Interruption, tally: Tally) -> None:
        self.folder = folder
        self.interruption = interruption
        self.tally = tally
        self._count = 0

    async def make(self, backend: Backend, pieces: list[Piece], jobs: int) -> None:
        """Makes every piece, those of one checkpoint before those of the next.

        Ends with the first take that cannot be saved, since the next ones could not be either.
        """
        self._count = _count(pieces)
        requests = [piece.request for piece in pieces]
        total_s = sum(request.duration_s * request.variations for request in requests)
        with (
            Bar(total_s, self.tally.quiet) as self.tally.bar,
            contextlib.suppress(_CannotSaveError),
        ):
            for _, same in itertools.groupby(pieces, key=_model):
                queue = iter(list(same))
                await asyncio.gather(*(self._work(backend, queue) for _ in range(jobs)))
        self.tally.bar = None

    async def _work(self, backend: Backend, queue: Iterator[Piece]) -> None:
        for piece in queue:
            if self.interruption.pressed:
                return
            try:
                made = await self._finished(backend, piece)
                for name, finished in zip(piece.names, made, strict=True):
                    await self._save(piece, name, finished)
            except _CannotSaveError:
                raise
            except Exception as error:
                self.tally.fail(piece.line, _why(error))

    async def _finished(self, backend: Backend, piece: Piece) -> list[Finished]:
        """The takes, or what was made of them when they were stopped."""
        notes: list[str] = []
        made: list[Finished] = []
        clips = {}
        for name, path in piece.clips.items():
            reading = await asyncio.to_thread(load.read, path, CLIP_FIELDS[name])
            clips[name] = reading.clip
            notes += reading.notes
        defaults_of = lambda *names: backend.describe(*names).defaults  # noqa: E731
        values = await asyncio.to_thread(completed, piece.values, defaults_of)
        job = backend.submit(GenerationRequest.parse({**values, **clips}))
        with self.interruption.stops(job):
            async for event in job.events():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    if event.fault:
                        raise RequestError(event.fault)
                    made.append(dataclasses.replace(event, notes=(*notes, *event.notes)))
                if isinstance(event, Progress):
                    self._show(piece, event)
        if not made:
            raise RequestError("It ended without a take.")
        return made

    def _show(self, piece: Piece, progress: Progress) -> None:
        if self.tally.bar and progress.stage is not Stage.WAITING:
            beside = f"{self.tally.made} of {_takes(self._count)}"
            self.tally.bar.show(progress, (piece, progress.variation), beside)

    async def _save(self, piece: Piece, name: str, finished: Finished) -> None:
        if finished.stopped:
            return
        try:
            take = await asyncio.to_thread(takes.save, finished, self.folder, name)
        except takes.UnsavedError as error:
            self.tally.fail(piece.line, str(error))
            raise _CannotSaveError from error
        new_s = finished.clip.duration_s - finished.prompt_s
        self.tally.saved(piece, take, new_s)
        self._show(piece, Progress(Stage.COMPOSING, finished.variation, done_s=new_s))
