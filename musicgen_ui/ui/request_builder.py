"""Values of a form or of an API client become a request: checked once, then completed.

What the user did not choose is left to the checkpoint, and a form's value counts as chosen only
once it differs from what the page was given of the checkpoint that it knew last. The page learns of
a checkpoint some time after its choice, of the first one when the engine is there: a click before
that still makes music with the checkpoint's own settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from musicgen_ui import takes
from musicgen_ui.audio import clip_cache
from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.protocol import Backend
from musicgen_ui.errors import RequestError
from musicgen_ui.request import (
    CHECKPOINT_FIELDS,
    CLIP_FIELDS,
    MAX_DURATION_S,
    GenerationRequest,
    check_melody,
    check_style,
    coerce,
)


def without_unchanged(
    values: Mapping[str, object], given: Mapping[str, object]
) -> dict[str, object]:
    """`values` with None for those that still are as the page was given them, `given`."""
    return {**values, **{name: None for name, value in given.items() if values.get(name) == value}}


class RequestBuilder:
    """Builds what may be asked of a backend on this server.

    Args:
        backend: which states its checkpoints' settings.
        max_duration_s: of a take.
        take_folders: where takes lie with their codes.
    """

    def __init__(
        self, backend: Backend, max_duration_s: float, take_folders: Iterable[Path] = ()
    ) -> None:
        self._backend = backend
        self._max_duration_s = max_duration_s
        self._take_folders = tuple(take_folders)

    def check(self, values: Mapping[str, object]) -> GenerationRequest:
        """The request as far as it is known before `complete`: without clips.

        All values are checked here. The page's validator asks too, to say what is wrong at its
        field before anything is queued.

        Raises:
            RequestError: a value is wrong, or more than this server makes.
        """
        request = GenerationRequest.parse({**values, **dict.fromkeys(CLIP_FIELDS)})
        if values.get("duration_s") is not None and request.duration_s > self._max_duration_s:
            raise RequestError(
                f"This server makes at most {self._max_duration_s:g} s at once: choose a shorter "
                "length.",
                "duration_s",
            )
        # A host's limit is one of work: what is left out is made, too.
        if request.skip_s and self._max_duration_s < min(request.end_s, MAX_DURATION_S):
            raise RequestError(
                f"This server makes at most {self._max_duration_s:g} s at once, and with what is "
                f"left out this would be {request.end_s:g} s.",
                "skip_s",
            )
        return request

    def complete(
        self, request: GenerationRequest, values: Mapping[str, object]
    ) -> tuple[GenerationRequest, tuple[str, ...]]:
        """The request with its clips and the checkpoint's settings, and notes about the clips.

        Reads files and may wait for the backend.

        Raises:
            RequestError: a clip cannot be read, or there is no such checkpoint.
        """
        missing = [name for name in CHECKPOINT_FIELDS if values.get(name) is None]
        stated = self._stated(request.checkpoint, request.adapter) if missing else {}
        changes = {name: coerce(name, stated[name]) for name in missing if name in stated}
        notes: list[str] = []
        for name, keep_s in CLIP_FIELDS.items():
            if value := values.get(name):
                path = Path(str(value))
                reading = clip_cache.read(path, keep_s)
                clip = reading.clip
                changes[name] = self._with_codes(clip, path) if name == "audio_prompt" else clip
                notes += reading.notes
        if melody := changes.get("melody"):
            check_melody(melody)
        completed = replace(request, **changes) if changes else request
        check_style(completed)
        if completed.sections and completed.duration_s < request.duration_s:
            GenerationRequest.parse({"sections": completed.sections, **changes})
        return completed, tuple(notes)

    def _with_codes(self, clip: Clip, path: Path) -> Clip:
        """The clip, with its codes where it is a take made here, so that it need not be encoded.

        The page hands over a copy of the file, which has no codes beside it.
        """
        for folder in self._take_folders:
            with_codes, _ = takes.with_codes(clip, folder / path.name)
            if with_codes.codes is not None:
                return with_codes
        return clip

    def _stated(self, checkpoint: str, adapter: str) -> dict[str, object]:
        """What a checkpoint states, and a length that this server makes."""
        stated = self._backend.describe(checkpoint, adapter).defaults
        length_s = coerce("duration_s", stated.get("duration_s"))
        return {**stated, "duration_s": min(length_s, self._max_duration_s)}
