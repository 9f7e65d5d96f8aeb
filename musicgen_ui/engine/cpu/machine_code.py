"""The folder that compiled kernels are kept in, so that only the first start waits for them.

A kernel's machine code has a folder of its own, written beside its place, sealed with a checksum
and then moved there, so it is whole or absent. These folders lie in one whose name is a hash of
everything the code depends on: every source that is compiled into a kernel, the compiler, Python
and the processor. A folder of another hash is removed when nothing has used it for a month.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import llvmlite.binding
import platformdirs

# Whose source, or whose named tuples, are compiled into kernels.
SOURCES = ("int8", "codec_kernels", "kernels", "products", "recurrence", "microkernel", "vectors")
PREFIX = "musicgen-ui-kernels-"
SEAL = "sha256"  # the file with the checksum of the others
KEPT_S = 30 * 86_400.0  # for a folder that nothing uses

log = logging.getLogger(__name__)


class Store:
    """Where machine code is kept. Its methods may be called from any thread.

    Args:
        bases: folders to keep it in, the first of them that can be written to; without any
            NUMBA_CACHE_DIR, else `__pycache__` beside the sources or the user's cache.
    """

    def __init__(self, bases: Sequence[Path] = ()) -> None:
        self._bases = bases
        self.trouble = ""  # why machine code is not kept, in a sentence

    @functools.cached_property
    def folder(self) -> Path | None:
        """The folder of this version; None if none can be written to."""
        refused: list[tuple[Path, OSError]] = []
        for base in self._bases or bases():
            home = base / (PREFIX + version())
            try:
                home.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=home).close()
                os.utime(home)
                _remove_unused(base, home.stat().st_mtime)
            except OSError as error:
                refused.append((base, error))
                continue
            self.trouble = ""
            return home
        if refused:
            self.failed(*refused[-1])
        return None

    def failed(self, folder: Path, error: Exception) -> None:
        """Remembers, for `trouble`, why machine code is not kept in a folder."""
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        self.trouble = (
            f"Compiled kernels cannot be kept in {folder} ({why}), so every start compiles them "
            "again: free space there, or set NUMBA_CACHE_DIR to a folder that can be written to."
        )
        log.warning(self.trouble)

    def discard(self, folder: Path) -> None:
        """Removes a kernel's damaged folder."""
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.unlink(missing_ok=True)


STORE = Store()


def bases() -> list[Path]:
    """Folders that may be written to, in the order in which they are tried."""
    named = os.environ.get("NUMBA_CACHE_DIR", "")
    user = Path(platformdirs.user_cache_dir("musicgen-ui", appauthor=False))
    found = [Path(named)] if named else [Path(__file__).parent / "__pycache__", user]
    return [base for base in found if base.is_absolute() or named]  # "~" of nobody


@functools.cache
def version() -> str:
    """A hash of what machine code depends on."""
    binding, here = llvmlite.binding, Path(__file__).parent
    parts = [str(here)]  # numba keeps code by the path of its source
    parts += [importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    parts += [sys.implementation.cache_tag, sys.platform, binding.get_process_triple()]
    parts += [binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()]
    parts += [(here / f"{name}.py").read_text(encoding="utf-8") for name in SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def name_of(types: object) -> str:
    """A name for the types of a kernel's arguments."""
    return hashlib.sha256(repr(types).encode()).hexdigest()[:16]


def seal(folder: Path) -> None:
    """Writes the checksum of a folder's files into it."""
    (folder / SEAL).write_text(_checksum(folder), encoding="ascii")


def is_whole(folder: Path) -> bool:
    """Whether a folder holds what was sealed."""
    try:
        return (folder / SEAL).read_text(encoding="ascii") == _checksum(folder)
    except (OSError, ValueError):
        return False


def _checksum(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SEAL):
        content = file.read_bytes()
        found.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()


def _remove_unused(base: Path, now_s: float) -> None:
    """Removes the folders of other versions; `now_s` is the file system's own time."""
    for other in base.glob(PREFIX + "*"):
        try:
            if now_s - other.stat().st_mtime > KEPT_S:
                shutil.rmtree(other, ignore_errors=True)
        except OSError:  # another process was faster
            continue
