"""What a checkpoint says of its own sampling: `generation_config.json` as settings of a request.

Only what the file states counts: transformers would fill the rest with values of its own (a top-k
of 50), which nobody chose for this checkpoint. A value that no request may have is left out. The
stated length is the longest that the checkpoint was made for, so it is a default only where it is
shorter than the app's own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from musicgen_ui.audio import untrusted
from musicgen_ui.checkpoints.config import Configuration
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CHECKPOINT_FIELDS, FIELDS, coerce

FILE = "generation_config.json"


def read(folder: Path) -> dict[str, Any]:
    """What `folder`'s `generation_config.json` holds; empty where there is no readable one."""
    try:
        return untrusted.read_object(folder / FILE)
    except (OSError, ValueError):
        return {}


def stated(generation: dict[str, Any], config: Configuration) -> dict[str, Any]:
    """The settings that `generation` states, by the request's names.

    Args:
        generation: what `generation_config.json` holds; it is not trusted.
        config: the checkpoint's configuration, which says how long a step is.
    """
    values = {name: generation.get(name) for name in CHECKPOINT_FIELDS}
    values["duration_s"] = _length_s(generation, config)
    if isinstance(values["top_p"], (int, float)) and values["top_p"] >= 1:
        values["top_p"] = 0.0  # transformers' word for off
    return {
        name: held for name, value in values.items() if (held := _held(name, value)) is not None
    }


def _held(name: str, value: Any) -> Any:
    """The value as a request holds it; None where it cannot."""
    if value is None:
        return None
    try:
        return coerce(name, value)
    except RequestError:
        return None


def _length_s(generation: dict[str, Any], config: Configuration) -> float | None:
    codec, decoder = config["audio_encoder"], config["decoder"]
    steps = generation.get("max_new_tokens") or generation.get("max_length")
    if type(steps) is not int:
        return None
    frames = steps - (decoder["num_codebooks"] // decoder["audio_channels"] - 1)
    length_s = frames * math.prod(codec["upsampling_ratios"]) / codec["sampling_rate"]
    return length_s if length_s < FIELDS["duration_s"].default else None
