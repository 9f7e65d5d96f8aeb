"""Untrusted audio files in: whatever is uploaded, memory and work stay bounded.

soundfile is the first reader, PyAV (FFmpeg's libraries) the second, for what phones and browsers
record (M4A, WebM). Both hand over small blocks that are mixed down, brought to at most 48 kHz and
written into a ring of the last `keep_s` seconds, because a continuation needs a clip's end. What
a header says of the length serves only to skip ahead; where that fails, the file is read from its
start until it ends or a bound on the work is reached.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr

from musicgen_ui.request import Clip, RequestError

MIN_RATE_HZ, MAX_RATE_HZ, MAX_CHANNELS = 4_000, 400_000, 8
KEPT_RATE_HZ = 48_000  # more is never heard by a checkpoint, and 400 kHz would fill the memory
MAX_WORK = 2_000_000_000  # decoded samples of all channels: three to five hours of stereo
BLOCK_WORK = 1_024  # a block costs about as much as this many samples, however small it is
BLOCK = 16_384  # samples
SKIP_MARGIN_S = 2.0  # compressed formats need a run-up after a seek
SILENCE = 1e-4  # -80 dBFS
KINDS = {
    "WAV": "wav wave",
    "WAVEX": "wav wave",
    "RF64": "wav wave rf64",
    "FLAC": "flac",
    "OGG": "ogg oga opus",
    "MP3": "mp3 mpga mpeg",
    "AIFF": "aiff aif aifc",
    "MP4": "m4a mp4 mov m4b 3gp aac",
    "WEBM": "webm mkv mka weba",
}  # what a file turns out to hold, and the endings that fit it
# FFmpeg also reads playlists, which name other files and addresses: these formats cannot.
FFMPEG_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,ogg,mp3,aac,flac,wav,aiff,caf,amr,asf"
# Shares of left and right (ITU-R BS.775) by channel in WAV's and FLAC's order.
LEFT, RIGHT, CENTRE, LOW = (1.0, 0.0), (0.0, 1.0), (0.707, 0.707), (0.0, 0.0)
REAR_LEFT, REAR_RIGHT, REAR = (0.707, 0.0), (0.0, 0.707), (0.5, 0.5)
LAYOUTS = {
    3: (LEFT, RIGHT, CENTRE),
    4: (LEFT, RIGHT, REAR_LEFT, REAR_RIGHT),
    5: (LEFT, RIGHT, CENTRE, REAR_LEFT, REAR_RIGHT),
    6: (LEFT, RIGHT, CENTRE, LOW, REAR_LEFT, REAR_RIGHT),
    7: (LEFT, RIGHT, CENTRE, LOW, REAR, REAR_LEFT, REAR_RIGHT),
    8: (LEFT, RIGHT, CENTRE, LOW, REAR_LEFT, REAR_RIGHT, REAR_LEFT, REAR_RIGHT),
}
DECODE_ERRORS = (soundfile.SoundFileError, av.FFmpegError)


@dataclass(frozen=True, eq=False)
class Reading:
    """A file as a clip: at most its last `keep_s` seconds, 1 or 2 channels, at most 48 kHz."""

    clip: Clip
    notes: tuple[str, ...]  # what a musician should know ("Only the last 120 s are used …")
    full_s: float  # the whole file's length


@dataclass(frozen=True)
class _Source:
    """An open file. `claimed_s` is what its header says, or 0."""

    kind: str  # a key of KINDS, or another format's name
    sampling_rate: int
    channels: int
    claimed_s: float
    seek: Callable[[float], object]  # to seconds from the start
    blocks: Callable[[], Iterator[np.ndarray]]  # float32 [samples, channels]


@dataclass(frozen=True, eq=False)
class _Tail:
    samples: np.ndarray  # float32 [channels, samples]
    read_s: float  # seconds that were decoded, the kept ones included
    broken: bool  # ended by an error


def read(path: Path | str, keep_s: float = 120.0) -> Reading:
    """The last `keep_s` seconds of an audio file that nobody vouches for.

    Stays within 300 MB of memory and a bounded amount of work for any file. Samples beyond ±1 in
    floating-point files are kept in shape by turning the whole clip down.

    Raises:
        RequestError: there is no such file; it is not audio; it is empty, has NaN or Inf, a
            sampling rate outside 4 to 400 kHz, more than 8 channels or too much to decode.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"There is no file “{path.name}”: choose another.")
    if not path.stat().st_size:
        raise RequestError("The file is empty: choose another.")
    source, tail, full_s = _read_end(path, keep_s)
    if not tail.samples.shape[1]:
        raise RequestError("The file holds no audio: choose another.")
    if not np.isfinite(tail.samples).all():
        raise RequestError("The file's samples are damaged (NaN or infinite): export it again.")
    samples, level_notes = _level(tail.samples)
    rate = min(source.sampling_rate, KEPT_RATE_HZ)
    notes = [*_notes(path, source, tail, full_s, keep_s), *level_notes]
    return Reading(Clip(samples, rate), tuple(notes), full_s)


def _read_end(path: Path, keep_s: float) -> tuple[_Source, _Tail, float]:
    with _open(path) as source:
        _check(source)
        skip_s = source.claimed_s - keep_s - SKIP_MARGIN_S
        if skip_s > 0:
            try:
                source.seek(skip_s)
                tail = _collect(source, keep_s)
            except DECODE_ERRORS:
                tail = None
            if tail and tail.read_s >= keep_s and not tail.broken:
                return source, tail, source.claimed_s
    with _open(path) as source:
        tail = _collect(source, keep_s)
        return source, tail, tail.read_s


def _check(source: _Source) -> None:
    if not MIN_RATE_HZ <= source.sampling_rate <= MAX_RATE_HZ:
        raise RequestError(
            f"The file's sampling rate is {source.sampling_rate:,} Hz: "
            f"export it with {MIN_RATE_HZ:,} to {MAX_RATE_HZ:,} Hz."
        )
    if not 1 <= source.channels <= MAX_CHANNELS:
        raise RequestError(
            f"The file has {source.channels} channels: export it with at most {MAX_CHANNELS}."
        )


def _collect(source: _Source, keep_s: float) -> _Tail:
    rate = min(source.sampling_rate, KEPT_RATE_HZ)
    channels = min(source.channels, 2)
    resampler = soxr.ResampleStream(source.sampling_rate, rate, channels, quality="HQ")
    keep = round(keep_s * rate)
    ring = np.zeros((channels, keep), np.float32)
    written = decoded = work = 0
    broken = False

    def push(block: np.ndarray) -> None:
        nonlocal written
        written += len(block)
        newest = block[-keep:]
        ring[:, np.arange(written - len(newest), written) % keep] = newest.T

    try:
        for block in source.blocks():
            decoded += len(block)
            work += block.size + BLOCK_WORK
            if work > MAX_WORK:
                raise RequestError("The file is hours too long: cut it to its last minutes.")
            mixed = _mixed(block)
            push(mixed if rate == source.sampling_rate else resampler.resample_chunk(mixed))
    except DECODE_ERRORS:
        broken = True
    if rate != source.sampling_rate:
        push(resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True))
    samples = np.roll(ring, -written, axis=1) if written > keep else ring[:, :written]
    return _Tail(samples, decoded / source.sampling_rate, broken)


def _mixed(block: np.ndarray) -> np.ndarray:
    if block.shape[1] <= 2:
        return block
    shares = np.array(LAYOUTS[block.shape[1]], np.float32)  # [channels, 2]
    return block @ (shares / shares.sum(axis=0))  # shares of 1 in all: never louder than full scale


def _level(samples: np.ndarray) -> tuple[np.ndarray, list[str]]:
    peak = float(np.abs(samples).max())
    if peak < SILENCE:
        return samples, ["The clip is silent: there is little to go on from."]
    if peak <= 1:
        return samples, []
    over_db = 20 * np.log10(peak)
    note = f"The clip goes {over_db:.1f} dB beyond full scale: it was turned down by that much."
    return samples / np.float32(peak), [note] if over_db >= 0.1 else []


def _notes(path: Path, source: _Source, tail: _Tail, full_s: float, keep_s: float) -> Iterator[str]:
    if full_s > keep_s + 0.05:
        yield f"The file is {_length(full_s)} long: its last {keep_s:g} s were taken."
    missing_s = source.claimed_s - full_s
    if missing_s > max(0.5, 0.02 * source.claimed_s):
        yield (
            f"The file is cut short: {_length(full_s)} of {_length(source.claimed_s)} "
            "could be read."
        )
    elif tail.broken:
        yield f"The file is damaged after {_length(full_s)}: what comes before was taken."
    if source.channels > 2:
        yield f"The file's {source.channels} channels were mixed down to stereo."
    ending = path.suffix[1:].lower()
    fitting = KINDS.get(source.kind, ending).split()
    if ending not in fitting and any(ending in endings.split() for endings in KINDS.values()):
        yield f"The file is named .{ending} but holds {source.kind}; it was read as that."


def _length(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


@contextmanager
def _open(path: Path) -> Iterator[_Source]:
    with ExitStack() as stack:
        try:
            source = stack.enter_context(_with_soundfile(path))
        except soundfile.SoundFileError:
            try:
                source = stack.enter_context(_with_av(path))
            except av.FFmpegError as error:
                raise RequestError(
                    "The file is not audio that can be read: use WAV, FLAC, MP3, OGG, M4A or WebM."
                ) from error
        yield source


@contextmanager
def _with_soundfile(path: Path) -> Iterator[_Source]:
    # Without a name, libsndfile cannot take a text called .au for headerless audio.
    with path.open("rb") as raw, soundfile.SoundFile(raw.fileno(), closefd=False) as file:
        rate = file.samplerate

        def blocks() -> Iterator[np.ndarray]:
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                yield block

        # libsndfile reads half a WAV without complaint, but its log tells: "data : 64000 (should
        # be 32000)". Sizes near 2³² mean that the writer did not know them.
        shortened = re.search(r": (\d+) \(should be (\d+)\)", file.extra_info)
        claimed, found = map(int, shortened.groups()) if shortened else (1, 1)
        share = claimed / found if 0 < found < claimed < 0xFFFF_0000 else 1
        yield _Source(
            kind=file.format,
            sampling_rate=rate,
            channels=file.channels,
            claimed_s=file.frames * share / rate if rate > 0 else 0,
            seek=lambda seconds: file.seek(round(seconds * rate)),
            blocks=blocks,
        )


@contextmanager
def _with_av(path: Path) -> Iterator[_Source]:
    options = {"format_whitelist": FFMPEG_FORMATS}
    with (
        path.open("rb") as raw,
        av.open(raw, "r", options=options, metadata_errors="replace") as file,
    ):
        if not file.streams.audio:
            raise RequestError("The file holds no audio: choose another.")
        stream = file.streams.audio[0]
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        resampler = av.AudioResampler(format="flt")

        def blocks() -> Iterator[np.ndarray]:
            for frame in file.decode(stream):
                if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
                    raise av.InvalidDataError(0, "the format changes on the way")
                for part in resampler.resample(frame):
                    yield part.to_ndarray().reshape(-1, channels)

        yield _Source(
            kind="WEBM"
            if "webm" in file.format.name
            else "MP4"
            if "mp4" in file.format.name
            else file.format.name.upper(),
            sampling_rate=rate,
            channels=channels,
            claimed_s=(file.duration or 0) / av.time_base,
            seek=lambda seconds: file.seek(round(seconds * av.time_base)),
            blocks=blocks,
        )
