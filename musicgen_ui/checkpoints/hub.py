"""Checkpoints from the Hugging Face Hub: what is here already, what is there, the download.

A checkpoint that is complete in the Hub's cache is used without asking the network, so a second
start is quick and works offline. Otherwise `huggingface_hub` downloads the few files that are
needed, with one form of the weights; it resumes a transfer that breaks off, keeps finished files
for the next attempt and verifies what came against the Hub's hashes. No answer is waited for longer
than `_ANSWER_S`. Every failure becomes one sentence for the user, by its cause (`explained`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Protocol, cast
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tqdm import tqdm

from musicgen_ui.checkpoints.hub_errors import explained
from musicgen_ui.errors import RequestError

Report = Callable[[str], None]  # is called with what is being done, in words

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# The forms of weights, the best first: safetensors cannot run code and are mapped, not read.
WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
)
AUDIOCRAFT = ("state_dict.bin", "compression_state_dict.bin")  # as audiocraft exports them
ADAPTER = "adapter_config.json"
# A tokenizer is one of these two; transformers makes an empty one where there is neither.
VOCABULARIES = ("tokenizer.json", "spiece.model")
_TOKENIZER = (
    *VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"),
)
_FACTS = ("config.json", "generation_config.json", "README.md", ADAPTER)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
OTHERS = (
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
_ANSWER_S = 20.0  # and where there is none; the client itself sets no limit
_PIECE_BYTES = 2**18  # of a file that is not downloaded


def id_of(name: str, field: str = "checkpoint") -> str:
    """The id in a link to a model on the Hub; any other name as it is.

    Raises:
        RequestError: the link is to something else, or to another revision than the main one.
    """
    name = name.strip()
    try:
        link = urlsplit(name if "://" in name else f"https://{name}")
    except ValueError:
        return name
    hosts = (*_HOSTS, urlsplit(constants.ENDPOINT).netloc)
    path = [unquote(part) for part in link.path.split("/") if part]
    if link.scheme == "hf":
        path = [part for part in (link.netloc, *path) if part]
    elif link.netloc not in hosts:
        if "://" not in name:
            return name
        raise RequestError(
            f"{name[:120]} is not a link to the Hub: download its files and name their folder.",
            field,
        )
    path = path[1:] if path[:1] == ["models"] else path
    found = "/".join(path[:2])
    if not ID.fullmatch(found) or path[0] in ("datasets", "spaces", "collections", "papers"):
        raise RequestError(
            f"{name[:120]} is not a link to a model: paste the address of the model's page.", field
        )
    if len(path) > 3 and path[3] != "main":
        raise RequestError(
            f"{name[:120]} is a link to the revision {path[3]}: name {found} for the main one, or "
            "download that revision and name the folder.",
            field,
        )
    return found


def download(repo_id: str, report: Report) -> Path:
    """The folder with the checkpoint's files, downloaded where the cache lacks them.

    `report` is called with the progress in words; an exception that it raises ends the download.

    Raises:
        RequestError: there is no such checkpoint, or no network, or the download broke off, or
            what came is not what the Hub holds.
    """
    folder = cached(repo_id)
    if folder:
        return folder
    report(f"asking the Hub for {repo_id}")
    names = _names(repo_id)
    weights = weights_among(names) or audiocraft_among(names)
    if not weights:
        raise RequestError(
            f"{repo_id} on the Hub has no weights of MusicGen, in transformers' format or "
            "audiocraft's: choose another checkpoint.",
            "checkpoint",
        )
    return _fetched(repo_id, [*OTHERS, *weights], report)


def names_on_the_hub(repo_id: str, field: str = "checkpoint") -> list[str]:
    """The files of a repository on the Hub.

    Asked before a download, for where the Hub fails the client gives what the cache has of a
    repository, as if that were all.

    Raises:
        RequestError: there is no such repository, or no network.
    """
    with _limited(_LOOKING, field):
        return _names(repo_id, field)


def _names(repo_id: str, field: str = "checkpoint", what: str = "") -> list[str]:
    with _explained(repo_id, field, what):
        found = HfApi().model_info(repo_id, timeout=_ANSWER_S)
        return [file.rfilename for file in found.siblings or ()]


@contextlib.contextmanager
def opened(repo_id: str, file: str) -> Iterator[IO[bytes]]:
    """A file on the Hub, of which only the pieces that are read are downloaded.

    Raises:
        RequestError: it cannot be had.
    """
    from huggingface_hub import HfFileSystem

    with _limited(_LOOKING, "checkpoint"), _explained(repo_id):
        files = HfFileSystem(skip_instance_cache=True)  # it would remember what is not there
        with files.open(f"{repo_id}/{file}", block_size=_PIECE_BYTES) as opened:
            yield opened


def tokenizer(repo_id: str, report: Report) -> Path | None:
    """The folder with a repository's tokenizer, downloaded where the cache lacks it; None where
    the repository has none.

    Raises:
        RequestError: there is no such repository, or no network.
    """
    for vocabulary in VOCABULARIES:
        folder = cached_with(repo_id, vocabulary)
        if folder:
            return folder
    what = f"The tokenizer of {repo_id}"  # the rest of the repository may well be here
    if not {*VOCABULARIES} & {*_names(repo_id, what=what)}:
        return None
    return _fetched(repo_id, [*_TOKENIZER], report, what)


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def _fetched(repo_id: str, patterns: list[str], report: Report, what: str = "") -> Path:
    """A snapshot of the files that match; damaged ones are downloaded once more."""
    bars = _progress_bars(f"downloading {repo_id}", report)
    with _explained(repo_id, what=what):
        # Not hf_hub_download: without a network it tries for 23 s before it says so.
        folder = Path(snapshot_download(repo_id, allow_patterns=patterns, tqdm_class=bars))
        report(f"checking {repo_id}")
        damaged = _damaged(repo_id) if folder.is_dir() else []  # no file matched
        if damaged:
            snapshot_download(repo_id, allow_patterns=damaged, tqdm_class=bars, force_download=True)
            damaged = _damaged(repo_id)
    if damaged:
        for name in damaged:
            (folder / name).resolve().unlink()
            (folder / name).unlink(missing_ok=True)
        raise RequestError(
            f"{repo_id} came damaged from the Hub, twice, and was deleted: check the network and "
            "try again.",
            "checkpoint",
        )
    return folder


def _damaged(repo_id: str) -> list[str]:
    """The files of the cached snapshot whose hashes are not the Hub's."""
    found = HfApi().verify_repo_checksums(repo_id)
    return [mismatch["path"] for mismatch in found.mismatches]


def delete_damaged(repo_id: str) -> list[str]:
    """Deletes the cached files whose hashes are not the Hub's, so that they are downloaded again;
    their names. Without a network nothing is known, and nothing is deleted.
    """
    folder = cached(repo_id)
    try:
        damaged = _damaged(repo_id) if folder else []
    except Exception:  # no network, a Hub that fails, a cache without the branch's name
        return []
    for name in damaged:
        path = cast(Path, folder) / name
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    return damaged


def cached(repo_id: str) -> Path | None:
    """The checkpoint's folder in the Hub's cache, if it is complete; asks no network."""
    for weights in (*((form,) for form in WEIGHTS), AUDIOCRAFT):
        folder = _cached_snapshot(repo_id, [*OTHERS, *weights])
        if folder and (weights_in(folder) or audiocraft_among(_names_in(folder))):
            return folder
    return None


def _cached_snapshot(repo_id: str, patterns: list[str]) -> Path | None:
    """The newest cached snapshot; None where the files known to match `patterns` are missing."""
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def weights_in(folder: Path) -> list[Path]:
    """The files of the best form of weights that is complete in `folder`; empty if none is."""
    return [folder / name for name in weights_among(_names_in(folder))]


def weights_among(names: Iterable[str]) -> list[str]:
    """Of a folder's or repository's files, those of the best form of weights that is complete."""
    names = list(names)
    for pattern in WEIGHTS:
        files = sorted(fnmatch.filter(names, pattern))
        # A shard's name ends with the count of shards: model-00001-of-00003.safetensors.
        count = files[0].partition(".")[0].rpartition("-")[2] if files and "*" in pattern else "1"
        if files and len(files) == int(count):
            return files
    return []


def audiocraft_among(names: Iterable[str]) -> list[str]:
    """The same for audiocraft's two files; the codec may be missing, if the first one names it."""
    found = [name for name in AUDIOCRAFT if name in set(names)]
    return found if AUDIOCRAFT[0] in found else []


def _names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("*") if file.is_file()]


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
    with _limited(_FETCHING, field), _explained(repo_id, field):
        return Path(snapshot_download(repo_id, allow_patterns=[*names]))


def config_file(repo_id: str) -> Path:
    """The checkpoint's `config.json`, from the cache if it is there, else from the Hub.

    Other small files that say something of a checkpoint come with it.

    Raises:
        RequestError: there is no such checkpoint, or no network.
    """
    folder = cached_with(repo_id, "config.json")
    if folder is None:
        with _limited(_LOOKING, "checkpoint"):
            _names(repo_id)
            folder = _fetched(repo_id, [*_FACTS], lambda _: None)
    return folder / "config.json"


def has(repo_id: str) -> bool:
    """Whether the checkpoint can be had, from the cache or the Hub, without waiting long."""
    return cached(repo_id) is not None or _reachable(repo_id, int(time.monotonic() // 60))


@functools.lru_cache(maxsize=16)
def _reachable(repo_id: str, minute: int) -> bool:  # noqa: ARG001 - a key of the cache
    """Whether the Hub shows the checkpoint; remembered for the rest of the `minute`."""
    try:
        HfApi().model_info(repo_id, timeout=_LOOK_S)
    except Exception:  # no network, no such checkpoint, a broken proxy: it cannot be had
        return False
    return True


# Callers wait in threads, which are few, and a silent Hub keeps each of them for long.
_LOOKING, _FETCHING = threading.BoundedSemaphore(8), threading.BoundedSemaphore(8)


@contextlib.contextmanager
def _limited(callers: threading.BoundedSemaphore, field: str) -> Iterator[None]:
    """Counts as one of the callers for as long as the Hub is asked.

    Raises:
        RequestError: there are too many; it names `field` of the request.
    """
    if not callers.acquire(blocking=False):
        raise RequestError(
            f"The Hub is slow, and is being asked for other {field}s: try again in a minute, or "
            "choose one that is on this computer.",
            field,
        )
    try:
        yield
    finally:
        callers.release()


@contextlib.contextmanager
def _explained(repo_id: str, field: str = "checkpoint", what: str = "") -> Iterator[None]:
    """Turns what the Hub's client raises into the sentence that the user reads.

    `what` is what the sentence says is missing, where that is not the repository as a whole.
    """
    try:
        hooks = get_session().event_hooks["request"]
        if _limit_waiting not in hooks:
            hooks.append(_limit_waiting)
        yield
    except (RequestError, Abandoned):
        raise
    except Exception as error:
        raise explained(error, repo_id, field, what) from error


class _Request(Protocol):
    """httpx's."""

    extensions: dict[str, dict[str, float]]


def _limit_waiting(request: _Request) -> None:
    """Gives a request of the client the time limits that it lacks (a hook of httpx)."""
    limits = request.extensions.get("timeout") or {}
    phases = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {phase: limits.get(phase) or _ANSWER_S for phase in phases}


class Downloading(str):
    """How far a download is, in words: a report that also has the number."""

    share: float  # of the bytes that are here

    def __new__(cls, action: str, done: float, total: float, left_s: float) -> Downloading:
        """What is being downloaded, bytes that are here, all of them, and seconds that are left;
        0 is not known yet."""
        share = done / total
        left = ""
        if left_s:
            minutes = round(left_s / 60)
            left = f", about {f'{minutes} min' if minutes > 1 else f'{round(left_s)} s'} left"
        note = super().__new__(cls, f"{action}: {_of(done, total)} ({share:.0%}{left})")
        note.share = share
        return note


class Abandoned(Exception):  # noqa: N818 - nothing went wrong
    """Raised by a report callback when nobody waits for the download any more."""


def _progress_bars(action: str, report: Report) -> type[tqdm]:
    """A tqdm class whose bars draw nothing: those that count bytes are reported in words.

    The client may keep one bar for bytes received and one for bytes written: the further one is
    reported, at most five times a second.
    """
    reported_s = began_s = 0.0
    most = before = 0.0

    class Words(tqdm):  # type: ignore[misc] # tqdm has no types
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal reported_s, began_s, most, before
            self.n += n or 0
            if not self.counts_bytes or not self.total:
                return
            now_s = time.monotonic()
            if not began_s:  # what an earlier attempt left here says nothing of the speed
                began_s, before = now_s, self.n
            most = max(most, self.n)
            if now_s - reported_s >= 0.2 or most >= self.total:
                reported_s = now_s
                passed_s, came = now_s - began_s, most - before
                left_s = passed_s * (self.total - most) / came if passed_s > 1 and came else 0.0
                report(Downloading(action, most, self.total, left_s))

    return Words


def _of(done: float, total: float) -> str:
    """`done` of `total` bytes in the larger one's unit: "0.31 of 2.36 GB"."""
    if total >= 1e9:
        return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"
    return f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
