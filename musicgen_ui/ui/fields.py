"""A component for each kind of setting, with the label, help and limits of the request's field."""

from __future__ import annotations

from typing import Literal, TypedDict

import gradio as gr

from musicgen_ui.request import FIELDS
from musicgen_ui.ui.components import DEFAULTS


class About(TypedDict):
    """What every component of a setting has."""

    label: str
    info: str | None
    elem_id: str
    render: Literal[False]


def in_words(name: str) -> str:
    """What a setting is and its limits, for the API's description."""
    metadata = FIELDS[name].metadata
    low, high, unit = (metadata[key] for key in ("min", "max", "unit"))
    if high is None:
        return str(metadata["help"])
    if isinstance(DEFAULTS[name], (str, tuple)):
        unit = "rows" if isinstance(DEFAULTS[name], tuple) else "characters"
        return f"{metadata['help']}; up to {high:,} {unit}"
    return f"{metadata['help']}; {low:.15g} to {high:,.15g} {unit}".rstrip()


def about(name: str, info: str | None = None) -> About:
    """A setting's label, help and id; errors name a setting by the same label."""
    metadata = FIELDS[name].metadata
    help = metadata["help"] if info is None else info or None
    return {"label": metadata["label"], "info": help, "elem_id": name, "render": False}


def textbox(
    name: str,
    info: str | None = None,
    *,
    value: str | None = None,
    lines: int = 1,
    max_lines: int | None = None,
    placeholder: str | None = None,
) -> gr.Textbox:
    """A setting as text."""
    return gr.Textbox(
        value,
        max_length=FIELDS[name].metadata["max"],
        lines=lines,
        max_lines=max_lines,
        placeholder=placeholder,
        **about(name, info),
    )


def _default(name: str) -> float:
    value = DEFAULTS[name]
    assert isinstance(value, (int, float)), name
    return value


def slider(
    name: str, step: float, info: str | None = None, highest: float | None = None
) -> gr.Slider:
    """A setting as a slider over all that a request may have, or up to `highest` if that is less.

    The number field beside it takes any number.
    """
    low, high = FIELDS[name].metadata["min"], FIELDS[name].metadata["max"]
    high = high if highest is None else min(high, highest)
    value = min(_default(name), high)
    return gr.Slider(low, high, value, step=step, min_width=140, **about(name, info))


def number(name: str, info: str | None = None) -> gr.Number:
    """A setting as a number to type, for a range that is too wide for a slider."""
    return gr.Number(_default(name), min_width=140, **about(name, info))


def switch(name: str, info: str | None = None) -> gr.Checkbox:
    """A setting that is on or off."""
    return gr.Checkbox(bool(DEFAULTS[name]), min_width=140, **about(name, info))


def clip(name: str) -> gr.Audio:
    """A clip, uploaded or recorded."""
    return gr.Audio(
        label=FIELDS[name].metadata["label"],
        elem_id=name,
        type="filepath",
        sources=["upload", "microphone"],
        editable=False,  # see `audio_panel.trim`
        buttons=[],
        render=False,
    )
