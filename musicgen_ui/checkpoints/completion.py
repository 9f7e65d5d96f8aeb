"""A fine-tuned decoder alone: which checkpoint completes it with a text encoder and a codec.

transformers saves a trained `MusicgenForCausalLM` by itself. What it needs beside was not trained:
it is that of its base, which `base_model` in its `config.json` or in its card names, or of the
published checkpoint with a decoder of the same shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from musicgen_ui.audio import untrusted
from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints.config import Configuration
from musicgen_ui.errors import RequestError

# A decoder's model type, and that of the whole model.
_WHOLE = {"musicgen_decoder": "musicgen", "musicgen_melody_decoder": "musicgen_melody"}
_SHAPE = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "ffn_dim"),
    *("num_codebooks", "audio_channels", "vocab_size"),
)
_LONGEST_CARD = 20_000  # characters that are looked at


def is_alone(file: Path) -> bool:
    """Whether `config.json` is a decoder's alone."""
    kind = _read(file).get("model_type")
    return isinstance(kind, str) and kind in _WHOLE


def base_name(file: Path) -> str:
    """The base that a decoder's `config.json`, or its card beside it, names; "" if none does."""
    for said in (_read(file), _card(file.with_name("README.md"))):
        for key in ("base_model", "base_model_name_or_path"):
            name = said.get(key)
            name = name[0] if isinstance(name, list) and name else name
            if isinstance(name, str) and name:
                return name
    return ""


def is_of_size(file: Path, config: Configuration) -> bool:
    """Whether a decoder has the shape of the one in `config`, and follows melodies as it does."""
    own, melody = _read(file), bool(config["melody"])
    kind = "musicgen_melody_decoder" if melody else "musicgen_decoder"
    return own["model_type"] == kind and all(
        own.get(key, default) == config["decoder"][key]
        for key, default in configuration.decoder_defaults(_SHAPE).items()
    )


def config(name: str, file: Path, base: Configuration) -> Configuration:
    """The configuration of a decoder with the other parts of its base.

    Raises:
        RequestError: it cannot be read, or the base is of the other kind.
    """
    own = _read(file)
    kind = _WHOLE[own["model_type"]]
    if (kind == "musicgen_melody") != bool(base["melody"]):
        raise RequestError(
            f"The decoder {name} and its base are of two kinds, with melody and without: name its "
            "own base under base_model in its config.json.",
            "checkpoint",
        )
    return configuration.of(name, {**base, **base["melody"], "decoder": own, "model_type": kind})


def baseless(name: str) -> RequestError:
    """What is said of a decoder that no checkpoint is found for."""
    return RequestError(
        f"{name} is a decoder alone, without text encoder and codec: write the checkpoint that has "
        "them, in transformers' format, under base_model into its config.json.",
        "checkpoint",
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        return untrusted.read_object(file)
    except (OSError, ValueError):
        return {}


def _card(file: Path) -> dict[str, Any]:
    """What stands between the two lines of three dashes at the head of a card."""
    try:
        with file.open(encoding="utf-8") as opened:
            head = opened.read(_LONGEST_CARD).split("---\n")
        held = untrusted.read_yaml(head[1]) if len(head) > 2 and not head[0] else {}
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}
