"""Compiles kernels with numba and caches their machine code on disk: only the first start waits.

Python calls a function that is decorated with `kernel`. Functions decorated with `compiled` are
inlined into kernels, so a kernel is one piece of machine code. A function that was not inlined
would exist twice, optimised alone and optimised within the kernel, and the two round differently.
The linker takes the first where this process compiled the kernel and the second where the kernel
was loaded from disk, so the first start of a version would make other music than all later ones.

The machine code of a kernel has a folder of its own. It is written under a temporary name, gets a
checksum and is then renamed, so it is complete or absent. These folders lie in one whose name is a
hash of everything that the code depends on: all sources of this package, the compiler, Python and
the processor. A folder of another hash is removed when nothing has used it for a month.
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
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding
import numba
import platformdirs

PREFIX = "musicgen-ui-kernels-"
CHECKSUM = "sha256"  # the file with the checksum of the others in its folder
UNUSED_S = 30 * 86_400.0  # after which the folder of another version is removed

# LLVM makes several loops of one, and takes the one without vectors where it cannot rule out by
# addresses that arrays overlap. So nothing is allowed that lets them round differently: "reassoc"
# reorders factors and "arcp" multiplies by reciprocals in some of them. Nor is it promised that
# there is no NaN and no infinity: both occur when a model overflows, and must reach the logits or
# samples, where they are detected.
_FASTMATH = {"nsz", "contract"}
_OPTIONS: Any = {"fastmath": _FASTMATH, "nogil": True, "error_model": "numpy"}
_INLINED: Any = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_COMPILING = threading.Lock()

log = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


class Store:
    """The folder of the cached machine code. Its methods may be called from any thread.

    Args:
        bases: candidates for the folder's parent, of which the first writable one is used. Default:
            NUMBA_CACHE_DIR, or without it `__pycache__` beside the sources or the user's cache.
    """

    def __init__(self, bases: Sequence[Path] = ()) -> None:
        self._bases = bases
        self.trouble = ""  # why machine code is not cached, as a sentence for users

    @functools.cached_property
    def folder(self) -> Path | None:
        """The folder of this version; None if no candidate is writable."""
        refused: list[tuple[Path, OSError]] = []
        for base in self._bases or default_bases():
            folder = base / (PREFIX + version())
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                os.utime(folder)
                _remove_unused(base, folder.stat().st_mtime)
            except OSError as error:
                refused.append((base, error))
                continue
            self.trouble = ""
            return folder
        if refused:
            self.report(*refused[-1])
        return None

    def report(self, folder: Path, error: Exception) -> None:
        """Records in `trouble`, and in the log, why machine code cannot be cached in a folder."""
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        self.trouble = (
            f"Compiled kernels cannot be kept in {folder} ({reason}), so every start compiles them "
            "again: free space there, or set NUMBA_CACHE_DIR to a folder that can be written to."
        )
        log.warning(self.trouble)

    def discard(self, folder: Path) -> None:
        """Removes the damaged folder of a kernel."""
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.unlink(missing_ok=True)


STORE = Store()


def default_bases() -> list[Path]:
    """Candidates for the cache folder's parent, in the order in which they are tried."""
    configured = os.environ.get("NUMBA_CACHE_DIR", "")
    if configured:
        return [Path(configured)]
    user = Path(platformdirs.user_cache_dir("musicgen-ui", appauthor=False))
    found = [Path(__file__).parent / "__pycache__", user]
    return [base for base in found if base.is_absolute()]  # no home directory: "~" stays relative


@functools.cache
def version() -> str:
    """A hash of everything that machine code depends on."""
    binding, package = llvmlite.binding, Path(__file__).parent
    inputs = [str(package)]  # numba identifies cached code by the path of its source
    inputs += [importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    inputs += [sys.implementation.cache_tag, sys.platform, binding.get_process_triple()]
    inputs += [binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()]
    for source in sorted(package.glob("*.py")):
        inputs += [source.name, source.read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


def write_checksum(folder: Path) -> None:
    """Writes the checksum of a folder's files into it."""
    (folder / CHECKSUM).write_text(_checksum(folder), encoding="ascii")


def is_complete(folder: Path) -> bool:
    """Whether a folder's files are those of its checksum."""
    try:
        return (folder / CHECKSUM).read_text(encoding="ascii") == _checksum(folder)
    except (OSError, ValueError):
        return False


def _checksum(folder: Path) -> str:
    found = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUM)
    for file in sorted(files):
        content = file.read_bytes()
        found.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()


def _remove_unused(base: Path, now_s: float) -> None:
    """Removes the folders of other versions; `now_s` is the file system's current time."""
    for other in base.glob(PREFIX + "*"):
        try:
            if now_s - other.stat().st_mtime > UNUSED_S:
                shutil.rmtree(other, ignore_errors=True)
        except OSError:  # another process removed it
            continue


def compiled(function: Function) -> Function:
    """Makes a function available to kernels, which it is inlined into; Python cannot call it."""
    return numba.njit(**_INLINED, **_OPTIONS)(function)


def compiled_sum(function: Function) -> Function:
    """As `compiled`, but numbers are added in any order, without which sums are not vectorised.

    The function must not write to arrays: the order then depends on the length alone.
    """
    options = _OPTIONS | {"fastmath": _FASTMATH | {"reassoc"}}
    return numba.njit(**_INLINED, **options)(function)


def kernel(function: Callable[..., None]) -> Kernel:
    """Makes a function that Python calls as machine code."""
    return Kernel(function)


class Kernel:
    """Compiles a function on the first call with arguments of some types, or loads it from disk.

    Args:
        function: what to compile. It raises no TypeError.
        store: where the machine code is cached.
    """

    def __init__(self, function: Callable[..., None], store: Store = STORE) -> None:
        self._function = function
        self._store = store
        self._by_types: dict[tuple[Any, ...], Any] = {}  # numba dispatchers of one signature each
        self._latest: Any = None  # the one that was called last

    @property
    def signatures(self) -> list[tuple[Any, ...]]:
        """The types of the arguments that it was called with."""
        return list(self._by_types)

    def __call__(self, *args: Any) -> None:
        """Runs the machine code; any number of threads may call it at once."""
        if self._latest:
            try:
                self._latest(*args)
                return
            except TypeError:  # it was compiled for other types
                pass
        types = tuple(map(numba.typeof, args))
        with _COMPILING:
            if types not in self._by_types:
                self._by_types[types] = self._load_or_compile(types)
                self._by_types[types].disable_compile()
        dispatcher = self._latest = self._by_types[types]
        dispatcher(*args)

    def _load_or_compile(self, types: tuple[Any, ...]) -> Any:
        if self._store.folder:
            name = hashlib.sha256(repr(types).encode()).hexdigest()[:16]
            folder = self._store.folder / f"{self._function.__name__}-{name}"
            dispatcher = self._load(types, folder) or self._compile_into(types, folder)
            if dispatcher:
                return dispatcher
        dispatcher = numba.njit(**_OPTIONS)(self._function)
        dispatcher.compile(types)
        return dispatcher

    def _load(self, types: tuple[Any, ...], folder: Path) -> Any:
        """The machine code for these types from a folder; None if it is absent or damaged."""
        if is_complete(folder):
            try:
                dispatcher = self._cached_in(folder)
                dispatcher.compile(types)
                if dispatcher.stats.cache_hits:
                    return dispatcher
            except Exception as error:  # unpickling damaged data may raise anything
                log.warning("A compiled kernel could not be read: %s", folder, exc_info=error)
        self._store.discard(folder)
        return None

    def _compile_into(self, types: tuple[Any, ...], folder: Path) -> Any:
        """Compiles for these types and caches in a folder; None if it could not be compiled."""
        dispatcher = None
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as new:
                dispatcher = self._cached_in(Path(new))
                dispatcher.compile(types)
                write_checksum(Path(new))
                Path(new).replace(folder)
        except Exception as error:  # the disk is full, numba cannot write there, …
            if not is_complete(folder):  # otherwise another process was faster
                self._store.report(folder.parent, error)
        return dispatcher if dispatcher and types in dispatcher.signatures else None

    def _cached_in(self, folder: Path) -> Any:
        """The function with numba's own cache in a folder."""
        config: Any = numba.config  # read when a function is decorated
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
        try:
            dispatcher = numba.njit(cache=True, **_OPTIONS)(self._function)
        finally:
            config.CACHE_DIR = before
        if not Path(dispatcher.stats.cache_path).is_relative_to(folder):
            raise PermissionError(f"numba cannot write to {folder}")
        return dispatcher
