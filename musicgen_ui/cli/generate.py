"""The command line's `generate`: a request from flags, a progress bar, files.

There is a flag for every field of `GenerationRequest`, made from the field's metadata, so a new
field appears by itself. What can be refused is refused before torch is imported; the music comes
from the same engine as the page's, so a seed gives the same take here and there. The first Ctrl+C
stops it and keeps what was made so far.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO, cast

from tqdm import tqdm

from musicgen_ui import files
from musicgen_ui.audio.clip import ENDINGS
from musicgen_ui.audio.export import Shape
from musicgen_ui.cli import console
from musicgen_ui.coercion import Spec
from musicgen_ui.engine.protocol import Backend, Failed, Finished, Job, Progress, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CHECKPOINT_FIELDS, CLIP_FIELDS, FIELDS, GenerationRequest, completed

TABLES = ("sections", "automation")  # settings that a file of JSON may hold
DONE, FAILED, INTERRUPTED = 0, 1, 130  # exit codes
STDOUT = "-"
NEW_AT_LEAST_S = 0.01  # a take with less new music than half a frame is none


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of the request, then those of the command itself."""
    _add_settings(parser)
    _add_own_flags(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    for name, spec in FIELDS.items():
        what, named = _help(spec), flag(name)
        if name == "prompt":
            parser.add_argument(name, nargs="?", default="", help=what)
        elif isinstance(spec.default, bool):
            switch = argparse.BooleanOptionalAction
            parser.add_argument(named, action=switch, help=what, default=None, dest=name)
        else:
            unit = _metavar(spec)
            parser.add_argument(named, metavar=unit, help=what, default=None, dest=name)


def _add_own_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        default="takes",
        help="out.wav, .flac, .mp3, .ogg or .opus (out-1.wav … for variations), - for a WAV to "
        "standard output, or a folder where every take gets a name of its own, as WAV and FLAC "
        "with its codes (default takes)",
    )
    parser.add_argument(
        "--loop-bars",
        metavar="N",
        type=int,
        default=0,
        help="the take is a loop of so many bars at --tempo, from the start of the "
        "new music on; a WAV says so to samplers",
    )
    parser.add_argument(
        "--fade-out",
        metavar="S",
        type=float,
        default=0.0,
        help="the take's last seconds fade to silence",
    )
    parser.add_argument(
        "--batch",
        metavar="FILE",
        help="a request a row instead: prompts as text, CSV or JSON lines with any setting by its "
        "API name; the flags are what rows leave out. Takes that are there are not made again",
    )
    parser.add_argument(
        "--jobs",
        default="8",
        metavar="N",
        help="takes of a batch made at the same time (default 8; fewer where memory is short)",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    parser.add_argument(
        "--precision",
        default="auto",
        help="auto, float32, bfloat16, float16 or int8 (default auto)",
    )
    parser.add_argument(
        "--ray-address",
        default="",
        metavar="HOST:PORT",
        help="the Ray cluster of a “serve --backend ray” makes the takes: auto or host:port; "
        "--device and --precision are its own then",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no notes")


def run(flags: argparse.Namespace) -> int:
    """Makes the takes and saves them; returns the exit code.

    Raises:
        RequestError: a request that cannot be run.
    """
    values, notes = _read(vars(flags))
    shape = Shape(flags.loop_bars, flags.fade_out)
    if shape.loop_bars:
        asked = GenerationRequest.parse(values)
        asked_s = None if values["duration_s"] is None else asked.duration_s
        values["duration_s"] = shape.duration_s(asked.tempo_bpm, asked_s, asked.beats_a_bar)
    if not flags.ray_address:
        check_checkpoint(GenerationRequest.parse(values))
    output = None if flags.output == STDOUT else output_path(flags.output)
    if not output:
        _check_stdout(values)
    with contextlib.closing(backend_of(flags)) as backend, stop_on_interrupt() as interruption:
        try:
            own = completed(values, lambda *names: backend.describe(*names).defaults)
            job = backend.submit(GenerationRequest.parse(own))
            with interruption.stops(job):
                saved, broken = _save_all(job, output, notes, flags.quiet, shape)
        except RequestError as error:
            if error.field:
                raise
            print(error, file=sys.stderr)
            return FAILED
        if not interruption.pressed:
            return FAILED if broken else DONE
        kept = "what was made so far is kept" if saved else "there was nothing to keep yet"
        print(f"Stopped: {kept}.", file=sys.stderr)
        return INTERRUPTED


def backend_of(flags: argparse.Namespace, max_jobs: int = 8) -> Backend:
    """What makes the takes: this computer, or the Ray cluster of `--ray-address`.

    Raises:
        RequestError: there is no such device, precision or cluster.
    """
    from musicgen_ui.backends.ranking import Ranking

    if not flags.ray_address:
        from musicgen_ui.backends.local import LocalBackend  # torch: seconds

        local = LocalBackend(device=flags.device, precision=flags.precision, max_jobs=max_jobs)
        return Ranking(local)
    if (flags.device, flags.precision) != ("auto", "auto"):
        raise RequestError("--device and --precision are those of the cluster: leave them out.")
    if find_spec("ray") is None:
        raise RequestError("--ray-address needs more: pip install -r requirements-ray.txt")
    from musicgen_ui.backends.ray_cluster import Cluster, connect

    return Ranking(connect(Cluster(flags.ray_address, front_only=True), {}))


def _check_stdout(values: Mapping[str, object]) -> None:
    if GenerationRequest.parse(values).takes > 1:
        raise RequestError(
            "Standard output takes one WAV: add --keep 1 to --variations, or name a folder "
            "after -o."
        )
    if sys.stdout.isatty():
        raise RequestError("-o - writes a WAV to standard output: send it to a program or a file.")


def flag(name: str) -> str:
    """The flag of a request's field: its name without the unit."""
    unit = FIELDS[name].metadata["unit"]
    return "--" + name.removesuffix(f"_{unit}").replace("_", "-")


def _help(spec: Spec) -> str:
    about = spec.metadata
    facts = []
    if not isinstance(spec.default, (str, bool, tuple)) and about["min"] is not None:
        facts.append(f"{about['min']:.15g} to {about['max']:.15g} {about['unit']}".rstrip())
    if spec.default not in (None, "", ()):
        words = {"True": "on", "False": "off"}
        shown = f"{spec.default}".removesuffix(".0")
        own = "the checkpoint's own, else " if spec.name in CHECKPOINT_FIELDS else ""
        facts.append(f"default {own}{words.get(shown, shown)}")
    text: str = about["help"] + (f" ({', '.join(facts)})" if facts else "")
    return text.replace("%", "%%")


def _metavar(spec: Spec) -> str:
    if spec.name in CLIP_FIELDS:
        return "FILE"
    if isinstance(spec.default, tuple):
        return "FILE-OR-JSON"
    return spec.metadata["unit"].upper() or ("TEXT" if isinstance(spec.default, str) else "N")


def output_path(text: str) -> Path:
    """The file or folder to write to; its folder is made.

    Raises:
        RequestError: it cannot be written to, or asks for another kind of file.
    """
    path = files.expanded(text)
    if path.is_dir() or not path.suffix or text.endswith("/"):
        folder = path
    elif path.suffix.lower() in ENDINGS:
        folder = path.parent
    else:
        raise RequestError(
            f"{path.name} is no kind of file that is written here: end it in "
            f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}, or name a folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder} cannot be a folder: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise RequestError(f"The folder {folder} cannot be written to: choose another.")
    return path


def _read(flags: Mapping[str, object]) -> tuple[dict[str, object], tuple[str, ...]]:
    """A request's values with the clips read, and what is to be said about them."""
    values = {name: _as_typed(flags[name]) for name in FIELDS}
    notes: list[str] = []
    for name, keep_s in CLIP_FIELDS.items():
        if values[name] is not None:
            from musicgen_ui import takes
            from musicgen_ui.audio import load

            path = files.expanded(str(flags[name]))
            reading = load.read(path, keep_s)
            values[name] = takes.with_codes(reading.clip, path)[0]
            notes += reading.notes
    for name in TABLES:
        values[name] = table_in(name, values[name], Path())
    return values, tuple(notes)


def _as_typed(value: object) -> object:
    """An argument's text: where the locale is not UTF-8, Python keeps what it lacks as bytes."""
    if not isinstance(value, str) or value.isascii():
        return value
    return os.fsencode(value).decode("utf-8", "replace") if _has_bytes(value) else value


def _has_bytes(text: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in text)


def table_in(name: str, value: object, folder: Path) -> object:
    """Rows as they are or, where `value` names a file from `folder` on, the file's text.

    Args:
        name: of the setting, one of `TABLES`.
        value: rows, JSON or a file's name.
        folder: where relative names start.

    Raises:
        RequestError: the file cannot be read.
    """
    if not isinstance(value, str) or not value or value.lstrip().startswith("["):
        return value
    path = folder / files.expanded(value)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path} cannot be read as {name}: give a file of JSON, or JSON itself.", name
        ) from error


def check_checkpoint(request: GenerationRequest) -> None:
    """Refuses an unknown or unsuitable checkpoint; which one "auto" is depends on the device.

    Raises:
        RequestError: there is no such checkpoint, or it cannot do what is asked.
    """
    from musicgen_ui.checkpoints import registry

    if request.checkpoint != "auto":
        source = registry.resolve(request.checkpoint, request.stereo)
        registry.describe(source)
        registry.require_able(source, request)


class Interruption:
    """Whether Ctrl+C was pressed, and the jobs that it stops."""

    def __init__(self) -> None:
        self.pressed = False
        self._jobs: list[Job] = []

    def press(self) -> None:
        """Stops the jobs."""
        self.pressed = True
        for job in list(self._jobs):
            job.stop()

    @contextlib.contextmanager
    def stops(self, job: Job) -> Iterator[None]:
        """Within it, the job is one of them; it is stopped at the end, whatever happens."""
        self._jobs.append(job)
        try:
            if self.pressed:
                job.stop()
            yield
        finally:
            job.stop()
            self._jobs.remove(job)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Interruption]:
    """The first Ctrl+C stops the jobs, the second one interrupts."""
    interruption = Interruption()

    def interrupted(*_: object) -> None:
        interruption.press()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)


def _save_all(
    job: Job, output: Path | None, notes: tuple[str, ...], quiet: bool, shape: Shape
) -> tuple[int, int]:
    """Saves and reports every take with new music in it; how many there were, how many failed."""
    saved = failed = place = 0
    request = job.request
    with Bar(request.duration_s * request.variations, quiet) as bar:
        for event in job.follow():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Progress):
                bar.show(event, event.variation)
            elif isinstance(event, Finished):
                failed += bool(event.fault)
                place = place + 1 if request.keep else event.variation + 1
                new_s = event.clip.duration_s - event.prompt_s
                if new_s < NEW_AT_LEAST_S:
                    continue
                made = Progress(Stage.COMPOSING, done_s=new_s, speed=event.speed)
                bar.show(made, event.variation)
                finished = dataclasses.replace(event, notes=(*notes, *event.notes))
                try:
                    lines, said = _save(finished, output, place if request.takes > 1 else 0, shape)
                except RequestError as error:  # the other variations may still be saved
                    failed += 1
                    bar.say([f"Seed {event.request.seed}: {error}"], sys.stderr)
                    continue
                saved += 1
                bar.say(lines, sys.stdout if output else sys.stderr)
                bar.say([] if quiet else said, sys.stderr)
    return saved, failed


def _save(
    finished: Finished, output: Path | None, number: int, shape: Shape
) -> tuple[list[str], tuple[str, ...]]:
    """Writes a take; a line for each file, and the take's notes. One of several has a number."""
    from musicgen_ui import takes

    made: list[Path] = []
    if output is None:
        content, notes = takes.encode(finished, ".wav", shape)
        cast(console.Stream, sys.stdout).write_bytes(content)
    elif output.is_dir():
        take = takes.save(finished, output, shape=shape)
        made, notes = [take.wav, take.flac], take.notes
    else:
        made = [output.with_stem(output.stem + (f"-{number}" if number else ""))]
        notes = takes.write(finished, made[0], shape)
    facts = f"seed {finished.request.seed}  {finished.speed:.2f}× real time"
    return [f"{file}  {facts}" for file in made], notes


class Bar:
    """A progress bar on stderr: seconds of new music over several takes."""

    def __init__(self, total_s: float, quiet: bool) -> None:
        self._done_s: dict[object, float] = {}
        self._stage = ""
        self._bar = tqdm(
            total=total_s,
            disable=quiet,
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 5.0,  # s; a log file wants few lines
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n:.1f} of {total:.1f} s{postfix}",
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, progress: Progress, take: object, beside: str = "") -> None:
        """Moves the bar; `take` says whose progress it is, `beside` replaces the speed."""
        stage = progress.note or progress.stage
        if stage != self._stage:
            self._stage = stage
            self._bar.set_description_str(stage)
        if progress.stage is Stage.COMPOSING:
            beside = beside or f"{progress.speed:.2f}× real time"
            self._bar.set_postfix_str(beside, refresh=False)
            self._bar.update(progress.done_s - self._done_s.get(take, 0.0))
            self._done_s[take] = progress.done_s

    def say(self, lines: Iterable[str], file: TextIO) -> None:
        """Prints lines without disturbing the bar."""
        for line in lines:
            self._bar.write(line, file=file)
