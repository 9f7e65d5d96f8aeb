"""One variation of a job: what is asked for, its codes, its audio so far.

`Specification` is fixed when the job is queued. `CodeWindow`, in `code_window`, holds the codes
that the decoder reads and writes, `TakeRecorder` turns finished frames into audio, and `Slot` is
what the stepper keeps.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Chroma, Clip
from musicgen_ui.engine import sampling
from musicgen_ui.engine.audio_prompt import AudioPrompt
from musicgen_ui.engine.code_window import CodeWindow
from musicgen_ui.engine.codec import Codec, Decoding
from musicgen_ui.engine.device import moved
from musicgen_ui.engine.faults import NotFiniteError
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.lora import AppliedAdapter
from musicgen_ui.engine.protocol import Chunk, Finished, Progress, Recorded, Stage
from musicgen_ui.engine.transformer import Sequence
from musicgen_ui.request import GenerationRequest

FIRST_CHUNK_FRAMES = 10  # 0.2 s, so that the first audio comes early
CHUNK_FRAMES = 25  # 0.5 s: few enough calls, and no long stall for the other variations
DECODED_FRAMES = 1500  # 30 s in a call of the codec: more wait where a piece goes on after them
ENDLESS_STEPS = 1 << 40  # of a live piece
PREFILL_COLUMNS = 128  # of an audio prompt between two steps, so that the others go on


@dataclass(frozen=True, eq=False)
class Specification:
    """What a variation is made of. The queue holds these."""

    job: LoggedJob
    index: int  # its number among the job's variations
    request: GenerationRequest  # of this variation alone, as its take records it
    prompt: AudioPrompt | None
    steps: int  # that it takes, about

    @property
    def delivered(self) -> bool:
        """Whether audio of this variation is in the job's log."""
        events = self.job.log.so_far()
        return any(isinstance(e, Chunk) and e.variation == self.index for e in events)

    @classmethod
    def of_job(
        cls, job: LoggedJob, prompt: AudioPrompt | None, checkpoint: str, codec: Codec
    ) -> list[Specification]:
        """One for each variation of the job."""
        stereo = codec.channels == 2
        request = dataclasses.replace(job.request, checkpoint=checkpoint, stereo=stereo)
        context = prompt.codes.shape[1] if prompt else 0
        delayed = codec.codebooks - 1
        steps = round(request.end_s * codec.frame_rate) + delayed + prefill_steps(context)
        if request.live:
            steps = ENDLESS_STEPS
        return [
            cls(job, index, request.variation(index), prompt, steps)
            for index in range(request.variations)
        ]


def prefill_steps(context_frames: int) -> int:
    """Steps in which an audio prompt is taken in."""
    return math.ceil(context_frames / PREFILL_COLUMNS)


@dataclass(eq=False)
class Slot:
    """A variation's state in the stepper, which alone changes it."""

    sequence: Sequence  # its KV caches and the text that it attends to
    finite: Tensor  # bool, any shape: all logits were numbers


class TakeRecorder:
    """Decodes finished frames, hands out the audio in chunks, and keeps all of it.

    Args:
        window: where the codes come from.
        codec: of the checkpoint.
        index: the variation's number.
        samples: of each channel that are kept; None is all.
        with_codes: whether chunks carry the codes of the frames that went to the codec for them.
    """

    alone = False  # whether its chunks are decoded without those of others

    def __init__(
        self,
        window: CodeWindow,
        codec: Codec,
        index: int,
        samples: int | None = None,
        with_codes: bool = False,
    ) -> None:
        self._window = window
        self._codec = codec
        self._index = index
        self.stream = codec.stream()
        self.decoded_frames = 0  # that went to the codec
        self.decoding: Decoding | None = None  # what is there now
        self.ended = False  # nothing more goes there
        self._codes: list[Tensor] = []  # all that went there, int64 [codebooks, frames] each
        self._with_codes = with_codes
        self._sent_frames = window.context_frames  # whose codes went out with a chunk
        self._decoded_samples = 0  # of `_samples`, which hold the context too
        samples = window.frames * codec.hop if samples is None else samples
        self._samples = np.empty((codec.channels, samples), np.float32)
        self._hop = codec.hop
        self._context_samples = window.context_frames * codec.hop

    @property
    def waiting_frames(self) -> int:
        """Frames that are done and did not go to the codec."""
        return self._window.frames_done - self.decoded_frames

    def is_due(self, most_frames: int = CHUNK_FRAMES) -> bool:
        """There are enough frames for a call of the codec, and it has none of this variation.

        Chunks grow up to `most_frames`: each is at most as long as the music before it, so that a
        listener has time to wait for it.
        """
        if self.decoding or self.ended:
            return False
        new = self.decoded_frames - self._window.context_frames
        frames = min(max(new, CHUNK_FRAMES), most_frames) if new > 0 else FIRST_CHUNK_FRAMES
        return self.waiting_frames >= frames

    def decode(self, finite: Tensor, last: bool = False) -> None:
        """Sends the frames that are done to the codec; `chunk` has what comes back."""
        frames = self.waiting_frames
        codes = self._take_codes(frames if last else min(frames, DECODED_FRAMES))
        (self.decoding,) = Decoding.start([self.stream], [codes], [finite], last)
        self.ended = last

    @staticmethod
    def decode_together(recorders: list[TakeRecorder], finite: list[Tensor], frames: int) -> None:
        """Sends so many frames of each to the codec in one pass; their streams are of one phase."""
        streams = [recorder.stream for recorder in recorders]
        begins = [recorder.decoded_frames for recorder in recorders]
        codes = [
            recorder._window.codes(begin, begin + frames)
            for recorder, begin in zip(recorders, begins, strict=True)
        ]
        started = Decoding.start(streams, codes, finite)
        for recorder, decoding, some in zip(recorders, started, codes, strict=True):
            recorder.decoding = decoding
            recorder._codes.append(some)
            recorder.decoded_frames += frames

    def _take_codes(self, frames: int) -> Tensor:
        codes = self._window.codes(self.decoded_frames, self.decoded_frames + frames)
        self._codes.append(codes)
        self.decoded_frames += frames
        return codes

    def chunk(self) -> Chunk | None:
        """The new audio of the frames that went to the codec, for which it waits.

        Raises:
            NotFiniteError: logits or audio are no numbers.
        """
        assert self.decoding
        piece = self.decoding.samples()
        self.decoding = None
        if piece is None:
            raise NotFiniteError
        begin = self._decoded_samples
        self._decoded_samples += piece.shape[1]
        self._samples[:, begin : self._decoded_samples] = piece
        begin = max(self._context_samples, begin)
        new = self._samples[:, begin : self._decoded_samples]
        if not new.size:
            return None
        clip = Clip(new, self._codec.sampling_rate)
        if self._with_codes:
            codes = torch.cat(self._codes, dim=1)[:, self._sent_frames :]
            self._sent_frames += codes.shape[1]
            clip = dataclasses.replace(
                clip, codes=codes.to(torch.int16).cpu().numpy(), codec=self._codec.name
            )
        return Chunk(self._index, clip, begin - self._context_samples)

    def rest(self, finite: Tensor) -> Iterator[Chunk | None]:
        """The chunks of all that is done and was not handed out yet; ends the signal."""
        if self.decoding:
            yield self.chunk()
        if not self.ended and self._window.frames_done > self._window.context_frames:
            self.decode(finite, last=True)
            yield self.chunk()

    def codes(self) -> np.ndarray | None:
        """All that were decoded, int16 [codebooks, frames].

        None before the first, and where the audio breaks off within them.
        """
        if not self._decoded_samples or self._decoded_samples != self.decoded_frames * self._hop:
            return None
        return torch.cat(self._codes, dim=1).to(torch.int16).cpu().numpy()

    def clip(self, prompt: Clip | None) -> Clip:
        """The take: the audio prompt, if it is included, and all new audio."""
        decoded = self._samples[:, : self._decoded_samples]
        new = decoded[:, self._context_samples :]
        take = Clip(new, self._codec.sampling_rate)
        if prompt:
            take = audio.join(prompt, decoded, self._context_samples) if decoded.size else prompt
        return dataclasses.replace(take, codes=self.codes(), codec=self._codec.name)


class Variation:
    """A variation that has been admitted to the decoder.

    Args:
        specification: what to make.
        codec: of the checkpoint.
        codebooks: rows of codes: 4 in mono, 8 in stereo for Meta's.
        start_token: of the decoder.
        device: of the decoder.
        window_s: the length of its training examples.
    """

    slot: Slot  # set by the stepper
    adapter: AppliedAdapter | None = None  # set before it is admitted, as the next two
    notes: tuple[str, ...] = ()  # of the take
    melody: Chroma | None = None  # what it follows
    # A mix in place of the request's prompt, and another guidance; see `Conditioner.conditions`.
    prompts: tuple[tuple[str, float], ...] | None = None
    guidance_scale: float | None = None

    def __init__(
        self,
        specification: Specification,
        codec: Codec,
        codebooks: int,
        start_token: int,
        device: torch.device,
        window_s: float,
    ) -> None:
        self.specification = specification
        self.request = request = specification.request
        self._codec = codec
        prompt = specification.prompt
        codes = prompt.codes if prompt else np.zeros((codebooks, 0), np.int16)
        self._made_frames = 0
        self._begin(moved(torch.from_numpy(codes), device).to(torch.int64), start_token, window_s)
        self._text = request.words(self.at_s)
        self._started_s: float | None = None
        self.reported_s = 0.0  # when progress was last reported, on the monotonic clock

    def _begin(self, context: Tensor, start_token: int, window_s: float) -> None:
        """Sets window, recorder and random numbers; `context` is int64 [codebooks, frames]."""
        request, codec = self.request, self._codec
        new_frames = round(request.duration_s * codec.frame_rate)
        self.window = CodeWindow(context, new_frames, codec, start_token, window_s)
        # Drawn for the whole piece: a code's number depends on its frame and never on the window.
        draws = new_frames + self.window.positions - self.window.window_frames
        device, index = context.device, self.specification.index
        self.uniforms = moved(sampling.uniforms(request.seed, draws, len(context)), device)
        made = self.job.made
        self.recorder = TakeRecorder(self.window, codec, index, with_codes=made is not None)
        if made and (frames := made.get(index)) is not None:
            self._made_frames = frames.shape[1]
            self.window.resume(torch.from_numpy(frames).to(device, torch.int64), request.overlap_s)

    @property
    def job(self) -> LoggedJob:
        """The job that it is a part of."""
        return self.specification.job

    @property
    def index(self) -> int:
        """Its number among the job's variations."""
        return self.specification.index

    @property
    def next_uniform(self) -> int:
        """The row of `uniforms` that the next column is drawn with."""
        return self.window.start + self.window.written - self.window.context_frames

    @property
    def at_s(self) -> float:
        """Where in the new music the frame lies that is begun next, in seconds."""
        window = self.window
        frame = window.start + min(window.written, window.window_frames - 1)
        return (frame - window.context_frames) / self._codec.frame_rate

    @property
    def start_s(self) -> float:
        """Where in the new music the window begins, in seconds; below 0 with an audio prompt."""
        return (self.window.start - self.window.context_frames) / self._codec.frame_rate

    @property
    def prefilled(self) -> bool:
        """The decoder has taken in all that is written."""
        return self.slot.sequence.length >= self.window.written

    @property
    def ready(self) -> bool:
        """Its next column can be stepped."""
        window = self.window
        if self._made_frames and (
            window.written < window.known_frames or self._text != self.request.words(self.at_s)
        ):
            return False
        return self.slot.sequence.length == window.written < window.positions

    @property
    def waits(self) -> bool:
        """Its next column is not to be stepped yet."""
        return False

    def worked(self, seconds: float) -> None:
        """A step that wrote a column of it took so long."""

    def recordings(self) -> Iterator[Recorded]:
        """The stretches that a listener wants as takes."""
        return iter(())

    @property
    def abandoned(self) -> bool:
        """Nobody listens to it any more."""
        return False

    @property
    def steps_left(self) -> int:
        """Steps until it is done, about."""
        window = self.window
        prefill = 0 if self._started_s else prefill_steps(window.context_frames)
        return window.frames - window.frames_done + prefill

    def slide(self) -> bool:
        """Begins the next window if its time has come; whether it did."""
        return self.window.slide(self.request.overlap_s, self.recorder.decoded_frames)

    def skip_made(self) -> bool:
        """Steps over codes made before, once the decoder has taken in those before; whether so."""
        before = self.window.written
        if self._made_frames and self.prefilled:
            rate, context = self._codec.frame_rate, self.window.context_frames
            changes = (context + math.ceil(s * rate - 1e-9) for s, _ in self.request.sections)
            self.window.skip_made(changes)
        return self.window.written != before

    def change_text(self) -> bool:
        """Goes on to the section of the frame that is written next; whether it has other words.

        Not before the decoder has taken in what is written, which the words before belong to.
        """
        if not self.prefilled:
            return False
        before, self._text = self._text, self.request.words(self.at_s)
        return self._text != before

    def advance(self) -> None:
        """Another column was written."""
        if self._started_s is None:
            self._started_s = time.monotonic()
        self.window.written += 1

    def decode(self, last: bool = False) -> None:
        """Sends all frames that are done to the codec."""
        self.recorder.decode(self.slot.finite, last)

    @property
    def _done_s(self) -> float:
        return (self.window.frames_done - self.window.context_frames) / self._codec.frame_rate

    @property
    def _speed(self) -> float:
        worked_s = time.monotonic() - self._started_s if self._started_s else 0.0
        new_s = self._done_s - self._made_frames / self._codec.frame_rate
        return new_s / worked_s if worked_s else 0.0

    def progress(self) -> Progress:
        """How far the new music is."""
        total_s = (self.window.frames - self.window.context_frames) / self._codec.frame_rate
        done_s = self._done_s
        return Progress(
            Stage.COMPOSING, self.index, done_s=done_s, total_s=total_s, speed=self._speed
        )

    def finished(self) -> Finished:
        """The take, once the recorder's `rest` was read or nothing was made."""
        prompt = self.specification.prompt if self.request.include_prompt else None
        clip = self.recorder.clip(prompt.clip if prompt else None)
        return Finished(
            variation=self.index,
            clip=clip,
            request=self.request,
            prompt_s=prompt.clip.duration_s if prompt else 0.0,
            speed=self._speed,
            stopped=not self.window.done,
            notes=self.notes,
            melody=self.melody,
            codes=clip.codes,
            context_frames=self.window.context_frames,
        )
