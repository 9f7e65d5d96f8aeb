"""The scheduler of one decoder: admit, prefill, step, decode, deliver, stop.

All the logic of generation is `Scheduler.step()`: it admits waiting variations into free places,
takes in a piece of a new variation's audio prompt, moves every variation one frame on, appends new
audio to its job's log and frees the places of variations that ended. Variations of different
clients, lengths, settings and positions share each step. Any thread may add jobs; a single thread
steps: `worker` has it.

Failure handling: one variation's error never affects the others. A variation that finds no memory
before its first audio waits until fewer run, and starts again from its seed; any other error ends
it, and the audio that was delivered is its take. An error of the device, or one that ends the
thread, is raised to whoever steps, who calls `fail_all`: variations without audio may start again
on the next scheduler, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
import traceback
from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedTokenizerBase

from musicgen_ui.engine import faults, live
from musicgen_ui.engine.audio_prompt import AudioPrompt
from musicgen_ui.engine.code_window import bounded_window_s
from musicgen_ui.engine.codec import Codec
from musicgen_ui.engine.conditioning import Conditioner, Conditions
from musicgen_ui.engine.cuda_graph import CudaGraphStepper
from musicgen_ui.engine.device import THREADS, SideThread, copy_weights, threads_for
from musicgen_ui.engine.job import LoggedJob, empty_take
from musicgen_ui.engine.job_queue import JobQueue
from musicgen_ui.engine.live import LiveVariation
from musicgen_ui.engine.lora import LoraStore
from musicgen_ui.engine.protocol import Chunk, Event, Failed
from musicgen_ui.engine.stepper import EagerStepper
from musicgen_ui.engine.transformer import Decoder, Model
from musicgen_ui.engine.variation import (
    CHUNK_FRAMES,
    FIRST_CHUNK_FRAMES,
    PREFILL_COLUMNS,
    Specification,
    TakeRecorder,
    Variation,
)
from musicgen_ui.errors import Fault, RequestError
from musicgen_ui.request import WINDOW_S, GenerationRequest

CACHE_SHARE = 0.6  # of a GPU's free memory; the rest is for prefills and the codec
PROGRESS_S = 0.25  # between two reports of a variation
FEW_JOBS = 4  # that each get their chunks as soon as possible
MODEL = ("stepper", "decoder", "codec", "conditioner", "adapters")  # attributes that hold it

log = logging.getLogger(__name__)


class Scheduler:
    """A checkpoint ready to make music for several clients at once.

    Args:
        model: transformers' `MusicgenForConditionalGeneration`, or `MusicgenMelodyFor…`; its
            modules are packed or taken over, so the caller should drop it.
        tokenizer: of the checkpoint.
        checkpoint: the name that takes carry.
        device: of text encoder and decoder.
        precision: see `linear.PRECISIONS`.
        codec_device: where the codec runs, if not on `device`.
        max_jobs: variations that are stepped together; fewer where a GPU lacks the memory.
        graphs: whether steps go through `CudaGraphStepper`; None is on CUDA alone.
        extractor: the feature extractor's configuration, of a melody checkpoint.
        window_s: the length of the decoder's training examples.
        kv_cache_dtype: see `kv_cache.DTYPES`.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        *,
        checkpoint: str,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        codec_device: torch.device | str | None = None,
        max_jobs: int = 8,
        graphs: bool | None = None,
        extractor: Mapping[str, object] | None = None,
        window_s: float = WINDOW_S,
        kv_cache_dtype: str = "auto",
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
        self.conditioner = Conditioner.of(model, tokenizer, self.device, extractor, precision)
        self.decoder = Decoder(model.decoder, self.device, precision, kv_cache_dtype)
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
        self._encoder = SideThread(self.stepper.side)
        self.queue = JobQueue()
        self.running: list[Variation] = []
        self._places = self.max_jobs

    @property
    def busy(self) -> bool:
        """Something is being made or waits."""
        return bool(self.running or self.queue)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and of the variations in flight; 0 once the model is freed."""
        held = (getattr(self, name, None) for name in MODEL)
        return sum(each.nbytes for each in held if each)

    @torch.inference_mode()
    def _compile(self) -> None:
        """Takes a step, so that no job waits for what is compiled at its first call."""
        start = torch.full((1, self.decoder.codebooks), self.decoder.start_token)
        states = self.decoder.embeddings.new_zeros(1, self.decoder.embeddings.shape[1])
        self.decoder.step(start, [self.decoder.sequence([states], 1)])
        rows = self.codec.channels * self.codec.codebooks
        self.codec.decode(torch.zeros(rows, FIRST_CHUNK_FRAMES, dtype=torch.int64))

    def _affordable(self, jobs: int) -> int:
        if self.device.type != "cuda":
            return jobs
        free, _ = torch.cuda.mem_get_info(self.device)
        slot_nbytes = CudaGraphStepper.slot_nbytes(self.decoder)
        return max(1, min(jobs, int(CACHE_SHARE * free / slot_nbytes)))

    @property
    def places(self) -> int:
        """Variations that may run: fewer once memory ran out, until all have ended."""
        if not self.running:
            self._places = self.max_jobs
        return self._places

    # Any thread

    def submit(self, request: GenerationRequest, client: str = "") -> LoggedJob:
        """A new job, with its audio prompt encoded here and now."""
        job = LoggedJob(request, client)
        self.add(job, self.encode(job.request))
        return job

    def encode(self, request: GenerationRequest) -> AudioPrompt | None:
        """The request's audio prompt for `add`; the style of its clip is computed here too."""
        return self._encoder.run(functools.partial(self._encode, request))

    def _encode(self, request: GenerationRequest) -> AudioPrompt | None:
        torch.set_num_threads(self.threads)
        self.conditioner.prepare(request, texts=self._encoder.stream is not None)
        if request.audio_prompt is None:
            return None
        context_s = request.context_used_s(bounded_window_s(self.window_s))
        return AudioPrompt.of(request.audio_prompt, context_s, self.codec)

    def add(self, job: LoggedJob, prompt: AudioPrompt | None) -> None:
        """Queues every variation of a job, unless it was stopped before."""
        if job.begin():
            self.queue.add(Specification.of_job(job, prompt, self.checkpoint, self.codec))

    # The stepping thread

    def step(self) -> bool:
        """Moves every variation on by one frame; False when nothing is left to do.

        Raises what concerns all of them: the device failed, the thread is to end, or this loop is
        wrong. `fail_all` must follow.
        """
        torch.set_num_threads(self.threads)  # always: MKL has a number for each calling thread
        began_s = time.perf_counter()
        self.queue.take_in()
        self._stop()
        self._admit()
        self._change_windows()
        self._prefill()
        advanced = self._advance()
        self._decode()
        for variation in list(self.running):
            with self._failing_alone(variation):
                self._deliver(variation)
        self.queue.stepped()
        for variation in advanced:
            variation.worked(time.perf_counter() - began_s)
        return self.busy

    @property
    def idles(self) -> bool:
        """The next step has nothing to do: all that runs is ahead of its listeners."""
        admits = self.queue and len(self.running) < self.places
        return bool(self.running) and not admits and all(each.waits for each in self.running)

    def poll(self) -> None:
        """A step for a caller without a worker: see the `poll` of `EventLog.follow`."""
        try:
            self.step()
        except Exception as error:
            self.fail_all(error)

    def _stop(self) -> None:
        """Ends the variations of jobs that are to stop, and drops those of jobs that failed."""
        for specification in self.queue.pop_stopped():
            job = specification.job
            job.log.append(empty_take(job, specification.index))
        self.queue.drop_ended()
        for variation in list(self.running):
            if variation.job.ended:
                self._leave(variation)
            elif variation.job.stopping.is_set() or variation.abandoned:
                with self._failing_alone(variation):
                    self._finish(variation)

    def _admit(self) -> None:
        """One variation a step, so that the others are not held up by a crowd."""
        places = self.places
        if len(self.running) < places and (specification := self.queue.pop()):
            try:
                self.running.append(self._start(specification))
            except BaseException as error:
                self._fail(specification, error)
        left = [variation.steps_left for variation in self.running]
        jobs = {variation.job for variation in self.running}
        self.queue.report(jobs, left + [0] * (places - len(left)))

    def _start(self, specification: Specification) -> Variation:
        request, decoder = specification.request, self.decoder
        if request.live and sum(each.request.live for each in self.running) >= max(
            1, self.max_jobs // 2
        ):
            raise RequestError("Too many live pieces are being played here: try again later.")
        variation = (LiveVariation if request.steered else Variation)(
            specification,
            self.codec,
            decoder.codebooks,
            decoder.start_token,
            self.device,
            self.window_s,
        )
        variation.adapter = self.adapters.applied(request)
        # Now, not in the end: no finished take is lost to an error that the words bring about.
        variation.notes = self._notes(request)
        variation.melody = self.conditioner.chroma(request)
        self.stepper.admit(variation, self._conditions(variation))
        variation.job.log.append(variation.progress())
        return variation

    def _conditions(self, variation: Variation) -> Conditions:
        return self.conditioner.conditions(
            variation.request,
            variation.start_s,
            variation.at_s,
            prompts=variation.prompts,
            guidance_scale=variation.guidance_scale,
        )

    def _notes(self, request: GenerationRequest) -> tuple[str, ...]:
        words = next(filter(None, map(self.conditioner.truncated_after, request.texts)), None)
        return (f"The prompt was too long: the model read it up to “… {words}”.",) if words else ()

    def _change_windows(self) -> None:
        """Begins the windows and the sections whose time has come."""
        for variation in list(self.running):
            with self._failing_alone(variation):
                slid, changed = variation.slide(), variation.change_text()
                if slid or (changed and self.decoder.prefixed):  # a prefix: all anew
                    self.stepper.admit(variation, self._conditions(variation))
                elif changed:
                    self.stepper.set_conditions(variation, self._conditions(variation))
                if variation.skip_made():
                    self.stepper.move(variation)
                if isinstance(variation, LiveVariation):
                    for chunk in live.steer(variation, self.conditioner, self.stepper):
                        self._append(variation, chunk)

    def _prefill(self) -> None:
        """Takes in a piece of one variation's prefix and known columns."""
        for variation in self.running:
            if variation.prefilled:
                continue
            with self._failing_alone(variation):
                self.stepper.prefill(variation, PREFILL_COLUMNS)
            return

    def _advance(self) -> list[Variation]:
        """Writes the next column of every variation that is ready for it; which they are."""
        ready = [each for each in self.running if each.ready and not each.waits]
        ready = self.stepper.steppable(ready)
        if not ready:
            return ready
        try:
            self.stepper.step(ready)
        except BaseException as error:
            if faults.concerns_all(error):
                raise
            self._advance_one_by_one(ready)
            return ready
        for variation in ready:
            variation.advance()
        return ready

    def _advance_one_by_one(self, variations: list[Variation]) -> None:
        """A step that failed for all is tried for each: only those that fail alone end."""
        for variation in variations:  # some may have counted the step that failed
            variation.slot.sequence.length = variation.window.written
        for variation in variations:
            with self._failing_alone(variation):
                self.stepper.step([variation])
                variation.advance()

    def _decode(self) -> None:
        """Sends frames to the codec where it is worth a call; on CUDA those of several at once."""
        due = [each for each in self.running if each.recorder.is_due(self._chunk_frames)]
        if due and self._beside and not due[0].recorder.alone:
            self._decode_together(due[0])
        for variation in list(self.running):
            recorder = variation.recorder
            with self._failing_alone(variation):
                if variation.window.done and not recorder.decoding and not recorder.ended:
                    variation.decode(last=True)
                elif recorder.is_due(self._chunk_frames):
                    variation.decode()

    def _decode_together(self, due: Variation) -> None:
        """Decodes the frames of one with those of others that have at least half as many."""
        fewest = max(1, due.recorder.waiting_frames // 2)
        together = [
            each
            for each in self.running
            if not (each.recorder.decoding or each.window.done or each.recorder.alone)
            and each.recorder.waiting_frames >= fewest
            and each.recorder.stream.phase == due.recorder.stream.phase
        ]
        if len(together) < 2:
            return
        recorders = [each.recorder for each in together]
        frames = min(recorder.waiting_frames for recorder in recorders)
        try:
            finite = [each.slot.finite for each in together]
            TakeRecorder.decode_together(recorders, finite, frames)
        except Exception as error:
            if faults.concerns_all(error):
                raise
            log.warning("Variations are decoded one by one: together it failed", exc_info=error)

    @property
    def _beside(self) -> bool:
        """The codec runs beside the decoder, where a call takes the host as long for any work."""
        return self.codec.side is not None

    @property
    def _chunk_frames(self) -> int:
        """The longest chunk."""
        return CHUNK_FRAMES * (4 if self._beside and len(self.running) > FEW_JOBS else 1)

    def _deliver(self, variation: Variation) -> None:
        """Appends what is new to the job's log: audio, progress, in the end the take."""
        recorder = variation.recorder
        if recorder.decoding and recorder.decoding.done:
            self._append(variation, recorder.chunk())
        self._append(variation, *variation.recordings())
        if recorder.ended and not recorder.decoding:
            self._finish(variation)
        elif (now := time.monotonic()) - variation.reported_s >= PROGRESS_S:
            variation.reported_s = now
            variation.job.log.append(variation.progress())

    def _append(self, variation: Variation, *events: Event | None) -> None:
        for event in events:
            if event:
                variation.job.log.append(event)

    def _finish(self, variation: Variation) -> None:
        for chunk in variation.recorder.rest(variation.slot.finite):
            self._append(variation, chunk)
        self._append(variation, *variation.recordings())
        take = variation.finished()
        self._leave(variation)
        variation.job.log.append(take)

    def _leave(self, variation: Variation) -> None:
        self.running.remove(variation)
        self.stepper.release(variation)

    # Failures

    @contextlib.contextmanager
    def _failing_alone(self, variation: Variation) -> Iterator[None]:
        """An error inside ends this variation alone, unless it concerns all."""
        try:
            yield
        except BaseException as error:
            self._fail(variation.specification, error, variation)

    def _fail(
        self, specification: Specification, error: BaseException, running: Variation | None = None
    ) -> None:
        """Lets a variation that found no memory wait until fewer run, or ends it.

        Raises an error that concerns all; `fail_all` then ends this one too, or starts it again.
        """
        if faults.concerns_all(error):
            if running is None:  # `fail_all` would not know of it
                self._start_again(specification)
            raise error
        if running in self.running:
            self._leave(running)
        if faults.out_of_memory(error) and self.running and not specification.delivered:
            self._places = len(self.running)
            self.queue.put_back(specification)
        else:
            self._end(specification, error, running)
        traceback.clear_frames(error.__traceback__)  # they hold on to the memory

    def _start_again(self, specification: Specification) -> None:
        """Puts a variation without audio back for the next scheduler, once a job."""
        if specification.job in self.queue.retried:
            self._end(specification, faults.error_of(Fault.DEVICE))
            return
        self.queue.put_back(specification)
        self.queue.retried.add(specification.job)

    def _end(
        self, specification: Specification, error: BaseException, running: Variation | None = None
    ) -> None:
        """Ends a variation with the audio that was delivered; a job without any has failed."""
        job = specification.job
        if job.ended:
            return
        if not isinstance(error, RequestError):
            log.error("A variation ended early", exc_info=error)
        if job.log.unfinished == 1 and not any(isinstance(e, Chunk) for e in job.log.so_far()):
            job.log.append(Failed(faults.for_caller(error)))
            return
        take = empty_take(job, specification.index)
        if running and specification.delivered:
            try:
                take = running.finished()
            except Exception as failure:  # such as no memory for it
                log.error("The audio of a variation is lost", exc_info=failure)
        fault = faults.sentence(error)
        notes = (*take.notes, f"It broke off: {fault}")
        job.log.append(dataclasses.replace(take, stopped=True, notes=notes, fault=fault))

    def fail_all(self, error: BaseException, retry: bool = False) -> None:
        """Ends every variation with the audio that was delivered, and empties the queue.

        With `retry` those that wait stay in the queue, and running ones without audio are put
        back, once a job: for the scheduler that takes the queue over.
        """
        self.queue.take_in()
        running, self.running = self.running, []
        retried = self.queue.retried
        for variation in reversed(running):
            specification, job = variation.specification, variation.job
            if retry and not (job.ended or job in retried or specification.delivered):
                self.queue.put_back(specification)
            else:
                self._end(specification, error, variation)
            if not retry:
                with contextlib.suppress(Exception):  # whatever state the stepper is in
                    self.stepper.release(variation)
        retried.update(variation.job for variation in running)
        self.queue.retried = {job for job in retried if not job.ended}
        for specification in () if retry else self.queue.pop_all():
            self._end(specification, error)

    def free_model(self) -> None:
        """Frees the model of a scheduler that is not used any more; its queue is kept."""
        for name in MODEL:
            self.__dict__.pop(name, None)
