"""A setting of the request as a component: its label, help, limits and id come from the field."""

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


def slider(name: str, low: float, high: float, step: float, info: str | None = None) -> gr.Slider:
    """A setting as a slider; its limits may be tighter than the request's."""
    value = min(DEFAULTS[name], high)
    return gr.Slider(low, high, value, step=step, min_width=140, **about(name, info))


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
