"""The command line's `finetune`: teaches a checkpoint the music of a folder.

Ctrl+C, or SIGTERM, pauses after the step under way, and the same command goes on. A second Ctrl+C
interrupts at once; then it goes on from what was last saved.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from musicgen_ui import files
from musicgen_ui.errors import RequestError
from musicgen_ui.finetune.options import LEARNING_RATE, PRESETS, Options, preset_for
from musicgen_ui.finetune.progress import Event, Kind

DONE, FAILED, INTERRUPTED = 0, 1, 130  # exit codes
# Flags of whole numbers: limits and meaning.
_COUNTS = {
    "steps": (1, 1_000_000, "steps of the training"),
    "batch": (1, 256, "pieces of music a step"),
    "rank": (1, 512, "of the adapter: more holds more, and needs more memory"),
    "save_every": (1, 1_000_000, "steps between two states that are saved"),
    "sample_every": (0, 1_000_000, "steps between two samples; 0 makes one at the end alone"),
    "seed": (0, 2**32 - 1, "of everything that is drawn at random"),
}
_OF_THE_PRESET = ("steps", "batch", "rank", "piece_s")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `finetune`."""
    parser.add_argument("music", nargs="+", help="folders and audio files to learn from")
    parser.add_argument(
        "-o", "--output", default="finetune", help="folder of the run (default finetune)"
    )
    parser.add_argument(
        "--checkpoint", default="auto", help="what to train, as in generate (default auto)"
    )
    parser.add_argument(
        "--activation-word", default="", help="comes first in every caption; use it in prompts"
    )
    parser.add_argument(
        "--preset",
        choices=("auto", *PRESETS),
        default="auto",
        help="settings for a CPU or a GPU of so many GB (default auto)",
    )
    defaults = Options((), Path())
    for name, (low, high, text) in _COUNTS.items():
        default = None if name in _OF_THE_PRESET else getattr(defaults, name)
        shown = "the preset's" if default is None else default
        parser.add_argument(
            "--" + name.replace("_", "-"),
            metavar="N",
            type=_number(int, low, high),
            default=default,
            help=f"{text} ({low} to {high}, default {shown})",
        )
    parser.add_argument(
        "--piece",
        metavar="S",
        dest="piece_s",
        type=_number(float, 2, 30),
        help="longest piece that a song is cut into (2 to 30 s, default the preset's)",
    )
    parser.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=_number(float, 1e-7, 0.1),
        default=LEARNING_RATE,
        help=f"up to 0.1 (default {LEARNING_RATE:g})",
    )
    parser.add_argument(
        "--sample-prompt", default="", help="of the samples (default the first caption)"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    parser.add_argument(
        "--write-captions",
        action="store_true",
        help="only write suggested captions beside the files that have none, to edit them",
    )
    parser.add_argument(
        "--estimate", action="store_true", help="only say how long it takes and how much memory"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """An argument's type: a number within limits."""

    def parsed(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must be {low:g} to {high:g}, not “{text[:40]}”")
        return number

    return parsed


def run(flags: argparse.Namespace) -> int:
    """Trains an adapter; returns the exit code.

    Raises:
        RequestError: the run cannot be made.
    """
    options = _options(flags)
    if flags.write_captions:
        return _write_captions(options)
    from musicgen_ui.finetune import run as runs  # torch: seconds
    from musicgen_ui.finetune.train import DivergedError

    with pause_on_signal() as pause, Display(flags.quiet) as display:
        try:
            done = runs.run(_for_device(options, flags), display.show, pause, flags.estimate)
        except DivergedError as error:
            print(error, file=sys.stderr)
            return FAILED
    return DONE if done else INTERRUPTED


def _options(flags: argparse.Namespace) -> Options:
    return Options(
        tuple(files.expanded(name) for name in flags.music),
        files.expanded(flags.output).absolute(),
        flags.checkpoint,
        _word(flags.activation_word),
        PRESETS["cpu" if flags.preset == "auto" else flags.preset],
        flags.learning_rate,
        flags.save_every,
        flags.sample_every,
        flags.sample_prompt,
        flags.device,
        flags.seed,
    )


def _word(text: str) -> str:
    word = " ".join(text.split())
    if len(word) > 50:
        raise RequestError(f"The activation word has {len(word)} characters: use at most 50.")
    return word


def _for_device(options: Options, flags: argparse.Namespace) -> Options:
    """The options with the preset for the device, and the flags that change it."""
    from musicgen_ui.engine import device as devices

    place = devices.choose(options.device)
    preset = options.preset
    if flags.preset == "auto" and place.device.startswith("cuda"):
        preset = PRESETS[preset_for(devices.budget_bytes(place))]
    given = {name: getattr(flags, name) for name in _OF_THE_PRESET}
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(options, preset=replace(preset, **changes))


def _write_captions(options: Options) -> int:
    from musicgen_ui.finetune import dataset

    paths = dataset.find(options.sources)
    count = 0
    for path, caption in dataset.write_captions(paths):
        if caption:
            count += 1
            print(f"{path}  {caption}")
        else:
            print(f"{path.name} cannot be read and has no caption.", file=sys.stderr)
    print(f"{count} captions written beside {len(paths)} files.", file=sys.stderr)
    return DONE


@contextlib.contextmanager
def pause_on_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one ends the process."""
    pause = threading.Event()
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.getsignal(name) for name in names}

    def paused(*_: object) -> None:
        pause.set()
        for name, handler in before.items():
            signal.signal(name, handler)

    for name in names:
        signal.signal(name, paused)
    try:
        yield pause
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class Display:
    """Events on the terminal: a line that is renewed for steps, sentences for the rest."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.close()

    def show(self, event: Event) -> None:
        """Shows an event."""
        if event.kind is Kind.STEP:
            self._show_step(event)
        elif event.kind is Kind.SAMPLE:
            self._say(f"Step {event.step}, a sample: {event.file}")
        elif event.sentence and not (self.quiet and event.kind is Kind.PREPARING):
            self._say(event.sentence)

    def _show_step(self, event: Event) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=event.steps,
                initial=event.step - 1,
                disable=self.quiet,
                file=sys.stderr,
                mininterval=0.1 if sys.stderr.isatty() else 10.0,  # s
                bar_format="{percentage:3.0f}% |{bar}| step {n} of {total}{postfix}",
            )
        minutes = max(1, round(event.left_s / 60))
        self._bar.set_postfix_str(f"loss {event.loss:.3f}, {minutes} min left", refresh=False)
        self._bar.update()

    def _say(self, sentence: str) -> None:
        tqdm.write(sentence, file=sys.stderr)
