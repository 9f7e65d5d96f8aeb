"""An uploaded file as a clip: what is refused, what is corrected, and the sentences that say so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from musicgen_ui.audio.clip import SILENCE, Clip, cancels
from musicgen_ui.audio.decode import End, decode_end
from musicgen_ui.errors import RequestError

KINDS = {
    "WAV": "wav wave",
    "WAVEX": "wav wave",
    "RF64": "wav wave rf64",
    "FLAC": "flac",
    "OGG": "ogg oga opus",
    "MP3": "mp3 mpga mpeg",
    "AIFF": "aiff aif aifc",
    "MP4": "m4a mp4 mov m4b 3gp",
    "AAC": "aac",
    "WEBM": "webm mkv mka weba",
}  # what a file turns out to hold, and the endings that fit it


@dataclass(frozen=True, eq=False)
class Reading:
    """A file as a clip: at most its last `keep_s` seconds, 1 or 2 channels, at most 48 kHz."""

    clip: Clip
    notes: tuple[str, ...]  # sentences for the musician ("The file is 1 h 2 min long: …")
    full_s: float  # the whole file's length


def read(path: Path | str, keep_s: float = 120.0) -> Reading:
    """The last `keep_s` seconds of an untrusted audio file.

    The process stays within 300 MB of its level and a bounded amount of work for any file. Samples
    beyond ±1 keep their shape: the whole clip is turned down. More than two channels are mixed
    down to stereo.

    Raises:
        RequestError: there is no such file; it cannot be read; it is not audio; it is empty, has
            NaN or Inf, a sampling rate outside 4 to 400 kHz, more than 8 channels or too much to
            decode.
    """
    path = Path(path)
    if not is_file(path):
        raise RequestError(f"There is no file “{path.name[:80]}”: choose another.")
    try:
        if not path.stat().st_size:
            raise RequestError("The file is empty: choose another.")
        end = decode_end(path, keep_s)
    except OSError as error:
        raise RequestError(f"The file cannot be read: {error.strerror}.") from error
    if not end.samples.shape[1]:
        raise RequestError("The file holds no audio: choose another.")
    if not np.isfinite(end.samples).all():
        raise RequestError("The file's samples are damaged (NaN or infinite): export it again.")
    samples, level_notes = _level(end.samples)
    notes = (*_notes(path, end, keep_s), *level_notes)
    return Reading(Clip(samples, end.sampling_rate), notes, end.full_s)


def is_file(path: Path) -> bool:
    """Whether there is such a file; one whose name cannot be is not there."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, not text of this system
        return False


def _level(samples: np.ndarray) -> tuple[np.ndarray, list[str]]:
    peak = float(np.abs(samples).max())
    if peak < SILENCE:
        return samples, ["The clip is silent: there is little to go on from."]
    if peak <= 1:
        return samples, []
    over_db = 20 * np.log10(peak)
    note = f"The clip goes {over_db:.1f} dB beyond full scale: it was turned down by that much."
    return samples / np.float32(peak), [note] if over_db >= 0.1 else []


def _notes(path: Path, end: End, keep_s: float) -> Iterator[str]:
    kind, claimed_s = end.header.kind, end.header.claimed_s
    if end.full_s > keep_s + 0.05:
        yield f"The file is {_length(end.full_s)} long: its last {keep_s:g} s were taken."
    if claimed_s - end.full_s > max(0.5, 0.02 * claimed_s):
        yield (
            f"The file is cut short: {_length(end.full_s)} of {_length(claimed_s)} could be read."
        )
    elif end.broken:
        yield f"The file is damaged after {_length(end.full_s)}: what comes before was taken."
    elif end.goes_on:
        yield (
            f"Only the first {_length(end.full_s)} of the file can be read. If it was joined from "
            "several, join them in an audio program instead."
        )
    if end.header.channels > 2:
        yield f"The file's {end.header.channels} channels were mixed down to stereo."
    if cancels(end.samples):
        yield "The channels are of opposite phase: in mono, only the louder one is used."
    ending = path.suffix[1:].lower()
    known = {known for endings in KINDS.values() for known in endings.split()}
    if ending in known and ending not in KINDS.get(kind, ending).split():
        yield f"The file is named .{ending} but holds {kind}; it was read as that."


def _length(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
