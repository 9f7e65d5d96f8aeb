"""Further styles, and solo pieces: what people ask for beside the twelve that the judge knows.

Written as those in styles.py. `TEMPI` is how fast a style usually is, for songs at any tempo.
"""

from __future__ import annotations

from training.patterns import arpeggio, drums, melody, one_a_bar, riff, spans
from training.sketch import Sketch
from training.styles import LEFT, RIGHT, Style


def _reggae(p: Sketch) -> None:
    chords = one_a_bar(p)
    p.voice(0, *((18, "organ"), (28, "muted guitar"), (27, "clean guitar"))[p.palette], LEFT)
    p.voice(1, 33, "bass")
    line = p.rng.choice(("X..x..X...x.x...", "X.....x.X..x..x."))
    for start, frames, degree in spans(p, chords):
        riff(p, 0, "....X.......X...", start, frames, p.chord(degree, low=60), 96, 0.8)
        riff(p, 0, "..x...x...x...x.", start, frames, p.chord(degree, low=60), 72, 0.5)
        riff(p, 1, line, start, frames, [p.bass(degree)], 112, 1.6)
    drums(
        p,
        0,
        "drums",
        108,
        kick="........X.......",
        rim="....x.......x...",
        snare="........x.......",
        hat="X.x.X.x.X.x.X.x.",
    )


def _blues(p: Sketch) -> None:
    chords, swing = p.rng.choice(([0, 3], [0, 4])), round(p.sixteenth * 0.66)
    p.voice(0, *((27, "clean guitar"), (0, "piano"), (18, "organ"))[p.palette], LEFT)
    p.voice(1, 33, "bass")
    for start, frames, degree in spans(p, chords):
        root = p.bass(degree)
        for i, step in enumerate((0, 7, 9, 7)):
            if i * p.beat < frames:
                p.play(start + i * p.beat, p.beat * 0.9, 1, root + step, 104)
        riff(p, 0, "X...x...X...x...", start, frames, p.chord(degree, 4), 72, 1.6)
    p.voice(2, *((22, "harmonica"), (29, "electric guitar"), (22, "harmonica"))[p.palette], RIGHT)
    melody(p, chords, 2, 60, 96, (1, 1, 2, 4), 0.9, 8, swing)
    drums(
        p,
        0,
        "drums",
        104,
        swing,
        kick="X.......X.......",
        snare="....X.......X...",
        ride="X.x.X.x.X.x.X.x.",
    )


def _bossa(p: Sketch) -> None:
    chords = p.progression()
    p.voice(0, 24, "nylon guitar", LEFT)
    p.voice(1, 32, "upright bass")
    for start, frames, degree in spans(p, chords):
        riff(p, 0, "X..x..X...x..x..", start, frames, p.chord(degree, 4), 84, 1.2)
        riff(p, 1, "X.....x.", start, frames, [p.bass(degree)], 100, 2.0)
    p.voice(2, *((73, "flute"), (66, "saxophone"), (11, "vibraphone"))[p.palette], RIGHT)
    melody(p, chords, 2, 72, 80, (1, 2, 2, 4))
    drums(
        p,
        32,
        "soft drums",
        84,
        kick="X..xX..xX..xX..x",
        rim="X..X..X...X..X..",
        shaker="xoxoxoxoxoxoxoxo",
    )


def _chiptune(p: Sketch) -> None:
    chords = p.progression()
    p.voice(0, 80, "chip synth", LEFT)
    p.voice(1, 80, "chip synth")
    p.voice(2, 80, "chip synth", RIGHT)
    for start, frames, degree in spans(p, chords):
        keys = p.chord(degree, low=60)
        for i in range(round(frames / p.sixteenth)):
            p.play(start + i * p.sixteenth, p.sixteenth * 0.8, 0, keys[i % 3], 56)
        riff(p, 1, "X.x.X.x.", start, frames, [p.bass(degree)], 88, 1.2)
    melody(p, chords, 2, 72, 88, (1, 1, 2), 0.8)
    drums(
        p,
        25,
        "electronic drums",
        96,
        kick="X...X...X...X...",
        snare="....X.......X...",
        hat="x.x.x.x.x.x.x.x.",
    )


def _music_box(p: Sketch) -> None:
    chords = p.progression()
    p.voice(0, *((10, "music box"), (9, "bells"), (8, "celesta"))[p.palette])
    for start, frames, degree in spans(p, chords):
        arpeggio(p, 0, start, frames, p.chord(degree, low=60), (0, 1, 2, 1), 64, 1.6)
    melody(p, chords, 0, 84, 104, (2, 2, 4))


def _trap(p: Sketch) -> None:
    chords = one_a_bar(p)
    p.voice(0, *((14, "bells"), (0, "piano"), (89, "pad"))[p.palette], LEFT)
    p.voice(1, 38, "synth bass")
    line = p.rng.choice(("X.....x...X.....", "X..x......X...x."))
    for start, frames, degree in spans(p, chords):
        riff(p, 1, line, start, frames, [p.bass(degree, 40)], 112, 3.0)
        keys = p.chord(degree, low=60)
        arpeggio(p, 0, start, frames, [*keys, keys[0] + 12], (0, 2, 1, 3), 84, 1.2)
    hat = p.rng.choice(("x.x.x.xxx.x.x.x.", "xxx.x.x.xxx.x.xx"))
    drums(p, 25, "electronic drums", 116, kick="X.....x...X.....", clap="........X.......", hat=hat)


SOLOS = (  # General MIDI program, name, lowest C of its melody, whether it plays chords too, gain
    (0, "piano", 72, True, 10.89),
    (25, "acoustic guitar", 60, True, 8.88),
    (24, "nylon guitar", 60, True, 5.0),
    (27, "clean guitar", 60, True, 1.22),
    (29, "electric guitar", 60, False, 11.64),
    (40, "violin", 72, False, 6.56),
    (42, "cello", 48, False, 7.49),
    (73, "flute", 72, False, 4.75),
    (66, "saxophone", 60, False, 3.96),
    (56, "trumpet", 60, False, 2.81),
    (46, "harp", 72, True, 7.31),
    (19, "church organ", 60, True, 6.09),
    (4, "electric piano", 60, True, 6.98),
    (11, "vibraphone", 72, True, 4.17),
    (10, "music box", 84, True, 2.3),
    (33, "bass", 36, False, 1.86),
    (22, "harmonica", 72, False, 7.84),
    (71, "clarinet", 60, False, 7.75),
    (12, "marimba", 60, True, 8.2),
    (21, "accordion", 60, True, 4.55),
    (81, "synth lead", 60, False, 4.06),
    (48, "strings", 60, True, 3.0),
    (0, "piano", 72, True, 10.89),
    (25, "acoustic guitar", 60, True, 8.88),
)


def _solo(p: Sketch) -> None:
    """One instrument, alone: its chords broken or struck under a melody, or the melody only."""
    program, name, base, chordal, _ = SOLOS[p.number % len(SOLOS)]
    chords = p.progression()
    p.voice(0, program, name)
    if not chordal:
        melody(p, chords, 0, base, 104, p.rng.choice(((1, 1, 2, 2), (2, 2, 4), (1, 2, 4))))
        return
    order = p.rng.choice(((0, 1, 2, 1), (0, 2, 1, 2), (0, 1, 2, 3)))
    struck = p.rng.random() < 0.3
    for start, frames, degree in spans(p, chords):
        keys = p.chord(degree, low=base - 12)
        p.play(start, frames, 0, p.bass(degree, 48) + (12 if base > 72 else 0), 80)
        if struck:
            riff(p, 0, "X...x...", start, frames, keys, 76, 3.6)
        else:
            arpeggio(p, 0, start, frames, [*keys, keys[0] + 12], order, 68, 1.2)
    if p.rng.random() < 0.75:
        melody(p, chords, 0, base, 100)


MORE_STYLES = {
    "reggae": Style(_reggae, (12, 10, 8, 7, 6), 2.2, True),
    "blues": Style(_blues, (10, 8, 7, 6, 5), 1.92, True),
    "bossa nova": Style(_bossa, (10, 8, 7, 6, 5), 2.1, True),
    "chiptune": Style(_chiptune, (10, 8, 7, 6, 5), 1.36, True),
    "music box": Style(_music_box, (12, 10, 8, 7, 6), 5.2, False),
    "trap": Style(_trap, (10, 8, 7, 6, 5), 1.41, True),
    "solo": Style(_solo, (12, 10, 8, 7, 6), 1.0, False),
}
TEMPI = {  # beats a minute
    "piano ballad": (62, 100),
    "lo-fi hip hop": (66, 96),
    "synth pop": (95, 130),
    "rock": (90, 165),
    "ambient": (60, 92),
    "jazz": (85, 168),
    "funk": (88, 122),
    "techno": (115, 148),
    "orchestral": (64, 145),
    "folk": (72, 145),
    "drums": (72, 165),
    "flute": (62, 118),
    "reggae": (64, 95),
    "blues": (64, 125),
    "bossa nova": (85, 135),
    "chiptune": (105, 168),
    "music box": (60, 100),
    "trap": (120, 152),
    "solo": (62, 140),
}
