"""Presets and recent prompts: kept in the browser, chosen again by name.

A preset is the form's settings under a name. Both lie in the browser's local storage, so they are
there after the server was started anew, and nobody else sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import gradio as gr

from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.ui.components import PresetPanel, Undo, Updates, notice, undo_button
from musicgen_ui.ui.request_form import SETTINGS, Restoring

MOST_PRESETS = 50
NAME_CHARACTERS = 60
RECENT = 20
# Gradio encrypts what it keeps: with a key of its own, the next start could not read it.
SECRET = "musicgen-ui"


class Preset(TypedDict):
    """Settings under a name."""

    name: str
    settings: Mapping[str, object]


def panel() -> PresetPanel:
    """The components, not placed yet."""

    def button(label: str, name: str) -> gr.Button:
        return gr.Button(label, size="sm", min_width=60, elem_id=name, render=False)

    return PresetPanel(
        recent=gr.Dropdown(
            [],
            value=None,
            label="Recent prompts",
            info="the last 20 that music was made from",
            elem_id="recent",
            render=False,
        ),
        recent_clear=button("Clear the list", "recent_clear"),
        preset=gr.Dropdown(
            [],
            value=None,
            label="Presets",
            info="the whole form under a name",
            elem_id="preset",
            render=False,
        ),
        preset_use=button("Use it", "preset_use"),
        preset_delete=button("Delete", "preset_delete"),
        preset_name=gr.Textbox(
            "",
            lines=1,
            label="Name",
            info="for a new preset or the chosen one",
            max_length=NAME_CHARACTERS,
            elem_id="preset_name",
            render=False,
        ),
        preset_save=button("Save the form", "preset_save"),
        preset_rename=button("Rename", "preset_rename"),
        presets=gr.BrowserState([], storage_key="musicgen-presets", secret=SECRET, render=False),
        prompts=gr.BrowserState([], storage_key="musicgen-prompts", secret=SECRET, render=False),
        deleted=gr.State(None, render=False),
        undo_preset=undo_button(Undo.PRESET),
    )


def lay_out(panel: PresetPanel, place: Callable[..., None]) -> None:
    """Places the components, in a fold that is closed."""
    with gr.Accordion("Presets and recent prompts", open=False, elem_id="presets_fold"):
        with gr.Row(elem_classes="field-row"):
            place(panel.recent, panel.recent_clear)
        with gr.Row(elem_classes="field-row"):
            place(panel.preset, panel.preset_use, panel.preset_delete)
        with gr.Row(elem_classes="field-row"):
            place(panel.preset_name, panel.preset_save, panel.preset_rename)
    place(panel.presets, panel.prompts, panel.deleted, panel.undo_preset)


def kept(presets: object, prompts: object) -> tuple[list[Preset], list[str]]:
    """What the browser keeps, without what is none: another version may have written it."""
    found: list[Preset] = []
    entries = presets if isinstance(presets, list) else []
    for each in (entry for entry in entries if isinstance(entry, dict)):
        name, settings = each.get("name"), each.get("settings")
        if isinstance(name, str) and isinstance(settings, dict):
            found.append({"name": name, "settings": settings})
    texts = prompts if isinstance(prompts, list) else []
    return found, [text for text in texts if isinstance(text, str)]


class Presets:
    """Answers the panel's events.

    Args:
        restoring: fills the form.
    """

    def __init__(self, restoring: Restoring) -> None:
        self._restoring = restoring

    def load(self, presets: object, prompts: object) -> Updates:
        """A page was opened: what its browser keeps."""
        found, texts = kept(presets, prompts)
        return {
            "preset": gr.update(choices=_names(found), value=None),
            "recent": gr.update(choices=texts, value=None),
        }

    def remember(self, prompts: object, prompt: str) -> Updates:
        """Music is made from a prompt: it is the first of the recent ones."""
        _, texts = kept([], prompts)
        words = (prompt or "").strip()
        if not words or texts[:1] == [words]:
            return {}
        texts = [words, *(text for text in texts if text != words)][:RECENT]
        return {"prompts": texts, "recent": gr.update(choices=texts, value=None)}

    def forget(self) -> Updates:
        """The recent prompts are cleared."""
        return {"prompts": [], "recent": gr.update(choices=[], value=None)}

    def save(self, presets: object, name: str, *values: object) -> Updates:
        """The form's settings under a name; a preset of that name is replaced."""
        found, _ = kept(presets, [])
        name = _cleaned(name)
        if not name:
            return _said("Write a name for the preset first.", wrong=True)
        others = [each for each in found if each["name"] != name]
        if len(others) >= MOST_PRESETS:
            return _said(f"There are {MOST_PRESETS} presets: delete one first.", wrong=True)
        try:
            settings = GenerationRequest.parse(dict(zip(SETTINGS, values, strict=True))).settings()
        except RequestError as error:
            return _said(f"The preset is not saved. {error}", wrong=True)
        verb = "saved" if len(others) == len(found) else "replaced"
        found = sorted([*others, {"name": name, "settings": settings}], key=_by_name)
        return _listed(found, name) | _said(f"The preset “{name}” is {verb}.")

    def choose(self, name: str | None) -> Updates:
        """A preset was chosen from the list: its name can be changed."""
        return {"preset_name": name or ""}

    def use(self, presets: object, name: str | None, *values: object) -> Updates:
        """Fills the form with a preset; says what that changed."""
        found, _ = kept(presets, [])
        chosen = next((each for each in found if each["name"] == name), None)
        if chosen is None:
            return _said("Choose a preset from the list first.", wrong=True)
        known = {name: value for name, value in chosen["settings"].items() if name in SETTINGS}
        try:  # another version may have written it
            settings = GenerationRequest.parse(known).settings()
        except RequestError as error:
            return _said(f"The preset cannot be used here. {error}", wrong=True)
        return self._restoring.preset(chosen["name"], settings, *values)

    def rename(self, presets: object, name: str | None, new: str) -> Updates:
        """The chosen preset gets another name."""
        found, _ = kept(presets, [])
        new = _cleaned(new)
        names = _names(found)
        if name not in names:
            return _said("Choose a preset from the list first.", wrong=True)
        if not new or new == name:
            return _said("Write its new name first.", wrong=True)
        if new in names:
            return _said(f"There is a preset “{new}”: choose another name.", wrong=True)
        renamed: list[Preset] = [
            {"name": new, "settings": each["settings"]} if each["name"] == name else each
            for each in found
        ]
        text = f"The preset “{name}” is called “{new}” now."
        return _listed(sorted(renamed, key=_by_name), new) | _said(text)

    def delete(self, presets: object, name: str | None) -> Updates:
        """The chosen preset goes; it can be brought back until the next message."""
        found, _ = kept(presets, [])
        gone = next((each for each in found if each["name"] == name), None)
        if gone is None:
            return _said("Choose a preset from the list first.", wrong=True)
        left = [each for each in found if each is not gone]
        said = notice(f"The preset “{name}” is deleted.", undo=Undo.PRESET)
        deleted: Updates = {"deleted": gone, "preset_name": "", "notice": said}
        return _listed(left, None) | deleted

    def undelete(self, presets: object, gone: Preset | None) -> Updates:
        """Brings the deleted preset back."""
        found, _ = kept(presets, [])
        if gone is None or gone["name"] in _names(found):
            return {}
        found = sorted([*found, gone], key=_by_name)
        back: Updates = {"deleted": None}
        return _listed(found, gone["name"]) | back | _said(f"“{gone['name']}” is back.")


def _cleaned(name: str) -> str:
    return " ".join((name or "").split())[:NAME_CHARACTERS]


def _names(presets: Sequence[Preset]) -> list[str]:
    return [each["name"] for each in presets]


def _by_name(preset: Preset) -> str:
    return preset["name"].casefold()


def _listed(presets: list[Preset], chosen: str | None) -> Updates:
    """The presets as the browser keeps them and the list shows them."""
    shown = gr.update(choices=_names(presets), value=chosen)
    return {"presets": presets, "preset": shown}


def _said(text: str, wrong: bool = False) -> Updates:
    return {"notice": notice(text, wrong=wrong)}
