"""The machine that is measured: its name, its memory bandwidth, the memory in use."""

from __future__ import annotations

import contextlib
import math
import platform
import re
import time
from pathlib import Path

import psutil
import torch
import transformers

from musicgen_ui.engine import device as devices
from musicgen_ui.engine.device import Place


def name() -> str:
    """Processor, system and the releases that decide the speed."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return (
        f"{processor}, {psutil.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def bandwidth(place: Place) -> float:
    """Bytes a second that the device reads: the best of ten sums over more than its caches.

    On a GPU a few sums are started together, as starting one and waiting for it takes time too.
    """
    on_gpu = place.device.startswith("cuda")
    values = torch.ones(2**29 if on_gpu else 2**26, device=place.device)
    sums, taken_s = 5 if on_gpu else 1, []
    for _ in range(10):
        devices.synchronize(place.device)
        started_s = time.perf_counter()
        for _ in range(sums):
            total = values.sum()
        total.item()
        taken_s.append((time.perf_counter() - started_s) / sums)
    return values.nbytes / min(taken_s)


class Memory:
    """The most memory in use since the last reset."""

    def __init__(self, place: Place) -> None:
        self._cuda = place.device if place.device.startswith("cuda") else None
        self.reset()

    def reset(self) -> None:
        """Begins anew from what is in use now."""
        self._resets = False
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            with contextlib.suppress(OSError):  # not Linux, or not permitted
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
                self._resets = True

    def peak_mb(self) -> float:
        """In MB of a million bytes."""
        if self._cuda:
            return float(torch.cuda.max_memory_allocated(self._cuda)) / 1e6
        if not self._resets:
            return float(psutil.Process().memory_info().rss) / 1e6
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(peak[1]) * 1024 / 1e6 if peak else math.nan
