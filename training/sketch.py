"""One loop of a style on the codec's time grid, and the notes and instruments in it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

DRUM_CHANNEL = 9
MODES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
VELOCITY_STEP = 8
DRUM_KEYS = {
    "kick": 36,
    "snare": 38,
    "rim": 37,
    "clap": 39,
    "hat": 42,
    "open": 46,
    "pedal": 44,
    "ride": 51,
    "shaker": 70,
    "tom_high": 48,
    "tom_mid": 45,
    "tom_low": 41,
}


@dataclass(frozen=True)
class Note:
    frame: int
    frames: int
    channel: int
    key: int  # MIDI
    velocity: int


@dataclass
class Sketch:
    """What a style function writes into: one loop on the grid, and its instruments."""

    rng: random.Random
    mode: str
    tonic: int
    sixteenth: float  # frames, whole unless the song has a `bpm` of its own
    bars: int
    with_drums: bool
    loud: int  # added to every velocity
    palette: int  # which instrumentation of the style
    number: int = 0  # of the song, for choices that its sections share
    notes: list[Note] = field(default_factory=list)
    programs: dict[int, int] = field(default_factory=dict)
    pans: dict[int, int] = field(default_factory=dict)
    instruments: list[str] = field(default_factory=list)

    @property
    def beat(self) -> float:
        return 4 * self.sixteenth

    @property
    def loop(self) -> int:
        return round(4 * self.bars * self.beat)

    def voice(self, channel: int, program: int, name: str, pan: int = 64) -> None:
        """An instrument on a channel; its name is what captions call it."""
        self.programs[channel], self.pans[channel] = program, pan
        if name not in self.instruments:
            self.instruments.append(name)

    def degree(self, degree: int, base: int) -> int:
        """MIDI key of a scale degree (0 is the tonic) above `base`, a C."""
        octave, step = divmod(degree, 7)
        tonic = self.tonic if self.tonic < 8 else self.tonic - 12
        return base + tonic + MODES[self.mode][step] + 12 * octave

    def play(self, frame: float, frames: float, channel: int, key: int, velocity: int) -> None:
        velocity = round((velocity + self.loud) / VELOCITY_STEP) * VELOCITY_STEP
        note = Note(round(frame), max(2, round(frames)), channel, key, max(24, min(127, velocity)))
        self.notes.append(note)

    def progression(self) -> list[int]:
        """Chord degrees of the loop, evenly spread over its bars."""
        two = {"major": [[0, 3], [0, 4]], "minor": [[0, 5], [0, 6]]}
        four = {"major": [[0, 4, 5, 3], [0, 5, 3, 4]], "minor": [[0, 5, 2, 6], [0, 6, 5, 6]]}
        return self.rng.choice((four if self.bars == 2 else two)[self.mode])

    def chord(self, degree: int, count: int = 3, low: int = 55) -> list[int]:
        """Stacked thirds, each moved to the octave above `low` so that voices move little."""
        keys = (self.degree(degree + 2 * i, 48) for i in range(count))
        return sorted(low + (key - low) % 12 for key in keys)

    def bass(self, degree: int, top: int = 45) -> int:
        key = self.degree(degree, 36)
        return key if key < top else key - 12

    def pattern(self, channel: int, key: int, steps: str, velocity: int, swing: int = 0) -> None:
        """Drum hits a sixteenth each: X full, x softer, o soft, a dot for none."""
        share = {"X": 1.0, "x": 0.78, "o": 0.55}
        for i in range(16 * self.bars):
            hit = steps[i % len(steps)]
            if hit != ".":
                late = swing if i % 2 else 0
                self.play(i * self.sixteenth + late, 6, channel, key, round(velocity * share[hit]))
