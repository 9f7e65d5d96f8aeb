"""Values from a browser, a JSON body, a shell or a file, as a request's fields hold them.

Each function takes the field, whose metadata has label and limits. Where a value is wrong it raises
a `RequestError` that names the field and says what it takes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import SupportsFloat

import numpy as np

from musicgen_ui.audio import chords
from musicgen_ui.errors import RequestError

Spec = dataclasses.Field[object]

PROMPT_CHARACTERS = 2000
SECTIONS_CHARACTERS = 6000  # in all: libsndfile writes up to 50 kB into a WAV's comment
TONICS = "C C# Db D D# Eb E F F# Gb G G# Ab A A# Bb B".split()  # noqa: SIM905
KEYS = [f"{tonic} {mode}" for tonic in TONICS for mode in ("major", "minor")]
_TYPED_KEYS = {key.lower(): key for key in KEYS} | {"": ""}
TIME_SIGNATURE = re.compile(r"([1-9]|[12]\d|3[0-2])/(?:1|2|4|8|16|32)")
SWITCH_WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


def refusal(spec: Spec, text: str) -> RequestError:
    """The error of a setting: its label, then `text`."""
    return RequestError(f"{spec.metadata['label']} {text}", spec.name)


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "�" for c in text[:41])  # it goes to terminals too
    return f"“{text[:40]}…”" if len(text) > 40 else f"“{text}”"


def text_of(spec: Spec, value: object, where: str = "") -> str:
    """Text without control characters; `where` it stands in a table, for the error."""
    if not isinstance(value, str):
        raise refusal(spec, f"{where}must be text.")
    # Lone surrogates and control characters cannot be tokenised, written to a file or shown.
    text = value
    if not value.isprintable():
        text = "".join(c for c in value if c in "\n\t" or c.isprintable())
    text = text.strip()
    limit = PROMPT_CHARACTERS if where else spec.metadata["max"]
    if len(text) > limit:
        raise refusal(spec, f"{where}has {len(text):,} characters: shorten it to {limit:,}.")
    return text


def _key(spec: Spec, text: str) -> str:
    typed = " ".join(text.replace("♯", "#").replace("♭", "b").lower().split())
    if typed not in _TYPED_KEYS:
        raise refusal(spec, f"must be like C minor or F# major, or empty, not {_shown(text)}.")
    return _TYPED_KEYS[typed]


def _chords(_: Spec, text: str) -> str:
    chords.parse(text)
    return " ".join(text.split())


def _time_signature(spec: Spec, text: str) -> str:
    if not TIME_SIGNATURE.fullmatch(text.replace(" ", "")):
        raise refusal(spec, f"must be like 4/4, 3/4 or 6/8, not {_shown(text)}.")
    return text.replace(" ", "")


TEXT_CHECKS = {"key": _key, "chords": _chords, "time_signature": _time_signature}


def sections_of(spec: Spec, value: object) -> Iterator[tuple[float, str]]:
    """Rows of a start and words, also as JSON; rows with neither are left out."""
    try:
        pairs = pairs_of(value)
    except (ValueError, TypeError, RecursionError):
        example = '[[0, "piano"], [15, "drums join"]]'
        raise refusal(spec, f"must be rows of a start in s and words, as {example}.") from None
    if len(pairs) > spec.metadata["max"]:
        raise refusal(spec, f"has {len(pairs)} rows: at most {spec.metadata['max']} are possible.")
    characters = sum(len(words) for _, words in pairs if isinstance(words, str))
    if characters > SECTIONS_CHARACTERS:
        limit = f"{SECTIONS_CHARACTERS:,}"
        raise refusal(spec, f"has {characters:,} characters in all: shorten it to {limit}.")
    before_s = -1.0
    for number, (start_s, words) in enumerate(pairs, start=1):
        words = text_of(spec, "" if words is None else words, f"row {number} ")
        if words or not _is_nothing(start_s):
            start_s = _start(spec, start_s, before_s, number)
            yield start_s, words
            before_s = start_s


def pairs_of(value: object) -> list[tuple[object, object]]:
    """Rows of two, also as JSON.

    Raises:
        TypeError, ValueError, RecursionError: there are none.
    """
    rows: object = json.loads(value or "[]") if isinstance(value, str) else value
    if not isinstance(rows, Iterable):
        raise TypeError(f"{type(rows).__name__} has no rows")
    return [(first, second) for first, second in rows]


def _is_nothing(start_s: object) -> bool:
    """Whether a table's cell is empty."""
    return start_s is None or start_s == "" or start_s != start_s  # noqa: PLR0124 - NaN


def _start(spec: Spec, value: object, before_s: float, number: int) -> float:
    if _is_nothing(value):
        raise refusal(spec, f"row {number} has no start: say at which second its words begin.")
    try:
        start_s = _seconds(value)
    except (TypeError, ValueError, OverflowError):
        start_s = -1.0
    if not (math.isfinite(start_s) and start_s >= 0):
        raise refusal(
            spec, f"row {number} must start at a number of s, or at m:ss, not {_shown(value)}."
        )
    if start_s == before_s:
        raise refusal(
            spec, f"row {number} starts at {start_s:g} s, as the one before: remove one of them."
        )
    if start_s < before_s:
        raise refusal(
            spec, f"row {number} starts before the one above it: put the rows in order of time."
        )
    return start_s


def _seconds(value: object) -> float:
    """Seconds as a number, or written as minutes and seconds: 90, "90", "1:30"."""
    if isinstance(value, str) and (
        clock := re.fullmatch(r"\s*(\d+):([0-5]?\d(?:\.\d+)?)\s*", value)
    ):
        return 60 * float(clock[1]) + float(clock[2])
    return float_of(value)


def float_of(value: object) -> float:
    """A number, also as text.

    Raises:
        TypeError, ValueError, OverflowError: it is none.
    """
    # The usual ones first: a look for a method takes a thousand times longer.
    if not isinstance(value, (float, int, str, SupportsFloat)):
        raise TypeError(f"{type(value).__name__} is no number")
    return float(value)


def switch_of(spec: Spec, value: object) -> bool:
    """A switch, from a boolean, 0 or 1, or a word."""
    if isinstance(value, str) and value.lower() in SWITCH_WORDS:
        return SWITCH_WORDS[value.lower()]
    if isinstance(value, (bool, int, float, np.bool_)) and value in (0, 1):
        return bool(value)
    raise refusal(spec, f"must be on or off, not {_shown(value)}.")


def number_of(spec: Spec, value: object) -> float | int:
    """A number within the limits; whole where the default is."""
    try:
        number = float_of(value)
    except (TypeError, ValueError, OverflowError):
        raise refusal(spec, f"must be a number, not {_shown(value)}.") from None
    low, high, unit = (spec.metadata[key] for key in ("min", "max", "unit"))
    if not math.isfinite(number) or not low <= number <= high:
        limits = f"between {low:.15g} and {high:.15g} {unit}".rstrip()
        raise refusal(spec, f"must be {limits}, not {number:.15g}.")
    if isinstance(spec.default, int):
        if number != int(number):
            raise refusal(spec, f"must be a whole number, not {number:.15g}.")
        return int(number)
    return number
