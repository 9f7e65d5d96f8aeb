"""Chords as text: what is understood, where it lies, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from musicgen_ui.audio import chords
from musicgen_ui.audio.chords import Progression
from musicgen_ui.errors import RequestError


def notes(text: str) -> list[list[tuple[int, ...]]]:
    return [[chord.classes for chord in bar] for bar in chords.parse(text)]


def test_parse_reads_bars_and_their_parts():
    assert notes("C  A:min F,G:7 N") == [
        [(0, 4, 7)],
        [(0, 4, 9)],
        [(0, 5, 9), (2, 5, 7, 11)],
        [()],
    ]


# As musicgen-chord has them, above C.
QUALITIES = {
    "maj": [0, 4, 7],
    "min": [0, 3, 7],
    "dim": [0, 3, 6],
    "aug": [0, 4, 8],
    "min6": [0, 3, 7, 9],
    "maj6": [0, 4, 7, 9],
    "min7": [0, 3, 7, 10],
    "minmaj7": [0, 3, 7, 11],
    "maj7": [0, 4, 7, 11],
    "7": [0, 4, 7, 10],
    "dim7": [0, 3, 6, 9],
    "hdim7": [0, 3, 6, 10],
    "sus2": [0, 2, 7],
    "sus4": [0, 5, 7],
}


def test_parse_knows_every_quality_on_every_root():
    assert set(chords.QUALITIES) == set(QUALITIES)
    for name, steps in QUALITIES.items():
        for root, above_c in (("C", 0), ("F#", 6), ("Bb", 10), ("Cb", 11), ("E♯", 5), ("A♭", 8)):
            expected = tuple(sorted((above_c + step) % 12 for step in steps))
            assert notes(f"{root}:{name}") == [[expected]]


def test_parse_takes_the_spelling_of_lead_sheets():
    assert notes("Am Cmaj7 G7 F#m7b5 Dm7 B6") == notes("A:min C:maj7 G:7 F#:hdim7 D:min7 B:maj6")


@pytest.mark.parametrize("text", ["H", "C:major", "c", "C/E", "C:", "|", "A:min9", "Cm:7", "É"])
def test_parse_names_what_is_no_chord(text):
    with pytest.raises(RequestError, match="is no chord: write a root from A to G") as caught:
        chords.parse(f"C {text} G")
    assert str(caught.value).startswith(f"“{text}”") and caught.value.field == "chords"


def test_parse_refuses_a_bar_that_cannot_be_divided():
    with pytest.raises(RequestError, match="“C,,G” a chord is missing beside a comma"):
        chords.parse("C,,G")
    with pytest.raises(RequestError, match="has 17 chords: write at most 16"):
        chords.parse(",".join("C" * 17))


def test_chroma_changes_with_the_bars_and_does_not_drift():
    """At 97 bpm no bar is a whole number of columns; after five minutes it still is in place."""
    bar_s, column_s = 4 * 60 / 97, 0.128
    columns = Progression(chords.parse("C G,D"), bar_s).chroma(0, 2344, column_s)
    c, g, d = (np.eye(12)[list(each)].sum(0) for each in ((0, 4, 7), (7, 11, 2), (2, 6, 9)))
    for column, found in enumerate(columns):
        beat = column * column_s / bar_s % 2
        expected = c if beat < 1 else g if beat < 1.5 else d
        assert np.array_equal(found, expected)


def test_chord_begins_with_its_bar_whatever_the_rounding():
    progression = Progression(chords.parse("C G"), 0.1)
    assert progression.at(0.3).name == "G"  # 0.3 / 0.1 is below 3


def test_chroma_of_a_window_is_part_of_the_whole():
    progression = Progression(chords.parse("C G A:min F"), 2.0)
    whole = progression.chroma(0, 400, 0.128)
    assert np.array_equal(progression.chroma(141, 235, 0.128), whole[141:376])


def test_placed_chords_fill_the_piece_and_join_equal_neighbours():
    placed = Progression(chords.parse("C C,G G"), 2.0).placed(9.0)
    found = [(each.chord.name, each.start_s, each.end_s) for each in placed]
    assert found == [("C", 0, 3), ("G", 3, 6), ("C", 6, 9)]
    assert Progression(chords.parse("C,G"), 2.0).placed(0.5)[-1].end_s == 0.5
