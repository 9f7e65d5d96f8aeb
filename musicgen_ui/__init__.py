"""MusicGen in a web page: music while it is being made, from words or from a clip of your own.

For scripts: `GenerationRequest` says what to make, `Clip` is audio, `LocalBackend` makes it.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musicgen_ui.audio.clip import Clip
    from musicgen_ui.backends.local import LocalBackend
    from musicgen_ui.request import GenerationRequest

__version__ = "1.0.0"
__all__ = ["Clip", "GenerationRequest", "LocalBackend", "__version__"]

# For torch on Linux, which reads it when it is imported. Its threads wait for each other without
# giving way, by default for milliseconds: beside programs that kept two cores busy,
# musicgen-small's size took 70 ms a step in int8, and 27 with threads that slept at once. So many
# turns are some 10 us: where nobody else wants the cores, int8 loses nothing by them and float32 a
# fifth.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

_PUBLIC = {
    "Clip": "musicgen_ui.audio.clip",
    "GenerationRequest": "musicgen_ui.request",
    "LocalBackend": "musicgen_ui.backends.local",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: torch takes seconds."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
