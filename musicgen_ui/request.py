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


def _about(
    label: str,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    unit: str = "",
) -> dict[str, Any]:
    return {"label": label, "help": help, "min": minimum, "max": maximum, "unit": unit}


def _setting(default: Any, *about: Any) -> Any:
    return field(default=default, metadata=_about(*about))


@dataclass(frozen=True)
class GenerationRequest:
    """One request for music. Every field has a default; see each field's `label` and `help`.

    A text's `max` is in characters, a number's `min` and `max` in its `unit`.

    Raises:
        RequestError: a value is of the wrong kind or outside its limits.
    """

    prompt: str = _setting("", "Prompt", "the music in words; empty lets the model choose", 0, 2000)
    negative_prompt: str = _setting(
        "", "Negative prompt", "what to steer away from, in words", 0, 2000
    )
    audio_prompt: Clip | None = field(
        default=None, metadata=_about("Audio prompt", "a clip to continue")
    )
    context_s: float = _setting(
        0.0,
        "Context",
        "seconds of the clip's end that the model hears; 0 is as much as fits",
        0,
        WINDOW_S,
        "s",
    )
    include_prompt: bool = _setting(True, "Start with the clip", "the take begins with the clip")
    checkpoint: str = _setting(
        "auto", "Checkpoint", "a checkpoint's name, Hub id or folder", 0, 500
    )
    stereo: bool = _setting(False, "Stereo", "two channels, from the checkpoint's stereo sibling")
    duration_s: float = _setting(10.0, "Length", "seconds of new music", 0.5, WINDOW_S, "s")
    guidance_scale: float = _setting(
        3.0, "Guidance", "how closely to follow the prompt; 1 is off", 1, 20
    )
    do_sample: bool = _setting(
        True, "Sampling", "draw at random; off always takes the likeliest (greedy)"
    )
    temperature: float = _setting(
        1.0, "Temperature", "above 1 more adventurous, below 1 safer", 0.01, 5
    )
    top_k: int = _setting(250, "Top-k", "draw from the likeliest k codes; 0 is all", 0, 1_000_000)
    top_p: float = _setting(
        0.0, "Top-p", "draw from the likeliest codes of this total share; 0 is off", 0, 1
    )
    seed: int = _setting(
        -1, "Seed", "the same seed gives the same take; -1 draws one", -1, MAX_SEED
    )
    variations: int = _setting(
        1, "Variations", "takes at once, with the seeds seed, seed + 1 …", 1, 4
    )
    normalize: bool = _setting(False, "Even loudness", "bring the finished file to -14 LUFS")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _coerce(spec, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
        if self.audio_prompt is not None and WINDOW_S - self.duration_s < MIN_CONTEXT_S:
            raise RequestError(
                f"A length of {self.duration_s:g} s leaves no room for your clip in the model's "
                f"{WINDOW_S:g} s window: choose at most {WINDOW_S - MIN_CONTEXT_S:g} s.",
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
            raise _refusal(spec, "must be audio, or left empty.")
        return value
    if value is None:
        return spec.default
    if isinstance(spec.default, str):
        return _text(spec, value) or spec.default
    if isinstance(spec.default, bool):
        return _switch(spec, value)
    return _number(spec, value)


def _refusal(spec: dataclasses.Field, text: str) -> RequestError:
    return RequestError(f"{spec.metadata['label']} {text}", spec.name)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return f"“{text[:40]}…”" if len(text) > 40 else f"“{text}”"


def _text(spec: dataclasses.Field, value: Any) -> str:
    if not isinstance(value, str):
        raise _refusal(spec, "must be text.")
    # Lone surrogates and control characters cannot be tokenised, written to a file or shown.
    text = "".join(c for c in value if c in "\n\t" or c.isprintable()).strip()
    limit = spec.metadata["max"]
    if len(text) > limit:
        raise _refusal(spec, f"has {len(text):,} characters: shorten it to {limit:,}.")
    return text


def _switch(spec: dataclasses.Field, value: Any) -> bool:
    words = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, (bool, int, float, np.bool_)) and value in (0, 1):
        return bool(value)
    raise _refusal(spec, f"must be on or off, not {_shown(value)}.")


def _number(spec: dataclasses.Field, value: Any) -> float | int:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _refusal(spec, f"must be a number, not {_shown(value)}.") from None
    low, high, unit = (spec.metadata[key] for key in ("min", "max", "unit"))
    if not math.isfinite(number) or not low <= number <= high:
        limits = f"between {low:.15g} and {high:.15g} {unit}".rstrip()
        raise _refusal(spec, f"must be {limits}, not {number:.15g}.")
    if isinstance(spec.default, int):
        if number != int(number):
            raise _refusal(spec, f"must be a whole number, not {number:.15g}.")
        return int(number)
    return number
