"""What may be asked for: the settings of a take with their units, limits and defaults.

A `GenerationRequest` is the one list of settings. A field's name is the handler's parameter, the
component's key, the API's name, the command line's flag (without the unit) and README's row; its
metadata holds the sentence and the limits that all of these show. The constructor coerces what a
browser, a JSON body or a shell hands over and raises `RequestError` with the sentence that the
user reads, so a request that exists is a request that can be run.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WINDOW_S = 30.0  # MusicGen is trained on windows of 30 s; beyond them it still runs, badly
MIN_CONTEXT_S = 0.5  # less of a clip than this cannot be continued
MAX_SEED = 2**32 - 1


class RequestError(ValueError):
    """Something the user can mend. Its text is shown to the user: a sentence that says what to do.

    `field` names the setting at fault, where there is one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, eq=False)
class Clip:
    """A piece of audio: `samples` float32 [channels, samples], nominally within ±1."""

    samples: np.ndarray
    sampling_rate: int  # Hz

    @property
    def channels(self) -> int:
        """1 for mono, 2 for stereo."""
        return self.samples.shape[0]

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.samples.shape[1] / self.sampling_rate


def _setting(
    default: Any, help: str, minimum: float | None = None, maximum: float | None = None
) -> Any:
    return field(default=default, metadata={"help": help, "min": minimum, "max": maximum})


@dataclass(frozen=True)
class GenerationRequest:
    """One request for music. Every field has a default; see each field's `help`.

    Raises:
        RequestError: a value is of the wrong kind or outside its limits.
    """

    prompt: str = _setting("", "the music in words; empty lets the model choose", maximum=2000)
    negative_prompt: str = _setting("", "what to steer away from, in words", maximum=2000)
    audio_prompt: Clip | None = _setting(None, "a clip to continue")
    context_s: float = _setting(
        0.0, "seconds of the clip's end that the model hears; 0 is as much as fits", 0, WINDOW_S
    )
    include_prompt: bool = _setting(True, "the take begins with the clip")
    checkpoint: str = _setting("auto", "a checkpoint's name, Hub id or folder", maximum=500)
    stereo: bool = _setting(False, "two channels, from the checkpoint's stereo sibling")
    duration_s: float = _setting(10.0, "seconds of new music", 0.5, WINDOW_S)
    guidance_scale: float = _setting(3.0, "how closely to follow the prompt; 1 is off", 1, 20)
    do_sample: bool = _setting(True, "draw at random; off always takes the likeliest (greedy)")
    temperature: float = _setting(1.0, "above 1 more adventurous, below 1 safer", 0.01, 5)
    top_k: int = _setting(250, "draw from the likeliest k codes; 0 is all", 0, 1_000_000)
    top_p: float = _setting(
        0.0, "draw from the likeliest codes of this total share; 0 is off", 0, 1
    )
    seed: int = _setting(-1, "the same seed gives the same take; -1 draws one", -1, MAX_SEED)
    variations: int = _setting(1, "takes at once, with the seeds seed, seed + 1 …", 1, 4)
    normalize: bool = _setting(False, "bring the finished file to -14 LUFS")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _coerce(spec, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
        if self.audio_prompt is not None and WINDOW_S - self.duration_s < MIN_CONTEXT_S:
            raise RequestError(
                f"A {self.duration_s:g} s continuation leaves no room for your clip in the "
                f"{WINDOW_S:g} s window: choose a length of at most "
                f"{WINDOW_S - MIN_CONTEXT_S:g} s.",
                "duration_s",
            )

    @property
    def context_used_s(self) -> float:
        """Seconds of the audio prompt's end that the model hears; 0 without a clip."""
        if self.audio_prompt is None:
            return 0.0
        wanted = self.context_s or WINDOW_S
        return min(self.audio_prompt.duration_s, wanted, WINDOW_S - self.duration_s)

    def with_seed(self) -> GenerationRequest:
        """The same request with a drawn seed where it said -1."""
        if self.seed >= 0:
            return self
        return dataclasses.replace(self, seed=secrets.randbelow(2**31))

    def variation(self, index: int) -> GenerationRequest:
        """The request for one of the variations alone: its seed is `seed + index`."""
        seed = (self.seed + index) % (MAX_SEED + 1)
        return dataclasses.replace(self, seed=seed, variations=1)

    def settings(self) -> dict[str, Any]:
        """The fields that a JSON file can hold, in order: everything but the clips."""
        return {
            spec.name: getattr(self, spec.name)
            for spec in dataclasses.fields(self)
            if spec.name not in CLIP_FIELDS
        }


CLIP_FIELDS = ("audio_prompt",)
FIELDS = {spec.name: spec for spec in dataclasses.fields(GenerationRequest)}


def _coerce(spec: dataclasses.Field, value: Any) -> Any:
    if spec.name in CLIP_FIELDS:
        if value is not None and not isinstance(value, Clip):
            raise RequestError(f"{spec.name} must be audio, or nothing.", spec.name)
        return value
    kind = type(spec.default)
    if kind is str:
        return _text(spec, value)
    if kind is bool:
        return _switch(spec, value)
    return _number(spec, value, kind)


def _text(spec: dataclasses.Field, value: Any) -> str:
    if value is None:
        return spec.default
    if not isinstance(value, str):
        raise RequestError(f"{spec.name} must be text.", spec.name)
    # Lone surrogates and control characters cannot be tokenised, written to a file or shown.
    text = "".join(c for c in value if c in "\n\t" or c.isprintable()).strip()
    limit = spec.metadata["max"]
    if len(text) > limit:
        raise RequestError(
            f"{spec.name} has {len(text):,} characters: shorten it to {limit:,}.", spec.name
        )
    return text or spec.default


def _switch(spec: dataclasses.Field, value: Any) -> bool:
    if value is None:
        return spec.default
    if isinstance(value, (bool, np.bool_)) or value in (0, 1):
        return bool(value)
    words = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise RequestError(f"{spec.name} must be true or false, not {value!r}.", spec.name)


def _number(spec: dataclasses.Field, value: Any, kind: type) -> float | int:
    if value is None:
        return spec.default
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{spec.name} must be a number, not {value!r}.", spec.name) from None
    low, high = spec.metadata["min"], spec.metadata["max"]
    if not math.isfinite(number) or not low <= number <= high:
        raise RequestError(
            f"{spec.name} must be between {low:g} and {high:,g}, not {value}.".replace(",", " ")
            if high < 10_000
            else f"{spec.name} must be between {low:g} and {int(high)}, not {value}.",
            spec.name,
        )
    if kind is int:
        if number != int(number):
            raise RequestError(f"{spec.name} must be a whole number, not {value}.", spec.name)
        return int(number)
    return number
