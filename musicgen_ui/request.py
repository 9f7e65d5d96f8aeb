"""The settings of a take: fields, units, limits, defaults and validation.

`GenerationRequest` is the one list of settings. A field's name is the component, the API's
parameter, the command line's flag (without the unit) and the row in docs/settings.md; its metadata
holds the label, help text and limits that all of these show.

`GenerationRequest.parse` coerces and checks what a browser, a JSON body, a shell or a file hands
over. It runs once for a request; the constructor and `dataclasses.replace` check nothing, so that
the program can vary a valid request at no cost.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np

from musicgen_ui.audio import chords
from musicgen_ui.audio.chords import Progression
from musicgen_ui.audio.clip import SILENCE, Clip
from musicgen_ui.coercion import (
    PROMPT_CHARACTERS,
    TEXT_CHECKS,
    Spec,
    float_of,
    number_of,
    pairs_of,
    refusal,
    sections_of,
    switch_of,
    text_of,
)
from musicgen_ui.errors import RequestError
from musicgen_ui.steering import MEMORY_SLOTS, Steering, normalised
from musicgen_ui.take_settings import TakeSettings

WINDOW_S = 30.0  # MusicGen is trained on windows of 30 s; longer ones run without error, badly
MAX_DURATION_S = 300.0
MIN_NEW_S = 0.5  # new audio that every window has room for
MIN_MELODY_S = 0.5  # a column of chroma needs about that much
MAX_SEED = 2**32 - 1
CHORDS_CHARACTERS = 1000
AUTOMATION_CHARACTERS = 30_000  # of its JSON, in a take's file
CHORDS_TEMPO_BPM = 120.0  # where none is given: chords are placed by bars

T = TypeVar("T")


def _about(
    label: str,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    unit: str = "",
) -> dict[str, object]:
    return {"label": label, "help": help, "min": minimum, "max": maximum, "unit": unit}


def _setting(
    default: T,
    label: str,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    unit: str = "",
) -> T:
    return field(default=default, metadata=_about(label, help, minimum, maximum, unit))


@dataclass(frozen=True)
class GenerationRequest:
    """One request for music. Every field has a default; see each field's `label` and `help`.

    In a field's metadata, a text's `max` is in characters, a number's `min` and `max` in its
    `unit`. Values from outside the program go through `parse`.
    """

    prompt: str = _setting(
        "", "Prompt", "the music in words; empty lets the model choose", 0, PROMPT_CHARACTERS
    )
    negative_prompt: str = _setting(
        "", "Negative prompt", "what to steer away from, in words", 0, PROMPT_CHARACTERS
    )
    sections: tuple[tuple[float, str], ...] = _setting(
        (), "Sections", "what joins the prompt from when on: rows of a start in s and words", 0, 50
    )
    tempo_bpm: float = _setting(
        0.0, "Tempo", "beats a minute, added to the words; 0 leaves it open", 0, 300, "bpm"
    )
    key: str = _setting(
        "", "Key", "such as C minor or F# major, added to the words; empty leaves it open", 0, 20
    )
    time_signature: str = _setting(
        "4/4",
        "Time signature",
        "beats of the tempo in a bar of chords and loops, such as 3/4",
        0,
        5,
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
    melody: Clip | None = field(
        default=None,
        metadata=_about("Melody", "a clip whose tune is followed, from a melody checkpoint"),
    )
    chords: str = _setting(
        "",
        "Chords",
        "a bar each, such as C G A:min F,G, from a melody checkpoint; empty is none",
        0,
        CHORDS_CHARACTERS,
    )
    chord_strength: float = _setting(
        1.0, "Chord strength", "how strongly the chords are followed: 1 as a melody is", 0.1, 2.5
    )
    style: Clip | None = field(
        default=None,
        metadata=_about("Style", "a clip whose style the music takes on, from a style checkpoint"),
    )
    style_start_s: float = _setting(
        0.0, "Excerpt start", "where in the style clip the excerpt begins", 0, MAX_DURATION_S, "s"
    )
    style_length_s: float = _setting(
        3.0, "Excerpt length", "seconds of the style clip that the model hears", 1.5, 4.5, "s"
    )
    style_codebooks: int = _setting(
        3, "Style codebooks", "how much of the excerpt comes through: 1 is its outline", 1, 6
    )
    text_guidance: float = _setting(
        5.0, "Text guidance", "with words and a style clip, the weight of the words over it", 1, 9
    )
    checkpoint: str = _setting(
        "auto", "Checkpoint", "a checkpoint's name, Hub id or folder", 0, 500
    )
    adapter: str = _setting(
        "", "Adapter", "a LoRA for the checkpoint, by its Hub id or folder; empty is none", 0, 500
    )
    adapter_strength: float = _setting(
        1.0, "Adapter strength", "how much of the adapter: 0 is none, 1 as it was trained", 0, 2
    )
    stereo: bool = _setting(False, "Stereo", "two channels, from the checkpoint's stereo sibling")
    duration_s: float = _setting(
        10.0, "Length", "seconds of new music", MIN_NEW_S, MAX_DURATION_S, "s"
    )
    overlap_s: float = _setting(
        12.0, "Overlap", "beyond 30 s: how much of its past the music goes on from", 1, 25, "s"
    )
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
    automation: tuple[tuple[float, Steering], ...] = _setting(
        (), "Automation", "changes on the way: rows of a time in s and what changes", 0, 2000
    )
    skip_s: float = _setting(
        0.0,
        "Skip",
        "seconds at the start that are made and left out of the take",
        0,
        3600,
        "s",
    )
    seed: int = _setting(
        -1, "Seed", "the same seed gives the same take; -1 draws one", -1, MAX_SEED
    )
    variations: int = _setting(
        1, "Variations", "takes at once, with the seeds seed, seed + 1 …", 1, 8
    )
    keep: int = _setting(
        0, "Keep", "how many of the variations are kept, the best by their score; 0 is all", 0, 8
    )
    rank_by_prompt: bool = _setting(
        False, "Rank by prompt", "CLAP judges how well takes fit the words; downloaded once, 0.8 GB"
    )
    normalize: bool = _setting(False, "Even loudness", "bring the finished file to -14 LUFS")
    # An endless piece that is steered while it plays. No setting: what is recorded of it has a
    # length, and its changes as `automation`.
    live: bool = False

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> GenerationRequest:
        """A checked request of values by field name; None and missing ones become the default.

        Numbers and switches may be text ("8", "on"), sections JSON; clips are a `Clip`.

        Raises:
            RequestError: a value is of the wrong kind or outside its limits.
        """
        request = cls(**{name: coerce(name, value) for name, value in values.items()})
        if request.chords and not request.tempo_bpm:
            request = dataclasses.replace(request, tempo_bpm=CHORDS_TEMPO_BPM)
        if request.sections and request.sections[-1][0] >= request.end_s:
            raise RequestError(
                f"A section starts at {request.sections[-1][0]:g} s, but the piece ends at "
                f"{request.end_s:g} s: let it start earlier, or choose a greater length.",
                "sections",
            )
        check_style(request)
        return request

    def context_used_s(self, window_s: float = WINDOW_S) -> float:
        """Seconds of the audio prompt's end that the model hears; 0 without a clip."""
        if self.audio_prompt is None:
            return 0.0
        clip_s = self.audio_prompt.duration_s
        return context_used_s(clip_s, self.context_s, self.duration_s, self.overlap_s, window_s)

    @property
    def steered(self) -> bool:
        """It is made as a live piece is: changed at frames, and never written to an end."""
        return self.live or bool(self.automation) or self.skip_s > 0

    @property
    def end_s(self) -> float:
        """Where in the new music the take ends, in seconds."""
        return self.skip_s + self.duration_s

    def words(self, at_s: float = 0.0) -> str:
        """The model's text `at_s` seconds into the new music: prompt, section, tempo, key.

        Tempo and key are written as in MusicGen's training data, where "name: value" pairs joined
        by full stops follow the description, keys in small letters (audiocraft,
        `augment_music_info_description`).
        """
        section = next((text for start_s, text in self.sections[::-1] if start_s <= at_s), "")
        common = self.prompt.rstrip(".,") if section else self.prompt
        description = ", ".join(filter(None, (common, section)))
        pairs = [f"bpm: {self.tempo_bpm:g}"] if self.tempo_bpm else []
        pairs += [f"key: {self.key.lower()}"] if self.key else []
        if pairs:
            description = description.rstrip(".")
        return ". ".join(filter(None, (description, *pairs)))

    @property
    def texts(self) -> list[str]:
        """The model's texts from the start of the piece to its end, in order."""
        starts = (0.0, *(start_s for start_s, _ in self.sections))
        return list(dict.fromkeys(map(self.words, starts)))

    @property
    def beats_a_bar(self) -> int:
        """Beats of the tempo in a bar of the chords, and of a loop."""
        return chords.beats_a_bar(self.time_signature)

    @property
    def progression(self) -> Progression | None:
        """The chords in time; None without any."""
        if not self.chords:
            return None
        bar_s = self.beats_a_bar * 60 / (self.tempo_bpm or CHORDS_TEMPO_BPM)
        return Progression(chords.parse(self.chords), bar_s)

    @property
    def style_excerpt(self) -> Clip:
        """What the model hears of the style clip, which must be there."""
        assert self.style
        rate = self.style.sampling_rate
        begin = round(self.style_start_s * rate)
        end = begin + round(self.style_length_s * rate)
        return Clip(self.style.samples[:, begin:end], rate)

    @property
    def followed(self) -> str:
        """What only a melody checkpoint can follow, in words; "" without any."""
        parts = ["a melody"] * (self.melody is not None) + ["chords"] * bool(self.chords)
        return " and ".join(parts)

    def with_seed(self) -> GenerationRequest:
        """The same request with a drawn seed where it said -1."""
        if self.seed >= 0:
            return self
        return dataclasses.replace(self, seed=secrets.randbelow(2**31))

    def variation(self, index: int) -> GenerationRequest:
        """The request for one of the variations alone: its seed is `seed + index`."""
        seed = (self.seed + index) % (MAX_SEED + 1)
        return dataclasses.replace(self, seed=seed, variations=1, keep=0)

    def without_clips(self) -> GenerationRequest:
        """The same request without its clips, which hold most of its memory."""
        if not any(getattr(self, name) for name in CLIP_FIELDS):
            return self
        return dataclasses.replace(self, audio_prompt=None, melody=None, style=None)

    @property
    def takes(self) -> int:
        """How many takes come of it."""
        return min(self.keep or self.variations, self.variations)

    def settings(self) -> TakeSettings:
        """The fields that a JSON file can hold, in order: everything but the clips."""
        values = {name: getattr(self, name) for name in FIELDS if name not in CLIP_FIELDS}
        values["sections"] = [list(row) for row in self.sections]
        values["automation"] = [[at_s, change.values()] for at_s, change in self.automation]
        return cast(TakeSettings, values)  # a test holds the names equal


def section_pairs(settings: TakeSettings) -> list[tuple[float, str]]:
    """The sections in a take's settings: start in s and words."""
    return [(float(start_s), str(words)) for start_s, words in settings["sections"]]


# The clips, and how much of a file's end is kept of each, in seconds.
CLIP_FIELDS = {"audio_prompt": 120.0, "melody": MAX_DURATION_S, "style": MAX_DURATION_S}
FIELDS = {spec.name: spec for spec in dataclasses.fields(GenerationRequest) if spec.metadata}
# What a checkpoint's generation_config.json may state: its defaults, which replace ours.
CHECKPOINT_FIELDS = (
    *("duration_s", "guidance_scale", "do_sample"),
    *("temperature", "top_k", "top_p"),
)


def completed(
    values: Mapping[str, object], defaults_of: Callable[[str, str], Mapping[str, object]]
) -> dict[str, object]:
    """`values` of a request with the checkpoint's defaults for those that are None or missing.

    `defaults_of` gives what a checkpoint states, by its name and that of the adapter, whose base
    "auto" is. It is called only where one of `CHECKPOINT_FIELDS` is missing.
    """
    missing = [name for name in CHECKPOINT_FIELDS if values.get(name) is None]
    if not missing:
        return dict(values)
    stated = defaults_of(str(values.get("checkpoint") or "auto"), str(values.get("adapter") or ""))
    return {**values, **{name: stated[name] for name in missing if name in stated}}


def context_used_s(
    clip_s: float,
    context_s: float,
    duration_s: float,
    overlap_s: float,
    window_s: float = WINDOW_S,
) -> float:
    """How much of a clip's end the model hears: what is asked for, else all that fits.

    A piece that does not fit into one window with its clip hears at least the overlap. `window_s`
    is the checkpoint's.
    """
    fitting_s = max(window_s - duration_s, overlap_used_s(overlap_s, window_s))
    return min(clip_s, context_s or fitting_s, window_s - MIN_NEW_S)


def overlap_used_s(overlap_s: float, window_s: float = WINDOW_S) -> float:
    """The overlap of two windows: at most the share of a window that `overlap_s` may have of 30 s.

    Otherwise a default of 12 s would not fit a window of 10 s.
    """
    most_s: float = FIELDS["overlap_s"].metadata["max"]
    return min(overlap_s, window_s * most_s / WINDOW_S)


def coerce(name: str, value: object) -> Any:  # of the field's type
    """`value` as the field `name` holds it; None becomes the default.

    Raises:
        RequestError: it is of the wrong kind or outside the limits.
    """
    if name not in FIELDS:
        raise RequestError(f"“{name[:40]}” is not a setting: choose among {', '.join(FIELDS)}.")
    spec = FIELDS[name]
    if value is None:
        return spec.default
    if name in CLIP_FIELDS:
        if not isinstance(value, Clip):
            raise refusal(spec, "must be audio, or left empty.")
        return check_melody(value) if name == "melody" else value
    if name == "automation":
        return tuple(_automation(spec, value))
    if isinstance(spec.default, tuple):
        return tuple(sections_of(spec, value))
    if isinstance(spec.default, str):
        text = text_of(spec, value) or spec.default
        return TEXT_CHECKS[name](spec, text) if name in TEXT_CHECKS else text
    return switch_of(spec, value) if isinstance(spec.default, bool) else number_of(spec, value)


def check_melody(clip: Clip) -> Clip:
    """The clip, if it can be followed as a melody.

    Raises:
        RequestError: it is too short or silent.
    """
    if clip.duration_s < MIN_MELODY_S:
        raise RequestError(
            f"The melody is {clip.duration_s:.2f} s short: choose a clip of at least "
            f"{MIN_MELODY_S:g} s.",
            "melody",
        )
    if np.abs(clip.samples).max() < SILENCE:
        raise RequestError("The melody is silent: choose a clip with a tune in it.", "melody")
    return clip


def check_style(request: GenerationRequest) -> None:
    """Requires that the excerpt lies within the style clip and is not silent.

    Raises:
        RequestError: it does not, or is; or the clip is shorter than every excerpt.
    """
    clip, start_s, length_s = request.style, request.style_start_s, request.style_length_s
    if clip is None:
        return
    clip_s, least_s = clip.duration_s, FIELDS["style_length_s"].metadata["min"]
    latest_s = math.floor((clip_s - length_s) * 100 + 1e-6) / 100
    if clip_s < least_s:
        raise RequestError(
            f"The style clip is {clip_s:.2f} s long: choose one of at least {least_s:g} s.", "style"
        )
    if latest_s < 0:
        raise RequestError(
            f"The excerpt is {length_s:g} s long and the style clip only {clip_s:.2f} s: choose a "
            "shorter excerpt or a longer clip.",
            "style_length_s",
        )
    if start_s > latest_s:
        raise RequestError(
            f"The excerpt from {start_s:g} to {start_s + length_s:g} s is not within the style "
            f"clip, which ends at {clip_s:.2f} s: let it start at {latest_s:g} s or earlier.",
            "style_start_s",
        )
    if np.abs(request.style_excerpt.samples).max() < SILENCE:
        raise RequestError(
            "The excerpt of the style clip is silent: let it start where there is music.",
            "style_start_s",
        )


def _automation(spec: Spec, value: object) -> Iterator[tuple[float, Steering]]:
    """Rows of a time and a change, also as JSON."""
    try:
        pairs = [(float_of(at_s), change) for at_s, change in pairs_of(value)]
    except (ValueError, TypeError, OverflowError, RecursionError):
        example = '[[0, {"prompts": [["rock", 0.7], ["piano", 0.3]]}], [4.2, {"top_k": 50}]]'
        raise refusal(spec, f"must be rows of a time in s and a change, as {example}.") from None
    if len(pairs) > spec.metadata["max"]:
        most = f"{spec.metadata['max']:,}"
        raise refusal(spec, f"has {len(pairs):,} rows: at most {most} are possible.")
    before_s = 0.0
    for number, (at_s, change) in enumerate(pairs, start=1):
        if not (math.isfinite(at_s) and at_s >= before_s):
            raise refusal(
                spec, f"row {number} must have a time in s, not before the row above, not {at_s:g}."
            )
        yield at_s, change if isinstance(change, Steering) else steering(change, f"row {number} ")
        before_s = at_s


def steering(change: object, where: str = "") -> Steering:
    """A checked change of a piece, from JSON with the names of `Steering`.

    Args:
        change: to check.
        where: it stands, for the error.

    Raises:
        RequestError: it is none, or a value is outside its limits.
    """
    spec, names = FIELDS["automation"], [each.name for each in dataclasses.fields(Steering)]
    if not isinstance(change, Mapping) or not change or not set(change) <= set(names):
        raise refusal(spec, f"{where}must change one or more of {', '.join(names)}.")
    values = {name: value for name, value in change.items() if value is not None}
    if "prompts" in values:
        try:
            pairs = [(words, float(weight)) for words, weight in values["prompts"]]
        except (TypeError, ValueError, OverflowError):
            raise refusal(spec, f"{where}must have rows of words and a weight.") from None
        values["prompts"] = normalised((text_of(spec, words, where), w) for words, w in pairs)
    for name in {"guidance_scale", "temperature", "top_k"} & set(values):
        values[name] = number_of(FIELDS[name], values[name])
    for name in {"store", "recall"} & set(values):
        if values[name] not in range(1, MEMORY_SLOTS + 1):
            raise refusal(spec, f"{where}must name a memory slot from 1 to {MEMORY_SLOTS}.")
    return Steering(**values)
