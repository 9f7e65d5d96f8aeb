"""What was made: a finished take as files that carry the settings which made them.

The settings are JSON in each file's comment (WAV: INFO/ICMT, FLAC and Ogg: a Vorbis comment, MP3:
ID3), so a file that went through a mail or a hard disk's crash can still fill the form again.
Beside WAV and FLAC lies a sidecar with the take's codes and waveform. Takes that were made of
others name them: a take's `id` is its sound's, and `parent` the id of the sound it goes on from.
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, TypeGuard, cast

import numpy as np
import soundfile

from musicgen_ui import files, sidecar
from musicgen_ui.audio import chords, export
from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Chroma, Clip
from musicgen_ui.audio.export import AS_MADE, Shape
from musicgen_ui.audio.load import read as read_audio
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CLIP_FIELDS, FIELDS, GenerationRequest
from musicgen_ui.sidecar import Codes
from musicgen_ui.take_settings import Results, TakeSettings

MARK = "MusicGen UI settings"  # the comment's key: whose JSON this is
TARGET_LUFS = -14.0
REDUCTION_SAID_DB = 0.1  # less limiting than this is not worth a note
NAME_CHARACTERS, TITLE_CHARACTERS = 40, 100
NAME_BYTES = 96  # two of them, a seed, a number and an ending are within a file system's 255
NONSENSE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
COMMENT_BYTES, MAX_CHUNKS = 200_000, 1_000  # more is no file of ours
MAX_KEPT_S = 3600.0  # a take with all that it was continued from


class Operation(StrEnum):
    """How a take came from another one."""

    CONTINUE = "continue"
    RETAKE = "retake"
    EXTEND = "extend"
    TRIM = "trim"


@dataclass(frozen=True)
class Origin:
    """Which take another one was made from."""

    parent: str  # the id of its sound
    operation: Operation
    at_s: float  # where in the parent the new take leaves it

    def settings(self) -> Results:
        """As a take's settings hold it."""
        return {
            "parent": self.parent,
            "operation": str(self.operation),
            "parent_at_s": round(self.at_s, 3),
        }


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _is_amount(value: object) -> bool:
    return _is_number(value) and value >= 0


def _is_id(value: object) -> bool:
    return isinstance(value, str) and len(value) == 16 and value.isalnum()


# What settings hold beside the request's fields: what came of it.
RESULTS: dict[str, Callable[[object], bool]] = {
    "made_s": _is_amount,
    "prompt_s": _is_amount,
    "melody_s": _is_amount,
    "style_s": _is_amount,
    "context_used_s": _is_amount,
    "sampling_rate": _is_amount,
    "channels": _is_amount,
    "speed_x": _is_amount,
    "score": _is_number,
    "stopped": lambda value: isinstance(value, bool),
    "gain_db": _is_number,  # that `normalize` took; samples and codes differ by it
    "id": _is_id,
    "parent": _is_id,
    "operation": lambda value: value in list(Operation),
    "parent_at_s": _is_amount,
    "loop_bars": _is_amount,
    "fade_out_s": _is_amount,
}


@dataclass(frozen=True, eq=False)
class Take:
    """A finished take on disk."""

    wav: Path
    flac: Path
    settings: TakeSettings  # the request's fields, then what came of it; JSON
    notes: tuple[str, ...]
    clip: Clip  # as in the files, before rounding to 16 bits
    prompt_s: float  # seconds of `clip` that are the audio prompt
    melody: Chroma | None = None  # what the rest of it followed


@dataclass(frozen=True, eq=False)
class Kept:
    """A take that was read back, ready to be gone on from."""

    clip: Clip  # at the level of its codes, which end with it; without any where none fit
    frame_samples: int  # samples a frame of the codes; 1 without codes
    settings: TakeSettings  # with an id


class UnsavedError(RequestError):
    """The take could not be written. It holds what is left of it: what would make it again."""

    def __init__(self, message: str, settings: TakeSettings) -> None:
        super().__init__(message)
        self.settings = settings


def save(
    finished: Finished,
    folder: Path,
    name: str = "",
    spare: Path | None = None,
    *,
    shape: Shape = AS_MADE,
    origin: Origin | None = None,
    codes: Codes | None = None,
) -> Take:
    """Finishes the audio and writes it as WAV and FLAC under a new name in `folder`.

    Codes, waveform and loudness are written beside them. A `name` without ending is used as it is:
    what had it before is replaced. Where `folder` does not take it, `spare` may, and a note says
    so, as one does where the music is too short for the `shape`. Without an `origin` the take goes
    on from its request's audio prompt, if it has one; without `codes` they are those of `finished`.

    Raises:
        UnsavedError: the folder cannot be written to, or the disk is full. Nothing is left there.
    """
    made = _master(finished, shape, origin)
    stem = _stem(finished.request)
    kept_codes = None if made.shape else codes or _codes(finished)
    data = sidecar.of_clip(made.clip, made.settings, kept_codes).content()
    try:
        wav, flac = _write_all(made, folder, name, stem, data)
    except OSError as error:
        try:
            if spare is None:
                raise
            wav, flac = _write_all(made, spare, name, stem, data)
        except OSError:
            raise UnsavedError(_complaint(error), made.settings) from error
        made.notes.append("The take could not be kept with the others: download it here, and soon.")
    notes = (*finished.notes, *made.notes)
    return Take(wav, flac, made.settings, notes, made.clip, made.prompt_s, finished.melody)


def encode(
    finished: Finished, ending: str, shape: Shape = AS_MADE
) -> tuple[bytes, tuple[str, ...]]:
    """A take as a single file, one of `clip.ENDINGS`, and its notes.

    Raises:
        UnsavedError: this kind of file cannot have the take's sampling rate.
    """
    made = _master(finished, shape, None)
    content = _encoded(made.clip, ending, made.settings)
    return content, (*finished.notes, *made.notes)


def write(finished: Finished, path: Path, shape: Shape = AS_MADE) -> tuple[str, ...]:
    """Writes a take as the single file `path`, of the kind that its ending says; gives its notes.

    Raises:
        UnsavedError: the folder cannot be written to, the disk is full, or see `encode`.
    """
    content, notes = encode(finished, path.suffix.lower(), shape)
    try:
        files.replace(path, content)
    except OSError as error:
        raise UnsavedError(_complaint(error), finished.request.settings()) from error
    return notes


def export_file(sound: Path, ending: str, shape: Shape = AS_MADE, title: str = "") -> bytes:
    """A take's sound as a file of another kind or shape, with the take's settings and `title`.

    Raises:
        RequestError: the sound cannot be read or cannot have the shape.
        UnsavedError: this kind of file cannot have the take's sampling rate.
    """
    settings = read_settings(sound) or GenerationRequest().settings()
    if ending == sound.suffix.lower() and not (shape or title):
        return sound.read_bytes()
    clip = _read_clip(sound)
    if shape:
        # Older files do not have the time signature.
        beats = chords.beats_a_bar(settings.get("time_signature", "4/4"))
        shaped = shape.of(clip, settings["tempo_bpm"], settings.get("prompt_s", 0.0), beats)
        clip, _ = export.limit(shaped)
        prompt_s = 0.0 if shape.loop_bars else settings.get("prompt_s", 0.0)
        settings = {**settings, **_measures(clip, prompt_s), **shape.settings()}
    return _encoded(clip, ending, settings, title)


def export_to(path: Path, sound: Path, shape: Shape = AS_MADE, title: str = "") -> None:
    """Writes `export_file`, of the kind that the ending of `path` says.

    Raises:
        RequestError: the folder cannot be written to, the disk is full, or see `export_file`.
    """
    content = export_file(sound, path.suffix, shape, title)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, content)
    except OSError as error:
        raise RequestError(_complaint(error)) from error


def _encoded(clip: Clip, ending: str, settings: TakeSettings, title: str = "") -> bytes:
    try:
        content = audio.encode(clip, ending, _tags(settings, ending == ".mp3", title))
    except soundfile.SoundFileError as error:
        message = f"The take cannot be a {ending[1:].upper()} file: choose WAV or FLAC."
        raise UnsavedError(message, settings) from error
    if ending == ".wav" and settings.get("loop_bars"):
        content = export.with_loop_points(content, clip.samples.shape[1], clip.sampling_rate)
    return content


def _tags(settings: TakeSettings, plain: bool = False, title: str = "") -> dict[str, str]:
    """soundfile's tags. In `plain` ones all is ASCII: libsndfile says that MP3's are Latin-1."""
    title = " ".join((title or settings["prompt"]).split())
    if plain:
        title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().strip()
    return {
        "title": title[:TITLE_CHARACTERS] or "Untitled",
        "artist": "MusicGen",
        "software": "MusicGen UI",
        "comment": json.dumps({MARK: settings}, ensure_ascii=plain),
    }


def load(sound: Path) -> Kept:
    """Reads a take that was kept.

    Its codes come along if they are beside it and are still those of this sound.

    Raises:
        RequestError: the file is not there, cannot be read or was not made here.
    """
    settings = read_settings(sound)
    if settings is None:
        raise RequestError(f"{sound.name} is not a take: choose a file that was made here.")
    clip = _read_clip(sound)
    return Kept(*with_codes(clip, sound), {"id": sidecar.sound_id(clip), **settings})


def with_codes(clip: Clip, sound: Path) -> tuple[Clip, int]:
    """What was read of the file `sound`, with the codes beside it and at their level; and the
    samples of a frame.

    Without codes of just this sound the clip stays as it is, and a frame is a sample.
    """
    data = sidecar.read(sidecar.beside(sound))
    if data is None or data.codes is None or data.id != sidecar.sound_id(clip):
        return clip, 1
    gain_db = data.settings.get("gain_db", 0.0)
    level = np.float32(10 ** (-(gain_db if _is_number(gain_db) else 0.0) / 20))
    values, frame_samples = data.codes.values, data.codes.frame_samples
    frames = min(values.shape[1], clip.samples.shape[1] // frame_samples)
    return Clip(
        clip.samples * level if level != 1 else clip.samples,
        clip.sampling_rate,
        values[:, values.shape[1] - frames :],
        data.codes.codec,
    ), frame_samples


def _read_clip(sound: Path) -> Clip:
    return read_audio(sound, keep_s=MAX_KEPT_S).clip


def read_settings(path: Path | str) -> TakeSettings | None:
    """The settings in a file made here; None for any other file, and for nonsense.

    The request's fields are checked as a request's; unknown keys are dropped.
    """
    try:
        return checked(json.loads(_comment(Path(path)))[MARK])
    except (soundfile.SoundFileError, OSError, *NONSENSE):
        return None


def checked(found: Mapping[str, object]) -> TakeSettings | None:
    """Settings from a file, as `read_settings` gives them."""
    try:
        kept = {key: found[key] for key in FIELDS if key in found and key not in CLIP_FIELDS}
        request = GenerationRequest.parse(kept)
        results = {key: found[key] for key, fits in RESULTS.items() if fits(found.get(key))}
    except NONSENSE:
        return None
    return cast(TakeSettings, request.settings() | results)


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


@dataclass(frozen=True)
class _Mastered:
    """A take as it is written."""

    clip: Clip
    prompt_s: float
    settings: TakeSettings
    notes: list[str]
    shape: Shape  # that it has


def _master(finished: Finished, shape: Shape, origin: Origin | None) -> _Mastered:
    """Shapes, levels and limits the sound, in this order."""
    request, clip, gain_db, notes = finished.request, finished.clip, 0.0, list[str]()
    try:
        clip = shape.of(clip, request.tempo_bpm, finished.prompt_s, request.beats_a_bar)
    except RequestError as error:  # as of a take that was stopped: it is not lost for that
        notes.append(f"The take was kept whole. {error}")
        shape = AS_MADE
    if request.normalize:
        clip, gain_db = audio.normalize(clip, TARGET_LUFS)
        reached = audio.loudness_lufs(clip)
        if math.isinf(reached):
            notes.append("The take is silent: its loudness was left as it is.")
        elif reached < TARGET_LUFS - 0.1:
            notes.append(f"Loudness is {reached:.1f} LUFS: at {TARGET_LUFS:g} peaks would clip.")
        else:
            notes.append(f"Loudness was changed by {gain_db:+.1f} dB to {reached:.1f} LUFS.")
    clip, reduced_db = export.limit(clip)
    if reduced_db >= REDUCTION_SAID_DB:
        notes.append(
            f"Peaks were limited by up to {reduced_db:.1f} dB, to {export.CEILING_DBTP:g} dBFS."
        )
    prompt_s = 0.0 if shape.loop_bars else finished.prompt_s
    settings: TakeSettings = {
        **request.settings(),
        **_measures(clip, prompt_s),
        "melody_s": round(request.melody.duration_s, 3) if request.melody else 0.0,
        "style_s": round(request.style.duration_s, 3) if request.style else 0.0,
        "speed_x": round(finished.speed, 2),
        "stopped": finished.stopped,
        "gain_db": round(gain_db, 4),
    }
    if finished.prompt_s and finished.frame_samples:
        context = finished.context_frames * finished.frame_samples
        settings["context_used_s"] = round(context / clip.sampling_rate, 3)
    if finished.score is not None:
        settings["score"] = finished.score
    if origin is None and (went_on := request.audio_prompt):
        parent = sidecar.sound_id(went_on)
        origin = Origin(parent, Operation.CONTINUE, went_on.duration_s)
    came_from: Results = origin.settings() if origin else {}
    settings = {**settings, **came_from, **shape.settings()}
    return _Mastered(clip, prompt_s, settings, notes, shape)


def _measures(clip: Clip, prompt_s: float) -> Results:
    return {
        "made_s": round(clip.duration_s - prompt_s, 3),
        "prompt_s": round(prompt_s, 3),
        "sampling_rate": clip.sampling_rate,
        "channels": clip.channels,
        "id": sidecar.sound_id(clip),
    }


def _codes(finished: Finished) -> Codes | None:
    """The codes of a take; those of its audio prompt that it goes on from come before them."""
    codes, context, frame_samples = finished.codes, finished.context_frames, finished.frame_samples
    if codes is None or not frame_samples:
        return None
    prompt = finished.request.audio_prompt
    if prompt and prompt.codes is not None and prompt.codes.shape[1] > context:
        known = prompt.codes[:, prompt.codes.shape[1] - context :]
        if prompt.codec == finished.clip.codec and np.array_equal(known, codes[:, :context]):
            codes = np.concatenate([prompt.codes, codes[:, context:]], axis=1)
            context = prompt.codes.shape[1]
    return Codes(codes, finished.clip.codec, context, frame_samples)


def _stem(request: GenerationRequest) -> str:
    words = slug(request.prompt) or "untitled"
    checkpoint = slug(request.checkpoint.replace("\\", "/").rstrip("/").rpartition("/")[2])
    return "-".join(part for part in (words, checkpoint, f"seed-{request.seed}") if part)


def slug(text: str) -> str:
    """Letters and digits of any script, hyphens between words: at most 40 characters, 96 bytes."""
    normal = unicodedata.normalize("NFKC", text).lower()
    spaced = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in normal)
    whole = "-".join(spaced.split())
    try:
        os.fsencode(whole)
    except UnicodeEncodeError:  # the locale's names are not Unicode
        system = sys.getfilesystemencoding()
        whole = unicodedata.normalize("NFKD", whole).encode(system, "ignore").decode(system)
        whole = "-".join(filter(None, whole.split("-")))
    if len(whole) > NAME_CHARACTERS:
        whole = whole[: NAME_CHARACTERS + 1].rpartition("-")[0] or whole[:NAME_CHARACTERS]
    return os.fsencode(whole)[:NAME_BYTES].decode(sys.getfilesystemencoding(), "ignore")


def _write_all(
    made: _Mastered, folder: Path, name: str, stem: str, data: bytes
) -> tuple[Path, Path]:
    """The WAV first, which claims the name, then the sidecar, in the end the FLAC."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Path] = []
    try:
        sounds = [_encoded(made.clip, ending, made.settings) for ending in (".wav", ".flac")]
        for content in (sounds[0], data, sounds[1]):
            parts.append(files.write_part(folder, content))
        wav, flac = _both(folder, name) if name else _claimed(parts[0], folder, stem)
        if name:
            parts[0].replace(wav)
        parts[1].replace(sidecar.beside(wav))
        parts[2].replace(flac)
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
