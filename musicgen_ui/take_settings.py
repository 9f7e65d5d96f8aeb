"""What a take's files say of it: the settings of its request, and what came of it.

A settings' meaning and limits are those of the request's field of the same name.
"""

from __future__ import annotations

from typing import TypedDict


class Results(TypedDict, total=False):
    """What came of a request; older files do not say all."""

    made_s: float
    prompt_s: float
    melody_s: float
    style_s: float
    context_used_s: float  # of the audio prompt, that the model heard
    sampling_rate: int  # Hz
    channels: int
    speed_x: float
    score: float
    stopped: bool
    gain_db: float  # that `normalize` took; samples and codes differ by it
    id: str  # of the sound
    parent: str  # the id of the sound that the take goes on from
    operation: str  # one of `takes.Operation`
    parent_at_s: float
    loop_bars: int
    fade_out_s: float


class TakeSettings(Results):
    """What a take's files say of it, as JSON: the request's fields, then what came of it."""

    prompt: str
    negative_prompt: str
    sections: list[list[float | str]]  # [start_s, words], see `section_pairs`
    tempo_bpm: float
    key: str
    time_signature: str
    context_s: float
    include_prompt: bool
    chords: str
    chord_strength: float
    style_start_s: float
    style_length_s: float
    style_codebooks: int
    text_guidance: float
    checkpoint: str
    adapter: str
    adapter_strength: float
    stereo: bool
    duration_s: float
    overlap_s: float
    guidance_scale: float
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    automation: list[list[object]]  # [at_s, what changes]
    skip_s: float
    seed: int
    variations: int
    keep: int
    rank_by_prompt: bool
    normalize: bool
