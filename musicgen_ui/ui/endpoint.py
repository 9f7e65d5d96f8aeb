"""The API's `generate`: its parameters and answers, described."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component
from gradio.components.api_component import Api

from musicgen_ui.request import CHECKPOINT_FIELDS, CLIP_FIELDS, FIELDS
from musicgen_ui.ui.components import Endpoint
from musicgen_ui.ui.fields import in_words

EXAMPLE_CLIP = {"path": "clip.wav", "url": "clip.wav", "meta": {"_type": "gradio.FileData"}}


def api() -> Endpoint:
    """The API's parameters and answers, described.

    Not `gr.api`: it gives parameters no description, and files unchecked.
    """
    words = {str: "string", bool: "boolean", int: "integer", float: "number"}
    kinds: dict[type, dict[str, Any]] = {kind: {"type": word} for kind, word in words.items()}
    kinds[tuple] = {"type": "array", "items": {}}
    parameters: dict[str, Block] = {}
    with gr.Column(visible=False):
        for name, spec in FIELDS.items():
            if name in CLIP_FIELDS:
                component: Component = gr.Audio(type="filepath", label=name)
                # Gradio's is an address, which is not fetched here.
                vars(component)["example_payload"] = lambda: EXAMPLE_CLIP
            else:
                # None: what the checkpoint states, else the request's default.
                default = None if name in CHECKPOINT_FIELDS else spec.default
                component = Api(default, kinds[type(spec.default)], name)
            described(component, in_words(name))
            parameters[name] = component
        trigger = gr.Button("generate")
        files = gr.File(file_count="multiple", label="files")
        described(files, "a WAV and a FLAC of each variation in turn")
        made = gr.JSON(label="settings")
        described(made, "what the takes were made with, the seed that was drawn included")
    return Endpoint(trigger, parameters, files, made)


def described(component: Component, text: str) -> None:
    """Gives one of the API's parameters or answers its description."""
    schema = component.api_info()
    # Gradio shows the one name for parameters and the other for answers.
    about_it = {"description": text, "additional_description": text}
    vars(component)["api_info"] = lambda: {**schema, **about_it}
