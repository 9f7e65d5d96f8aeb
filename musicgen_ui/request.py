"""What may be asked for: the settings of a take with their units, limits and defaults.

A `GenerationRequest` is the one list of settings. A field's name is the handler's parameter, the
component's key, the API's name, the command line's flag (without the unit) and its row in
docs/settings.md; its metadata holds the sentence and the limits that all of these show. The
constructor coerces what a browser, a JSON body or a shell hands over and raises `RequestError` with
the sentence that the user reads, so a request that exists is a request that can be run.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from musicgen_ui.coercion import PROMPT_CHARACTERS, RequestError, coerce, refusal

WINDOW_S = 30.0  # MusicGen is trained on windows of 30 s; beyond them it still runs, badly
MAX_DURATION_S = 300.0  # ten windows and more; nothing but patience and disk bounds it
MIN_NEW_S = 0.5  # a window is never so full of what came before that it adds less than this
MIN_MELODY_S = 0.5  # shorter than a column of chroma looks at
SILENCE = 1e-4  # -80 dBFS: below it there is no melody
MAX_SEED = 2**32 - 1


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
    seed: int = _setting(
        -1, "Seed", "the same seed gives the same take; -1 draws one", -1, MAX_SEED
    )
    variations: int = _setting(
        1, "Variations", "takes at once, with the seeds seed, seed + 1 …", 1, 4
    )
    normalize: bool = _setting(False, "Even loudness", "bring the finished file to -14 LUFS")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _coerced(spec, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
        if self.sections and self.sections[-1][0] >= self.duration_s:
            raise RequestError(
                f"A section starts at {self.sections[-1][0]:g} s, but the piece ends at "
                f"{self.duration_s:g} s: let it start earlier, or choose a greater length.",
                "sections",
            )
        if self.melody:
            _check_melody(self.melody)

    @property
    def context_used_s(self) -> float:
        """Seconds of the audio prompt's end that the model hears; 0 without a clip."""
        if self.audio_prompt is None:
            return 0.0
        clip_s = self.audio_prompt.duration_s
        return context_used_s(clip_s, self.context_s, self.duration_s, self.overlap_s)

    def words(self, at_s: float = 0.0) -> str:
        """What the model is told `at_s` seconds into the new music: prompt, section, tempo, key.

        Tempo and key are written as in MusicGen's training data, where "name: value" pairs joined
        by full stops follow the description, keys in small letters (audiocraft,
        `augment_music_info_description`).
        """
        section = next((text for start_s, text in self.sections[::-1] if start_s <= at_s), "")
        common = self.prompt.rstrip(".,") if section else self.prompt
        told = ", ".join(filter(None, (common, section)))
        pairs = [f"bpm: {self.tempo_bpm:g}"] if self.tempo_bpm else []
        pairs += [f"key: {self.key.lower()}"] if self.key else []
        return ". ".join(filter(None, (told.rstrip(".") if pairs else told, *pairs)))

    @property
    def texts(self) -> list[str]:
        """All that the model is told on the way, in order."""
        starts = (0.0, *(start_s for start_s, _ in self.sections))
        return list(dict.fromkeys(map(self.words, starts)))

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
        values = {name: getattr(self, name) for name in FIELDS if name not in CLIP_FIELDS}
        return values | {"sections": [list(row) for row in self.sections]}


# The clips, and how much of a file's end is kept of each, in seconds.
CLIP_FIELDS = {"audio_prompt": 120.0, "melody": MAX_DURATION_S}
FIELDS = {spec.name: spec for spec in dataclasses.fields(GenerationRequest)}
# What a checkpoint's own generation_config.json may state; where nothing is asked for, that counts.
CHECKPOINT_FIELDS = (
    *("duration_s", "guidance_scale", "do_sample"),
    *("temperature", "top_k", "top_p"),
)


def completed(
    values: Mapping[str, Any], defaults_of: Callable[[str], Mapping[str, Any]]
) -> dict[str, Any]:
    """`values` of a request, with the checkpoint's own in place of what is None or not there.

    `defaults_of` gives what a checkpoint, by its name, states; it is asked only where one of
    `CHECKPOINT_FIELDS` is missing.
    """
    missing = [name for name in CHECKPOINT_FIELDS if values.get(name) is None]
    if not missing:
        return dict(values)
    stated = defaults_of(values.get("checkpoint") or "auto")
    return {**values, **{name: stated[name] for name in missing if name in stated}}


def context_used_s(clip_s: float, context_s: float, duration_s: float, overlap_s: float) -> float:
    """How much of a clip's end the model hears: what is wished for, else all that fits.

    A piece that does not fit into one window with its clip hears at least the overlap.
    """
    fitting_s = max(WINDOW_S - duration_s, overlap_s)
    return min(clip_s, context_s or fitting_s, WINDOW_S - MIN_NEW_S)


def _check_melody(clip: Clip) -> None:
    if clip.duration_s < MIN_MELODY_S:
        raise RequestError(
            f"The melody is {clip.duration_s:.2f} s short: choose a clip of at least "
            f"{MIN_MELODY_S:g} s.",
            "melody",
        )
    if np.abs(clip.samples).max() < SILENCE:
        raise RequestError("The melody is silent: choose a clip with a tune in it.", "melody")


def _coerced(spec: dataclasses.Field, value: Any) -> Any:
    if spec.name not in CLIP_FIELDS:
        return spec.default if value is None else coerce(spec, value)
    if value is not None and not isinstance(value, Clip):
        raise refusal(spec, "must be audio, or left empty.")
    return value
