"""A setting of the request as a component: its label, help, limits and id come from the field.

There is one set of limits, the request's, and the request refuses a value beyond them, in a
sentence at the field: see `gradio_patches.leave_limits_to_the_request`.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from musicgen_ui.request import FIELDS

DEFAULTS: dict[str, Any] = {name: spec.default for name, spec in FIELDS.items()}


def about(name: str, info: str | None = None) -> dict[str, Any]:
    """A setting's label, help and id; errors name a setting by the same label."""
    told = FIELDS[name].metadata
    help = told["help"] if info is None else info or None
    return {"label": told["label"], "info": help, "elem_id": name}


def in_words(name: str) -> str:
    """What a setting is and what it may be, for the API's description."""
    about_it = FIELDS[name].metadata
    low, high, unit = (about_it[key] for key in ("min", "max", "unit"))
    if high is None:
        return about_it["help"]
    if isinstance(DEFAULTS[name], (str, tuple)):
        unit = "rows" if isinstance(DEFAULTS[name], tuple) else "characters"
        return f"{about_it['help']}; up to {high:,} {unit}"
    return f"{about_it['help']}; {low:.15g} to {high:,.15g} {unit}".rstrip()


def slider(
    name: str, step: float, info: str | None = None, highest: float | None = None
) -> gr.Slider:
    """A setting as a slider over all that a request may have, or up to `highest` if that is less.

    The number field beside it takes any number.
    """
    low, high = FIELDS[name].metadata["min"], FIELDS[name].metadata["max"]
    high = high if highest is None else min(high, highest)
    value = min(DEFAULTS[name], high)
    return gr.Slider(low, high, value, step=step, min_width=140, **about(name, info))


def number(name: str, info: str | None = None) -> gr.Number:
    """A setting as a number to type, for a range that is too wide for a slider."""
    return gr.Number(DEFAULTS[name], min_width=140, **about(name, info))


def switch(name: str, info: str | None = None) -> gr.Checkbox:
    """A setting that is on or off."""
    return gr.Checkbox(DEFAULTS[name], **about(name, info))


def clip(name: str) -> gr.Audio:
    """A clip, uploaded or recorded."""
    return gr.Audio(
        label=FIELDS[name].metadata["label"],
        elem_id=name,
        type="filepath",
        sources=["upload", "microphone"],
        buttons=[],
    )
