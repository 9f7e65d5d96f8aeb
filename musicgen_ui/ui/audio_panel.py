"""Start from audio: a clip that is continued, or one whose melody or style the music has.

Each use has a field of its own, the request's, and one of them is on show. The choice between them
appears where the checkpoint can follow a melody or take on a style; making it takes the clip along.
A clip is checked as soon as it is there, and a mistake is said beside it.
"""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TypedDict

import gradio as gr
import numpy as np

from musicgen_ui import takes
from musicgen_ui.audio import clip_cache, waveform
from musicgen_ui.coercion import float_of
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
from musicgen_ui.ui import player
from musicgen_ui.ui.components import (
    CONTINUE,
    FOLLOW,
    TAKE_STYLE,
    AudioPanel,
    Undo,
    Updates,
    notice,
    sent_by,
    undo_button,
)
from musicgen_ui.ui.request_form import PageFacts
from musicgen_ui.ui.take_panel import Group, chosen_take

UNRECORDED = (
    "Browsers record only on pages that come over https or from this computer (localhost): here a "
    "clip can be uploaded."
)

NEEDS = (
    "To follow a clip's melody, or to take on its style, choose a model that does: the list of "
    "models says which."
)
TRIM_S = 300.0  # of a clip's end, on show to be trimmed
TRIM_COLUMNS = 600
TRIM = """
<div class="trim" role="group" aria-label="Trim the clip" hidden>
  <div class="trim-wave">
    <svg viewBox="0 0 1 40" preserveAspectRatio="none" aria-hidden="true"><path/></svg>
    <i class="trim-part"></i>
    <span class="trim-handle trim-from-handle" role="slider" tabindex="0" aria-valuemin="0"
      aria-label="Start of the part that is kept"></span>
    <span class="trim-handle trim-to-handle" role="slider" tabindex="0" aria-valuemin="0"
      aria-label="End of the part that is kept"></span>
  </div>
  <div class="trim-foot">
    <label>From <input class="trim-from" type="text" autocomplete="off"></label>
    <label>to <input class="trim-to" type="text" autocomplete="off"></label>
    <span class="trim-length"></span>
    <button type="button" class="trim-play">Play</button>
    <button type="button" class="trim-cut">Trim</button>
  </div>
  <audio class="trim-audio" preload="none"></audio>
</div>
"""
TRIM_ON_LOAD = f"""
import({player.address("trim.js")}).then(({{ Trim }}) => {{
  const part = (from_s, to_s) => trigger('click', {{ from_s, to_s }});
  const trim = new Trim(element.querySelector('.trim'), part);
  const show = () => trim.show(props.value);
  watch('value', show);
  show();
}});
"""


class ClipFacts(TypedDict, total=False):
    """What is known of a clip or a melody; nothing where there is none."""

    refused: str  # the sentence; then nothing else is known
    full_s: float
    clip_s: float  # that is read
    notes: tuple[str, ...]


def panel() -> AudioPanel:
    """The components beside the two clips themselves, not placed yet."""
    return AudioPanel(
        audio_panel=gr.Accordion(
            "Start from audio", open=False, elem_id="audio_panel", render=False
        ),
        clip_use=gr.Radio(
            [CONTINUE, FOLLOW],
            value=CONTINUE,
            label="What your clip is for",
            show_label=False,
            visible=False,
            elem_id="clip_use",
            render=False,
        ),
        clip_needs=gr.HTML(_line(NEEDS), visible=False, elem_id="clip_needs", render=False),
        continue_column=gr.Column(elem_id="continued", render=False),
        clip_line=gr.HTML(clip_line({}, 10, 0, 12), elem_id="clip_line", render=False),
        offer=gr.Button("", visible=False, size="sm", elem_id="offer", render=False),
        melody_column=gr.Column(visible=False, elem_id="followed", render=False),
        melody_line=gr.HTML(melody_line({}, 10), elem_id="melody_line", render=False),
        style_column=gr.Column(visible=False, elem_id="styled", render=False),
        style_line=gr.HTML(NO_STYLE, elem_id="style_line", render=False),
        trim_fold=gr.Accordion(
            "Trim the clip", open=False, visible=False, elem_id="trim_fold", render=False
        ),
        trim=gr.HTML(
            value=None,
            html_template=TRIM,
            js_on_load=TRIM_ON_LOAD,
            apply_default_css=False,
            elem_id="trim",
            render=False,
        ),
        undo_trim=undo_button(Undo.TRIM),
        untrimmed=gr.State("", render=False),
        clip=gr.State({}, render=False),
        offered=gr.State({}, render=False),
        tune=gr.State({}, render=False),
    )


def clip_uses(facts: PageFacts, choice: str) -> Updates:
    """Offers the choice where the chosen checkpoint can follow a melody or take on a style; says
    what that needs where it cannot.
    """
    other = FOLLOW if facts.get("melody") else TAKE_STYLE if facts.get("style") else CONTINUE
    choices = [CONTINUE, other]
    changed = {} if choice in choices else {"value": CONTINUE}
    if other == CONTINUE:
        use = gr.update(visible=False, **changed)
    else:
        use = gr.update(visible=True, choices=choices, **changed)
    return {"clip_use": use, "clip_needs": gr.update(visible=other == CONTINUE)}


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
    facts: PageFacts | None = None,
    style_start_s: float | None = None,
    style_length_s: float | None = None,
) -> Updates:
    """Shows the chosen field with the clip in it, checked: a field that appears has no event."""
    path = audio_prompt or melody or style
    if choice == FOLLOW:
        read = read_melody(path, duration_s, {})
    elif choice == TAKE_STYLE:
        read = read_style(path, style_start_s, style_length_s, {}) | no_trim()
    else:
        read = read_clip(path, duration_s, context_s, overlap_s, facts)
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
    facts: PageFacts | None = None,
    clip: ClipFacts | None = None,
) -> Updates:
    """Checks a clip to continue: what it is, how much of it is used, or what is wrong.

    Args:
        path: of the clip.
        duration_s: of the new music.
        context_s: of the clip, as it is asked for.
        overlap_s: of two windows.
        facts: of the chosen checkpoint.
        clip: what is known of the last one; the answer's "clip" replaces it.
    """
    window = (duration_s, context_s, overlap_s, facts)
    if not path:
        # A refused clip is taken out of its field, which calls this again: keep the sentence.
        kept = clip if clip and clip.get("refused") else {}
        return {"clip": {}, "clip_line": clip_line(kept, *window), **no_offer(), **no_trim()}
    try:
        reading = clip_cache.read(Path(path))
    except RequestError as error:
        clip = {"refused": str(error)}
        refused: Updates = {"clip": clip, "audio_prompt": None}
        return refused | {"clip_line": clip_line(clip, *window), **no_offer(), **no_trim()}
    clip = {"full_s": reading.full_s, "clip_s": reading.clip.duration_s, "notes": reading.notes}
    line = clip_line(clip, *window)
    return {"clip": clip, "clip_line": line, **offer(Path(path)), **trim_of(Path(path))}


def clip_line(
    clip: ClipFacts,
    duration_s: float,
    context_s: float,
    overlap_s: float,
    facts: PageFacts | None = None,
) -> str:
    """How much of the clip the model hears beside the new music, as HTML."""
    if refused := clip.get("refused"):
        return _refused(refused)
    if not clip:
        return '<p class="clip-line">Your clip is continued from its end.</p>'
    duration_s = duration_s or 0  # an emptied field
    window_s = (facts or {}).get("window_s", WINDOW_S)
    used_s = context_used_s(clip["clip_s"], context_s, duration_s, overlap_s, window_s)
    said = [f"last {used_s:.1f} s of {clip['full_s']:.1f} s", f"{duration_s:.1f} s new"]
    if used_s + duration_s > window_s + 0.05:
        said.append(f"{window_s:g} s at a time")
    elif used_s + duration_s >= window_s - 0.05:
        said.append(f"the {window_s:g} s window is full")
    return _line(", ".join(said), clip.get("notes", ()))


def read_melody(path: str | None, duration_s: float, tune: ClipFacts) -> Updates:
    """Checks a melody: how much of it is followed, or what is wrong.

    `tune` is what is known of the last one; the answer's "tune" replaces it.
    """
    if not path:
        kept = tune if tune.get("refused") else {}
        return {"tune": {}, "melody_line": melody_line(kept, duration_s), **no_trim()}
    try:
        reading = clip_cache.read(Path(path), keep_s=CLIP_FIELDS["melody"])
        check_melody(reading.clip)
    except RequestError as error:
        tune = {"refused": str(error)}
        refused: Updates = {"tune": tune, "melody": None}
        return refused | {"melody_line": melody_line(tune, duration_s), **no_trim()}
    tune = {"clip_s": reading.clip.duration_s, "notes": reading.notes}
    line = melody_line(tune, duration_s)
    return {"tune": tune, "melody_line": line, **trim_of(Path(path))}


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
    facts: PageFacts | None = None,
    style_start_s: float | None = None,
    style_length_s: float | None = None,
) -> Updates:
    """Takes a file that was dropped on the page as the clip."""
    if not path:
        return {}
    if choice == TAKE_STYLE:
        styled: Updates = {"style": path, "audio_panel": gr.update(open=True)}
        return styled | read_style(path, style_start_s, style_length_s, {}) | no_trim()
    if choice != FOLLOW:
        return with_clip(path, duration_s, context_s, overlap_s, facts)
    filled: Updates = {"melody": path, "audio_panel": gr.update(open=True)}
    return filled | read_melody(path, duration_s, {})


def continue_take(
    history: list[Group],
    chosen: list[int],
    duration_s: float,
    context_s: float,
    overlap_s: float,
    facts: PageFacts | None = None,
    variation: int | None = None,
) -> Updates:
    """Makes the chosen take the clip to continue."""
    take = chosen_take(history, chosen, variation)
    if take.wav is None:
        return {}  # it could not be saved: its notes say so
    filled = with_clip(str(take.wav), duration_s, context_s, overlap_s, facts)
    return {**filled, "clip_use": CONTINUE}


def with_clip(
    path: str,
    duration_s: float,
    context_s: float,
    overlap_s: float,
    facts: PageFacts | None = None,
) -> Updates:
    """Fills a clip in, checked, and opens its fold: a field in a closed one has no events."""
    filled: Updates = {"audio_prompt": path, "audio_panel": gr.update(open=True)}
    return filled | read_clip(path, duration_s, context_s, overlap_s, facts)


def offer(path: Path) -> Updates:
    """Offers the settings that a take's file holds."""
    settings = takes.read_settings(path)
    if not settings:
        return no_offer()
    label = f"This is a take with seed {settings.get('seed', '?')}: use its settings"
    return {"offer": gr.update(value=label, visible=True), "offered": settings}


def no_offer() -> Updates:
    """Nothing to take settings from."""
    return {"offer": gr.update(visible=False), "offered": {}}


def trim_of(path: Path) -> Updates:
    """The clip as a whole, to choose a part of it; of a longer one the last `TRIM_S`."""
    reading = clip_cache.read(path, TRIM_S)
    columns, _ = waveform.peaks(reading.clip)
    starts = np.arange(0, columns.shape[1], -(-columns.shape[1] // TRIM_COLUMNS))
    low = np.minimum.reduceat(columns[0], starts)
    high = np.maximum.reduceat(columns[1], starts)
    shown = {
        "wav": player.file(path),
        "start_s": max(reading.full_s - reading.clip.duration_s, 0.0),
        "end_s": max(reading.full_s, reading.clip.duration_s),
        "peaks": base64.b64encode(np.concatenate([low, high]).tobytes()).decode(),
    }
    return {"trim_fold": gr.update(visible=True), "trim": shown}


def no_trim() -> Updates:
    """No clip, so no part of one."""
    return {"trim_fold": gr.update(visible=False, open=False), "trim": None}


def trim(choice: str, audio_prompt: str | None, melody: str | None, event: gr.EventData) -> Updates:
    """Keeps a part of the clip, as a file of its own; the event has its start and end in seconds.

    Gradio writes the file, and its field checks it as any other.
    """
    path = melody if choice == FOLLOW else audio_prompt
    if not path:
        return {}
    try:
        reading = clip_cache.read(Path(path), TRIM_S)
        start_s = max(reading.full_s - reading.clip.duration_s, 0.0)
        places = [float_of(sent_by(event, end)) - start_s for end in ("from_s", "to_s")]
    except (RequestError, TypeError, ValueError):
        return {}
    rate = reading.clip.sampling_rate
    start, end = (round(rate * min(max(s, 0.0), reading.clip.duration_s)) for s in places)
    part = reading.clip.samples[:, start:end]
    if not part.size:
        return {}
    pcm = np.rint(32767 * np.clip(part.T, -1, 1)).astype(np.int16)
    text = f"The clip is trimmed to {part.shape[1] / rate:.1f} s."
    said: Updates = {"untrimmed": path, "notice": notice(text, undo=Undo.TRIM)}
    return said | _clip(choice, (rate, pcm))


def untrim(choice: str, untrimmed: str) -> Updates:
    """Takes the whole clip again."""
    return _clip(choice, untrimmed) if untrimmed else {}


def _clip(choice: str, value: object) -> Updates:
    return {"melody": value} if choice == FOLLOW else {"audio_prompt": value}
