"""What was made: a finished take as files that carry the settings which made them.

The settings are JSON in each file's comment (WAV: INFO/ICMT, FLAC and Ogg: a Vorbis comment, MP3:
ID3), so a file
that went through a mail or a hard disk's crash can still fill the form again.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import soundfile

from musicgen_ui import files
from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Chroma, Clip
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CLIP_FIELDS, FIELDS, GenerationRequest

MARK = "MusicGen UI settings"  # the comment's key: whose JSON this is
TARGET_LUFS = -14.0
RESULTS: dict[str, type] = {
    "made_s": float,
    "prompt_s": float,
    "melody_s": float,
    "sampling_rate": int,
    "channels": int,
    "speed_x": float,
    "stopped": bool,
}
NAME_CHARACTERS, TITLE_CHARACTERS = 40, 100
NONSENSE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
COMMENT_BYTES, MAX_CHUNKS = 200_000, 1_000  # more is no file of ours


@dataclass(frozen=True, eq=False)
class Take:
    """A finished take on disk."""

    wav: Path
    flac: Path
    settings: dict[str, Any]  # the request's fields, then what came of it; JSON
    notes: tuple[str, ...]
    clip: Clip  # as in the files, before rounding to 16 bits
    prompt_s: float  # seconds of `clip` that are the audio prompt
    melody: Chroma | None = None  # what the rest of it followed


class UnsavedError(RequestError):
    """The take could not be written. It holds what is left of it: what would make it again."""

    def __init__(self, message: str, settings: dict[str, Any]) -> None:
        super().__init__(message)
        self.settings = settings


def save(finished: Finished, folder: Path, name: str = "", spare: Path | None = None) -> Take:
    """Finishes the audio and writes it as WAV and FLAC under a new name in `folder`.

    A `name` without ending is used as it is: what had it before is replaced. Where `folder` does
    not take it, `spare` may, and a note says so.

    Raises:
        UnsavedError: the folder cannot be written to, or the disk is full. Nothing is left there.
    """
    clip, notes = _mastered(finished)
    settings = _settings(finished, clip)
    tags = _tags(settings)
    stem = _stem(finished.request)
    try:
        wav, flac = _write_both(clip, folder, name, stem, tags)
    except OSError as error:
        try:
            if spare is None:
                raise
            wav, flac = _write_both(clip, spare, name, stem, tags)
        except OSError:
            raise UnsavedError(_complaint(error), settings) from error
        notes.append("The take could not be kept with the others: download it here, and soon.")
    notes = [*finished.notes, *notes]
    return Take(wav, flac, settings, tuple(notes), clip, finished.prompt_s, finished.melody)


def encode(finished: Finished, ending: str) -> tuple[bytes, tuple[str, ...]]:
    """A take as a single file, ".wav", ".flac", ".mp3" or ".ogg", and its notes.

    Raises:
        UnsavedError: this kind of file cannot have the take's sampling rate.
    """
    clip, notes = _mastered(finished)
    settings = _settings(finished, clip)
    try:
        content = audio.encode(clip, ending, _tags(settings, plain=ending == ".mp3"))
    except soundfile.SoundFileError as error:
        message = f"The take cannot be a {ending[1:].upper()} file: choose WAV or FLAC."
        raise UnsavedError(message, settings) from error
    return content, (*finished.notes, *notes)


def write(finished: Finished, path: Path) -> tuple[str, ...]:
    """Writes a take as the single file `path`, of the kind that its ending says; gives its notes.

    Raises:
        UnsavedError: the folder cannot be written to, the disk is full, or see `encode`.
    """
    content, notes = encode(finished, path.suffix.lower())
    try:
        files.replace(path, content)
    except OSError as error:
        raise UnsavedError(_complaint(error), finished.request.settings()) from error
    return notes


def _tags(settings: dict[str, Any], plain: bool = False) -> dict[str, str]:
    """soundfile's tags. In `plain` ones all is ASCII: libsndfile says that MP3's are Latin-1."""
    title = " ".join(settings["prompt"].split())
    if plain:
        title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().strip()
    return {
        "title": title[:TITLE_CHARACTERS] or "Untitled",
        "artist": "MusicGen",
        "software": "MusicGen UI",
        "comment": json.dumps({MARK: settings}, ensure_ascii=plain),
    }


def read_settings(path: Path | str) -> dict[str, Any] | None:
    """The settings in a file made here; None for any other file, and for nonsense.

    The request's fields are checked as a request's; unknown keys are dropped.
    """
    try:
        found = json.loads(_comment(Path(path)))[MARK]
        kept = {key: found[key] for key in FIELDS if key in found and key not in CLIP_FIELDS}
        request = GenerationRequest.parse(kept)
        results = {key: found[key] for key in RESULTS if _is_result(key, found.get(key))}
    except (soundfile.SoundFileError, OSError, *NONSENSE):
        return None
    return request.settings() | results


def _comment(path: Path) -> str:
    """The comment of a file that nobody vouches for; raises ValueError where there is none."""
    with path.open("rb", buffering=0) as raw:  # libsndfile sees where it stands
        head = raw.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            return _wav_comment(raw)
        raw.seek(0)
        with soundfile.SoundFile(raw.fileno(), closefd=False) as file:
            return file.comment if len(file.comment) <= COMMENT_BYTES else ""


def _wav_comment(raw: BinaryIO) -> str:
    # libsndfile writes long comments into WAV but reads only those up to 2 kB.
    for name, size in _chunks(raw):
        if name == b"LIST" and raw.read(4) == b"INFO":
            info = io.BytesIO(raw.read(min(size - 4, COMMENT_BYTES)))
            found = (info.read(size) for name, size in _chunks(info) if name == b"ICMT")
            return next(found, b"").rstrip(b"\0").decode()
    return ""


def _chunks(raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Names and sizes of a RIFF file's chunks; the file stands at each one's content."""
    for _ in range(MAX_CHUNKS):
        head = raw.read(8)
        if len(head) < 8:
            return
        start, size = raw.tell(), int.from_bytes(head[4:], "little")
        yield head[:4], size
        raw.seek(start + size + size % 2)


def _mastered(finished: Finished) -> tuple[Clip, list[str]]:
    clip, notes = finished.clip, []
    if finished.request.normalize:
        clip, gain_db = audio.normalize(clip, TARGET_LUFS)
        reached = audio.loudness_lufs(clip)
        if math.isinf(reached):
            notes.append("The take is silent: its loudness was left as it is.")
        elif reached < TARGET_LUFS - 0.1:
            notes.append(f"Loudness is {reached:.1f} LUFS: at {TARGET_LUFS:g} peaks would clip.")
        else:
            notes.append(f"Loudness was changed by {gain_db:+.1f} dB to {reached:.1f} LUFS.")
    clip, beyond = audio.clip_to_full_scale(clip)
    if beyond:
        samples = "1 sample was" if beyond == 1 else f"{beyond:,} samples were"
        notes.append(f"{samples} beyond full scale and clipped.")
    return clip, notes


def _settings(finished: Finished, clip: Clip) -> dict[str, Any]:
    melody = finished.request.melody
    return finished.request.settings() | {
        "made_s": round(clip.duration_s - finished.prompt_s, 3),
        "prompt_s": round(finished.prompt_s, 3),
        "melody_s": round(melody.duration_s, 3) if melody else 0.0,
        "sampling_rate": clip.sampling_rate,
        "channels": clip.channels,
        "speed_x": round(finished.speed, 2),
        "stopped": finished.stopped,
    }


def _is_result(key: str, value: Any) -> bool:
    if RESULTS[key] is bool or isinstance(value, bool):
        return RESULTS[key] is type(value)
    return isinstance(value, (int, float)) and 0 <= value < 1e9


def _stem(request: GenerationRequest) -> str:
    words = slug(request.prompt) or "untitled"
    checkpoint = slug(request.checkpoint.replace("\\", "/").rstrip("/").rpartition("/")[2])
    return "-".join(part for part in (words, checkpoint, f"seed-{request.seed}") if part)


def slug(text: str) -> str:
    """Letters and digits of any script in words joined by hyphens, at most 40 characters."""
    normal = unicodedata.normalize("NFKC", text).lower()
    spaced = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in normal)
    whole = "-".join(spaced.split())
    try:
        os.fsencode(whole)
    except UnicodeEncodeError:  # the locale's names are not Unicode
        system = sys.getfilesystemencoding()
        whole = unicodedata.normalize("NFKD", whole).encode(system, "ignore").decode(system)
        whole = "-".join(filter(None, whole.split("-")))
    if len(whole) <= NAME_CHARACTERS:
        return whole
    return whole[: NAME_CHARACTERS + 1].rpartition("-")[0] or whole[:NAME_CHARACTERS]


def _write_both(
    clip: Clip, folder: Path, name: str, stem: str, tags: dict[str, str]
) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Path] = []
    try:
        for ending in (".wav", ".flac"):
            parts.append(files.write_part(folder, audio.encode(clip, ending, tags)))
        wav, flac = _both(folder, name) if name else _claimed(parts[0], folder, stem)
        if name:
            parts[0].replace(wav)
        parts[1].replace(flac)
    finally:
        for part in parts:
            files.drop(part)
    return wav, flac


def _both(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.wav", folder / f"{name}.flac"


def _claimed(part: Path, folder: Path, stem: str) -> tuple[Path, Path]:
    """Gives the WAV a name that no other take has: whoever does owns the FLAC's too."""
    for number in itertools.count(1):
        named = _both(folder, stem if number == 1 else f"{stem}-{number}")
        if not any(path.exists() for path in named) and files.claim(part, named[0]):
            break
    return named


def _complaint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The take could not be saved because the disk is full: make room and try again."
    return (
        f"The take could not be saved ({error.strerror or 'unknown error'}): "
        "choose an output folder that can be written to."
    )
