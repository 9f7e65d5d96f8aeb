"""A folder of takes in object storage, by its fsspec URL, such as s3://bucket/takes.

Takes are written, listed and edited in a folder of this computer, the mirror. A thread copies what
changed either way, so that several servers show the same takes. For each file it keeps what both
sides looked like when they were last the same: a side that differs has changed. Where both have,
the file of this computer stays. Only what lies in the trash here is deleted in the storage; what
another server deleted there goes to the trash here.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import platformdirs

from musicgen_ui import files
from musicgen_ui.errors import RequestError

TRASH = ".trash"
STATE = ".mirror.json"  # in the mirror: what both sides looked like
LOCAL_S = 1.0  # between two looks at the mirror
REMOTE_S = 10.0  # between two looks at the storage
CHANGED = ("ETag", "etag", "content_md5", "mtime", "LastModified", "last_modified", "created")

log = logging.getLogger(__name__)


def is_url(named: str) -> bool:
    """Whether a folder is named by a URL; C:/takes is none."""
    return "://" in named


def local_folder(named: str) -> Path:
    """The folder of this computer behind a name: itself, that of file://, or a URL's mirror."""
    if not is_url(named):
        return Path(named)
    url = urlsplit(named)
    return Path(unquote(url.path)) if url.scheme == "file" else _mirror(named)


@functools.cache
def _mirror(url: str) -> Path:
    """The mirror of a URL, for this process alone: another one that runs here has one of its own.

    Raises:
        RequestError: the user's folder of data cannot be written to.
    """
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    mirrors = Path(platformdirs.user_data_dir("musicgen-ui", appauthor=False)) / "mirrors"
    for number in itertools.count():
        folder = mirrors / f"{digest}-{number}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{folder} cannot be made: {error.strerror}.") from error
        if files.hold(folder):
            return folder
    raise AssertionError


@dataclass(frozen=True)
class Known:
    """What both sides of a file looked like when they were the same."""

    local: str
    remote: str


class RemoteFolder:
    """Keeps a mirror and a folder in object storage the same.

    Args:
        url: of the storage, for fsspec.
        folder: the mirror.

    Raises:
        RequestError: the storage is not known, not reached or refuses.
    """

    def __init__(self, url: str, folder: Path) -> None:
        import fsspec

        self.folder = folder
        self._ended = threading.Event()
        self._lock = threading.Lock()
        try:
            self._storage, self._path = fsspec.core.url_to_fs(url)
            self._storage.makedirs(self._path, exist_ok=True)
            self._remote()
        except (ImportError, ValueError) as error:
            raise RequestError(f"The folder of takes cannot be {url}: {error}") from error
        except Exception as error:  # each storage has its own
            raise RequestError(
                f"The folder of takes at {url} cannot be used ({type(error).__name__}: {error}): "
                "check its name, the network and the credentials."
            ) from error
        self._thread = threading.Thread(target=self._run, name="remote-folder", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copies what is left and ends the thread."""
        self._ended.set()
        self._thread.join()
        self._try()

    def _run(self) -> None:
        copied: dict[str, str] | None = None
        tried_s = 0.0
        while not self._ended.wait(LOCAL_S):
            try:
                local = self._local()
            except OSError as error:  # such as too many open files: the next look may succeed
                log.warning("The folder of takes cannot be looked at: %s", error)
                continue
            if local != copied or time.monotonic() - tried_s >= REMOTE_S:
                self._try()
                copied, tried_s = local, time.monotonic()

    def _try(self) -> None:
        try:
            self.synchronise()
        except Exception as error:  # each storage has its own; what is missing is copied later
            log.warning("Takes were not copied to or from the storage: %s", error)

    def synchronise(self) -> None:
        """Copies what changed on either side."""
        with self._lock:
            known, local, remote = self._known(), self._local(), self._remote()
            try:
                # Sounds come before sidecars, so that no take is shown without its sound.
                for name in sorted({*known, *local, *remote}, key=_sidecars_last):
                    self._copy(name, known, local.get(name, ""), remote.get(name, ""))
            finally:
                content = {name: [each.local, each.remote] for name, each in known.items()}
                files.replace(self.folder / STATE, json.dumps(content).encode())

    def _copy(self, name: str, known: dict[str, Known], local: str, remote: str) -> None:
        """Makes both sides of a file the same; "" stands for a file that is not there."""
        before, here = known.get(name, Known("", "")), self.folder / name
        if local and local != before.local:
            self._upload(name)
            self._storage.invalidate_cache()
            remote = _remote_look(self._storage.info(self._at(name)))
        elif remote and (remote != before.remote or not (local or self._is_deleted(name))):
            files.replace(here, self._storage.cat_file(self._at(name)))
            local = _look(here)
        elif remote and not local:
            self._storage.rm_file(self._at(name))
            remote = ""
        elif local and not remote:
            self._discard(name)
            local = ""
        if local and remote:
            known[name] = Known(local, remote)
        else:
            known.pop(name, None)

    def _is_deleted(self, name: str) -> bool:
        return any((trash / name).exists() for trash in (self.folder / TRASH).glob("*"))

    def _upload(self, name: str) -> None:
        """Puts a file under its name in one step, where the storage can."""
        part = self._at(f".{name}.{secrets.token_hex(4)}{files.PART}")
        try:
            self._storage.put_file(str(self.folder / name), part)
            self._storage.mv(part, self._at(name))
        except BaseException:
            with suppress(Exception):
                self._storage.rm_file(part)
            raise

    def _discard(self, name: str) -> None:
        trash = self.folder / TRASH / f"{time.time_ns()}-{secrets.token_hex(4)}"
        trash.mkdir(parents=True)
        (self.folder / name).rename(trash / name)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _known(self) -> dict[str, Known]:
        try:
            content = json.loads((self.folder / STATE).read_bytes())
            return {name: Known(*looks) for name, looks in content.items()}
        except (OSError, ValueError, TypeError, AttributeError):  # both sides are compared anew
            return {}

    def _local(self) -> dict[str, str]:
        """What the files of the mirror look like."""
        found = {}
        for entry in os.scandir(self.folder):
            with suppress(OSError):  # it was renamed in between
                if entry.is_file() and not entry.name.startswith("."):
                    found[entry.name] = _look(Path(entry.path))
        return found

    def _remote(self) -> dict[str, str]:
        """What the files of the storage look like."""
        self._storage.invalidate_cache()
        try:
            entries = self._storage.ls(self._path, detail=True)
        except FileNotFoundError:  # object storage has no empty folders
            return {}
        named = ((each["name"].rpartition("/")[2], each) for each in entries)
        return {
            name: _remote_look(each)
            for name, each in named
            if each["type"] == "file" and name and not name.startswith(".")
        }


def _sidecars_last(name: str) -> tuple[bool, str]:
    return name.endswith(".safetensors"), name


def _look(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _remote_look(info: Mapping[str, object]) -> str:
    changed = next((info[key] for key in CHANGED if info.get(key)), "")
    return f"{info['size']} {changed}"
