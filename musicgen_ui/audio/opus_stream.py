"""Ogg Opus that is written while the music is made.

libsndfile writes a page of Ogg for each second, so a listener is a second behind at most. Opus has
48 kHz: other sampling rates are resampled as one signal, without a seam between clips.
"""

from __future__ import annotations

import io

import numpy as np
import soundfile
import soxr

from musicgen_ui.audio.clip import LOSSY, OPUS_RATES, Clip

MEDIA_TYPE = "audio/ogg"


class _Pages:
    """A file for libsndfile, which keeps what was written since `take` alone."""

    def __init__(self) -> None:
        self._pages = bytearray()
        self._position = 0

    def read(self, size: int) -> bytes:
        """Nothing is read from a file that is written; soundfile asks for the method."""
        raise io.UnsupportedOperation("read")

    def tell(self) -> int:
        """How much was written."""
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """libsndfile seeks to where it is, and never writes anywhere but at the end."""
        return self._position

    def write(self, data: bytes) -> int:
        """Adds to the end."""
        written = bytes(data)
        self._pages += written
        self._position += len(written)
        return len(written)

    def take(self) -> bytes:
        """What was written since."""
        taken = bytes(self._pages)
        self._pages.clear()
        return taken


class OpusStream:
    """A signal that becomes Ogg Opus clip by clip.

    Args:
        sampling_rate: of the clips, in Hz.
        channels: of the clips, 1 or 2.
    """

    def __init__(self, sampling_rate: int, channels: int) -> None:
        rate = sampling_rate if sampling_rate in OPUS_RATES else OPUS_RATES[-1]
        self._resampler = soxr.ResampleStream(sampling_rate, rate, channels)
        self._channels = channels
        self._pages = _Pages()
        options = LOSSY[".opus"]
        self._file = soundfile.SoundFile(self._pages, "w", rate, channels, format="OGG", **options)

    def write(self, clip: Clip) -> bytes:
        """The pages that are complete with the signal's next clip."""
        self._file.write(self._resampler.resample_chunk(np.ascontiguousarray(clip.samples.T)))
        return self._pages.take()

    def close(self) -> bytes:
        """The rest."""
        nothing = np.zeros((0, self._channels), np.float32)
        self._file.write(self._resampler.resample_chunk(nothing, last=True))
        self._file.close()
        return self._pages.take()
