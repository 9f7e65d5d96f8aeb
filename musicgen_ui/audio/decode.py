"""The end of an untrusted audio file, decoded within bounds of memory and work.

soundfile is the first reader; its library allocates little and runs here. What it cannot read
(phones' M4A, browsers' WebM) goes to PyAV, that is FFmpeg, in a process of its own with limits on
memory and time: an MP4's tables alone can claim gigabytes. Both readers hand over small blocks
that are mixed down, brought to at most 48 kHz and written into a ring of the last `keep_s`
seconds, because a continuation needs a clip's end. What a header says of the length serves only
to skip ahead; where that fails, the file is read from its start until it ends or the work does.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import soxr

from musicgen_ui.errors import RequestError

MIN_RATE_HZ, MAX_RATE_HZ, MAX_CHANNELS = 4_000, 400_000, 8
KEPT_RATE_HZ = 48_000  # no checkpoint uses more, and 400 kHz would fill the memory
MAX_WORK = 2_000_000_000  # decoded samples of all channels: three to five hours of stereo
BLOCK_WORK = 1_024  # a block costs about as much as this many samples, however small it is
BLOCK = 16_384  # samples
SKIP_MARGIN_S = 2.0  # compressed formats need a run-up after a seek
SKIP_ERROR_S = 0.5  # how far the length in a header may be off and still be believed
OGG_PAGE = re.compile(rb"OggS\0([\0-\7])")  # and its kind, in bits
OGG_LOOK_BYTES = 1_000_000
SLACK_BYTES = 1_000  # after the audio: an ID3v1 tag, padding; too short to be audible
CHUNKED = ("WAV", "WAVEX", "RF64", "AIFF")  # libsndfile's names
GUESSED = ("MP3", "AAC", "OGG")  # here FFmpeg's length is a guess, where files were joined
MAX_PARTS = 100_000  # of an MP4 in fragments
FENCE_BYTES, FENCE_S = 250_000_000, 120  # what FFmpeg's process may take
# FFmpeg also reads playlists, which name other files and addresses: these formats cannot.
FFMPEG_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,ogg,mp3,aac,flac,wav,aiff,caf,amr,asf"
NOT_AUDIO = "The file is not audio that can be read: use WAV, FLAC, MP3, OGG, M4A or WebM."
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


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    kind: str  # "WAV", "FLAC", "MP3", "MP4", "WEBM" …
    sampling_rate: int
    channels: int
    claimed_s: float  # its length; 0 where it does not say


@dataclass(frozen=True, eq=False)
class End:
    """The end of a file, and what was found on the way."""

    header: Header
    samples: np.ndarray  # float32 [channels, samples], 1 or 2 channels
    sampling_rate: int  # Hz, at most KEPT_RATE_HZ
    full_s: float  # the whole file's length
    broken: bool  # the decoder gave up at the end
    goes_on: bool  # the file holds more than was read, such as a second one joined to it


@dataclass(frozen=True)
class _Source:
    header: Header
    seek: Callable[[float], object]  # to seconds from the start
    blocks: Callable[[], Iterator[np.ndarray]]  # float32 [samples, channels]
    goes_on: Callable[[], bool]  # after the last block: whether there is more in the file


Reader = Callable[[Path], AbstractContextManager[_Source]]


def decode_end(path: Path, keep_s: float) -> End:
    """At most the last `keep_s` seconds of a file.

    Raises:
        RequestError: the file is not audio, has an unusable sampling rate or channel count, or
            takes too much work.
    """
    try:
        end = _read_end(_with_soundfile, path, keep_s)
    except _undecodable():
        return _read_end_fenced(path, keep_s)
    return _read_on(end, path, keep_s) if end.goes_on else end


def _read_on(end: End, path: Path, keep_s: float) -> End:
    """The end by FFmpeg, if it finds more than libsndfile did, which ends where a header says so.

    Headers are wrong in files that were joined, and in those of a recorder that lost its power.
    """
    try:
        further = _read_end_fenced(path, keep_s, whole=True)
    except RequestError:
        return end
    if further.full_s > end.full_s + 0.1:
        return further
    # After other formats, FFmpeg would have found audio: it is a tag.
    return replace(end, goes_on=end.header.kind in (*CHUNKED, "OGG"))


def _read_end(reader: Reader, path: Path, keep_s: float) -> End:
    with reader(path) as source:
        _check(source.header)
        skip_s = source.header.claimed_s - keep_s - SKIP_MARGIN_S
        if skip_s > 0:
            try:
                source.seek(skip_s)
                end = _collect(source, keep_s)
            except _undecodable():
                end = None
            if end and not end.broken:
                off_s = end.full_s - keep_s - SKIP_MARGIN_S  # were the claim true, about nothing
                if abs(off_s) < SKIP_ERROR_S:
                    return replace(end, full_s=end.header.claimed_s)
    with reader(path) as source:
        return _collect(source, keep_s)


def _check(header: Header) -> None:
    if not MIN_RATE_HZ <= header.sampling_rate <= MAX_RATE_HZ:
        raise RequestError(
            f"The file's sampling rate is {header.sampling_rate:,} Hz: "
            f"export it with {MIN_RATE_HZ:,} to {MAX_RATE_HZ:,} Hz."
        )
    if not 1 <= header.channels <= MAX_CHANNELS:
        raise RequestError(
            f"The file has {header.channels} channels: export it with at most {MAX_CHANNELS}."
        )


def _collect(source: _Source, keep_s: float) -> End:
    full_rate, channels = source.header.sampling_rate, min(source.header.channels, 2)
    rate = min(full_rate, KEPT_RATE_HZ)
    resampler = soxr.ResampleStream(full_rate, rate, channels, quality="HQ")
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
            push(mixed if rate == full_rate else resampler.resample_chunk(mixed))
    except _undecodable():
        broken = True
    if rate != full_rate:
        push(resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True))
    samples = np.roll(ring, -written, axis=1) if written > keep else ring[:, :written]
    return End(source.header, samples, rate, decoded / full_rate, broken, source.goes_on())


def _mixed(block: np.ndarray) -> np.ndarray:
    if block.shape[1] <= 2:
        return block
    return block @ np.array(LAYOUTS[block.shape[1]], np.float32)  # [samples, 2]


@contextmanager
def _with_soundfile(path: Path) -> Iterator[_Source]:
    def blocks() -> Iterator[np.ndarray]:
        while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
            yield block

    # Without a name, libsndfile cannot take a text called .au for headerless audio.
    with (
        path.open("rb", buffering=0) as raw,
        soundfile.SoundFile(raw.fileno(), closefd=False) as file,
    ):
        rate = file.samplerate
        claimed_s = file.frames * _cut_share(file.extra_info) / max(rate, 1)
        header = Header(file.format, rate, file.channels, claimed_s)
        yield _Source(
            header,
            lambda seconds: file.seek(round(seconds * rate)),
            blocks,
            lambda: _goes_on(raw, file.format),
        )


def _goes_on(raw: BinaryIO, kind: str) -> bool:
    """Whether more than tags follows what libsndfile has read, which ends at `raw`'s place."""
    size, at = os.fstat(raw.fileno()).st_size, os.lseek(raw.fileno(), 0, os.SEEK_CUR)
    if kind == "OGG":  # it reads ahead, so the place says little
        return _ogg_parts(raw, size) > 1
    name = _bytes_at(raw, at + at % 2, 4)
    is_chunk = kind in CHUNKED and re.fullmatch(rb"[\w ]{4}", name)
    return size - at > SLACK_BYTES and not is_chunk


def _ogg_parts(raw: BinaryIO, size: int) -> int:
    """How many files an Ogg file was joined from: how often streams begin after other pages.

    Their numbers do not tell: a file that was joined to itself has one alone.
    """
    parts, before = 0, False
    for at in range(0, size, OGG_LOOK_BYTES):
        for kind in OGG_PAGE.findall(_bytes_at(raw, at, OGG_LOOK_BYTES + 5)):
            begins = bool(kind[0] & 2)
            parts += begins and not before
            before = begins
    return parts


def _bytes_at(raw: BinaryIO, at: int, count: int) -> bytes:
    raw.seek(at)
    return raw.read(count)


def _cut_share(log: str) -> float:
    """How much longer a cut file was, from libsndfile's log: "data : 64000 (should be 32000)".

    Sizes near 2³¹ and 2³² mean that the writer, into a pipe, did not know them.
    """
    sizes = re.search(r": (\d+) \(should be (\d+)\)", log)
    claimed, found = map(int, sizes.groups()) if sizes else (1, 1)
    unknown = any(abs(claimed - limit) <= 0x1_0000 for limit in (2**31, 2**32))
    return claimed / found if 0 < found < claimed and not unknown else 1


def _undecodable() -> tuple[type[Exception], ...]:
    """What a decoder raises about a file; PyAV is loaded in the process that uses it alone."""
    av = sys.modules.get("av")
    return (soundfile.SoundFileError, UnicodeDecodeError, *((av.FFmpegError,) if av else ()))


@contextmanager
def _with_av(path: Path, whole: bool = False) -> Iterator[_Source]:
    """FFmpeg; `whole` reads a WAV to the end of the file, wherever its header says that it ends."""
    import av

    sought_s = 0.0

    def seek(seconds: float) -> None:
        nonlocal sought_s
        sought_s = seconds
        file.seek(round(seconds * av.time_base))

    def blocks() -> Iterator[np.ndarray]:
        nonlocal sought_s
        resampler, known = av.AudioResampler("flt", rate=rate), None
        for frame in file.decode(stream):
            if frame.time is not None and frame.time < sought_s:
                continue  # a file without an index is sought from its start
            sought_s = 0.0  # in joined files, time begins anew
            found = (frame.sample_rate, frame.layout.name, frame.format.name)
            if known not in (None, found):  # such files may go on in another format
                yield from map(with_channels, resampler.resample(None))
                resampler = av.AudioResampler("flt", rate=rate)
            known = found
            yield from map(with_channels, resampler.resample(frame))
        yield from map(with_channels, resampler.resample(None) if known else ())

    def with_channels(frame: av.AudioFrame) -> np.ndarray:
        block = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
        if block.shape[1] == channels:
            return block
        return np.repeat(block.mean(axis=1, keepdims=True), channels, axis=1)

    options = {"format_whitelist": FFMPEG_FORMATS}
    if whole:
        options["ignore_length"] = "1"
    with path.open("rb") as raw, av.open(raw, "r", options=options) as file:
        if not file.streams.audio:
            raise RequestError("The file holds no audio: choose another.")
        stream = file.streams.audio[0]
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        names = file.format.name
        kind = next((kind for kind in ("webm", "mp4") if kind in names), names).upper()
        claimed_s = 0 if kind in GUESSED else (file.duration or 0) / av.time_base
        yield _Source(Header(kind, rate, channels, claimed_s), seek, blocks, lambda: _joined(raw))


def _joined(raw: BinaryIO) -> bool:
    """Whether another file follows the first one where FFmpeg does not look for it.

    That is in WAV, AIFF and MP4, whose lengths are in the names of their parts.
    """
    at = 0
    for _ in range(MAX_PARTS):
        head = _bytes_at(raw, at, 8)
        name, length = head[4:], int.from_bytes(head[:4], "big")
        if (riff := head[:4]) in (b"RIFF", b"FORM"):
            order: Literal["little", "big"] = "little" if riff == b"RIFF" else "big"
            name, length = riff, 8 + int.from_bytes(head[4:], order)
        if at and name in (b"RIFF", b"FORM", b"ftyp"):
            return True
        if length < 8:  # the end, or what is longer than 4 GB
            return False
        at += length
    return False


def _read_end_fenced(path: Path, keep_s: float, whole: bool = False) -> End:
    """`_read_end` with PyAV in a process that may take FENCE_BYTES and FENCE_S."""
    package = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        child = subprocess.run(
            [sys.executable, "-m", "musicgen_ui.audio.decode", str(path.resolve()), str(keep_s)]
            + ["whole"] * whole,
            capture_output=True,
            timeout=FENCE_S,
            env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        )
        line = child.stdout[: child.stdout.find(b"\n") + 1]
        answer = json.loads(line)
    except subprocess.TimeoutExpired as error:
        raise RequestError("The file takes too long to decode: export it as WAV.") from error
    except ValueError as error:  # it died without a word: out of memory, or worse
        raise RequestError(NOT_AUDIO) from error
    if "refused" in answer:
        raise RequestError(answer["refused"])
    samples = np.frombuffer(child.stdout, np.float32, offset=len(line)).copy()
    header, shape = Header(**answer.pop("header")), answer.pop("shape")
    return End(header, samples.reshape(shape), **answer)


def _main(path: str, keep_s: str, whole: str = "") -> None:
    import av  # noqa: F401 - before the fence, which has no room for it

    _fence()
    samples = np.zeros(0, np.float32)
    answer: dict[str, object]
    try:
        reader = functools.partial(_with_av, whole=bool(whole))
        end = _read_end(reader, Path(path), float(keep_s))
    except _undecodable():
        answer = {"refused": NOT_AUDIO}
    except RequestError as error:
        answer = {"refused": str(error)}
    else:
        samples = end.samples
        answer = {
            "header": asdict(end.header),
            "shape": samples.shape,
            "sampling_rate": end.sampling_rate,
            "full_s": end.full_s,
            "broken": end.broken,
            "goes_on": end.goes_on,
        }
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.write(np.ascontiguousarray(samples).data)


def _fence() -> None:
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return  # Windows and macOS have no such limit; the time's still holds
    resource.setrlimit(resource.RLIMIT_AS, (used + FENCE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (FENCE_S,) * 2)


if __name__ == "__main__":
    _main(*sys.argv[1:])
