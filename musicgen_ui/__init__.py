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

# Read by torch's OpenMP on Linux at import: how long a thread spins before it sleeps. The default
# is milliseconds, which costs much when other programs use the cores: musicgen-small's size took
# 70 ms a step in int8 beside a load on two cores, and 27 ms with threads that slept at once. 3000
# spins are about 10 us; on idle cores int8 is as fast as before, float32 a fifth slower.
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
