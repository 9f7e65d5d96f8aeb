"""Values of a form or of a caller become a request: checked, completed, its clips read.

What nobody chose is the checkpoint's to say (`completed`), and a form's value counts as chosen only
once it differs from what the page was given of the checkpoint that it knew last. The page learns of
a checkpoint some time after its choice, of the first one when the engine is there: who clicks
before that hears the music as its checkpoint is meant to be heard, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from musicgen_ui.audio import load
from musicgen_ui.engine.protocol import Engine
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CLIP_FIELDS, FIELDS, GenerationRequest, coerce, completed


def following(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with None for those that still are as the page was given them, `own`."""
    return {**values, **{name: None for name, held in own.items() if values.get(name) == held}}


class Asking:
    """What may be asked of an engine on this server."""

    def __init__(self, engine: Engine, max_duration_s: float) -> None:
        self._engine = engine
        self._max_duration_s = max_duration_s

    def check(self, values: Mapping[str, Any]) -> GenerationRequest:
        """The request as far as it is known before its clips are read; raises RequestError."""
        request = GenerationRequest.parse({**values, **dict.fromkeys(CLIP_FIELDS)})
        if values.get("duration_s") is not None and request.duration_s > self._max_duration_s:
            raise RequestError(
                f"This server makes at most {self._max_duration_s:g} s at once: choose a shorter "
                "length.",
                "duration_s",
            )
        return request

    def read(self, values: Mapping[str, Any]) -> tuple[GenerationRequest, tuple[str, ...]]:
        """The request with its clips read; what is to be said about them."""
        values = completed(values, self._stated)
        request = self.check(values)
        readings = {
            name: load.read(Path(values[name]), keep_s)
            for name, keep_s in CLIP_FIELDS.items()
            if values.get(name)
        }
        clips = {name: coerce(name, reading.clip) for name, reading in readings.items()}
        notes = tuple(note for reading in readings.values() for note in reading.notes)
        return replace(request, **clips).with_seed(), notes

    def _stated(self, checkpoint: str, adapter: str) -> dict[str, Any]:
        """What a checkpoint states, and a length that this server makes."""
        stated = self._engine.describe(checkpoint, adapter).defaults
        length_s = stated.get("duration_s", FIELDS["duration_s"].default)
        return {**stated, "duration_s": min(length_s, self._max_duration_s)}
