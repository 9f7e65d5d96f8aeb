"""Settings that come back, from a file or to a page that is opened again.

A file may come from another server or from the command line, so it may hold what this server does
not take. Such a value is brought to the nearest that it does, and the user is told which: what the
form shows is what the next take is made with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from musicgen_ui import takes
from musicgen_ui.request import CLIP_FIELDS, FIELDS, MAX_DURATION_S
from musicgen_ui.ui.notice import notice

SETTINGS = [name for name in FIELDS if name not in CLIP_FIELDS]
FILLED = [*SETTINGS, "own", "offer", "offered", "notice"]  # the components of an answer
SECTION_ROWS = 3
CLIPS = {
    "prompt_s": "It went on from an audio prompt, which its file does not hold",
    "melody_s": "It followed a melody, which its file does not hold",
}


def settings_of(path: Path) -> dict[str, Any]:
    """What a take file made here was made with; empty for any other file."""
    held = takes.read_settings(path) or {}
    return {name: held[name] for name in (*SETTINGS, *CLIPS) if name in held}


def section_rows(rows: list[list[Any]]) -> list[list[Any]]:
    """The table of sections with a row more to fill in, and some to begin with."""
    shown = [[f"{at:.10g}" if isinstance(at, float) else at, words] for at, words in rows]
    return shown + [["", ""]] * max(1, SECTION_ROWS - len(shown))


class Restoring:
    """Fills the form with settings.

    Args:
        longest_s: the greatest length of a take on this server.
        adapters: whether the form shows the adapter. What it does not show is not restored: it
            would count for every take from then on, and nobody could see or change it.
    """

    def __init__(self, longest_s: float = MAX_DURATION_S, adapters: bool = True) -> None:
        self._longest_s = longest_s
        self._adapters = adapters

    def file(self, path: str | None) -> dict[str, Any]:
        """Fills the form from a take file, or says that it holds no settings."""
        settings = settings_of(Path(path)) if path else {}
        if not settings:
            text = "This file holds no settings: choose a WAV or FLAC that was made here."
            return {"notice": notice(text, wrong=True)}
        missing = [
            f"{text}: choose it again." for name, text in CLIPS.items() if settings.get(name)
        ]
        return self.settings(settings, missing)

    def settings(
        self, settings: Mapping[str, Any], missing: list[str] | None = None
    ) -> dict[str, Any]:
        """Fills the form with a take's settings; says what had to change and what is `missing`."""
        if not settings:
            return {}
        shown, changes = self.form(settings)
        return {
            **shown,
            "variations": 1,  # a file is one take
            "notice": notice("The settings are filled in.", [*changes, *(missing or ())]),
            "offer": gr.update(visible=False),
            "offered": {},
        }

    def form(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The form with settings as this server takes them, and a sentence for each change."""
        values = {name: value for name, value in settings.items() if name in SETTINGS}
        changes = []
        if not self._adapters:
            if values.get("adapter"):
                changes.append(f"Adapter {values['adapter']} is left out: this server takes none.")
            values |= {name: FIELDS[name].default for name in ("adapter", "adapter_strength")}
        length_s = values.get("duration_s", 0.0)
        if length_s > self._longest_s:
            values["duration_s"] = self._longest_s
            changes.append(
                f"Length is {self._longest_s:g} s instead of {length_s:g} s: this server makes no "
                "more at once."
            )
        sections = values.get("sections", [])
        kept = [row for row in sections if row[0] < self._longest_s]
        if len(kept) < len(sections):
            changes.append(f"Sections from {self._longest_s:g} s on are left out.")
        # Nothing follows the checkpoint any more: what a take was made with is what was asked for.
        return {**values, "sections": section_rows(kept), "own": {}}, changes
