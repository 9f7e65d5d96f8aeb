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
from dataclasses import asdict, dataclass, replace

from training.more_styles import MORE_STYLES, SOLOS
from training.sketch import DRUM_CHANNEL, DRUM_KEYS, Note, Sketch
from training.styles import STYLES

FRAME_S = 0.02
KEYS = {  # pitch classes, nearest first
    "major": (0, 7, 5, 2, 10, 9, 3, 4, 8, 11, 1, 6),
    "minor": (9, 4, 2, 11, 7, 6, 0, 1, 5, 8, 10, 3),
}
PITCH_NAMES = "C,C sharp,D,E flat,E,F,F sharp,G,A flat,A,B flat,B".split(",")  # noqa: SIM905
SLOW_BELOW_BPM, FAST_ABOVE_BPM = 88, 118  # of songs at any tempo
SPEEDS = ("slow", "slow", "medium", "fast", "fast")  # of a style's five tempi


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
