"""Checkpoints from the Hugging Face Hub: what is here already, what is there, the download.

A checkpoint that lies complete in the Hub's cache is used without asking the network, so a second
start is quick and works offline. Otherwise `huggingface_hub` downloads the few files that are
needed, one form of the weights alone; it takes up a transfer that breaks off where it stopped, and
keeps finished files for the next attempt. What came is held against the hashes that the Hub states
for it, and no answer is waited for longer than `_ANSWER_S`. Whatever goes wrong becomes one
sentence.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session
from tqdm import tqdm

from musicgen_ui.request import RequestError

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# The forms of weights, the best first: safetensors cannot run code and are mapped, not read.
WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
)
_FACTS = ("config.json", "generation_config.json", "README.md")
_OTHERS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)
_LOOK_S = 3.0  # how long to wait for the Hub where there is another choice
_ANSWER_S = 20.0  # and where there is none; the client itself would wait for ever


def download(repo_id: str, say: Callable[[str], None]) -> Path:
    """The folder with the checkpoint's files, downloaded where the cache lacks them.

    `say` hears how far it is, in words; what it raises ends the download.

    Raises:
        RequestError: there is no such checkpoint, or no network, or the download broke off, or
            what came is not what the Hub holds.
    """
    folder = cached(repo_id)
    if folder:
        return folder
    say(f"asking the Hub for {repo_id}")
    for weights in WEIGHTS:
        folder = _fetched(repo_id, [*_OTHERS, weights], say)
        if weights_in(folder):
            return folder
    raise RequestError(
        f"{repo_id} on the Hub has no weights in transformers' format: choose another checkpoint.",
        "checkpoint",
    )


def _fetched(repo_id: str, patterns: list[str], say: Callable[[str], None]) -> Path:
    """A snapshot of the files that match; fetched once more where something came damaged."""
    bars = _bars(f"downloading {repo_id}", say)
    for _ in range(2):
        with _Sentences(repo_id):
            # Not hf_hub_download: without a network it tries for 23 s before it says so.
            folder = Path(snapshot_download(repo_id, allow_patterns=patterns, tqdm_class=bars))
            say(f"checking {repo_id}")
            if not _delete_damaged(folder):
                return folder
    raise RequestError(
        f"{repo_id} came damaged from the Hub, twice, and was deleted: check the network and try "
        "again.",
        "checkpoint",
    )


def _delete_damaged(folder: Path) -> int:
    """Deletes the files of a cached snapshot that are not what the Hub holds; how many there were.

    Each is a link to a file that is called by the Hub's hash of it: SHA-256, or git's for a small
    one. Where the system has no links there is no such name, and nothing is checked.
    """
    damaged = [path for path in folder.glob("*") if path.is_symlink() and not _is_whole(path)]
    for path in damaged:
        path.resolve().unlink()
        path.unlink()
    return len(damaged)


def _is_whole(path: Path) -> bool:
    stated = path.resolve().name
    digest = {64: hashlib.sha256(), 40: hashlib.sha1(usedforsecurity=False)}.get(len(stated))
    if digest is None:
        return True
    if len(stated) == 40:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest() == stated


def cached(repo_id: str) -> Path | None:
    """The checkpoint's folder in the Hub's cache, if it is complete; asks no network."""
    folders = (_cached_snapshot(repo_id, [*_OTHERS, weights]) for weights in WEIGHTS)
    return next((folder for folder in folders if folder and weights_in(folder)), None)


def _cached_snapshot(repo_id: str, patterns: list[str]) -> Path | None:
    """The newest cached snapshot; None where the files known to match `patterns` are missing."""
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def weights_in(folder: Path) -> list[Path]:
    """The files of the best form of weights that is complete in `folder`; empty if none is."""
    for pattern in WEIGHTS:
        files = sorted(folder.glob(pattern))
        # A shard's name ends with the count of shards: model-00001-of-00003.safetensors.
        if files and ("*" not in pattern or len(files) == int(files[0].stem.rpartition("-")[2])):
            return files
    return []


def cached_with(repo_id: str, file: str) -> Path | None:
    """The newest cached snapshot that has `file`; asks no network."""
    folder = _cached_snapshot(repo_id, [file])
    return folder if folder and (folder / file).is_file() else None


def files(repo_id: str, names: tuple[str, ...], field: str) -> Path:
    """A folder with a repository's files of these names, as far as it has them.

    Raises:
        RequestError: there is no such repository, or no network; it names `field` of the request.
    """
    folder = _cached_snapshot(repo_id, [*names])
    if folder and all((folder / name).is_file() for name in names):
        return folder
    with _one_of_few(_FETCHING, field), _Sentences(repo_id, field):
        return Path(snapshot_download(repo_id, allow_patterns=[*names]))


def config_file(repo_id: str) -> Path:
    """The checkpoint's `config.json`, from the cache if it is there, else from the Hub.

    Other small files that say something of a checkpoint come with it.

    Raises:
        RequestError: there is no such checkpoint, or no network.
    """
    folder = cached_with(repo_id, "config.json")
    if folder is None:
        with _one_of_few(_LOOKING, "checkpoint"):
            folder = _fetched(repo_id, [*_FACTS], lambda _: None)
    return folder / "config.json"


def has(repo_id: str) -> bool:
    """Whether the checkpoint can be had, from the cache or the Hub, without waiting long."""
    return cached(repo_id) is not None or _reachable(repo_id, int(time.monotonic() // 60))


@functools.lru_cache(maxsize=16)
def _reachable(repo_id: str, minute: int) -> bool:
    """Whether the Hub shows the checkpoint; remembered for the rest of the `minute`."""
    try:
        HfApi().model_info(repo_id, timeout=_LOOK_S)
    except Exception:  # no network, no such checkpoint, a broken proxy: it cannot be had
        return False
    return True


# Callers wait in threads, which are few. A Hub that is silent keeps each of them for long.
_LOOKING, _FETCHING = threading.BoundedSemaphore(8), threading.BoundedSemaphore(8)


@contextlib.contextmanager
def _one_of_few(places: threading.BoundedSemaphore, field: str) -> Iterator[None]:
    """Takes one of the places for as long as the Hub is asked.

    Raises:
        RequestError: none is free; it names `field` of the request.
    """
    if not places.acquire(blocking=False):
        raise RequestError(
            f"The Hub is slow, and is being asked for other {field}s: try again in a minute, or "
            "choose one that is on this computer.",
            field,
        )
    try:
        yield
    finally:
        places.release()


class _Sentences:
    """Turns what the Hub's client raises into the sentence that the user reads."""

    def __init__(self, repo_id: str, field: str = "checkpoint") -> None:
        self.repo_id = repo_id
        self.field = field

    def __enter__(self) -> None:
        hooks = get_session().event_hooks["request"]
        if _wait_for_an_end not in hooks:
            hooks.append(_wait_for_an_end)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, (RequestError, Abandoned)):
            raise RequestError(self._sentence(error), self.field) from error

    def _sentence(self, error: Exception) -> str:
        name = self.repo_id
        if isinstance(error, GatedRepoError):
            return (
                f"{name} is gated: accept its terms on the Hub, set HF_TOKEN to your access "
                "token and start the app again."
            )
        if isinstance(error, RepositoryNotFoundError):
            return f'The Hub has no {self.field} "{name}": check the name.'
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f"The disk is full: free some room and ask for {name} again."
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return f"{name} on the Hub is no checkpoint for transformers: choose another one."
        return (
            f"{name} is not on this computer and cannot be downloaded now: check the network and "
            'try again, or choose the checkpoint "bundled", which needs none.'
        )


def _wait_for_an_end(request: Any) -> None:
    """Gives a request of the client the limits that it lacks (a hook of httpx)."""
    limits = request.extensions.get("timeout") or {}
    phases = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {phase: limits.get(phase) or _ANSWER_S for phase in phases}


class Abandoned(Exception):  # noqa: N818 - nothing went wrong
    """Raised out of `say` when nobody waits for the download any more."""


def _bars(action: str, say: Callable[[str], None]) -> type[tqdm]:
    """A tqdm class whose bars draw nothing: those that count bytes are put in words.

    The client may keep one bar for bytes received and one for bytes written: the further one is
    told, at most five times a second.
    """
    told_s = 0.0
    most = 0

    class Words(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal told_s, most
            self.n += n or 0
            if not self.counts_bytes or not self.total:
                return
            most = max(most, self.n)
            if time.monotonic() - told_s >= 0.2 or most >= self.total:
                told_s = time.monotonic()
                say(f"{action}: {_of(most, self.total)}")

    return Words


def _of(done: float, total: float) -> str:
    """`done` of `total` bytes in the larger one's unit: "0.31 of 2.36 GB"."""
    if total >= 1e9:
        return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"
    return f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
