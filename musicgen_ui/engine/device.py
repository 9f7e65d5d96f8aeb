"""Where a model runs: the device, the precision that suits it, and how much memory there is.

CUDA with bfloat16 where the card has it comes first, then Apple's MPS, then the CPU. EnCodec gives
silence on MPS (audiocraft's pull request 612 reports it), so the codec stays on the CPU there.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from musicgen_ui.engine.linear import PRECISIONS
from musicgen_ui.request import RequestError

CPU_PRECISION = "int8"  # what "auto" means on a CPU
THREADS = torch.get_num_threads()  # that torch works with, unless it is told otherwise
BYTES_A_THREAD = 20_000_000  # of a decoder: threads wait for each other hundreds of times a step
BYTES_A_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.5}
_CUDA_SHARE = 0.85  # of the card's memory; the rest is for activations and other programs
_RAM_SHARE = 0.6  # of the computer's memory, where the system and the browser live too


@dataclass(frozen=True)
class Place:
    """Where models run and how."""

    device: str  # as torch names it: "cuda", "mps" or "cpu", with an index if one was given
    codec_device: str
    precision: str  # one of `linear.PRECISIONS`
    label: str  # the device in words
    reason: str = ""  # why this precision, where it isn't the usual one

    @property
    def bytes_a_weight(self) -> float:
        """Bytes that a weight takes, on average over a model."""
        return BYTES_A_WEIGHT[self.precision]


def choose(device: str = "auto", precision: str = "auto") -> Place:
    """The place that `device` and `precision` name; "auto" leaves the choice to this computer.

    Raises:
        RequestError: there is no such device or precision here.
    """
    kind = _kind(device)
    device = kind if device == "auto" else device
    reason = ""
    if precision == "auto":
        precision, reason = _precision(kind)
    if precision not in PRECISIONS:
        raise RequestError(f'There is no precision "{precision}": choose {", ".join(PRECISIONS)}.')
    if precision == "int8" and kind != "cpu":
        raise RequestError("int8 runs on the CPU alone: choose bfloat16 or float16.")
    codec_device = "cpu" if kind == "mps" else device
    return Place(device, codec_device, precision, _label(device), reason)


def _kind(device: str) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": _has_mps(), "cpu": True}
    kind = device.partition(":")[0]
    if kind == "auto":
        return next(name for name, is_there in there.items() if is_there)
    if not there.get(kind):
        here = ", ".join(name for name, is_there in there.items() if is_there)
        raise RequestError(f'There is no device "{device}" here: choose auto or {here}.')
    return kind


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _precision(kind: str) -> tuple[str, str]:
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", ""
        return "float16", "this GPU has no bfloat16"
    if kind == "mps":
        return "float32", "half precision is not tried on MPS"
    return CPU_PRECISION, ""


def _label(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device.startswith("mps"):
        return "Apple GPU"
    return f"CPU ({THREADS} thread{'s' if THREADS > 1 else ''})"


def threads_for(nbytes: int) -> int:
    """Threads that a decoder of so many bytes gains from on a CPU."""
    return max(1, min(THREADS, nbytes // BYTES_A_THREAD))


def budget_bytes(place: Place) -> int:
    """Memory that loaded models may fill together, in bytes."""
    if place.device.startswith("cuda"):
        return round(_CUDA_SHARE * torch.cuda.get_device_properties(place.device).total_memory)
    return round(_RAM_SHARE * _ram_bytes())


def _ram_bytes() -> int:
    """The computer's memory, or the container's limit where that is less."""
    total = psutil.virtual_memory().total
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return min(total, int(limit))
    except (OSError, ValueError):  # no such file, or "max"
        return total


def own(module: torch.nn.Module | None) -> None:
    """Copies weights out of the file that they are mapped from, so that the map can be dropped."""
    for weight in module.parameters() if module else ():
        weight.data = weight.data.clone()


def synchronize(device: torch.device | str) -> None:
    """Waits until the device has done what it was told to do; a CPU always has."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def give_memory_back() -> None:
    """Returns what was freed to the device and to the system, so that others can use it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if _has_mps():
        torch.mps.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
