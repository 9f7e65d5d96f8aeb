"""The command line's `checkpoints`: the published checkpoints in a table, and which fit here.

All of it follows from their configurations, before anything is downloaded or loaded. The table in
docs/checkpoints.md is made of the same rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from musicgen_ui.checkpoints import memory, registry
from musicgen_ui.checkpoints.config_types import Configuration
from musicgen_ui.checkpoints.memory import size_in_words
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.device import BYTES_A_WEIGHT

PRECISIONS = ("bfloat16", "int8", "float32")
HEADS = ("Name", "Parameters", "Sound", "Can do", f"Memory: {PRECISIONS[0]}", *PRECISIONS[1:])


@dataclass(frozen=True)
class Entry:
    """A published checkpoint."""

    word: str  # its short name
    name: str  # the Hub id, or the short name again where it comes with the app
    config: Configuration

    def row(self) -> list[str]:
        """Its row under `HEADS`."""
        training = self.config["training"]
        stereo = self.config["decoder"]["audio_channels"] == 2
        rate = self.config["audio_encoder"]["sampling_rate"] / 1000
        abilities = ["sound effects from words" if training["sound_effects"] else "words"]
        abilities += ["audio prompts", *(["melodies"] if self.config["melody"] else [])]
        abilities += ["the style of a clip"] if self.config["style"] else []
        return [
            self.word if self.word == self.name else f"{self.word} ({self.name})",
            f"{memory.count_parameters(self.config) / 1e6:,.0f} M",
            f"{'stereo' if stereo else 'mono'}, {rate:g} kHz",
            ", ".join(abilities),
            *(
                size_in_words(memory.estimate_bytes(self.config, BYTES_A_WEIGHT[precision]))
                for precision in PRECISIONS
            ),
        ]


def entries() -> list[Entry]:
    """Every checkpoint that has a short name."""
    names = {word: source.name for word, source in registry.known().items()}
    return [Entry(word, names[word], config) for word, config in registry.known_configs().items()]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
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
    budget_bytes = devices.budget_bytes(place)
    rows = [
        [
            *entry.row(),
            "yes" if memory.weight_bytes(entry.config, place.precision) <= budget_bytes else "no",
        ]
        for entry in entries()
    ]
    print(aligned([[*HEADS, f"Fits in {place.precision}"], *rows]))
    print(f"\n{place.label}: models may use {size_in_words(budget_bytes)}.")


def aligned(rows: Iterable[Iterable[str]]) -> str:
    """Rows as lines of aligned columns."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in cells)
    return "\n".join(line.rstrip() for line in lines)
