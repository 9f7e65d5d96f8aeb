"""The published checkpoints: what each can do, what it needs, and which of them fit here.

All of it follows from the configurations, before anything is downloaded or loaded. The table in
docs/checkpoints.md and the command line's `checkpoints` are made of the same rows, and a checkpoint
that cannot fit is refused with those that can.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints import registry
from musicgen_ui.checkpoints.config import Configuration, size_in_words
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.device import BYTES_A_WEIGHT, Place
from musicgen_ui.errors import RequestError

# Of each device, the most exact one first.
PRECISIONS = {"cuda": ("float32", "bfloat16"), "mps": ("float32",), "cpu": ("float32", "int8")}
SHOWN = ("bfloat16", "int8", "float32")
HEADS = ("Name", "Parameters", "Sound", "Can do", *(f"Memory: {SHOWN[0]}", *SHOWN[1:]))


@dataclass(frozen=True)
class Entry:
    """A published checkpoint."""

    word: str  # its short name
    name: str  # the Hub id, or the word again where it comes with the app
    config: Configuration

    def bytes_in(self, precision: str) -> int:
        """The memory that it needs for its weights and one take of a whole window."""
        return configuration.estimate_bytes(self.config, BYTES_A_WEIGHT[precision])

    def row(self) -> list[str]:
        """Its row under `HEADS`."""
        stereo = self.config["decoder"]["audio_channels"] == 2
        rate = self.config["audio_encoder"]["sampling_rate"] / 1000
        able = ["words", "audio prompts", *(["melodies"] if self.config["melody"] else [])]
        return [
            self.word if self.word == self.name else f"{self.word} ({self.name})",
            f"{configuration.count_parameters(self.config) / 1e6:,.0f} M",
            f"{'stereo' if stereo else 'mono'}, {rate:g} kHz",
            ", ".join(able),
            *(size_in_words(self.bytes_in(precision)) for precision in SHOWN),
        ]


def entries() -> list[Entry]:
    """Every checkpoint that has a name of its own."""
    return [
        Entry(word, source.name, registry.config_of(source))
        for word, source in registry.known().items()
    ]


def hold_fits(name: str, config: Configuration, place: Place, budget_bytes: int) -> None:
    """Holds that a checkpoint's weights fit the memory for models.

    Raises:
        RequestError: they do not; the sentence names a precision, or checkpoints, that would.
    """
    needed = _weights(config, place.precision)
    if needed <= budget_bytes:
        return
    raise RequestError(
        f"{name} needs {size_in_words(needed)} of memory in {place.precision} and models may use "
        f"{size_in_words(budget_bytes)} here: {_advice(config, place, budget_bytes)}.",
        "checkpoint",
    )


def _advice(config: Configuration, place: Place, budget_bytes: int) -> str:
    kind = place.device.partition(":")[0]
    smaller = [
        f"start the app with --precision {precision}, which needs {size_in_words(needed)}"
        for precision in PRECISIONS[kind]
        if (needed := _weights(config, precision)) <= budget_bytes
    ]
    needs = {entry.word: _weights(entry.config, place.precision) for entry in entries()}
    fitting = sorted((needed, word) for word, needed in needs.items() if needed <= budget_bytes)
    largest = [f"{word} ({size_in_words(needed)})" for needed, word in fitting[-1:-4:-1]]
    others = [f"choose one that fits, such as {', '.join(largest)}"] if largest else []
    return ", or ".join([*smaller[:1], *others]) or "give models more memory by --memory-gb"


def _weights(config: Configuration, precision: str) -> int:
    return round(configuration.count_parameters(config) * BYTES_A_WEIGHT[precision])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command line's `checkpoints`."""
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    parser.add_argument(
        "--precision", default="auto", help="auto, float32, bfloat16, float16 or int8"
    )


def run(flags: argparse.Namespace) -> None:
    """Prints the table, with what fits on this computer.

    Raises:
        RequestError: there is no such device or precision here.
    """
    place = devices.choose(flags.device, flags.precision)
    budget = devices.budget_bytes(place)
    here = f"Fits in {place.precision}"
    rows = [
        [*entry.row(), "yes" if _weights(entry.config, place.precision) <= budget else "no"]
        for entry in entries()
    ]
    print(columns([[*HEADS, here], *rows]))
    print(f"\n{place.label}: models may use {size_in_words(budget)}.")


def columns(rows: Iterable[Iterable[str]]) -> str:
    """Rows as lines of aligned columns."""
    held = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*held, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in held)
    return "\n".join(line.rstrip() for line in lines)
