"""Pieces that are changed while they are made: live ones, and takes that repeat a recording.

A live piece has no end. It is written in whole windows, decoded in chunks of one length, and made
no further than `LOOK_AHEAD_S` beyond what its listener has heard, so that a change is heard soon.
Its last `KEPT_S` seconds are kept, so that a stretch of them can become a take.

A change acts at a frame. The frames and changes are the piece's automation, and a request with that
automation takes the same way as the live piece: the same windows, draws and chunks. It ends within
the piece, so its last frames, and what the codec makes of them, have the same future. That is why
the take is the recording to the sample.

A memory slot holds the codes of the last `overlap_s` seconds. To recall them begins a window with
them at its head: the piece goes on from there, at the frame where it is.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.code_window import CodeWindow
from musicgen_ui.engine.codec import Codec, Decoding
from musicgen_ui.engine.conditioning import Conditioner, Conditions
from musicgen_ui.engine.faults import NotFiniteError
from musicgen_ui.engine.job import RECORDED_S
from musicgen_ui.engine.protocol import Chunk, Finished, Progress, Recorded, Stage
from musicgen_ui.engine.sampling import SamplingParams
from musicgen_ui.engine.variation import (
    ENDLESS_STEPS,
    Specification,
    TakeRecorder,
    Variation,
)
from musicgen_ui.errors import RequestError
from musicgen_ui.request import AUTOMATION_CHARACTERS, FIELDS, GenerationRequest
from musicgen_ui.steering import Automation, Steering

if TYPE_CHECKING:
    from musicgen_ui.engine.cuda_graph import CudaGraphStepper
    from musicgen_ui.engine.stepper import EagerStepper

LOOK_AHEAD_S = 0.9  # the player's buffer; a change is heard about as much later
CHUNK_FRAMES = 10  # 0.2 s
KEPT_S = RECORDED_S[1]
ABANDONED_S = 600.0  # a piece that nobody hears ends after that
MEASURED_FRAMES = 250  # whose work gives the speed, nearly


class Draws:
    """The random numbers of a piece, float32 [steps, codebooks], as `sampling.uniforms` gives them.

    They are drawn as far as a window needs them.
    """

    def __init__(self, seed: int, codebooks: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = torch.empty(0, codebooks)
        self._first = 0  # the step of the first row

    def rows(self, first: int, count: int) -> Tensor:
        """Those of so many steps; steps before `first` are not asked for again."""
        missing = first + count - self._first - len(self._rows)
        if missing > 0:
            new = torch.rand(missing, self._rows.shape[1], generator=self._generator)
            self._rows = torch.cat([self._rows, new])
        self._rows, self._first = self._rows[first - self._first :], first
        return self._rows[:count]


class OpenWindow(CodeWindow):
    """The codes of a piece without an end."""

    def recall(self, codes: Tensor) -> None:
        """Begins a window with other codes, int64 [codebooks, frames], in place of the last ones.

        All frames that are done must be decoded.
        """
        self._lay_out(self.frames_done - codes.shape[1], codes)


class LiveRecorder(TakeRecorder):
    """Decodes chunks of one length and keeps the last seconds.

    Args:
        window: where the codes come from.
        codec: of the checkpoint.
        index: the variation's number.
        first: sample where the take begins.
        last: sample where it ends; None is endless.
    """

    alone = True

    def __init__(
        self, window: OpenWindow, codec: Codec, index: int, first: int, last: int | None
    ) -> None:
        super().__init__(window, codec, index, samples=0)
        self._first, self._last = first, last
        self._kept: deque[tuple[int, np.ndarray]] = deque()  # first sample, [channels, samples]
        self._kept_codes: deque[tuple[int, np.ndarray]] = deque()  # first frame, int16
        self.end = 0  # samples that were decoded

    def is_due(self, most_frames: int = CHUNK_FRAMES) -> bool:
        """There are enough frames for a chunk, and the codec has none of this variation."""
        return not (self.decoding or self.ended) and self.waiting_frames >= CHUNK_FRAMES

    def decode(self, finite: Tensor, last: bool = False) -> None:
        """Sends the next chunk to the codec, or what there is of it."""
        self._decode(min(CHUNK_FRAMES, self.waiting_frames), finite)

    def _decode(self, frames: int, finite: Tensor) -> None:
        begin = self.decoded_frames
        codes = self._window.codes(begin, begin + frames)
        (self.decoding,) = Decoding.start([self.stream], [codes], [finite])
        self._kept_codes.append((begin, codes.to(torch.int16).cpu().numpy()))
        self.decoded_frames += frames

    def chunk(self) -> Chunk | None:
        """The new audio of the frames that went to the codec, as far as the take has it.

        Raises:
            NotFiniteError: logits or audio are no numbers.
        """
        assert self.decoding
        piece = self.decoding.samples()
        self.decoding = None
        if piece is None:
            raise NotFiniteError
        begin, self.end = self.end, self.end + piece.shape[1]
        self.ended = self._last is not None and self.end >= self._last
        new = piece[:, max(self._first - begin, 0) :]
        begin += piece.shape[1] - new.shape[1]
        if self._last is not None:
            new = new[:, : max(self._last - begin, 0)]
        if not new.size:
            return None
        self._kept.append((begin, new))
        self._forget()
        return Chunk(self._index, Clip(new, self._codec.sampling_rate), begin - self._first)

    def _forget(self) -> None:
        if self._last is not None:
            kept_from = self._first
        else:
            kept_from = self.end - round((KEPT_S + 1) * self._codec.sampling_rate)
        while self._kept[0][0] + self._kept[0][1].shape[1] <= kept_from:
            self._kept.popleft()
        frame = kept_from // self._codec.hop
        while self._kept_codes[0][0] + self._kept_codes[0][1].shape[1] <= frame:
            self._kept_codes.popleft()

    def drain(self, finite: Tensor) -> Iterator[Chunk | None]:
        """The chunks of all frames that are done, without an end of the signal."""
        if self.decoding:
            yield self.chunk()
        while self.waiting_frames and not self.ended:
            self.decode(finite)
            yield self.chunk()

    def rest(self, finite: Tensor) -> Iterator[Chunk | None]:
        """The chunk that the codec has; the piece breaks off there."""
        if self.decoding:
            yield self.chunk()

    def stretch(self, begin: int, end: int) -> Clip:
        """Samples `begin` to `end`, with their codes where both are whole frames.

        Raises:
            RequestError: they are not kept any more, or not there yet.
        """
        rate, hop = self._codec.sampling_rate, self._codec.hop
        if begin == end:
            return Clip(np.zeros((self._codec.channels, 0), np.float32), rate)
        if not self._kept or begin < self._kept[0][0] or end > self.end:
            raise RequestError(
                f"Only the last {KEPT_S / 60:g} minutes that were heard can be recorded."
            )
        samples = _cut(self._kept, begin, end)
        if begin % hop or end % hop:
            return Clip(samples, rate)
        codes = _cut(self._kept_codes, begin // hop, end // hop)
        return Clip(samples, rate, codes, self._codec.name)

    @property
    def taken(self) -> tuple[int, int]:
        """The samples of the take so far, from where to where; a whole number of frames."""
        end = self.end if self._last is None else min(self.end, self._last)
        begin = min(self._first, end)
        return begin, begin + (end - begin) // self._codec.hop * self._codec.hop


def _cut(pieces: deque[tuple[int, np.ndarray]], begin: int, end: int) -> np.ndarray:
    """Columns `begin` to `end` of arrays that follow each other, each with its first column."""
    inside = [(at, each) for at, each in pieces if at < end and at + each.shape[1] > begin]
    joined = np.concatenate([each for _, each in inside], axis=1)
    return joined[:, begin - inside[0][0] : end - inside[0][0]]


class LiveVariation(Variation):
    """A variation that is changed while it is made.

    Args: see `Variation`.

    Raises:
        RequestError: it continues a clip.
    """

    window: OpenWindow
    recorder: LiveRecorder

    def __init__(
        self,
        specification: Specification,
        codec: Codec,
        codebooks: int,
        start_token: int,
        device: torch.device,
        window_s: float,
    ) -> None:
        if specification.prompt:
            raise RequestError(
                "A piece that is changed on its way cannot continue a clip: leave out the clip, or "
                "automation and skip.",
                "audio_prompt",
            )
        request = specification.request
        self._draws = Draws(request.seed, codebooks)
        super().__init__(specification, codec, codebooks, start_token, device, window_s)
        self.params = SamplingParams.of(request)
        self.automation: list[tuple[float, Steering]] = []  # that acted
        self._rows = deque(request.automation)  # to come
        self._not_before = 0  # the frame before which no change acts
        self._memory: dict[int, Tensor] = {}
        self._worked_s = self._worked_frames = 0.0  # of the last frames
        self.note = ""  # why the last change was refused

    def _begin(self, context: Tensor, start_token: int, window_s: float) -> None:
        request, codec = self.request, self._codec
        self._device = context.device
        self.window = OpenWindow(context, ENDLESS_STEPS, codec, start_token, window_s)
        self._draw()
        first, last = (
            round(s * codec.frame_rate) * codec.hop for s in (request.skip_s, request.end_s)
        )
        index = self.specification.index
        end = None if request.live else last
        self.recorder = LiveRecorder(self.window, codec, index, 0 if request.live else first, end)

    def _draw(self) -> None:
        """Draws what the window needs."""
        window = self.window
        self._drawn_from = window.start + window.written
        rows = self._draws.rows(self._drawn_from, window.positions - window.written)
        self.uniforms = rows.to(self._device)

    @property
    def next_uniform(self) -> int:
        """The row of `uniforms` that the next column is drawn with."""
        return self._frame - self._drawn_from

    @property
    def _frame(self) -> int:
        """The frame whose first codebook is written next, except in a window's last columns."""
        return self.window.start + self.window.written

    @property
    def steps_left(self) -> int:
        """Steps until it is done, about."""
        if self.request.live:
            return ENDLESS_STEPS
        return max(0, round(self.request.end_s * self._codec.frame_rate) - self.window.frames_done)

    def slide(self) -> bool:
        """Begins the next window if its time has come; whether it did."""
        slid = super().slide()
        if slid:
            self._draw()
        return slid

    # Changes

    def next_change(self) -> Steering | None:
        """Takes out a change that is due at the frame that is written next."""
        window = self.window
        if not self.ready or window.written >= window.window_frames:  # a window's last columns
            return None
        if self._frame < self._not_before:  # after a recall these frames come a second time
            return None
        if self._rows:
            if round(self._rows[0][0] * self._codec.frame_rate) > self._frame:
                return None
            return self._rows.popleft()[1]
        changes = self.job.listener.changes
        return changes.popleft() if self.request.live and changes else None

    def mix(self, change: Steering) -> tuple[tuple[tuple[str, float], ...] | None, float]:
        """The prompts, with tempo and key, and the guidance after a change."""
        prompts = self.prompts
        if change.prompts is not None:
            words = dataclasses.replace(self.request, sections=())
            prompts = tuple(
                (dataclasses.replace(words, prompt=text).words(), weight)
                for text, weight in change.prompts
            )
        scale = change.guidance_scale
        return prompts, self.params.guidance_scale if scale is None else scale

    def conditions(
        self,
        conditioner: Conditioner,
        prompts: tuple[tuple[str, float], ...] | None,
        guidance_scale: float | None,
    ) -> Conditions:
        """Its rows for a mix and guidance."""
        return conditioner.conditions(
            self.request, self.start_s, self.at_s, prompts=prompts, guidance_scale=guidance_scale
        )

    def apply(self, change: Steering) -> None:
        """A change acts from the present frame on; `recall` is called besides."""
        self.automation.append((round(self._frame / self._codec.frame_rate, 6), change))
        self.note = ""
        self.prompts, self.guidance_scale = self.mix(change)
        values = {n: getattr(change, n) for n in ("guidance_scale", "temperature", "top_k")}
        changed = {name: value for name, value in values.items() if value is not None}
        self.params = dataclasses.replace(self.params, **changed)
        if change.store:
            self._memory[change.store] = self._last_codes()

    def _last_codes(self) -> Tensor:
        """The codes of the overlap's length before the present frame."""
        window, end = self.window, self.window.frames_done
        frames = window.overlap_frames(self.request.overlap_s)
        return window.codes(max(window.start, end - frames), end).clone()

    def recall(self, slot: int) -> bool:
        """Goes on from what a memory slot holds; False where that is nothing.

        All frames that are done must be decoded.
        """
        codes = self._memory.get(slot)
        if codes is None or not codes.shape[1]:
            return False
        self._not_before = self._frame
        self.window.recall(codes)
        self._draw()
        return True

    # The listener

    @property
    def ahead_s(self) -> float:
        """Music that is made and was not heard yet."""
        made_s = self.window.frames_done / self._codec.frame_rate
        return made_s - self.job.listener.at_s(self._codec.sampling_rate)

    @property
    def waits(self) -> bool:
        """It is far enough ahead of its listener."""
        return self.request.live and self.ahead_s >= LOOK_AHEAD_S

    @property
    def abandoned(self) -> bool:
        """Nobody has heard anything new for long."""
        now_s = time.monotonic()
        since_s = max(self.job.listener.moved_s, self._started_s or now_s)
        return self.request.live and now_s - since_s > ABANDONED_S

    def worked(self, seconds: float) -> None:
        """A step took so long."""
        kept = 1 - 1 / MEASURED_FRAMES
        self._worked_s = self._worked_s * kept + seconds
        self._worked_frames = self._worked_frames * kept + 1

    @property
    def _speed(self) -> float:
        music_s = self._worked_frames / self._codec.frame_rate
        return music_s / self._worked_s if self._worked_s else 0.0

    def progress(self) -> Progress:
        """How far the new music is, and how the listener keeps up."""
        live, listener = self.request.live, self.job.listener
        return Progress(
            Stage.COMPOSING,
            self.index,
            note=self.note,
            done_s=self._done_s,
            total_s=0.0 if live else self.request.end_s,
            speed=self._speed,
            ahead_s=max(self.ahead_s, 0.0) if live else 0.0,
            underruns=listener.underruns,
        )

    # Takes

    def recordings(self) -> Iterator[Recorded]:
        """The stretches that the listener wants as takes, once they are there."""
        waiting = self.job.listener.recordings
        rate, frame_rate, hop = self._codec.sampling_rate, self._codec.frame_rate, self._codec.hop
        while waiting and round(waiting[0][1] * frame_rate) * hop <= self.recorder.end:
            start_s, end_s = waiting.popleft()
            begin, end = (round(s * frame_rate) * hop for s in (start_s, end_s))
            try:
                clip = self.recorder.stretch(begin, end)
            except RequestError as error:
                self.note = str(error)
                continue
            yield Recorded(self._take(clip, begin / rate, end / rate))

    def finished(self) -> Finished:
        """The take: of a live piece nothing, since its recordings are takes already."""
        begin, end = self.recorder.taken
        clip = self.recorder.stretch(end, end) if self.request.live else None
        clip = clip or self.recorder.stretch(begin, end)
        take = self._take(clip, self.request.skip_s, self.request.end_s)
        return dataclasses.replace(take, stopped=not self.recorder.ended)

    def _take(self, clip: Clip, start_s: float, end_s: float) -> Finished:
        """A stretch as a take that can be made again from its settings."""
        request, notes = self.request, self.notes
        if request.live:
            request, more = self._as_recorded(start_s, end_s)
            notes += more
        return Finished(
            variation=self.index,
            clip=clip,
            request=request,
            prompt_s=0.0,
            speed=self._speed,
            notes=notes,
            melody=None if start_s else self.melody,
            codes=clip.codes,
        )

    def _as_recorded(
        self, start_s: float, end_s: float
    ) -> tuple[GenerationRequest, tuple[str, ...]]:
        """The request that makes a stretch again, and what is to be said of it."""
        rows: Automation = tuple(row for row in self.automation if row[0] < end_s)
        request = dataclasses.replace(
            self.request,
            live=False,
            duration_s=round(end_s - start_s, 6),
            skip_s=round(start_s, 6),
            automation=rows,
        )
        size = len(json.dumps(request.settings()["automation"]))
        most = FIELDS["skip_s"].metadata["max"]
        rows_most = FIELDS["automation"].metadata["max"]
        if size <= AUTOMATION_CHARACTERS and len(rows) <= rows_most and start_s <= most:
            return request, ()
        request = dataclasses.replace(request, automation=(), skip_s=0.0)
        return request, (
            "It was changed too often, or began too late in the piece, to be made again from its "
            "settings.",
        )


def steer(
    variation: LiveVariation, conditioner: Conditioner, stepper: EagerStepper | CudaGraphStepper
) -> Iterator[Chunk | None]:
    """Applies the changes whose frame has come; the audio that a recall needs to be out before.

    Raises:
        RequestError: a change is not possible, in a piece whose changes were given beforehand.
    """
    while change := variation.next_change():
        before = variation.prompts, variation.guidance_scale
        try:
            conditions = variation.conditions(conditioner, *variation.mix(change))
        except RequestError as error:
            if not variation.request.live:
                raise
            variation.note = str(error)
            continue
        variation.apply(change)
        if change.recall:
            yield from variation.recorder.drain(variation.slot.finite)
        if change.recall and variation.recall(change.recall):
            conditions = variation.conditions(
                conditioner, variation.prompts, variation.guidance_scale
            )
            stepper.admit(variation, conditions)
        elif before != (variation.prompts, variation.guidance_scale):
            if conditioner.prefixed:  # all anew
                stepper.admit(variation, conditions)
            else:
                stepper.set_conditions(variation, conditions)
        stepper.set_sampling(variation, variation.params)
