"""Audio files that somebody has damaged, or made to do damage: seeds of every format, changed."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import av
import numpy as np
import soundfile

WITH_SOUNDFILE = ("wav", "flac", "mp3", "ogg")
FENCED = ("m4a", "webm")  # FFmpeg's, in a process of its own
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def seeds(folder: Path, ending: str) -> list[bytes]:
    """Whole files of a format: mono and stereo, of several rates and kinds of samples."""
    kinds = {
        "wav": [("PCM_16", 1), ("PCM_24", 2), ("FLOAT", 2), ("MS_ADPCM", 1), ("ULAW", 1)],
        "flac": [("PCM_16", 2), ("PCM_24", 1)],
        "mp3": [("MPEG_LAYER_III", 2), ("MPEG_LAYER_III", 1)],
        "ogg": [("VORBIS", 2), ("OPUS", 1)],
    }
    files = []
    for number, (subtype, channels) in enumerate(kinds.get(ending, ())):
        path = folder / f"seed-{number}.{ending}"
        soundfile.write(path, _music(channels), 48_000, subtype, format=ending.upper())
        files.append(path.read_bytes())
    for codec in {"m4a": ("aac", "alac"), "webm": ("libopus",)}.get(ending, ()):
        path = folder / f"{codec}.{ending}"
        _encode(path, codec)
        files.append(path.read_bytes())
    return files


def _music(channels: int) -> np.ndarray:
    t = np.arange(24_000) / 48_000
    tones = [0.3 * np.sin(2 * np.pi * (220 + 110 * channel) * t) for channel in range(channels)]
    return np.stack(tones, axis=1)


def _encode(path: Path, codec: str) -> None:
    form = "s16p" if codec == "alac" else "fltp"
    samples = np.ascontiguousarray(_music(1).T.astype(np.float32))
    if codec == "alac":
        samples = (samples * 32767).astype(np.int16)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=48_000, layout="mono", format=form)
        frame = av.AudioFrame.from_ndarray(samples, format=form, layout="mono")
        frame.sample_rate = 48_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def mutate(whole: bytes, draw: random.Random) -> bytes:
    """One to five changes of a file; half of them in its head, where its claims are."""
    content = bytearray(whole)
    for _ in range(draw.randint(1, 5)):
        if not content:
            break
        reach = len(content) if draw.random() < 0.5 else min(len(content), 200)
        _change(content, draw.randrange(reach), draw)
    return bytes(content)


def _change(content: bytearray, at: int, draw: random.Random) -> None:
    length = min(draw.choice((1, 4, 16, 400)), len(content) - at)
    match draw.randrange(8):
        case 0:
            content[at] ^= 1 << draw.randrange(8)
        case 1:
            size = draw.choice("BHIQ")
            number = draw.choice(NUMBERS) % 256 ** struct.calcsize(size)
            written = struct.pack(draw.choice("<>") + size, number)
            content[at : at + len(written)] = written
        case 2:
            content[at : at + length] = draw.randbytes(length)
        case 3:
            del content[at : at + length]
        case 4:
            content[at:at] = content[at : at + length] * draw.randint(1, 20)
        case 5:
            content[at:at] = draw.randbytes(length)
        case 6:
            del content[max(at, 12) :]
        case 7:
            other = draw.randrange(len(content))
            content[at : at + length] = content[other : other + length]
