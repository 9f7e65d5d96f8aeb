"""What browsers, shells and JSON hand over, as the values of a request, or a sentence that says why
not.

The kind of a setting is that of its default; its field's metadata holds its limits and its label.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

PROMPT_CHARACTERS = 2000
SECTIONS_CHARACTERS = 6000  # in all: what libsndfile writes of a WAV's comment ends at 50 kB
TONICS = "C C# Db D D# Eb E F F# Gb G G# Ab A A# Bb B".split()  # noqa: SIM905
KEYS = [f"{tonic} {mode}" for tonic in TONICS for mode in ("major", "minor")]


class RequestError(ValueError):
    """Something the user can mend. Its text is shown to the user: a sentence that says what to do.

    `field` names the setting at fault, where there is one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def coerce(spec: dataclasses.Field, value: Any) -> Any:
    """`value` as a setting: text, switch, number or the rows of sections.

    Raises:
        RequestError: it is of the wrong kind or outside the limits.
    """
    if isinstance(spec.default, tuple):
        return tuple(_sections(spec, value))
    if isinstance(spec.default, str):
        text = _text(spec, value) or spec.default
        return _key(spec, text) if spec.name == "key" else text
    if isinstance(spec.default, bool):
        return _switch(spec, value)
    return _number(spec, value)


def refusal(spec: dataclasses.Field, text: str) -> RequestError:
    """The error of a setting: its label, then `text`."""
    return RequestError(f"{spec.metadata['label']} {text}", spec.name)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "�" for c in text[:41])  # it goes to terminals too
    return f"“{text[:40]}…”" if len(text) > 40 else f"“{text}”"


def _text(spec: dataclasses.Field, value: Any, where: str = "") -> str:
    if not isinstance(value, str):
        raise refusal(spec, f"{where}must be text.")
    # Lone surrogates and control characters cannot be tokenised, written to a file or shown.
    text = "".join(c for c in value if c in "\n\t" or c.isprintable()).strip()
    limit = PROMPT_CHARACTERS if where else spec.metadata["max"]
    if len(text) > limit:
        raise refusal(spec, f"{where}has {len(text):,} characters: shorten it to {limit:,}.")
    return text


def _key(spec: dataclasses.Field, text: str) -> str:
    typed = " ".join(text.replace("♯", "#").replace("♭", "b").lower().split())
    keys = {key.lower(): key for key in KEYS} | {"": ""}
    if typed not in keys:
        raise refusal(spec, f"must be like C minor or F# major, or empty, not {_shown(text)}.")
    return keys[typed]


def _sections(spec: dataclasses.Field, value: Any) -> Iterator[tuple[float, str]]:
    """Rows of a start and words, also as JSON; rows without either are passed over."""
    try:
        rows = json.loads(value or "[]") if isinstance(value, str) else list(value)
        pairs = [(start_s, words) for start_s, words in rows]
    except (ValueError, TypeError, RecursionError):
        example = '[[0, "piano"], [15, "drums join"]]'
        raise refusal(spec, f"must be rows of a start in s and words, as {example}.") from None
    if len(pairs) > spec.metadata["max"]:
        raise refusal(spec, f"has {len(pairs)} rows: at most {spec.metadata['max']} can be told.")
    characters = sum(len(words) for _, words in pairs if isinstance(words, str))
    if characters > SECTIONS_CHARACTERS:
        limit = f"{SECTIONS_CHARACTERS:,}"
        raise refusal(spec, f"has {characters:,} characters in all: shorten it to {limit}.")
    before_s = -1.0
    for number, (start_s, words) in enumerate(pairs, start=1):
        words = _text(spec, "" if words is None else words, f"row {number} ")
        if words or not _is_nothing(start_s):
            start_s = _start(spec, start_s, before_s, number)
            yield start_s, words
            before_s = start_s


def _is_nothing(start_s: Any) -> bool:
    """A cell that nobody filled in, as browsers hand it over."""
    return start_s is None or start_s == "" or start_s != start_s


def _start(spec: dataclasses.Field, value: Any, before_s: float, number: int) -> float:
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
        raise refusal(spec, f"row {number} starts at {start_s:g} s, as the one before: leave one.")
    if start_s < before_s:
        raise refusal(
            spec, f"row {number} starts before the one above it: put the rows in order of time."
        )
    return start_s


def _seconds(value: Any) -> float:
    """Seconds as a number, or written as minutes and seconds: 90, "90", "1:30"."""
    if isinstance(value, str) and (
        clock := re.fullmatch(r"\s*(\d+):([0-5]?\d(?:\.\d+)?)\s*", value)
    ):
        return 60 * float(clock[1]) + float(clock[2])
    return float(value)


def _switch(spec: dataclasses.Field, value: Any) -> bool:
    words = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, (bool, int, float, np.bool_)) and value in (0, 1):
        return bool(value)
    raise refusal(spec, f"must be on or off, not {_shown(value)}.")


def _number(spec: dataclasses.Field, value: Any) -> float | int:
    try:
        number = float(value)
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
