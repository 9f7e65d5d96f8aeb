"""Chords as text, placed in time and as chroma.

The grammar is that of musicgen-chord (github.com/sakemin/cog-musicgen-chord): a space begins the
next bar, commas divide a bar into equal parts, and a chord is a root with a quality after a colon,
as in `C G:7 A:min F,G`. The short spellings of lead sheets (`Am`, `Cmaj7`) mean the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from musicgen_ui.errors import RequestError

PITCH_CLASSES = 12
MOST_IN_A_BAR = 16  # more would be shorter than a column of chroma
ROOTS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
ACCIDENTALS = {"#": 1, "b": -1}
QUALITIES = {  # semitones above the root
    "maj": (0, 4, 7),
    "min": (0, 3, 7),
    "dim": (0, 3, 6),
    "aug": (0, 4, 8),
    "sus2": (0, 2, 7),
    "sus4": (0, 5, 7),
    "7": (0, 4, 7, 10),
    "maj7": (0, 4, 7, 11),
    "min7": (0, 3, 7, 10),
    "minmaj7": (0, 3, 7, 11),
    "dim7": (0, 3, 6, 9),
    "hdim7": (0, 3, 6, 10),
    "maj6": (0, 4, 7, 9),
    "min6": (0, 3, 7, 9),
}
SHORT = {"": "maj", "m": "min", "m7": "min7", "6": "maj6", "m6": "min6", "m7b5": "hdim7"}
NO_CHORD = "N"
CHORD = re.compile(r"([A-G])([#b]?)(?::(?=.))?(.*)")


def beats_a_bar(time_signature: str) -> int:
    """Beats of the tempo in a bar: the upper number of "3/4"."""
    return int(time_signature.partition("/")[0])


@dataclass(frozen=True)
class Chord:
    """A chord, or none for a while."""

    name: str  # as it was written
    classes: tuple[int, ...]  # pitch classes, 0 is C; empty for "N"


@dataclass(frozen=True)
class PlacedChord:
    """A chord from when to when."""

    chord: Chord
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Progression:
    """Bars of chords, which begin again after the last one."""

    bars: tuple[tuple[Chord, ...], ...]
    bar_s: float  # seconds of a bar

    def at(self, time_s: float) -> Chord:
        """The chord at a time."""
        bars, part = divmod(time_s / self.bar_s + 1e-9, 1)
        bar = self.bars[int(bars) % len(self.bars)]
        return bar[int(part * len(bar))]

    def chroma(self, first: int, count: int, column_s: float) -> np.ndarray:
        """Columns of ones where a pitch class belongs to the chord, float32 [count, classes].

        Column `first + i` is that of the time `(first + i) · column_s`.
        """
        columns = np.zeros((count, PITCH_CLASSES), np.float32)
        for column in range(count):
            columns[column, list(self.at((first + column) * column_s).classes)] = 1
        return columns

    def placed(self, duration_s: float) -> tuple[PlacedChord, ...]:
        """The chords from 0 to `duration_s` in order, equal neighbours as one."""
        steps: list[tuple[Chord, float]] = []
        bar = 0
        while (start_s := bar * self.bar_s) < duration_s:
            chords = self.bars[bar % len(self.bars)]
            each_s = self.bar_s / len(chords)
            steps += [(chord, start_s + i * each_s) for i, chord in enumerate(chords)]
            bar += 1
        runs = [next(run) for _, run in groupby(steps, key=lambda step: step[0])]
        ends_s = [*(start_s for _, start_s in runs[1:]), duration_s]
        return tuple(
            PlacedChord(chord, start_s, min(end_s, duration_s))
            for (chord, start_s), end_s in zip(runs, ends_s, strict=True)
            if start_s < duration_s
        )


def parse(text: str) -> tuple[tuple[Chord, ...], ...]:
    """Bars of chords.

    Raises:
        RequestError: something in it is no chord; the sentence names it.
    """
    return tuple(_bar(bar) for bar in text.replace("♯", "#").replace("♭", "b").split())


def _bar(text: str) -> tuple[Chord, ...]:
    names = text.split(",")
    if len(names) > MOST_IN_A_BAR:
        raise RequestError(
            f"The bar “{text[:40]}…” has {len(names)} chords: write at most {MOST_IN_A_BAR} in a "
            "bar, and a space before the next one.",
            "chords",
        )
    if not all(names):
        raise RequestError(
            f"In the chords “{text[:40]}” a chord is missing beside a comma: write them without "
            "spaces, such as F,G.",
            "chords",
        )
    return tuple(map(_chord, names))


def _chord(name: str) -> Chord:
    if name == NO_CHORD:
        return Chord(name, ())
    found = CHORD.fullmatch(name)
    quality = SHORT.get(found[3], found[3]) if found else ""
    if not found or quality not in QUALITIES:
        raise RequestError(
            f"“{name[:40]}” is no chord: write a root from A to G with # or b where needed, alone "
            f"for major or followed by :{', :'.join(list(QUALITIES)[1:])}.",
            "chords",
        )
    root = ROOTS[found[1]] + ACCIDENTALS.get(found[2], 0)
    return Chord(name, tuple(sorted((root + step) % PITCH_CLASSES for step in QUALITIES[quality])))
