"""The codes of a window: laid out when it begins, written by the decoder, handed to the codec.

The columns are laid out when a variation starts, with the audio prompt's codes and the start tokens
in their places, so a step only fills what is `UNWRITTEN`. Frames whose last codebook is written go
to the codec's stream. The audio prompt goes through that stream first: the codec's decoder then
hears prompt and new frames as one piece, and the new audio is what `generate` would give from its
first sample.

The columns are those of a window, which is as long as the model's training examples: 30 s for
MusicGen, 10 s for AudioGen. A longer piece is made of several, as in audiocraft
(`GenModel._generate_tokens`): a window is written to its end, the last codebooks of its last frames
included, and the codes of its last frames, the overlap, stand where the audio prompt's would at the
head of the next one. There they are delayed anew, after a column of start tokens and with start
tokens before the delayed codebooks: the only head of a window that the model knows. So each window
is what `generate` makes of the overlap's codes. To go on from the columns as they are would save as
many steps a window as codebooks are delayed, 3 of 900, and begin every window with a head that no
training piece had. The codec's stream knows no windows, so nothing is decoded twice and there is no
seam.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from musicgen_ui.engine import delay_pattern
from musicgen_ui.engine.codec import Codec
from musicgen_ui.request import WINDOW_S, overlap_used_s


def bounded_window_s(training_s: float) -> float:
    """The length of a window for a decoder whose training examples are so long."""
    return min(training_s, WINDOW_S)


class CodeWindow:
    """The codes of a piece, a window at a time.

    Args:
        context: the audio prompt's codes, int64 [codebooks, context frames], on the decoder's
            device.
        new_frames: to make.
        codec: of the checkpoint.
        start_token: of the decoder.
        window_s: the length of the decoder's training examples.
    """

    def __init__(
        self, context: Tensor, new_frames: int, codec: Codec, start_token: int, window_s: float
    ) -> None:
        self._window_s = bounded_window_s(window_s)
        self.context_frames = context.shape[1]
        self.frames = self.context_frames + new_frames
        self._codec = codec
        self._start_token = start_token
        self._known = context  # frames from the first on, the made ones too where it goes on
        self._lay_out(0, context)

    def _lay_out(self, start: int, known: Tensor) -> None:
        """Begins the window at frame `start` with the codes of its first frames."""
        codec = self._codec
        self.start = start  # frames before the window
        self.window_frames = min(self.frames - start, round(self._window_s * codec.frame_rate))
        self.known_frames = known.shape[1]
        # int64 [codebooks, 1 + frames + delay]; the stepper may move it into its own buffer
        self.columns = delay_pattern.delayed(
            known, self.window_frames, codec.channels, self._start_token
        )
        self.written = self.known_frames  # the last column that is wholly known

    @property
    def positions(self) -> int:
        """Columns of the window that go through the decoder."""
        return self.columns.shape[1] - 1

    @property
    def done(self) -> bool:
        """Every column of the last window is written."""
        last = self.start + self.window_frames == self.frames
        return last and self.written == self.positions

    @property
    def frames_done(self) -> int:
        """Frames whose codebooks are all known, the context's included."""
        delayed = self.positions - self.window_frames
        return self.start + max(self.known_frames, self.written - delayed)

    def codes(self, begin: int, end: int) -> Tensor:
        """Frames `begin` to `end` of the piece; int64 [codebooks, frames].

        Those before this window are known where the piece went on from made codes.
        """
        known = self._known[:, begin : min(end, self.start)]
        begin, end = max(begin - self.start, 0), end - self.start
        codes = delay_pattern.undelayed(self.columns, begin, max(begin, end), self._codec.channels)
        return torch.cat([known, codes], dim=1) if known.shape[1] else codes

    @torch.inference_mode()
    def resume(self, made: Tensor, overlap_s: float) -> None:
        """Goes on after codes that were made before; nothing may be written yet.

        The columns are laid out as if this decoder had written them; `skip_made` counts them.

        Args:
            made: int64 [codebooks, new frames], from the first new one on, at most all.
            overlap_s: of two windows.
        """
        context = self._known
        self._known = known = torch.cat([context, made], dim=1)
        written = context.shape[1]
        while known.shape[1] > self.start + self.window_frames:
            written = self.overlap_frames(overlap_s)
            start = self.start + self.window_frames - written
            self._lay_out(start, known[:, start : start + written])
        self._lay_out(self.start, known[:, self.start :])
        self.written = written

    def skip_made(self, text_changes: Iterable[int]) -> None:
        """Counts made columns as written, up to the next change of the text or the last of them.

        Args:
            text_changes: the frames of the piece at which the model's text changes, rising.
        """
        for frame in text_changes:
            if self.written < frame - self.start < self.known_frames:
                self.written = frame - self.start
                return
        self.written = max(self.written, self.known_frames)

    def overlap_frames(self, overlap_s: float) -> int:
        """Frames at the head of the next window that this one's end gives."""
        overlap_s = overlap_used_s(overlap_s, self._window_s)
        return min(round(overlap_s * self._codec.frame_rate), self.window_frames - 1)

    @torch.inference_mode()
    def slide(self, overlap_s: float, decoded_frames: int) -> bool:
        """Begins the next window if this one is full, with the codes of its end; whether it did.

        It waits for the codec where that lags behind the overlap.
        """
        overlap = self.overlap_frames(overlap_s)
        start = self.start + self.window_frames - overlap
        if self.done or self.written < self.positions or decoded_frames < start:
            return False
        self._lay_out(start, self.codes(start, start + overlap))
        return True
