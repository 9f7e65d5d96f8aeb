"""One variation under way: its columns, its place in the decoder, its audio so far.

A job's columns are laid out when it is admitted, with the audio prompt's codes and the start
tokens in their places, so a step only fills what is `UNWRITTEN`. Frames whose last codebook is
written go to the codec's stream. The audio prompt goes through that stream first: the decoder of
the codec then hears prompt and new frames as one piece, and the new audio is what `generate` would
give from its first sample.

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

import dataclasses
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Chroma, Clip
from musicgen_ui.engine import delay_pattern, sampling
from musicgen_ui.engine.codec import PIECE_FRAMES, Codec, Decoding
from musicgen_ui.engine.faults import NotFiniteError
from musicgen_ui.engine.lora import AppliedAdapter
from musicgen_ui.engine.protocol import Chunk, Finished, Progress
from musicgen_ui.engine.transformer import Sequence
from musicgen_ui.request import WINDOW_S, GenerationRequest, overlap_used_s

FIRST_CHUNK_FRAMES = 10  # 0.2 s, so that something is heard early
CHUNK_FRAMES = 25  # 0.5 s: few enough calls, and no long stall for the other jobs


def steps_for(
    request: GenerationRequest, codec: Codec, codebooks: int, window_s: float = WINDOW_S
) -> int:
    """Steps that a variation of `request` takes, about; known before its `Job` is made."""
    delayed = codebooks // codec.channels - 1
    context = round(request.context_used_s(window_s) * codec.frame_rate)
    return round(request.duration_s * codec.frame_rate) + delayed + _pieces(context)


def _pieces(context_frames: int) -> int:
    """Steps in which an audio prompt is encoded and taken in."""
    return math.ceil(context_frames / PIECE_FRAMES) * 2


class Job:
    """A single variation of a request, from its codes to its take.

    Args:
        request: with its own seed and the checkpoint's name.
        variation: its number among the request's.
        codec: of the checkpoint.
        codebooks: rows of codes: 4 in mono, 8 in stereo for Meta's.
        start_token: of the decoder.
        device: of the decoder.
        window_s: the length of the decoder's training examples.
    """

    sequence: Sequence  # given by the batch, which knows the decoder
    adapter: AppliedAdapter | None = None  # given by the batch too
    notes: tuple[str, ...] = ()  # of the take, and what it follows: by the batch as well
    melody: Chroma | None = None

    def __init__(
        self,
        request: GenerationRequest,
        variation: int,
        codec: Codec,
        codebooks: int,
        start_token: int,
        device: torch.device,
        window_s: float = WINDOW_S,
    ) -> None:
        self.request = request
        self.window_s = min(window_s, WINDOW_S)
        self.variation = variation
        self.codec = codec
        self.new_frames = round(request.duration_s * codec.frame_rate)
        self.clip = (
            audio.convert(request.audio_prompt, codec.sampling_rate, codec.channels)
            if request.audio_prompt
            else None
        )
        self.context_frames = self._room_for_context()
        self.encoded_frames = 0  # of the context
        self._encoding = self._encode_context()
        self.frames = self.context_frames + self.new_frames
        self.start_token = start_token
        context = torch.zeros(codebooks, self.context_frames, dtype=torch.int64, device=device)
        self._lay_out(0, context)
        # Drawn for the whole piece: a code's number depends on its frame and never on the window.
        draws = self.new_frames + self.positions - self.window_frames
        self.uniforms = sampling.uniforms(request.seed, draws, codebooks).to(device)
        self.words = request.words()
        self.stream = codec.stream()
        self.sane = torch.ones((), dtype=torch.bool, device=device)  # logits were numbers
        self.decoded_frames = 0  # that went to the codec
        self.decoding: Decoding | None = None  # what is there now
        self.ended = False  # nothing more goes there
        self.decoded_samples = 0  # of `samples`, which hold the context too
        self.samples = np.empty((codec.channels, self.frames * codec.hop), np.float32)
        self.started_s: float | None = None
        self.told_s = 0.0

    def _lay_out(self, start: int, known: Tensor) -> None:
        """Begins the window at frame `start` with the codes of its first frames."""
        self.start = start  # frames before the window
        self.window_frames = min(self.frames - start, round(self.window_s * self.codec.frame_rate))
        self.known_frames = known.shape[1]
        self.columns = delay_pattern.delayed(
            known, self.window_frames, self.codec.channels, self.start_token
        )
        self.written = self.known_frames  # the last column that is wholly known

    @torch.inference_mode()
    def slide(self) -> bool:
        """Begins the next window if this one is full, with the codes of its end; whether it did.

        It waits for the codec where that lags behind the overlap.
        """
        overlap_s = overlap_used_s(self.request.overlap_s, self.window_s)
        overlap = min(round(overlap_s * self.codec.frame_rate), self.window_frames - 1)
        start = self.start + self.window_frames - overlap
        if self.done or self.written < self.positions or self.decoded_frames < start:
            return False
        kept = self.window_frames - overlap, self.window_frames
        self._lay_out(start, delay_pattern.undelayed(self.columns, *kept, self.codec.channels))
        return True

    def turn(self) -> bool:
        """Goes on to the words for the frame that is written next; whether they are others."""
        before, self.words = self.words, self.request.words(self.at_s)
        return self.words != before

    @property
    def at_s(self) -> float:
        """Where in the new music the frame lies that is begun next, in seconds."""
        frame = self.start + min(self.written, self.window_frames - 1)
        return (frame - self.context_frames) / self.codec.frame_rate

    @property
    def start_s(self) -> float:
        """Where in the new music the window begins, in seconds; below 0 with an audio prompt."""
        return (self.start - self.context_frames) / self.codec.frame_rate

    @property
    def next_uniform(self) -> int:
        """The row of `uniforms` that the next column is drawn with."""
        return self.start + self.written - self.context_frames

    def _room_for_context(self) -> int:
        """Frames of the clip's end that the model hears; 0 without a clip."""
        if self.clip is None:
            return 0
        room = int(self.request.context_used_s(self.window_s) * self.codec.frame_rate + 1e-6)
        return min(room, self.clip.samples.shape[1] // self.codec.hop)

    def _encode_context(self) -> Iterator[Tensor]:
        if self.clip is None or not self.context_frames:
            return iter(())
        heard = self.clip.samples[:, -self.context_frames * self.codec.hop :]
        return self.codec.encoding(torch.from_numpy(heard))

    @property
    def encoded(self) -> bool:
        """The context's codes are all in their places."""
        return self.encoded_frames == self.context_frames

    @torch.inference_mode()
    def encode_piece(self) -> None:
        """Lays the codes of some more of the context into their places."""
        codes = next(self._encoding)
        delay_pattern.write_codes(codes, self.columns, self.encoded_frames, self.codec.channels)
        self.encoded_frames += codes.shape[1]

    @property
    def positions(self) -> int:
        """Columns of the window that go through the decoder."""
        return self.columns.shape[1] - 1

    @property
    def steps_left(self) -> int:
        """Steps until it is done, about: pieces of the context that are still to come count too."""
        unheard = 0 if self.started_s else _pieces(self.context_frames)
        return self.frames - self.frames_done + unheard

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

    def advance(self) -> None:
        """Another column was written."""
        if self.started_s is None:
            self.started_s = time.monotonic()
        self.written += 1

    def progress(self) -> Progress:
        """How far the new music is."""
        done_s = (self.frames_done - self.context_frames) / self.codec.frame_rate
        total_s = self.new_frames / self.codec.frame_rate
        return Progress(
            "composing", self.variation, done_s=done_s, total_s=total_s, speed=self._speed(done_s)
        )

    def _speed(self, done_s: float) -> float:
        worked_s = time.monotonic() - self.started_s if self.started_s else 0.0
        return done_s / worked_s if worked_s else 0.0

    def chunk_due(self, most_frames: int = CHUNK_FRAMES) -> bool:
        """There are frames enough to be worth a call of the codec, and it has none of this job.

        Chunks grow up to `most_frames`: each is at most as long as the music before it, so that
        whoever listens has time to wait for it.
        """
        if not self.encoded or self.decoding or self.ended:
            return False
        new = self.decoded_frames - self.context_frames
        frames = min(max(new, CHUNK_FRAMES), most_frames) if new > 0 else FIRST_CHUNK_FRAMES
        return self.waiting_frames >= frames

    @property
    def waiting_frames(self) -> int:
        """Frames that are done and did not go to the codec."""
        return self.frames_done - self.decoded_frames

    def decode(self, last: bool = False) -> None:
        """Sends all frames that are done to the codec; `chunk` has what comes back."""
        codes = self._codes(self.waiting_frames)
        (self.decoding,) = Decoding.start([self.stream], [codes], [self.sane], last)
        self.decoded_frames, self.ended = self.frames_done, last

    @staticmethod
    def decode_together(jobs: list[Job], frames: int) -> None:
        """Sends so many frames of each to the codec in one pass; their streams are of one phase."""
        streams, codes = [job.stream for job in jobs], [job._codes(frames) for job in jobs]
        started = Decoding.start(streams, codes, [job.sane for job in jobs])
        for job, decoding in zip(jobs, started, strict=True):
            job.decoding = decoding
            job.decoded_frames += frames

    def _codes(self, frames: int) -> Tensor:
        """The next ones for the codec, int64 [codebooks, frames]."""
        begin = self.decoded_frames - self.start
        return delay_pattern.undelayed(self.columns, begin, begin + frames, self.codec.channels)

    def chunk(self) -> Chunk | None:
        """The new audio of the frames that went to the codec, for which it waits.

        Raises:
            NotFiniteError: it would be noise.
        """
        assert self.decoding
        piece = self.decoding.samples()
        self.decoding = None
        if piece is None:
            raise NotFiniteError
        begin = self.decoded_samples
        self.decoded_samples += piece.shape[1]
        self.samples[:, begin : self.decoded_samples] = piece
        new = self.samples[:, max(self.context_samples, begin) : self.decoded_samples]
        return Chunk(self.variation, Clip(new, self.codec.sampling_rate)) if new.size else None

    def rest(self) -> Iterator[Chunk | None]:
        """The chunks of all that is done and was not handed out yet; ends the signal."""
        if self.decoding:
            yield self.chunk()
        if not self.ended and self.frames_done > self.context_frames:
            self.decode(last=True)
            yield self.chunk()

    @property
    def context_samples(self) -> int:
        """Samples of the decoded audio that are the context's reconstruction."""
        return self.context_frames * self.codec.hop

    def finished(self, notes: tuple[str, ...] = (), melody: Chroma | None = None) -> Finished:
        """The take, once `rest` was read or nothing was made."""
        new_s = (self.frames_done - self.context_frames) / self.codec.frame_rate
        decoded = self.samples[:, : self.decoded_samples]
        clip = self.clip if self.request.include_prompt else None
        if clip is None:
            take = Clip(decoded[:, self.context_samples :], self.codec.sampling_rate)
        else:
            take = audio.join(clip, decoded, self.context_samples) if decoded.size else clip
        return Finished(
            variation=self.variation,
            clip=take,
            request=dataclasses.replace(self.request, stereo=self.codec.channels == 2),
            prompt_s=clip.duration_s if clip else 0.0,
            speed=self._speed(new_s),
            stopped=not self.done,
            notes=notes,
            melody=melody,
        )
