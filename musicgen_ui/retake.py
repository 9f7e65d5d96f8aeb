"""A take made from another one: gone on with, tried again from a place, made longer or trimmed.

Each gives a request with the earlier take, or its beginning, as audio prompt with its codes, so the
engine neither decodes nor encodes it again, and the origin that `takes.save` writes down.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from musicgen_ui import takes
from musicgen_ui.audio.clip import JOIN_FADE_S, Clip
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.errors import RequestError
from musicgen_ui.request import (
    CLIP_FIELDS,
    FIELDS,
    MAX_DURATION_S,
    MIN_NEW_S,
    GenerationRequest,
    section_pairs,
)
from musicgen_ui.sidecar import Codes
from musicgen_ui.takes import Kept, Operation, Origin, Take


@dataclass(frozen=True)
class Derived:
    """What to make of a take, and what to write down about it."""

    request: GenerationRequest
    origin: Origin


def extend(kept: Kept, more_s: float) -> Derived:
    """A request for `more_s` more seconds of the same, by the take's own settings and its seed."""
    at_s = kept.clip.duration_s
    request = _same(kept, kept.clip, at_s, more_s, kept.settings["seed"])
    return Derived(request, _origin(kept, Operation.EXTEND, at_s))


def retake(kept: Kept, at_s: float, seed: int = -1) -> Derived:
    """A request for the same take as long as before, made anew from `at_s` on.

    What comes before `at_s` stays as it is, to the sample. The new music begins up to two frames
    later, where a frame of the codes does: the join is faded within the last 20 ms before it.

    Args:
        kept: the take.
        at_s: where in the take to begin.
        seed: of the new part; -1 draws one.

    Raises:
        RequestError: the place is not in the take, or too near its end.
    """
    rate, total = kept.clip.sampling_rate, kept.clip.samples.shape[1]
    fade = math.ceil(JOIN_FADE_S * rate)
    left = (total - math.ceil(at_s * rate) - fade) // kept.frame_samples * kept.frame_samples
    if at_s < 0 or left < MIN_NEW_S * rate:
        latest_s = max(total / rate - MIN_NEW_S - 2 * JOIN_FADE_S, 0)
        raise RequestError(
            f"A retake cannot begin at {at_s:.2f} s: choose a place from the start to "
            f"{latest_s:.2f} s."
        )
    before = cut(kept, 0, total - left)
    duration_s = min(left / rate, MAX_DURATION_S)
    request = _same(kept, before, before.duration_s, duration_s, seed)
    return Derived(request, _origin(kept, Operation.RETAKE, at_s))


def trim(kept: Kept, start_s: float, end_s: float, folder: Path) -> Take:
    """Saves a stretch of a take as a take in `folder`: nothing is made, and its codes stay with it.

    With codes, the end is moved to the nearest frame.

    Raises:
        RequestError: the stretch is empty or not in the take.
        UnsavedError: see `takes.save`.
    """
    rate, total, frame = kept.clip.sampling_rate, kept.clip.samples.shape[1], kept.frame_samples
    after = round((total - end_s * rate) / frame) * frame
    start, end = round(start_s * rate), total - max(after, 0)
    if not 0 <= start < end:
        raise RequestError(
            f"{start_s:.2f} to {end_s:.2f} s is no stretch of this take: choose one from 0 to "
            f"{total / rate:.2f} s."
        )
    settings, clip = kept.settings, cut(kept, start, end)
    prompt_s = min(max(settings.get("prompt_s", 0.0) - start / rate, 0.0), clip.duration_s)
    finished = Finished(
        variation=0,
        clip=clip,
        request=GenerationRequest.parse(_fields(settings)),
        prompt_s=prompt_s,
        speed=settings.get("speed_x", 0.0),
        stopped=settings.get("stopped", False),
    )
    codes = None
    if clip.codes is not None:
        codes = Codes(clip.codes, clip.codec, 0, frame)
    return takes.save(finished, folder, origin=_origin(kept, Operation.TRIM, start_s), codes=codes)


def cut(kept: Kept, start: int, end: int) -> Clip:
    """Samples `start` to `end` of a take, `end` where a frame ends, with the codes of them."""
    clip = dataclasses.replace(kept.clip, samples=kept.clip.samples[:, start:end])
    if clip.codes is None:
        return clip
    last = clip.codes.shape[1] - (kept.clip.samples.shape[1] - end) // kept.frame_samples
    first = max(last - (end - start) // kept.frame_samples, 0)
    codes = clip.codes[:, first:last] if last > first else None
    return dataclasses.replace(clip, codes=codes, codec=clip.codec if codes is not None else "")


def _same(kept: Kept, prompt: Clip, at_s: float, duration_s: float, seed: int) -> GenerationRequest:
    """The take's settings for `duration_s` seconds after its first `at_s` seconds."""
    begun = section_pairs(kept.settings)
    sections = _sections_from(begun, at_s - kept.settings.get("prompt_s", 0))
    values = _fields(kept.settings) | {
        "sections": [row for row in sections if row[0] < duration_s],
        "audio_prompt": prompt,
        "include_prompt": True,
        "context_s": 0.0,
        "variations": 1,
        "duration_s": duration_s,
        "seed": seed,
    }
    return GenerationRequest.parse(values)


def _sections_from(sections: list[tuple[float, str]], from_s: float) -> list[tuple[float, str]]:
    """Sections as they are counted from `from_s` seconds into the music that they were made for."""
    begun = [words for start_s, words in sections if start_s <= from_s]
    later = [(start_s - from_s, words) for start_s, words in sections if start_s > from_s]
    return ([(0.0, begun[-1])] if begun else []) + later


def _fields(settings: Mapping[str, object]) -> dict[str, object]:
    return {name: settings[name] for name in FIELDS if name in settings and name not in CLIP_FIELDS}


def _origin(kept: Kept, operation: Operation, at_s: float) -> Origin:
    return Origin(kept.settings["id"], operation, at_s)
