"""Files that appear whole or not at all, and what a killed process leaves behind.

A file is written under a hidden name, brought to the disk and then renamed, so whoever looks sees
nothing or all of it, also after the process was killed or the power went. Hidden names and private
folders hold the number of the process that made them: the next start deletes those of processes
that are no more.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

PRIVATE = "musicgen-ui-"  # then the process's number and token, and something random
PART = ".part"
_TOKEN = secrets.token_hex(3)  # a container gives every process the same number
_NAMING = threading.Lock()


def replace(path: Path, content: bytes) -> None:
    """Puts `content` under `path` in one step: a reader sees the old file or the whole new one.

    Raises:
        OSError: the folder cannot be written to, or is full. Nothing is left there.
    """
    part = write_part(path.parent, content)
    try:
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_part(folder: Path, content: bytes) -> Path:
    """Writes `content` to the disk under a hidden name in `folder`, to be renamed by the caller."""
    part = folder / f"{_mine('.')}{secrets.token_hex(8)}{PART}"
    with part.open("xb") as file:  # with the permissions that the user's umask leaves
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    return part


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


def private_folder() -> Path:
    """A new temporary folder that only this process's user can read."""
    return Path(tempfile.mkdtemp(prefix=_mine(PRIVATE)))


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
    return True


def give_caches_a_home() -> None:
    """Where the user has no folder for caches, as in some containers, libraries get a private one.

    They compile, measure fonts and download into it, so call this before they are imported.
    """
    own = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with suppress(OSError):
        if own.is_absolute():
            own.mkdir(parents=True, exist_ok=True)
            if os.access(own, os.W_OK | os.X_OK):
                return
    folder = private_folder()
    os.environ |= {"XDG_CACHE_HOME": str(folder), "MPLCONFIGDIR": str(folder / "matplotlib")}
    atexit.register(delete, folder)


def delete_leftovers(takes: Path | None) -> None:
    """Deletes what killed processes left: their private folders, and parts in a folder of takes."""
    for part in takes.glob(f".*{PART}") if takes else ():
        if _is_of_the_dead(part.name, "."):
            with suppress(OSError):
                part.unlink()
    for folder in Path(tempfile.gettempdir()).glob(f"{PRIVATE}*-*"):
        if _is_of_the_dead(folder.name, PRIVATE):
            shutil.rmtree(folder, ignore_errors=True)


def _mine(prefix: str) -> str:
    return f"{prefix}{os.getpid()}-{_TOKEN}-"


def _is_of_the_dead(name: str, prefix: str) -> bool:
    number = re.match(rf"{re.escape(prefix)}(\d+)-", name)
    if not number or name.startswith(_mine(prefix)):
        return False
    return int(number[1]) == os.getpid() or not psutil.pid_exists(int(number[1]))
