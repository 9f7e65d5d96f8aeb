"""What each of the twelve styles plays: one loop on a Sketch, in one of three instrumentations.

A style is a function that writes chords, bass, melody and drums into a `Sketch`; `STYLES` names
them with their tempi (frames of 20 ms a sixteenth, slowest first) and their output gain. Gains
are fixed per style, never per song: one drum hit then has one level and one set of codes.
Channels: 0 chords, 1 bass, 2 melody, 3 and 4 more, 9 drums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from training.patterns import arpeggio, drums, melody, one_a_bar, riff, spans
from training.sketch import DRUM_CHANNEL, DRUM_KEYS, Sketch

LEFT, RIGHT = 28, 100


@dataclass(frozen=True)
class Style:
    write: Callable[[Sketch], None]
    sixteenths: tuple[int, int, int, int, int]
    gain: float
    drums: bool  # whether it has a beat


def _piano_ballad(p: Sketch) -> None:
    chords, order = p.progression(), p.rng.choice(((0, 1, 2, 1), (0, 2, 1, 2)))
    p.voice(0, 0, "piano")
    if p.palette == 1:
        p.voice(3, 48, "strings", LEFT)
    if p.palette == 2:
        p.voice(3, 42, "cello", RIGHT)
    for start, frames, degree in spans(p, chords):
        p.play(start, frames, 0, p.bass(degree, 48), 72)
        arpeggio(p, 0, start, frames, p.chord(degree), order, 56)
        if p.palette == 1:
            for key in p.chord(degree):
                p.play(start, frames, 3, key, 32)
        if p.palette == 2:
            p.play(start, frames, 3, p.bass(degree, 48) + 12, 48)
    melody(p, chords, 0, 72, 96)


def _lofi(p: Sketch) -> None:
    chords = p.progression()
    keys = ((4, "electric piano"), (4, "electric piano"), (26, "jazz guitar"))[p.palette]
    p.voice(0, *keys, LEFT)
    p.voice(1, 33, "bass")
    for start, frames, degree in spans(p, chords):
        for at, beats, key_level, bass_level in ((0, 1.2, 72, 96), (1.5, 0.4, 64, 88)):
            if at * p.beat < frames:
                for key in p.chord(degree, 4):
                    p.play(start + at * p.beat, beats * p.beat, 0, key, key_level)
                p.play(start + at * p.beat, beats * p.beat, 1, p.bass(degree), bass_level)
    kick = p.rng.choice(("X.......x.X.....", "X.....x...X....."))
    drums(
        p,
        0,
        "soft drums",
        100,
        round(p.sixteenth * 0.3),
        kick=kick,
        snare="....X.......X...",
        hat="x.o.x.o.x.o.x.o.",
    )
    if p.palette == 1:
        p.voice(2, 11, "vibraphone", RIGHT)
        melody(p, chords, 2, 72, 88, (2, 4))


def _synth_pop(p: Sketch) -> None:
    chords = p.progression()
    p.voice(0, (90, 90, 50)[p.palette], "synth", LEFT)
    p.voice(1, 38, "synth bass")
    for start, frames, degree in spans(p, chords):
        for key in p.chord(degree, low=57):
            p.play(start, frames, 0, key, 56)
        for i in range(round(2 * frames / p.beat)):
            octave = 12 if i % 2 else 0
            p.play(start + i * p.beat / 2, p.beat * 0.42, 1, p.bass(degree) + octave, 96)
    hat = p.rng.choice(("x.o.x.o.x.o.x.o.", "..x...x...x...x."))
    drums(
        p, 25, "electronic drums", 120, kick="X...X...X...X...", snare="....X.......X...", hat=hat
    )
    if p.palette:
        p.voice(2, 81, "synth lead", RIGHT)
        melody(p, chords, 2, 72, 72, (1, 1, 2, 2), 0.85)


def _rock(p: Sketch) -> None:
    p.voice(0, (30, 29, 30)[p.palette], "distorted guitar", LEFT)
    p.voice(1, 34, "bass guitar")
    strokes = p.rng.choice(("X.x.X.x.X.x.X.x.", "X...x.x.X...x.x.", "X.....X.....X..."))
    for start, frames, degree in spans(p, one_a_bar(p)):
        root = p.degree(degree, 36)
        root -= 12 if root >= 47 else 0
        riff(p, 0, strokes, start, frames, [root, root + 7, root + 12], 88, 1.8)
        riff(p, 1, strokes, start, frames, [root - 12 if root > 40 else root], 96, 1.8)
        if p.palette == 2:
            p.voice(3, 18, "organ", RIGHT)
            for key in p.chord(degree):
                p.play(start, frames, 3, key, 64)
    kick = p.rng.choice(("X.....x.X.x.....", "X...x...X.x....."))
    drums(p, 16, "heavy drums", 127, kick=kick, snare="....X.......X...", hat="X.x.X.x.X.x.X.x.")


def _ambient(p: Sketch) -> None:
    chords = p.rng.choice({"major": [[0, 3], [0, 4]], "minor": [[0, 5], [0, 6]]}[p.mode])
    p.voice(0, (89, 91, 89)[p.palette], ("pad", "choir pad", "pad")[p.palette], LEFT)
    p.voice(1, 89, "pad")
    for start, frames, degree in spans(p, chords):
        for key in p.chord(degree, low=52):
            p.play(start, frames, 0, key, 72)
        p.play(start, frames, 1, p.bass(degree), 72)
    if p.palette == 2:
        p.voice(2, 98, "bells", RIGHT)
        melody(p, chords, 2, 72, 72, (4, 4, 8))


def _jazz(p: Sketch) -> None:
    chords = [1, 4, 0, 0] if p.bars == 2 else [1, 4]
    swing = round(p.sixteenth * 0.66)
    lead = ((66, "saxophone"), (56, "muted trumpet"), (26, "jazz guitar"))[p.palette]
    p.voice(0, 0, "piano", LEFT)
    p.voice(1, 32, "upright bass")
    p.voice(2, *lead, RIGHT)
    comp = p.rng.choice(((0, 1.67), (0.67,), (1,)))
    for start, _, degree in spans(p, chords):
        for at in comp:
            for key in p.chord(degree, 4):
                p.play(start + at * p.beat, p.beat * 0.4, 0, key, 64)
        for i, key in enumerate((p.bass(degree), p.bass(degree) + 7)):
            p.play(start + i * p.beat, p.beat * 0.9, 1, key, 104)
        if p.with_drums:
            p.voice(DRUM_CHANNEL, 32, "ride cymbal")
            for at, level in ((0, 72), (1, 88), (1.67, 72)):
                p.play(start + at * p.beat, 8, DRUM_CHANNEL, DRUM_KEYS["ride"], level)
            p.play(start + p.beat, 5, DRUM_CHANNEL, DRUM_KEYS["pedal"], 80)
    melody(p, chords, 2, 60, 100, (1, 1, 2, 4), 0.9, 9, swing)


def _funk(p: Sketch) -> None:
    p.voice(1, 36, "slap bass")
    p.voice(0, *((7, "clavinet"), (28, "funk guitar"), (16, "organ"))[p.palette], LEFT)
    line = p.rng.choice(("X..xX.x...xX.x..", "X.x..x.X..x.X.x.", "X...x.xX..xx..x."))
    stabs = p.rng.choice(("..x.x..x..x.x..x", "....x..x....x.xx"))
    jumps = [p.rng.choice((0, 0, 12, 7)) for _ in range(16)]
    brass = p.rng.random() < 0.3
    for start, frames, degree in spans(p, one_a_bar(p)):
        for i in range(round(frames / p.sixteenth)):
            if line[i % 16] != ".":
                accent = line[i % 16] == "X"
                key = p.bass(degree) + (0 if accent else jumps[i % 16])
                p.play(start + i * p.sixteenth, p.sixteenth * 0.9, 1, key, 112 if accent else 96)
        riff(p, 0, stabs, start, frames, p.chord(degree, low=60), 96, 0.6)
        if brass:
            p.voice(2, 61, "brass", RIGHT)
            for key in p.chord(degree, low=60):
                p.play(start + 1.5 * p.beat, p.beat * 0.3, 2, key, 88)
    kick = p.rng.choice(("X.....X...X..x..", "X..x......X..x.."))
    drums(p, 0, "drums", 112, kick=kick, snare="....X.......X...", hat="xoxoxoxoxoxoxoxo")


def _techno(p: Sketch) -> None:
    p.voice(1, 38, "synth bass")
    p.voice(0, (81, 90, 80)[p.palette], "synth", LEFT if p.palette else RIGHT)
    line = p.rng.choice(("..x...x...x...x.", ".xxx.xxx.xxx.xxx"))
    stabs = p.rng.choice(("...x..x....x..x.", "x..x..x.x..x..x.", "....x.......x..."))
    jumps = [p.rng.choice((0, 0, 12, 7)) for _ in range(16)]
    for start, frames, degree in spans(p, one_a_bar(p)):
        for i in range(round(frames / p.sixteenth)):
            if line[i % 16] != ".":
                key = p.bass(degree) + jumps[i % 16]
                p.play(start + i * p.sixteenth, p.sixteenth * 0.85, 1, key, 88)
        riff(p, 0, stabs, start, frames, p.chord(degree, low=58), 76)
    drums(
        p,
        25,
        "kick drum",
        127,
        kick="X...X...X...X...",
        open="..x...x...x...x.",
        clap="....X.......X...",
    )


def _orchestral(p: Sketch) -> None:
    chords = p.progression()
    p.voice(0, 48, "strings", LEFT)
    p.voice(2, *((60, "french horn"), (56, "trumpet"), (68, "oboe"))[p.palette], RIGHT)
    staccato, timpani = p.rng.random() < 0.5, p.rng.random() < 0.6
    if timpani:
        p.voice(3, 47, "timpani")
    for start, frames, degree in spans(p, chords):
        if staccato:
            riff(p, 0, "X.", start, frames, p.chord(degree), 96, 1.6)
        else:
            for key in p.chord(degree):
                p.play(start, frames, 0, key, 84)
        p.play(start, frames, 0, p.bass(degree), 88)
        if timpani:
            p.play(start, p.beat * 0.8, 3, p.bass(degree), 104)
            p.play(start + 1.5 * p.beat, p.beat * 0.5, 3, p.bass(degree), 88)
    melody(p, chords, 2, 60, 96, (2, 4, 4))


def _folk(p: Sketch) -> None:
    chords = p.progression()
    p.voice(0, 25, "acoustic guitar", LEFT)
    strum, order = p.rng.random() < 0.5, p.rng.choice(((0, 3, 2, 4), (0, 2, 3, 4)))
    for start, frames, degree in spans(p, chords):
        root = p.bass(degree, 52)
        keys = [root, *p.chord(degree, low=52)]
        if strum:
            riff(p, 0, "X...x.x.", start, frames, keys, 88, 1.9)
        else:
            arpeggio(p, 0, start, frames, [*keys, keys[1] + 12], order, 88)
    if p.palette:
        p.voice(2, *((22, "harmonica"), (110, "fiddle"))[p.palette - 1], RIGHT)
        melody(p, chords, 2, 72, 80)


def _drum_beat(p: Sketch) -> None:
    kits = ((0, "drums", 116), (16, "heavy drums", 96), (25, "electronic drums", 112))
    kicks = ("X.....x.X.x.....", "X...x...X.x...x.", "X..x..x...X..x..", "X.X.....X.......")
    snares = ("....X.......X...", "....X..o.o..X...", "....X.......X.x.")
    cymbal = p.rng.choice(("hat", "hat", "ride"))
    drums(
        p,
        *kits[p.palette],
        kick=p.rng.choice(kicks),
        snare=p.rng.choice(snares),
        **{cymbal: p.rng.choice(("x.x.x.x.x.x.x.x.", "xoxoxoxoxoxoxoxo"))},
    )


def _flute(p: Sketch) -> None:
    chords = p.progression()
    p.voice(2, 73, "flute", RIGHT)
    p.voice(0, *((46, "harp"), (48, "strings"), (24, "nylon guitar"))[p.palette], LEFT)
    for start, frames, degree in spans(p, chords):
        if p.palette == 1:
            for key in p.chord(degree, low=50):
                p.play(start, frames, 0, key, 60)
        else:
            keys = p.chord(degree, low=50)
            arpeggio(p, 0, start, frames, [*keys, keys[0] + 12], (0, 1, 2, 3), 72, 1.4)
    melody(p, chords, 2, 72, 104, (1, 2, 2, 4))


STYLES = {
    "piano ballad": Style(_piano_ballad, (12, 10, 8, 7, 6), 11.2, False),
    "lo-fi hip hop": Style(_lofi, (12, 10, 8, 7, 6), 2.25, True),
    "synth pop": Style(_synth_pop, (10, 8, 7, 6, 5), 1.13, True),
    "rock": Style(_rock, (10, 8, 7, 6, 5), 1.95, True),
    "ambient": Style(_ambient, (12, 10, 8, 7, 6), 6.3, False),
    "jazz": Style(_jazz, (10, 8, 7, 6, 5), 1.98, True),
    "funk": Style(_funk, (12, 10, 8, 7, 6), 2.26, True),
    "techno": Style(_techno, (10, 8, 7, 6, 5), 1.02, True),
    "orchestral": Style(_orchestral, (12, 10, 8, 7, 6), 2.0, False),
    "folk": Style(_folk, (10, 8, 7, 6, 5), 5.3, False),
    "drums": Style(_drum_beat, (10, 8, 7, 6, 5), 1.86, True),
    "flute": Style(_flute, (12, 10, 8, 7, 6), 3.75, False),
}
