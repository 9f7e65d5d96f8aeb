"""ZeroGPU, the Spaces hardware that lends a GPU for the seconds of a call.

The server's process never has a GPU. `ZeroBackend` loads its checkpoints there before the page is
launched and moves them to "cuda", which the package `spaces` only notes down, so that they lie on
the GPU in the workers that it forks (`zerogpu_worker`). A `Call` is one use of such a worker. A
worker that dies takes nothing with it that was sent: the audio that was delivered is the take.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Generator, Iterator

import numpy as np
import torch

from musicgen_ui import files
from musicgen_ui.audio import clip
from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.zerogpu_worker import MODELS, PACE, Part, Spent, StopFile, compose
from musicgen_ui.checkpoints import registry
from musicgen_ui.checkpoints.registry import Loaded, Source
from musicgen_ui.engine.job import LoggedJob, empty_take
from musicgen_ui.engine.protocol import (
    NO_LIVE_MODE,
    CheckpointInfo,
    Chunk,
    Failed,
    Finished,
    Health,
    Progress,
    Stage,
    Status,
)
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

log = logging.getLogger(__name__)

AT_ONCE = 4  # calls that ask for a GPU; the Hub turns away who waits there for a minute
LOOK_S = 0.1  # between two looks whether a waiting job was stopped
LOST = "The GPU was taken away in the middle"


class ZeroBackend:
    """`protocol.Backend` on ZeroGPU. Make it in the main thread, before the page is launched.

    Args:
        checkpoint: the one that the page begins with; it, its stereo sibling and the bundled ones
            are loaded, and no others can be asked for. Every worker moves all of them to the GPU.
        device: where they are moved.

    Raises:
        RequestError: the checkpoint cannot be had.
    """

    def __init__(self, checkpoint: str = "auto", device: str = "cuda") -> None:
        self._sources: dict[tuple[str, bool], Source] = {}  # by what can be asked for
        self._nbytes: dict[str, int] = {}  # a checkpoint's weights
        self._first = checkpoint
        self._jobs: list[ZeroJob] = []  # under way, the first `AT_ONCE` ask for a GPU
        self._changed = threading.Condition()  # guards them
        self._folder = files.private_folder()
        for word in dict.fromkeys(("auto", checkpoint, "bundled")):
            for stereo in (False, True):
                self._offer(word, stereo)
        for source in dict.fromkeys(self._sources.values()):
            try:
                MODELS[source.name] = loaded = _loaded(source, device)
            except RequestError:
                if source == self._sources["auto", False]:
                    raise
                log.exception("%s is not offered", source.name)
                self._sources = {k: s for k, s in self._sources.items() if s != source}
                continue
            self._nbytes[source.name] = sum(w.nbytes for w in loaded.model.parameters())

    def _offer(self, word: str, stereo: bool) -> None:
        try:
            source = registry.resolve(self._first if word == "auto" else word, stereo, "cuda")
        except RequestError:
            if stereo:  # it has no sibling
                return
            raise
        for name in (word, source.name):
            self._sources.setdefault((name, stereo), source)

    def checkpoints(self) -> list[str]:
        """The names that the page offers, the first checkpoint's first."""
        names = (word for word, stereo in self._sources if not stereo)
        return list(dict.fromkeys([self._first, *names]))

    def describe(self, checkpoint: str, adapter: str = "") -> CheckpointInfo:
        """See `Backend.describe`."""
        return registry.describe(self._source(checkpoint, False), bytes_a_weight=2)

    def status(self) -> Status:
        """What is loaded and where."""
        return Status(tuple(MODELS), device="ZeroGPU", precision="bfloat16")

    def health(self) -> Health:
        """See `Backend.health`; the GPU's own is the Hub's business."""
        count = len(self._jobs)
        making = min(count, AT_ONCE)
        return Health(models=dict(self._nbytes), jobs=making, waiting=count - making)

    def unload(self) -> None:
        """Does nothing: the GPU is given back after each call."""

    def close(self) -> None:
        """Does nothing: the calls end with their jobs, the workers with this process."""

    def _source(self, checkpoint: str, stereo: bool) -> Source:
        source = self._sources.get((checkpoint, stereo))
        if source is None and stereo and (checkpoint, False) in self._sources:
            raise RequestError(f"{checkpoint} is mono: switch stereo off.", "stereo")
        if source is None:
            offered = ", ".join(self.checkpoints())
            raise RequestError(
                f"This Space offers these checkpoints alone: {offered}.", "checkpoint"
            )
        return source

    def submit(self, request: GenerationRequest, client: str = "") -> LoggedJob:
        """See `Backend.submit`. First come, first served: the Hub knows its visitors better.

        Must be called in the context of the visitor's request: the Hub counts the seconds by the
        visitor whom Gradio names there.
        """
        job = ZeroJob(request, client, StopFile(str(self._folder / uuid.uuid4().hex)))
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(self._run, job), name="zero-call", daemon=True).start()
        return job

    def _run(self, job: ZeroJob) -> None:
        try:
            if job.request.live:
                raise RequestError(NO_LIVE_MODE)
            source = self._source(job.request.checkpoint, job.request.stereo)
            registry.require_able(source, job.request)
            with self._turn(job):
                if not job.ended:
                    Call(source.name, job).run()
        except Exception as error:
            job.log.append(Failed(error))
        finally:
            job.close()

    @contextlib.contextmanager
    def _turn(self, job: ZeroJob) -> Iterator[None]:
        """Waits until fewer than `AT_ONCE` of the jobs before this one ask for a GPU."""
        with self._changed:
            self._jobs.append(job)
            place = max(0, len(self._jobs) - AT_ONCE)
        job.log.append(Progress(Stage.WAITING, place=place))
        try:
            with self._changed:
                while job in self._jobs[AT_ONCE:] and not job.ended:
                    self._changed.wait(LOOK_S)
            yield
        finally:
            with self._changed:
                self._jobs.remove(job)
                self._changed.notify_all()


def _loaded(source: Source, device: str) -> Loaded:
    loaded = registry.load(source, torch.float32, log.info)
    model: torch.nn.Module = loaded.model
    model.decoder.to(torch.bfloat16)  # as it will be packed: half as much to move
    model.to(device)
    return loaded


class LostError(Exception):
    """The worker died, or was ended for taking too long. Its text begins a sentence."""


class ZeroJob(LoggedJob):
    """A job whose stop reaches its worker by a file."""

    def __init__(self, request: GenerationRequest, client: str, stop_file: StopFile) -> None:
        super().__init__(request, client)
        self.stop_file = stop_file
        self._file_lock = threading.Lock()
        self._closed = False

    def stop(self) -> None:
        """Ends the job at the worker's next step, or now where no GPU was lent yet."""
        with self._file_lock:
            if not self._closed:
                self.stop_file.set()
        super().stop()

    def close(self) -> None:
        """The worker has ended: deletes the file."""
        with self._file_lock:
            self._closed = True
            self.stop_file.clear()


class Call:
    """A use of the GPU: takes the events out of the worker's parts.

    Args:
        name: of the checkpoint.
        job: to make.
    """

    def __init__(self, name: str, job: ZeroJob) -> None:
        self._name = name
        self._job = job
        self._request = dataclasses.replace(job.request, checkpoint=name)
        self._delivered: dict[int, list[Clip]] = {}  # of the variations that are not finished
        self._finished: set[int] = set()

    def run(self) -> None:
        """Appends the events to the job's log.

        Raises:
            RequestError: nothing was made; the Hub's sentences on quotas and queues included.
        """
        began_s, job = time.monotonic(), self._job
        parts: Generator[Part, None, None] = compose(self._name, self._request, job.stop_file)
        try:
            for number, part in enumerate(parts):
                if not (number or job.begin()):
                    return
                self._append(part)
            if not job.ended:
                raise LostError("Something went wrong on the GPU")
        except Exception as error:
            found = _error_of(error)
            if not isinstance(found, LostError):
                raise found from error
            self._end_early(str(found), time.monotonic() - began_s)
        finally:
            parts.close()  # waits until the worker has ended

    def _append(self, part: Part) -> None:
        for item in part:
            if isinstance(item, Spent):
                PACE.learn(self._name, item)
                continue
            if isinstance(item, Chunk):
                self._delivered.setdefault(item.variation, []).append(item.clip)
            elif isinstance(item, Finished):
                self._delivered.pop(item.variation, None)
                self._finished.add(item.variation)
            self._job.log.append(item)

    def _end_early(self, why: str, worked_s: float) -> None:
        """Makes takes of what was delivered of the variations that the worker did not finish.

        Raises:
            RequestError: nothing was.
        """
        if not self._delivered and not self._finished:
            raise RequestError(f"{why}, before the first sound: press Generate again.")
        notes = (f"{why}: this is what was made until then.",)
        for variation in range(self._request.variations):
            if variation in self._finished:
                continue
            take = empty_take(self._job, variation)
            if clips := self._delivered.get(variation):
                take = self._take_of(variation, clips, worked_s)
            self._job.log.append(dataclasses.replace(take, notes=notes))

    def _take_of(self, variation: int, clips: list[Clip], worked_s: float) -> Finished:
        new = Clip(np.concatenate([c.samples for c in clips], 1), clips[0].sampling_rate)
        prompt = self._request.audio_prompt if self._request.include_prompt else None
        if prompt is not None:
            prompt = clip.convert(prompt, new.sampling_rate, new.channels)
        return Finished(
            variation,
            clip.join(prompt, new.samples, 0) if prompt else new,
            dataclasses.replace(self._request.variation(variation), stereo=new.channels == 2),
            prompt.duration_s if prompt else 0.0,
            new.duration_s / worked_s,
            stopped=True,
        )


def _error_of(error: Exception) -> Exception:
    """What `spaces` raises, which is Gradio's errors with a title, as an error of ours."""
    title, message = getattr(error, "title", ""), str(getattr(error, "message", ""))
    if title == "ZeroGPU worker error" and message == "GPU task aborted":
        return LostError(LOST)
    if title == "ZeroGPU worker error":
        log.error("A worker failed with %s; its traceback was printed before", message)
        return LostError("Something went wrong on the GPU")
    return RequestError(message) if str(title).startswith("ZeroGPU") else error
