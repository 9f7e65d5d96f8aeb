"""Songs as events on the codec's time grid: seeded, pure, and no sound yet.

Every onset and every note end lies on a frame of 20 ms, velocities come in steps of eight, and a
section is one loop of whole frames played again and again, exactly. So the same bar gives the same
codes, and the decoder can learn rhythm by copying from a loop ago. A style has five tempi of whole
frames a sixteenth; with `bpm` any tempo can be had, and an onset is up to 10 ms beside its beat. A
song has one or two sections; the loop before a change of section may end in a drum fill.

`compose(seed)` is the whole interface. What a style plays is in styles.py, how a song is
described in captions.py, how it sounds in render.py.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field, replace

FRAME_S = 0.02
DRUM_CHANNEL = 9
MODES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
KEYS = {  # pitch classes, nearest first
    "major": (0, 7, 5, 2, 10, 9, 3, 4, 8, 11, 1, 6),
    "minor": (9, 4, 2, 11, 7, 6, 0, 1, 5, 8, 10, 3),
}
PITCH_NAMES = "C,C sharp,D,E flat,E,F,F sharp,G,A flat,A,B flat,B".split(",")  # noqa: SIM905
SLOW_BELOW_BPM, FAST_ABOVE_BPM = 88, 118  # of songs at any tempo
SPEEDS = ("slow", "slow", "medium", "fast", "fast")  # of a style's five tempi
VELOCITY_STEP = 8


@dataclass(frozen=True)
class Note:
    frame: int
    frames: int
    channel: int
    key: int  # MIDI
    velocity: int


@dataclass(frozen=True)
class Meta:
    """What a caption may say of a song, and what the training needs of its time."""

    seed: int
    style: str
    mode: str
    key: int  # pitch class of the tonic
    speed: str  # slow, medium, fast
    bpm: int
    sixteenth: float  # frames
    loop: int  # frames
    change: int  # frame at which the second section starts, 0 with one section
    dynamics: str  # soft, normal, loud
    instruments: tuple[str, ...]
    drums: bool

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Song:
    notes: tuple[Note, ...]  # in time order
    programs: dict[int, int]  # channel → General MIDI program
    pans: dict[int, int]  # channel → 0 left … 64 centre … 127 right
    gain: float
    meta: Meta


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


def compose(
    seed: int,
    style: str | None = None,
    seconds: float = 12.0,
    *,
    keys: int = 4,
    tempo: int | None = None,
    drums: bool | None = None,
    bpm: float | None = None,
) -> Song:
    """A song of `seconds`, cut at its end; all that is not given is drawn from the seed.

    `keys` is how many keys a mode has, from C major and A minor outwards; `tempo` which of the
    style's tempi it has, slowest first: the same song begins with the same notes at each. `bpm` is
    any tempo instead (beats a minute, to the nearest whole number of frames a loop).
    """
    from training.more_styles import MORE_STYLES, SOLOS
    from training.styles import STYLES

    rng = random.Random(seed)
    name = style or rng.choice(list(STYLES))
    spec = STYLES.get(name) or MORE_STYLES[name]
    mode = rng.choice(("major", "minor"))
    tonic = rng.choice(KEYS[mode][:keys])
    drawn = rng.choice(range(len(SPEEDS)))
    tempo = drawn if tempo is None else tempo
    sixteenth, bars = spec.sixteenths[tempo], 2 if spec.sixteenths[tempo] <= 7 else 1
    speed = SPEEDS[tempo]
    if bpm is not None:
        bars = 1 if bpm <= 100 else 2
        sixteenth = round(bars * 240 / bpm / FRAME_S) / (16 * bars)
        speed = "slow" if bpm < SLOW_BELOW_BPM else "fast" if bpm > FAST_ABOVE_BPM else "medium"
    dynamics = rng.choices(("normal", "soft", "loud"), (0.8, 0.12, 0.08))[0]
    if drums is None:
        drums = spec.drums and (name == "drums" or rng.random() > 0.06)
    palette = rng.randrange(3)

    def sketch() -> Sketch:
        loud = {"normal": 0, "soft": -16, "loud": 8}[dynamics]
        # loops of 2.4 to 4.8 s
        page = Sketch(rng, mode, tonic, sixteenth, bars, drums, loud, palette, seed)
        spec.write(page)
        lead = min(note.frame for note in page.notes)
        if lead:  # a loop begins with a sound, or a song would with silence
            page.notes = [replace(n, frame=(n.frame - lead) % page.loop) for n in page.notes]
        return page

    first = sketch()
    frames = round(seconds / FRAME_S)
    change, loops = 0, frames // first.loop
    if rng.random() < 0.4 and loops >= 2:
        change = first.loop * rng.randint(2, loops)
    fill = bool(drums and change and rng.random() < 0.6)
    notes, second = _tile(first, 0, change or frames, fill), first
    if change:
        second = sketch()
        notes += _tile(second, change, frames, False)
    notes.sort(key=lambda note: (note.frame, note.channel, note.key))
    meta = Meta(
        seed,
        name,
        mode,
        tonic,
        speed,
        round(750 / sixteenth),
        sixteenth,
        first.loop,
        change,
        dynamics,
        tuple(first.instruments),
        bool(drums),
    )
    programs, pans = second.programs | first.programs, second.pans | first.pans
    gain = SOLOS[seed % len(SOLOS)][-1] if name == "solo" else spec.gain
    return Song(tuple(notes), programs, pans, gain, meta)


def _tile(page: Sketch, start: int, end: int, fill: bool) -> list[Note]:
    """The loop again and again over [start, end), its last beat a fill on the toms if asked."""
    tiled = []
    for offset in range(start, end, page.loop):
        notes = page.notes
        if fill and offset + page.loop >= end:
            notes = _with_fill(page)
        tiled += [
            Note(offset + n.frame, n.frames, n.channel, n.key, n.velocity)
            for n in notes
            if offset + n.frame < end
        ]
    return tiled


def _with_fill(page: Sketch) -> list[Note]:
    start = page.loop - page.beat  # frames
    kept = [n for n in page.notes if n.channel != DRUM_CHANNEL or n.frame < start]
    keys = [DRUM_KEYS[k] for k in ("snare", "tom_high", "tom_mid", "tom_low")]
    hits = [
        Note(round(start + i * page.sixteenth), 6, DRUM_CHANNEL, key, 104)
        for i, key in enumerate(keys)
    ]
    return kept + hits
