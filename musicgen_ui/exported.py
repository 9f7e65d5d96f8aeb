"""audiocraft's two files: opened without running anything, their weights under other names.

A checkpoint is a folder with `state_dict.bin` and `compression_state_dict.bin`, pickles that hold
the settings as text and the weights under `best_state`. They are read with `weights_only`, and
mapped: what is copied is copied later, once. The second may name a codec on the Hub instead.
"""

from __future__ import annotations

import pickle
import reprlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgen_ui import audiocraft, bounded, hub
from musicgen_ui.request import RequestError

if TYPE_CHECKING:
    from torch import Tensor

LANGUAGE_MODEL, CODEC = "state_dict.bin", "compression_state_dict.bin"
_NAMED = 5  # weights named in a sentence

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Exported:
    """One of a checkpoint's two files, opened."""

    settings: audiocraft.Settings
    weights: dict[str, Tensor]  # by audiocraft's names
    pointer: str | None = None  # a codec's id on the Hub, in place of settings and weights


def is_audiocraft(folder: Path) -> bool:
    """Whether `folder` is a checkpoint as audiocraft exports it, and none of transformers'."""
    return (folder / LANGUAGE_MODEL).is_file() and not (folder / "config.json").is_file()


def read(file: Path) -> Exported:
    """One of the two pickles, its weights mapped.

    Raises:
        RequestError: it is missing or damaged, or holds something else.
    """
    package = _unpickled(file)
    pointer = package.get("pretrained")
    if pointer is not None and file.name == CODEC:
        if not isinstance(pointer, str) or not hub.ID.fullmatch(pointer):
            raise RequestError(
                f"{file} only names another codec, {reprlib.repr(pointer)}, which is no Hub id: "
                f"put that codec's own {CODEC} in its place.",
                "checkpoint",
            )
        return Exported(audiocraft.Settings(str(file), "{}"), {}, pointer)
    weights = package.get("best_state")
    if not isinstance(weights, dict) or not _plain(weights, file.stat().st_size):
        raise RequestError(
            f"{file} holds no plain weights under best_state: export the checkpoint with "
            "audiocraft's own export functions.",
            "checkpoint",
        )
    return Exported(audiocraft.Settings(str(file), package.get("xp.cfg")), weights)


def _unpickled(file: Path) -> dict[Any, Any]:
    import torch

    mapped = zipfile.is_zipfile(file)  # not cut short, nor in the form before torch 1.6
    try:
        bounded.require_weights(file)
        package = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise RequestError(
            f"{file} is missing: copy it beside {LANGUAGE_MODEL}; the one of any of Meta's "
            "checkpoints is the same.",
            "checkpoint",
        ) from error
    except Exception as error:  # whatever a broken pickle brings about
        if "GLOBAL" in str(error) or (mapped and isinstance(error, pickle.UnpicklingError)):
            why = (
                "holds more than weights and settings, which is not read, since it could run code: "
                "export the checkpoint with audiocraft's own export functions"
            )
        else:
            why = "is damaged or cut short: fetch or copy it again"
        raise RequestError(f"{file} {why}.", "checkpoint") from error
    return package if isinstance(package, dict) else {}


def _plain(weights: dict[Any, Any], size: int) -> bool:
    """Whether all are plain tensors that the file of `size` bytes has room for."""
    import torch

    return (
        all(
            isinstance(name, str)
            and isinstance(weight, torch.Tensor)
            and weight.layout is torch.strided
            and weight.is_floating_point()
            for name, weight in weights.items()
        )
        and sum(weight.nbytes for weight in weights.values()) <= size
    )


def without_window(weights: dict[str, Tensor], n_fft: int) -> dict[str, Tensor]:
    """`weights` but for the window of a melody's spectrogram, if it is Hann's of `n_fft` samples.

    Every reader computes that one itself, so transformers' format has no place for it.
    """
    import torch

    window, usual = weights.get(audiocraft.CHROMA_WINDOW), torch.hann_window(n_fft)
    # Half a thousandth is float16's rounding.
    if window is None or window.shape != usual.shape or (window - usual).abs().max() > 5e-4:
        return weights
    return {name: w for name, w in weights.items() if name != audiocraft.CHROMA_WINDOW}


def renamed(
    file: Path, weights: dict[str, Tensor], shapes: Shapes, codec: dict[str, Any]
) -> dict[str, Tensor]:
    """A file's weights under transformers' names, which `shapes` has with what they must be.

    Raises:
        RequestError: one is missing, unknown or of another shape; the sentence names them.
    """
    expected: Shapes = {}
    places = {key: audiocraft.name_of(key, codec) for key in shapes}
    for key, (name, third) in places.items():
        first, *rest = shapes[key]
        expected[name] = (first if third is None else 3 * first, *rest)
    _compare(file, expected, {name: tuple(weight.shape) for name, weight in weights.items()})
    return {
        # A copy, since files cannot hold two weights in the same memory.
        key: weights[name].contiguous() if third is None else weights[name].chunk(3)[third].clone()
        for key, (name, third) in places.items()
    }


def _compare(file: Path, expected: Shapes, found: Shapes) -> None:
    faults = {
        "missing": [name for name in expected if name not in found],
        "not known": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    said = [f"{fault}: {_some(names)}" for fault, names in faults.items() if names]
    if said:
        raise RequestError(
            f"{file} does not hold the weights that its settings describe ({'; '.join(said)}): "
            "fetch it again, or choose another checkpoint.",
            "checkpoint",
        )


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
