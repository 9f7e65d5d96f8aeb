"""Where a model runs: the device, its default precision, and how much memory there is.

CUDA comes first, with bfloat16 where the GPU has it, then Apple's MPS, then the CPU. EnCodec gives
silence on MPS (reported in audiocraft's pull request 612), so the codec stays on the CPU there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from musicgen_ui import heap
from musicgen_ui.engine.kv_cache import DTYPES
from musicgen_ui.engine.linear import PRECISIONS
from musicgen_ui.errors import RequestError

CPU_PRECISION = "int8"  # what "auto" means on a CPU
THREADS = torch.get_num_threads()  # torch's number before anyone changes it
BYTES_A_THREAD = 20_000_000  # of a decoder; with less a thread costs more time than it saves
BYTES_A_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.5}
_CUDA_SHARE = 0.85  # of the GPU's memory; the rest is for activations and other programs
_RAM_SHARE = 0.6  # of the computer's memory; the rest is for the system and the browser
GROUPS, PROCESS_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # Linux cgroups


_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Place:
    """Where models run and how."""

    device: str  # as torch names it: "cuda", "mps" or "cpu", with an index if one was given
    codec_device: str
    precision: str  # one of `linear.PRECISIONS`
    label: str  # the device's name, for users
    reason: str = ""  # why it is not the usual precision, for users
    kv_cache_dtype: str = "auto"  # one of `kv_cache.DTYPES`

    @property
    def bytes_a_weight(self) -> float:
        """Bytes that a weight takes, on average over a model."""
        return BYTES_A_WEIGHT[self.precision]


def choose(device: str = "auto", precision: str = "auto", kv_cache_dtype: str = "auto") -> Place:
    """The place that `device` and `precision` name; "auto" takes the best of this computer.

    Raises:
        RequestError: there is no such device, precision or type of the KV cache here.
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
    if kv_cache_dtype not in DTYPES:
        raise RequestError(
            f'The KV cache cannot be "{kv_cache_dtype}": choose {", ".join(DTYPES)}.'
        )
    codec_device = "cpu" if kind == "mps" else device
    return Place(device, codec_device, precision, _label(device), reason, kv_cache_dtype)


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
    """The threads that make a decoder of so many bytes fastest on a CPU."""
    return max(1, min(THREADS, nbytes // BYTES_A_THREAD))


def budget_bytes(place: Place) -> int:
    """Memory that loaded models may fill together, in bytes."""
    if place.device.startswith("cuda"):
        return round(_CUDA_SHARE * torch.cuda.get_device_properties(place.device).total_memory)
    return round(_RAM_SHARE * _ram_bytes())


def _ram_bytes() -> int:
    """The computer's memory, or the least limit of this process's control groups."""
    total: int = psutil.virtual_memory().total
    return min([total, *(limit for limit, _ in _group_memory())])


def free_bytes() -> int:
    """The main memory that this process can still take without being killed."""
    here: int = psutil.virtual_memory().available + psutil.swap_memory().free
    return max(0, min([here, *(limit - used for limit, used in _group_memory())]))


def _group_memory() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of this process's cgroup and of those above it.

    A group's limit holds for the groups inside it too.
    """
    for folder, names in _groups():
        held = _numbers(folder / names.stat)
        cached = sum(held.get(name, 0) for name in names.cached)
        used = max(0, _number(folder / names.usage) - cached)
        for name in names.limits:
            if limit := _number(folder / name):
                yield limit, used


@dataclass(frozen=True)
class _Names:
    """The files of a cgroup, and the names of its file cache's figures, which can be reclaimed."""

    limits: tuple[str, ...]
    usage: str
    cached: tuple[str, ...]
    stat: str = "memory.stat"


_V1 = _Names(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _Names(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def _groups() -> Iterator[tuple[Path, _Names]]:
    """The folders of this process's cgroups and of those above them.

    In a container the path may be the host's, where only its last folder is visible, as the root:
    folders that do not exist hold no limit.
    """
    try:
        lines = PROCESS_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:  # "0::/path" in version 2, "4:memory:/path" in version 1
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounts, names = [GROUPS / "memory", GROUPS / controllers], _V1
        if not controllers:
            mounts, names = [GROUPS, GROUPS / "unified"], _V2
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in dict.fromkeys(mounts):
            for count in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:count]), names


def _number(file: Path) -> int:
    """The number in a file; 0 where there is none, as in "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _numbers(file: Path) -> dict[str, int]:
    """The numbers in a file of lines with a name and a number."""
    try:
        rows = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
        return {name: int(number) for name, number in rows}
    except (OSError, ValueError):
        return {}


def copy_weights(module: torch.nn.Module | None) -> None:
    """Copies weights out of the file that they are mapped from, so that it can be unmapped."""
    for weight in module.parameters() if module else ():
        weight.data = weight.data.clone()


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for work beside the decoder's steps; None off CUDA, where there are none."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`; the host does not wait for what CUDA has to do before."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def keep_for_this_stream(tensor: torch.Tensor | None) -> None:
    """Keeps the memory of another stream's tensor until the work of this one on it is done."""
    if tensor is not None and tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


class SideThread:
    """Work beside the decoder's steps, of any thread: on a single thread and a stream.

    A single thread, as cuBLAS has a workspace for each (32 MB on an H100).

    Args:
        stream: of `side_stream`; None runs the work where it is asked for.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self._thread = ThreadPoolExecutor(1, "musicgen-encoder") if stream else None

    def run(self, work: Callable[[], _Result]) -> _Result:
        """The work's result, once the device has it too; raises what the work raises."""
        return self._thread.submit(self._run, work).result() if self._thread else work()

    def _run(self, work: Callable[[], _Result]) -> _Result:
        with torch.cuda.stream(self.stream):
            result = work()
            done = torch.cuda.Event()
            done.record(self.stream)
        done.synchronize()
        return result


def synchronize(device: torch.device | str) -> None:
    """Waits until the device has finished its work; a CPU always has."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def give_memory_back() -> None:
    """Returns freed memory to the device and to the system, for other programs."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if _has_mps():
        torch.mps.empty_cache()
    heap.trim()
