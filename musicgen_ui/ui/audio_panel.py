"""Start from audio: a clip that is continued, or one whose melody or style the music has.

Each use has a field of its own, the request's, and one of them is on show. The choice between them
appears where the checkpoint can follow a melody or take on a style; making it takes the clip along.
A clip is checked as soon as it is there, and a mistake is said beside it.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import TypedDict

import gradio as gr

from musicgen_ui.audio import clip_cache
from musicgen_ui.errors import RequestError
from musicgen_ui.request import (
    CLIP_FIELDS,
    WINDOW_S,
    GenerationRequest,
    check_melody,
    check_style,
    coerce,
    context_used_s,
)
from musicgen_ui.ui.components import CONTINUE, FOLLOW, TAKE_STYLE, Updates
from musicgen_ui.ui.request_form import PageFacts, settings_of
from musicgen_ui.ui.take_panel import Group, chosen_take

UNRECORDED = (
    "Browsers record only on pages that come over https or from this computer (localhost): here a "
    "clip can be uploaded."
)


class ClipFacts(TypedDict, total=False):
    """What is known of a clip or a melody; nothing where there is none."""

    refused: str  # the sentence; then nothing else is known
    full_s: float
    clip_s: float  # that is read
    notes: tuple[str, ...]


def clip_uses(facts: PageFacts, choice: str) -> Updates:
    """Offers the choice where the chosen checkpoint can follow a melody or take on a style."""
    other = FOLLOW if facts.get("melody") else TAKE_STYLE if facts.get("style") else CONTINUE
    choices = [CONTINUE, other]
    changed = {} if choice in choices else {"value": CONTINUE}
    if other == CONTINUE:
        return {"clip_use": gr.update(visible=False, **changed)}
    return {"clip_use": gr.update(visible=True, choices=choices, **changed)}


def offer_chords(facts: PageFacts, chords: str) -> Updates:
    """Shows the chords where the chosen checkpoint can follow them, and where some are written."""
    return {"chord_column": gr.update(visible=bool(facts.get("melody") or chords))}


def use(
    choice: str,
    audio_prompt: str | None,
    melody: str | None,
    style: str | None,
    duration_s: float,
    context_s: float,
    overlap_s: float,
    style_start_s: float | None = None,
    style_length_s: float | None = None,
) -> Updates:
    """Shows the chosen field with the clip in it, checked: a field that appears has no event."""
    path = audio_prompt or melody or style
    if choice == FOLLOW:
        read = read_melody(path, duration_s, {})
    elif choice == TAKE_STYLE:
        read = read_style(path, style_start_s, style_length_s, {})
    else:
        read = read_clip(path, duration_s, context_s, overlap_s, {})
    return {
        "continue_column": gr.update(visible=choice == CONTINUE),
        "melody_column": gr.update(visible=choice == FOLLOW),
        "style_column": gr.update(visible=choice == TAKE_STYLE),
        "audio_prompt": path if choice == CONTINUE else None,
        "melody": path if choice == FOLLOW else None,
        "style": path if choice == TAKE_STYLE else None,
        **read,
    }


def read_clip(
    path: str | None,
    duration_s: float,
    context_s: float,
    overlap_s: float,
    clip: ClipFacts,
) -> Updates:
    """Checks a clip to continue: what it is, how much of it is used, or what is wrong.

    `clip` is what is known of the last one; the answer's "clip" replaces it.
    """
    if not path:
        # A refused clip is taken out of its field, which calls this again: keep the sentence.
        kept = clip if clip.get("refused") else {}
        line = clip_line(kept, duration_s, context_s, overlap_s)
        return {"clip": {}, "clip_line": line, **no_offer()}
    try:
        reading = clip_cache.read(Path(path))
    except RequestError as error:
        clip = {"refused": str(error)}
        line = clip_line(clip, duration_s, context_s, overlap_s)
        return {"clip": clip, "audio_prompt": None, "clip_line": line, **no_offer()}
    clip = {"full_s": reading.full_s, "clip_s": reading.clip.duration_s, "notes": reading.notes}
    line = clip_line(clip, duration_s, context_s, overlap_s)
    return {"clip": clip, "clip_line": line, **offer(Path(path))}


def clip_line(clip: ClipFacts, duration_s: float, context_s: float, overlap_s: float) -> str:
    """How much of the clip the model hears beside the new music, as HTML."""
    if refused := clip.get("refused"):
        return _refused(refused)
    if not clip:
        return '<p class="clip-line">Your clip is continued from its end.</p>'
    duration_s = duration_s or 0  # an emptied field
    used_s = context_used_s(clip["clip_s"], context_s, duration_s, overlap_s)
    facts = [f"last {used_s:.1f} s of {clip['full_s']:.1f} s", f"{duration_s:.1f} s new"]
    if used_s + duration_s > WINDOW_S + 0.05:
        facts.append(f"{WINDOW_S:g} s at a time")
    elif used_s + duration_s >= WINDOW_S - 0.05:
        facts.append(f"the {WINDOW_S:g} s window is full")
    return _line(", ".join(facts), clip.get("notes", ()))


def read_melody(path: str | None, duration_s: float, tune: ClipFacts) -> Updates:
    """Checks a melody: how much of it is followed, or what is wrong.

    `tune` is what is known of the last one; the answer's "tune" replaces it.
    """
    if not path:
        kept = tune if tune.get("refused") else {}
        return {"tune": {}, "melody_line": melody_line(kept, duration_s)}
    try:
        reading = clip_cache.read(Path(path), keep_s=CLIP_FIELDS["melody"])
        check_melody(reading.clip)
    except RequestError as error:
        tune = {"refused": str(error)}
        return {"tune": tune, "melody": None, "melody_line": melody_line(tune, duration_s)}
    tune = {"clip_s": reading.clip.duration_s, "notes": reading.notes}
    return {"tune": tune, "melody_line": melody_line(tune, duration_s)}


def melody_line(tune: ClipFacts, duration_s: float) -> str:
    """How much of the melody will be followed, as HTML."""
    if refused := tune.get("refused"):
        return _refused(refused)
    if not tune:
        return _line("The music follows the tune of your clip, not its sound.")
    clip_s, duration_s = tune["clip_s"], duration_s or 0  # an emptied field
    text = f"The tune of all {clip_s:.1f} s is followed."
    if clip_s > duration_s + 0.05:
        text = f"The tune of the first {duration_s:.1f} s of {clip_s:.1f} s is followed."
    elif clip_s < duration_s - 0.05:
        text = f"The tune of {clip_s:.1f} s is repeated for {duration_s:.1f} s."
    return _line(text, tune.get("notes", ()))


def read_style(
    path: str | None, start_s: float | None, length_s: float | None, tune: ClipFacts
) -> Updates:
    """Checks a style clip and its excerpt: what is used, or what is wrong.

    `tune` is what is known of the last one; the answer's replaces it.
    """
    if not path:
        refused = tune.get("refused")
        return {"tune": {}, "style_line": _refused(refused) if refused else NO_STYLE}
    try:
        reading = clip_cache.read(Path(path), keep_s=CLIP_FIELDS["style"])
    except RequestError as error:
        tune = {"refused": str(error)}
        return {"tune": tune, "style": None, "style_line": _refused(str(error))}
    try:
        asked = GenerationRequest(
            style=reading.clip,
            style_start_s=coerce("style_start_s", start_s),
            style_length_s=coerce("style_length_s", length_s),
        )
        check_style(asked)
    except RequestError as error:  # the clip stays: another excerpt may be right
        return {"tune": {}, "style_line": _refused(str(error))}
    end_s, clip_s = asked.style_start_s + asked.style_length_s, reading.clip.duration_s
    text = f"From {asked.style_start_s:g} to {end_s:g} s of {clip_s:.1f} s is used."
    return {"tune": {}, "style_line": _line(text, reading.notes)}


def _refused(sentence: str) -> str:
    return f'<p class="clip-line wrong" role="alert">{html.escape(sentence)}</p>'


def _line(text: str, notes: tuple[str, ...] = ()) -> str:
    below = "".join(f"<br>{html.escape(note)}" for note in notes)
    return f'<p class="clip-line">{text}{below}</p>'


NO_STYLE = _line("The music takes on the style of your clip, with words or without.")


def dropped(
    path: str | None,
    choice: str,
    duration_s: float,
    context_s: float,
    overlap_s: float,
    style_start_s: float | None = None,
    style_length_s: float | None = None,
) -> Updates:
    """Takes a file that was dropped on the page as the clip."""
    if not path:
        return {}
    if choice == TAKE_STYLE:
        styled: Updates = {"style": path, "audio_panel": gr.update(open=True)}
        return styled | read_style(path, style_start_s, style_length_s, {})
    if choice != FOLLOW:
        return with_clip(path, duration_s, context_s, overlap_s)
    filled: Updates = {"melody": path, "audio_panel": gr.update(open=True)}
    return filled | read_melody(path, duration_s, {})


def continue_take(
    history: list[Group],
    chosen: list[int],
    duration_s: float,
    context_s: float,
    overlap_s: float,
    variation: int | None = None,
) -> Updates:
    """Makes the chosen take the clip to continue."""
    take = chosen_take(history, chosen, variation)
    if take.wav is None:
        return {}  # it could not be saved: its notes say so
    filled = with_clip(str(take.wav), duration_s, context_s, overlap_s)
    return {**filled, "clip_use": CONTINUE}


def with_clip(path: str, duration_s: float, context_s: float, overlap_s: float) -> Updates:
    """Fills a clip in, checked, and opens its fold: a field in a closed one has no events."""
    filled: Updates = {"audio_prompt": path, "audio_panel": gr.update(open=True)}
    return filled | read_clip(path, duration_s, context_s, overlap_s, {})


def offer(path: Path) -> Updates:
    """Offers the settings that a take's file holds."""
    settings = settings_of(path)
    if not settings:
        return no_offer()
    label = f"This is a take with seed {settings.get('seed', '?')}: use its settings"
    return {"offer": gr.update(value=label, visible=True), "offered": settings}


def no_offer() -> Updates:
    """Nothing to take settings from."""
    return {"offer": gr.update(visible=False), "offered": {}}
