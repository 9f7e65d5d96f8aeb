"""What a server that runs for months gives back: old files, and memory that is free."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from musicgen_ui import heap

TAKE_KEPT_S = 24 * 3600  # a take in the temporary folder
KEPT_S = 3600  # an upload, or the copy of a take that the page shows
YOUNG_S = 300.0  # a file that no bound on bytes deletes: it may be in use
SWEEP_EVERY_S = 60.0

log = logging.getLogger(__name__)


def sweep(
    folder: Path, kept_s: float, kept_bytes: float = math.inf, skip: Path | None = None
) -> int:
    """Deletes a folder's old files and, while there are too many bytes, its oldest ones.

    Args:
        folder: is searched with its subfolders; empty ones are deleted.
        kept_s: files that nobody changed for longer are deleted.
        kept_bytes: how much stays. Files that differ in their suffix alone, as those of a take,
            are deleted together, and none that is younger than `YOUNG_S`.
        skip: a subfolder that is left alone.

    Returns:
        The number of deleted files.
    """
    now_s, count = time.time(), 0
    kept: list[tuple[float, Path, int]] = []  # when it was changed, the file, its bytes
    for path in sorted(folder.rglob("*"), reverse=True):
        if skip and path.is_relative_to(skip):
            continue
        with suppress(OSError):  # another thread deleted it, or a folder is not empty
            if path.is_dir():
                path.rmdir()
                continue
            stat = path.stat()
            changed_s = max(stat.st_mtime, stat.st_ctime)  # a copy has its original's mtime
            if now_s - changed_s >= kept_s:
                path.unlink()
                count += 1
            else:
                kept.append((changed_s, path, stat.st_size))
    excess = sum(size for _, _, size in kept) - kept_bytes
    oldest = sorted(kept, key=lambda file: (file[0], file[1].with_suffix("")))
    for _, together in itertools.groupby(oldest, key=lambda file: file[1].with_suffix("")):
        if excess <= 0:
            break
        for changed_s, path, size in together:
            if now_s - changed_s < YOUNG_S:
                return count
            with suppress(OSError):
                path.unlink()
                count += 1
                excess -= size
    return count


def clean_while(running: Callable[[], bool], folder: Path, kept_bytes: float) -> None:
    """Sweeps a server's temporary folder, and its takes apart, for as long as it runs."""
    takes = folder / "takes"
    while running():
        time.sleep(SWEEP_EVERY_S)
        for swept, kept_s, skip in ((folder, KEPT_S, takes), (takes, TAKE_KEPT_S, None)):
            try:
                sweep(swept, kept_s, kept_bytes, skip)
            except OSError as error:  # such as too many open files: the next sweep may succeed
                log.warning("Old files in %s were not deleted: %s", swept, error)
        gc.collect()
        heap.trim()
