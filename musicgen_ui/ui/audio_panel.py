"""Start from audio: a clip that is carried on, or one whose tune is followed.

Each use has a field of its own, the request's, and one of them is on show. The choice between them
appears only where the checkpoint can follow a melody; making it takes the clip along.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr

from musicgen_ui.audio import load
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CLIP_FIELDS, check_melody
from musicgen_ui.ui import request_form
from musicgen_ui.ui.components import clip, slider, switch
from musicgen_ui.ui.request_form import CONTINUE, FOLLOW

FOLLOWED = "The music follows the tune of your clip, not its sound."
UNRECORDED = (
    "Browsers record on pages that come over https or from this computer (localhost) alone, so "
    "here a clip can only be uploaded."
)


def layout(parts: dict[str, Any]) -> None:
    """The panel's components."""
    parts["clip_use"] = gr.Radio(
        [CONTINUE, FOLLOW],
        value=CONTINUE,
        label="What your clip is for",
        show_label=False,
        visible=False,
        elem_id="clip_use",
    )
    # On show where the browser says so, see `assets/page.js`.
    text = f'<p class="clip-line">{UNRECORDED}</p>'
    gr.HTML(text, apply_default_css=False, elem_id="unrecorded")
    with gr.Column(elem_id="continued") as parts["continued"]:
        parts["audio_prompt"] = clip("audio_prompt")
        parts["clip_line"] = gr.HTML(request_form.clip_line({}, 10, 0, 12), elem_id="clip_line")
        parts["offer"] = gr.Button("", visible=False, size="sm", elem_id="offer")
        with gr.Row():
            parts["include_prompt"] = switch("include_prompt", "off gives the continuation alone")
            parts["context_s"] = slider("context_s", 0.5, "seconds of its end; 0 is all that fits")
    with gr.Column(visible=False, elem_id="followed") as parts["followed"]:
        parts["melody"] = clip("melody")
        parts["melody_line"] = gr.HTML(melody_line({}, 10), elem_id="melody_line")
    parts["tune"] = gr.State({})


def allow(facts: dict[str, Any]) -> dict[str, Any]:
    """Offers the choice where the chosen checkpoint can follow a melody."""
    if facts.get("melody"):
        return {"clip_use": gr.update(visible=True)}
    return {"clip_use": gr.update(visible=False, value=CONTINUE)}


def use(
    choice: str,
    audio_prompt: str | None,
    melody: str | None,
    duration_s: float,
    context_s: float,
    overlap_s: float,
) -> dict[str, Any]:
    """Shows the chosen field with the clip in it, checked: a field that appears tells nothing."""
    follow, path = choice == FOLLOW, audio_prompt or melody
    if follow:
        read = read_melody(path, duration_s, {})
    else:
        read = request_form.read_clip(path, duration_s, context_s, overlap_s, {})
    return {
        "continued": gr.update(visible=not follow),
        "followed": gr.update(visible=follow),
        "audio_prompt": None if follow else path,
        "melody": path if follow else None,
        **read,
    }


def read_melody(path: str | None, duration_s: float, tune: dict) -> dict[str, Any]:
    """Checks a melody as soon as it is there: how much of it is followed, or what is wrong.

    `tune` is what is known of the last one; the answer's "tune" replaces it.
    """
    if not path:
        # A refused clip is taken out of its field, which brings us here again: keep the sentence.
        kept = tune if tune.get("refused") else {}
        return {"tune": {}, "melody_line": melody_line(kept, duration_s)}
    try:
        reading = load.read(Path(path), keep_s=CLIP_FIELDS["melody"])
        check_melody(reading.clip)
    except RequestError as error:
        tune = {"refused": str(error)}
        return {"tune": tune, "melody": None, "melody_line": melody_line(tune, duration_s)}
    tune = {"clip_s": reading.clip.duration_s, "notes": reading.notes}
    return {"tune": tune, "melody_line": melody_line(tune, duration_s)}


def dropped(
    path: str | None, choice: str, duration_s: float, context_s: float, overlap_s: float
) -> dict[str, Any]:
    """Takes a file that was dropped on the page as the clip."""
    if not path:
        return {}
    if choice != FOLLOW:
        return request_form.with_clip(path, duration_s, context_s, overlap_s)
    filled = {"melody": path, "audio_panel": gr.update(open=True)}
    return filled | read_melody(path, duration_s, {})


def melody_line(tune: dict, duration_s: float) -> str:
    """How much of the melody will be followed, as HTML."""
    if refused := tune.get("refused"):
        return f'<p class="clip-line wrong" role="alert">{html.escape(refused)}</p>'
    text = FOLLOWED
    if tune:
        clip_s, duration_s = tune["clip_s"], duration_s or 0  # an emptied field
        text = f"The tune of all {clip_s:.1f} s is followed."
        if clip_s > duration_s + 0.05:
            text = f"The tune of the first {duration_s:.1f} s of {clip_s:.1f} s is followed."
        elif clip_s < duration_s - 0.05:
            text = f"The tune of {clip_s:.1f} s is repeated for {duration_s:.1f} s."
    notes = "".join(f"<br>{html.escape(note)}" for note in tune.get("notes", ()))
    return f'<p class="clip-line">{text}{notes}</p>'
