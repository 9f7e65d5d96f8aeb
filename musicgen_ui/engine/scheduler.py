"""The jobs in flight on one decoder: admit, step, deliver, stop.

All the logic of generation is `Batch.step()`: it admits waiting jobs into free places, takes in a
piece of a new job's audio prompt, moves every job one frame on, hands new audio to its caller and
frees the places of jobs that ended. Jobs of different callers, lengths, settings and positions
share each step. Callers hand in requests from any thread with `submit`; a single thread steps:
`worker` has the drivers.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine import faults
from musicgen_ui.engine.codec import Codec
from musicgen_ui.engine.conditioning import Conditioner, Conditions
from musicgen_ui.engine.cuda_graph import CudaGraphStepper
from musicgen_ui.engine.device import THREADS, copy_weights, threads_for
from musicgen_ui.engine.job import CHUNK_FRAMES, FIRST_CHUNK_FRAMES, Job, steps_for
from musicgen_ui.engine.job_queue import Entry, Line, Ticket
from musicgen_ui.engine.lora import LoraStore
from musicgen_ui.engine.losses import Losses
from musicgen_ui.engine.protocol import Chunk, Event, Finished
from musicgen_ui.engine.stepper import EagerStepper
from musicgen_ui.engine.transformer import Decoder
from musicgen_ui.request import WINDOW_S, GenerationRequest

PREFILL_COLUMNS = 128  # of an audio prompt between two steps, so that the other jobs go on
CACHE_SHARE = 0.6  # of a GPU's free memory; the rest is for prefills and the codec
PROGRESS_S = 0.25  # between two reports of a job
FEW_JOBS = 4  # that each get their chunks as soon as can be
ROOMS = ("stepper", "decoder", "codec", "conditioner", "adapters")  # where the model lies

log = logging.getLogger(__name__)


class Batch:
    """A checkpoint ready to make music for several callers at once.

    Args:
        model: transformers' `MusicgenForConditionalGeneration`, or `MusicgenMelodyFor…`; its parts
            are packed or taken over, so the caller should let go of it.
        tokenizer: of the checkpoint.
        checkpoint: the name that takes carry.
        device: of text encoder and decoder.
        precision: see `linear.PRECISIONS`.
        codec_device: where the codec runs, if not on `device`.
        max_jobs: jobs that are stepped together; fewer where a GPU lacks the memory.
        graphs: whether steps go through `CudaGraphStepper`; None is on CUDA alone.
        extractor: the feature extractor's configuration, of a melody checkpoint.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        checkpoint: str,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        codec_device: torch.device | str | None = None,
        max_jobs: int = 8,
        graphs: bool | None = None,
        extractor: Mapping[str, Any] | None = None,
        window_s: float = WINDOW_S,
    ) -> None:
        self.checkpoint = checkpoint
        self.window_s = window_s
        self.device = torch.device(device)
        self.max_jobs = max_jobs
        channels = model.decoder.config.audio_channels
        self.precision = precision
        copy_weights(model.audio_encoder)
        self.codec = Codec(
            model.audio_encoder,
            channels,
            codec_device or device,
            precision="float32" if precision == "float32" else "int16",
            release=True,
        )
        self.conditioner = Conditioner.of(model, tokenizer, self.device, extractor)
        self.decoder = Decoder(model.decoder, self.device, precision)
        on_cpu = self.device.type == "cpu"
        self.threads = threads_for(self.decoder.nbytes) if on_cpu else THREADS
        self.adapters = LoraStore(
            checkpoint,
            model.decoder.config,
            self.decoder.dtype,
            self.device,
            cross_attention=not self.decoder.prefixed,
        )
        self.conditioner.use_adapters(self.adapters)
        self.stepper: EagerStepper | CudaGraphStepper = EagerStepper(self.decoder)
        if self.device.type == "cuda" if graphs is None else graphs:
            self.max_jobs = self._affordable(max_jobs)
            self.stepper = CudaGraphStepper(self.decoder, self.max_jobs)
            self.stepper.warm_up()
        elif precision == "int8":
            self._compile()
        self.line = Line()
        self.jobs: dict[Job, Ticket] = {}
        self.losses = Losses(self.line, self.jobs, self.max_jobs, self._leave, self._heard)

    @property
    def busy(self) -> bool:
        """Something is being made or waits."""
        return bool(self.jobs or self.line)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and of the jobs in flight."""
        rooms = (getattr(self, name, None) for name in ROOMS)
        return sum(room.nbytes for room in rooms if room)

    @torch.inference_mode()
    def _compile(self) -> None:
        """Takes a step, so that nobody's music waits for what is compiled when it is called."""
        start = torch.full((1, self.decoder.codebooks), self.decoder.start_token)
        told = self.decoder.embeddings.new_zeros(1, self.decoder.embeddings.shape[1])
        self.decoder.step(start, [self.decoder.sequence([told], 1)])
        rows = self.codec.channels * self.codec.codebooks
        self.codec.decode(torch.zeros(rows, FIRST_CHUNK_FRAMES, dtype=torch.int64))

    def _affordable(self, jobs: int) -> int:
        if self.device.type != "cuda":
            return jobs
        free, _ = torch.cuda.mem_get_info(self.device)
        slot_nbytes = CudaGraphStepper.slot_nbytes(self.decoder)
        return max(1, min(jobs, int(CACHE_SHARE * free / slot_nbytes)))

    def submit(
        self,
        request: GenerationRequest,
        stop: threading.Event | None,
        deliver: Callable[[Event | Exception], None],
        visitor: str = "",
    ) -> Ticket:
        """Queues every variation of `request`. May be called from any thread.

        Args:
            request: what to make.
            stop: ends the variations at the next step, with what was made so far.
            deliver: is called by the stepping thread with each event, or once with an exception,
                after which nothing follows.
            visitor: whose request it is: visitors take turns.
        """
        request = dataclasses.replace(request.with_seed(), checkpoint=self.checkpoint)
        stop = stop or threading.Event()
        steps = steps_for(request, self.codec, self.decoder.codebooks, self.window_s)
        ticket = Ticket(request, stop, deliver, request.variations, steps, visitor)
        self.line.add(ticket)
        return ticket

    def step(self) -> bool:
        """Moves every job on by one frame; False when nothing is left to do.

        What breaks in a job ends that job. Raises what is more than one's: the device failed, or
        this loop is wrong. Then `losses.end_all` tells everybody.
        """
        torch.set_num_threads(self.threads)  # always: MKL has a number for each calling thread
        self.line.take_in()
        self._drop_closed()
        self._stop_waiting()
        self._admit()
        self._stop_running()
        self._turn()
        self._prefill()
        self._advance()
        self._decode()
        for job in list(self.jobs):
            with self.losses.alone(job):
                self._deliver(job)
        self.line.stepped()
        return self.busy

    def _drop_closed(self) -> None:
        for job in [job for job, ticket in self.jobs.items() if not ticket.open]:
            self._leave(job)
        self.line.drop_closed()

    def _stop_waiting(self) -> None:
        for ticket, index in self.line.pop_stopped():
            self._close(ticket, self._heard((ticket, index)))

    def _heard(self, entry: Entry, job: Job | None = None) -> Finished:
        """What a job made so far as a take; without a job an empty one."""
        if job:
            return self._take(job)
        request = entry[0].request.variation(entry[1])
        nothing = Clip(np.zeros((self.codec.channels, 0), np.float32), self.codec.sampling_rate)
        return Finished(entry[1], nothing, request, 0.0, 0.0, stopped=True)

    def _admit(self) -> None:
        """One job a step, so that the others are not held up by a crowd."""
        places = self.losses.places
        if len(self.jobs) < places and (entry := self.line.pop()):
            try:
                self.jobs[self._start(*entry)] = entry[0]
            except BaseException as error:
                self.losses.lose(entry, error)
        left = [job.steps_left for job in self.jobs]
        self.line.tell(set(self.jobs.values()), left + [0] * (places - len(left)))

    def _start(self, ticket: Ticket, index: int) -> Job:
        request = ticket.request.variation(index)
        decoder = self.decoder
        job = Job(
            request,
            index,
            self.codec,
            decoder.codebooks,
            decoder.start_token,
            self.device,
            self.window_s,
        )
        job.adapter = self.adapters.applied(request)
        # Now, not in the end: a take that is made should not be lost to what its words bring about.
        job.notes, job.melody = self._notes(request), self.conditioner.chroma(request)
        self.stepper.admit(job, self._conditions(job))
        ticket.deliver(job.progress())
        return job

    def _conditions(self, job: Job) -> Conditions:
        return self.conditioner.conditions(job.request, job.start_s, job.at_s)

    def _turn(self) -> None:
        """Begins the windows and the sections whose time has come."""
        for job in list(self.jobs):
            with self.losses.alone(job):
                slid, turned = job.slide(), job.turn()
                if slid or (turned and self.decoder.prefixed):  # what comes first: all anew
                    self.stepper.admit(job, self._conditions(job))
                elif turned:
                    self.stepper.set_conditions(job, self._conditions(job))

    def _stop_running(self) -> None:
        for job, ticket in list(self.jobs.items()):
            if ticket.stop.is_set():
                with self.losses.alone(job):
                    self._finish(job)

    def _prefill(self) -> None:
        """Takes in a piece of one job's prefix and past; an audio prompt is encoded first."""
        for job in self.jobs:
            if job.encoded and job.sequence.length >= job.written:
                continue
            with self.losses.alone(job):
                if not job.encoded:
                    job.encode_piece()
                else:
                    known = job.columns[:, : job.written]
                    self.decoder.prefill(job.sequence, known, PREFILL_COLUMNS)
            return

    def _advance(self) -> None:
        """Writes the next column of every job that has taken its past in."""
        jobs = [job for job in self.jobs if job.sequence.length == job.written < job.positions]
        if not jobs:
            return
        try:
            self.stepper.step(jobs)
        except BaseException as error:
            if faults.of_everybody(error):
                raise
            self._advance_one_by_one(jobs)
            return
        for job in jobs:
            job.advance()

    def _advance_one_by_one(self, jobs: list[Job]) -> None:
        """A step that failed for all is tried for each: only those that cannot go on, do not."""
        for job in jobs:
            job.sequence.length = job.written  # some may have counted the step that failed
        for job in jobs:
            with self.losses.alone(job):
                self.stepper.step([job])
                job.advance()

    def _decode(self) -> None:
        """Sends to the codec what is worth it, on CUDA the frames of several jobs in one pass."""
        due = [job for job in self.jobs if job.chunk_due(self._chunk_frames)]
        if due and self._beside:
            self._decode_together(due[0])
        for job in list(self.jobs):
            with self.losses.alone(job):
                if job.done and not job.decoding and not job.ended:
                    job.decode(last=True)
                elif job.chunk_due(self._chunk_frames):
                    job.decode()

    def _decode_together(self, due: Job) -> None:
        """Decodes the frames of a job with those of the jobs that have at least half as many."""
        fewest = max(1, due.waiting_frames // 2)
        jobs = [
            job
            for job in self.jobs
            if job.encoded
            and not (job.decoding or job.done)
            and job.waiting_frames >= fewest
            and job.stream.phase == due.stream.phase
        ]
        if len(jobs) > 1:
            try:
                Job.decode_together(jobs, min(job.waiting_frames for job in jobs))
            except Exception as error:
                if faults.of_everybody(error):
                    raise
                log.warning("Jobs could not be decoded together: each is alone", exc_info=error)

    @property
    def _beside(self) -> bool:
        """The codec runs beside the decoder, where a call takes the host as long for any work."""
        return self.codec.side is not None

    @property
    def _chunk_frames(self) -> int:
        """The longest chunk."""
        return CHUNK_FRAMES * (4 if self._beside and len(self.jobs) > FEW_JOBS else 1)

    def _deliver(self, job: Job) -> None:
        """Hands what is new to the caller: audio, progress, in the end the take."""
        if job.decoding and job.decoding.done:
            self._hand_over(job, job.chunk())
        if job.ended and not job.decoding:
            self._finish(job)
        elif (now := time.monotonic()) - job.told_s >= PROGRESS_S:
            job.told_s = now
            self.jobs[job].deliver(job.progress())

    def _hand_over(self, job: Job, chunk: Chunk | None) -> None:
        if chunk:
            self.jobs[job].heard.add(job.variation)
            self.jobs[job].deliver(chunk)

    def _finish(self, job: Job) -> None:
        ticket = self.jobs[job]
        for chunk in job.rest():
            self._hand_over(job, chunk)
        take = self._take(job)
        self._leave(job)
        self._close(ticket, take)

    def _leave(self, job: Job) -> Ticket:
        self.stepper.release(job)
        return self.jobs.pop(job)

    def _take(self, job: Job) -> Finished:
        return job.finished(job.notes, job.melody)

    def _notes(self, request: GenerationRequest) -> tuple[str, ...]:
        words = next(filter(None, map(self.conditioner.truncated_after, request.texts)), None)
        return (f"The prompt was too long: it was heard up to “… {words}”.",) if words else ()

    def _close(self, ticket: Ticket, finished: Finished) -> None:
        ticket.open -= 1
        ticket.deliver(finished)

    def let_go(self) -> None:
        """Frees the model of a batch that is not used any more; its line is kept."""
        for name in ROOMS:
            self.__dict__.pop(name, None)
