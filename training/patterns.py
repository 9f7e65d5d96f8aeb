"""Ways of playing that the styles share: each writes notes of one loop into a Sketch."""

from __future__ import annotations

from training.sketch import DRUM_CHANNEL, DRUM_KEYS, Sketch


def spans(p: Sketch, degrees: list[int]) -> list[tuple[float, float, int]]:
    """(frame, frames, degree) of each chord, evenly over the loop."""
    length = p.loop / len(degrees)
    return [(i * length, length, degree) for i, degree in enumerate(degrees)]


def one_a_bar(p: Sketch) -> list[int]:
    """Two chords a loop, for riff-based styles."""
    return p.rng.choice({"major": [[0, 3], [0, 4]], "minor": [[0, 5], [0, 6]]}[p.mode])


def drums(p: Sketch, kit: int, name: str, velocity: int, swing: int = 0, **steps: str) -> None:
    if not p.with_drums:
        return
    p.voice(DRUM_CHANNEL, kit, name)
    for drum, pattern in steps.items():
        p.pattern(DRUM_CHANNEL, DRUM_KEYS[drum], pattern, velocity, swing)


def melody(
    p: Sketch,
    chords: list[int],
    channel: int,
    base: int,
    velocity: int,
    lengths: tuple[int, ...] = (2, 2, 4),
    legato: float = 0.95,
    top: int = 8,
    swing: int = 0,
) -> None:
    """A line in eighths that lands on chord notes on the beats and moves by step between."""
    rng, eighth, total = p.rng, p.beat / 2, round(p.loop * 2 / p.beat)
    position, degree = 0, rng.choice((2, 4, 4, 7))
    while position < total:
        length = min(rng.choice(lengths), total - position)
        if position % 4 == 0:
            root = chords[position * len(chords) // total]
            tones = [root + 2 * i + 7 * o for i in range(3) for o in (-1, 0, 1)]
            aim = degree + rng.choice((-2, -1, 1, 2, 0))
            degree = min((t for t in tones if 0 <= t <= top), key=lambda t: (abs(t - aim), t))
        else:
            degree = max(0, min(top, degree + rng.choice((-1, -1, 1, 1, 0))))
        if position % 4 == 0 or rng.random() > 0.15:
            start = position * eighth + (swing if position % 2 else 0)
            p.play(start, length * eighth * legato, channel, p.degree(degree, base), velocity)
        position += length


def riff(
    p: Sketch,
    channel: int,
    steps: str,
    start: float,
    frames: float,
    keys: list[int],
    velocity: int,
    hold: float = 0.8,
) -> None:
    """Keys struck together on each X (x softer) of a pattern of sixteenths, within one chord."""
    for i in range(round(frames / p.sixteenth)):
        hit = steps[i % len(steps)]
        if hit != ".":
            for key in keys:
                level = velocity if hit == "X" else velocity - 16
                p.play(start + i * p.sixteenth, p.sixteenth * hold, channel, key, level)


def arpeggio(
    p: Sketch,
    channel: int,
    start: float,
    frames: float,
    keys: list[int],
    order: tuple[int, ...],
    velocity: int,
    hold: float = 1.0,
) -> None:
    """Keys one after another in eighths."""
    for i in range(round(2 * frames / p.beat)):
        key = keys[order[i % len(order)] % len(keys)]
        p.play(start + i * p.beat / 2, p.beat / 2 * hold, channel, key, velocity)
