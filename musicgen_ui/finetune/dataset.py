"""The songs that a run learns from: audio files, and a caption for each.

A caption is the text of `name.txt` beside `name.wav`, or comes from `name.json` (a `caption` or
`description`, or the fields that audiocraft's training uses). Where there is neither, one is
suggested from the file's tags and name and from the measured tempo and key. Vocals are not warned
about: no simple measure tells them from a lead instrument reliably.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from musicgen_ui import files
from musicgen_ui.audio import load
from musicgen_ui.coercion import PROMPT_CHARACTERS
from musicgen_ui.errors import RequestError
from musicgen_ui.finetune.pieces import Measures

ENDINGS = {f".{ending}" for endings in load.KINDS.values() for ending in endings.split()}
MAX_SONGS = 10_000
_CAPTION_KEYS = ("caption", "description", "prompt", "text")
_TAGS = ("genre", "title", "artist")
_METADATA_BYTES = 100_000  # of a caption's file


@dataclass(frozen=True)
class Song:
    """An audio file with its caption."""

    path: Path
    caption: str
    suggested: bool = False  # nobody wrote it


def find(sources: Sequence[Path]) -> list[Path]:
    """The audio files that are named, or are in folders that are named, in order.

    Raises:
        RequestError: a source is not there, or there are no audio files, or too many.
    """
    found: dict[Path, None] = {}
    for source in sources:
        if source.is_dir():
            inside = (p for p in sorted(source.rglob("*")) if p.suffix.lower() in ENDINGS)
            found |= dict.fromkeys(p for p in inside if p.is_file() and p.name[0] != ".")
        elif source.is_file():
            found[source] = None
        else:
            raise RequestError(f"There is no file or folder {source}: name one with music.")
        if len(found) > MAX_SONGS:
            raise RequestError(f"{source} holds more than {MAX_SONGS:,} audio files: name fewer.")
    if not found:
        named = ", ".join(str(source) for source in sources[:3])
        raise RequestError(
            f"{named} has no audio files: name a folder with WAV, FLAC, MP3, OGG or M4A files."
        )
    return list(found)


def written_caption(path: Path) -> str:
    """The caption beside an audio file; "" if there is none.

    Raises:
        RequestError: it cannot be read, or is too long for a prompt.
    """
    for ending in (".txt", ".json"):
        file = path.with_suffix(ending)
        if not file.is_file():
            continue
        try:
            with file.open(encoding="utf-8-sig") as opened:
                text = opened.read(_METADATA_BYTES)
            caption = text if ending == ".txt" else _of_json(json.loads(text))
        except (OSError, ValueError) as error:
            raise RequestError(
                f"The caption {file.name} cannot be read: save it as {_KINDS[ending]} in UTF-8."
            ) from error
        caption = " ".join(caption.split())
        require_short(caption, file.name)
        if caption:
            return caption
    return ""


_KINDS = {".txt": "plain text", ".json": "a JSON object"}


def require_short(caption: str, name: str) -> None:
    """Requires that a caption can be a prompt.

    Raises:
        RequestError: it is too long.
    """
    if len(caption) > PROMPT_CHARACTERS:
        raise RequestError(
            f"The caption {name} has {len(caption):,} characters: shorten it to at most "
            f"{PROMPT_CHARACTERS:,}; a sentence on style, instruments and mood is best."
        )


def _of_json(values: object) -> str:
    if not isinstance(values, dict):
        raise ValueError("not an object")
    for key in _CAPTION_KEYS:
        if isinstance(values.get(key), str) and values[key].strip():
            return str(values[key])
    keys = ("genre", "title", "artist", "moods", "keywords", "instrument", "bpm", "key")
    words = [(key, values.get(key)) for key in keys]
    texts = [(key, ", ".join(map(str, v)) if isinstance(v, list) else v) for key, v in words]
    return ", ".join(f"{text} bpm" if key == "bpm" else str(text) for key, text in texts if text)


def suggested_caption(path: Path, measures: Measures) -> str:
    """A caption from a file's tags and name, and its measured tempo and key."""
    tags = _tags(path)
    parts = [tags.get("genre", ""), tags.get("title") or _words(path.stem)]
    if tags.get("artist"):
        parts.append(f"by {tags['artist']}")
    if measures.tempo_bpm:
        parts.append(f"{measures.tempo_bpm} bpm")
    parts.append(f"in {measures.key}" if measures.key else "")
    return ", ".join(part for part in parts if part)[:PROMPT_CHARACTERS]


def _words(stem: str) -> str:
    """ "slow piano" of "01 - slow_piano"."""
    return " ".join(re.sub(r"[\W_]+", " ", re.sub(r"^\d+[\W_]+", "", stem)).split())


def _tags(path: Path) -> dict[str, str]:
    import av

    try:
        with av.open(str(path)) as container:
            every = [container.metadata, *(s.metadata for s in container.streams.audio)]
    except (av.FFmpegError, OSError, ValueError, UnicodeError):
        return {}
    tags = {key.lower(): value for metadata in every for key, value in metadata.items()}
    return {name: " ".join(tags[name].split())[:100] for name in _TAGS if tags.get(name)}


def with_word(caption: str, activation_word: str) -> str:
    """The caption, begun by the activation word unless it holds it already."""
    if not activation_word or activation_word.lower() in caption.lower():
        return caption
    return f"{activation_word}, {caption}" if caption else activation_word


def write_captions(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Writes suggested captions beside the files that have none; yields each file and its caption,
    or "" where the audio cannot be read.

    Raises:
        RequestError: a caption that is there is too long, or the folder cannot be written to.
    """
    from musicgen_ui.finetune import pieces

    for path in paths:
        if written_caption(path):
            continue
        try:
            clip = load.read(path, pieces.LONGEST_S).clip
        except RequestError:
            yield path, ""
            continue
        caption = suggested_caption(path, pieces.measure(clip))
        file = path.with_suffix(".txt")
        try:
            files.replace(file, f"{caption}\n".encode())
        except OSError as error:
            raise RequestError(f"{file} cannot be written: {error.strerror}.") from error
        yield file, caption
