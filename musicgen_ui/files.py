"""Files that appear whole or not at all, and what a killed process leaves behind.

A file is written under a hidden name, brought to the disk and then renamed, so whoever looks sees
nothing or all of it, also after the process was killed or the power went. Who made a hidden file or
a private folder holds a lock on it, which ends with the process: the next start deletes those that
nobody holds. Process numbers would not tell: containers that share a folder count each their own.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing that was left is deleted
    fcntl = None  # type: ignore[assignment]

# The bundled checkpoints, stylesheet and scripts: inside an installed package, else beside it.
ASSETS = Path(__file__).resolve().parent / "assets"
if not ASSETS.is_dir():
    ASSETS = ASSETS.parents[1] / "assets"
# How private folders are called; then the process's number and token, and something random.
PRIVATE, SHORT = "musicgen-ui-", "mg-ray-"
PART = ".part"
# Folders with what visitors made: nothing there is opened as a checkpoint.
TAKES: set[Path] = set()
_TOKEN = secrets.token_hex(3)  # a container gives every process the same number
_NAMING = threading.Lock()
_LOCKS: dict[Path, int] = {}  # open files that hold this process's locks


def replace(path: Path, content: bytes) -> None:
    """Puts `content` under `path` in one step: a reader sees the old file or the whole new one.

    Raises:
        OSError: the folder cannot be written to, or is full. Nothing is left there.
    """
    part = write_part(path.parent, content)
    try:
        part.replace(path)
    finally:
        drop(part)


def write_part(folder: Path, content: bytes) -> Path:
    """Writes `content` to the disk under a hidden name in `folder`.

    The caller renames it, and calls `drop` in any case.
    """
    part = folder / f"{_mine('.')}{secrets.token_hex(8)}{PART}"
    with part.open("xb") as file:  # with the permissions that the user's umask leaves
        try:
            _hold(part)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            drop(part)
            raise
    return part


def drop(part: Path) -> None:
    """Deletes a part, unless it has its name by now, and gives its lock back."""
    part.unlink(missing_ok=True)
    _let_go(part)


def expanded(text: str) -> Path:
    """`text` as a path, with a home folder in place of "~".

    "~" stays as it is where that home is unknown: in a container, a user may have neither HOME nor
    a name. Where the locale cannot write a name, it is taken as UTF-8.
    """
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        text = os.fsdecode(text.encode("utf-8", "surrogatepass"))
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path.expanduser raises there)


def claim(part: Path, path: Path) -> bool:
    """Gives a part its name, unless another file has it: then False."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a disk without hard links
        with _NAMING:
            if path.exists():
                return False
            part.rename(path)
    return True


def private_folder(prefix: str = PRIVATE) -> Path:
    """A new temporary folder that only this process's user can read; `delete` it in the end."""
    unnamed = Path(tempfile.mkdtemp(prefix="."))  # no other start takes it for a leftover
    folder = unnamed.with_name(_mine(prefix) + secrets.token_hex(4))
    _hold(unnamed)
    unnamed.rename(folder)
    _LOCKS[folder] = _LOCKS.pop(unnamed, -1)
    return folder


def is_visitors(folder: Path) -> bool:
    """Whether visitors can put files there: a server's private folder, Gradio's, one of takes."""
    folder = folder.resolve()
    gradios = os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir(), "gradio")
    private = re.compile(rf"{PRIVATE}\d+-[0-9a-f]+-", re.IGNORECASE)
    return (
        any(private.match(part) for part in folder.parts)
        or _key(folder)[: len(_key(Path(gradios)))] == _key(Path(gradios))
        or _key(folder) in map(_key, TAKES)
    )


def _key(folder: Path) -> tuple[str, ...]:
    """A path as a disk sees it that tells no capitals from small letters."""
    return tuple(part.casefold() for part in folder.resolve().parts)


def delete(folder: Path, patience_s: float = 5.0) -> bool:
    """Deletes a folder into which some thread may still be writing; False if it would not go.

    `shutil.rmtree` gives up on a folder in which a file appears after it was emptied.
    """
    end_s = time.monotonic() + patience_s
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > end_s:
            return not folder.exists()
        time.sleep(0.01)
    _let_go(folder)
    return True


def delete_private() -> None:
    """Deletes the private folders of this process, also those that others wrote to since."""
    # A copy: threads that still save change it.
    held = [path for path in tuple(_LOCKS) if path.name.startswith((PRIVATE, SHORT))]
    for prefix in (PRIVATE, SHORT):
        held += Path(tempfile.gettempdir()).glob(f"{_mine(prefix)}*")
    for path in held:
        delete(path)


def delete_leftovers(takes: Path | None) -> None:
    """Deletes what killed processes left: their private folders, and parts in a folder of takes."""
    parts = takes.glob(f".*{PART}") if takes else ()
    found = [(part, ".") for part in parts]
    for prefix in (PRIVATE, SHORT):
        found += [(each, prefix) for each in Path(tempfile.gettempdir()).glob(f"{prefix}*")]
    for path, prefix in found:
        named_here = re.match(rf"{re.escape(prefix)}\d+-[0-9a-f]+-", path.name)
        if named_here and (lock := _lock(path)) is not None:
            with suppress(OSError):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            os.close(lock)


def _mine(prefix: str) -> str:
    return f"{prefix}{os.getpid()}-{_TOKEN}-"


def hold(folder: Path) -> bool:
    """Keeps a folder for this process until it ends; False where another one has it."""
    _hold(folder)
    return folder in _LOCKS or fcntl is None


def _hold(path: Path) -> None:
    """Locks a file or folder of this process until `_let_go`, or until the process ends."""
    if (lock := _lock(path)) is not None:
        _LOCKS[path] = lock


def _let_go(path: Path) -> None:
    if (lock := _LOCKS.pop(path, -1)) >= 0:
        os.close(lock)


def _lock(path: Path) -> int | None:
    """An open file that holds the lock of `path`; None where another one does, or none can."""
    if fcntl is None:
        return None
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file
