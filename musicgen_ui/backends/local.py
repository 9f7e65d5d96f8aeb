"""The backend of this computer.

`LocalBackend` finds and reads the checkpoint that a request names, keeps models in a `ModelCache`,
encodes the audio prompt and hands the job to the model's `Worker`, whose `Scheduler` makes the
music. It also says whether a checkpoint will ever fit this computer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from musicgen_ui.backends.model_cache import CachedModel, ModelCache, Say
from musicgen_ui.checkpoints import hub, lora, memory, registry
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.engine import device as devices
from musicgen_ui.engine import faults
from musicgen_ui.engine.cpu.machine_code import STORE
from musicgen_ui.engine.device import Place
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.protocol import (
    CheckpointInfo,
    Failed,
    Finished,
    Health,
    Progress,
    Stage,
    Status,
    Trouble,
)
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

IDLE_S = 1800.0
LOOK_S = 0.05  # between two looks at a load that is under way
REPORT_S = 0.3  # between two reports of a load that was asked for by itself
STUCK_S = 60.0  # a step that takes longer will not end: the slowest machines take seconds


def load_scheduler(source: Source, place: Place, max_jobs: int, say: Say) -> Scheduler:
    """Reads a checkpoint and makes it ready on its device.

    Raises:
        RequestError: it cannot be had or read, see `checkpoints.load`.
    """
    # float32 whatever will be computed in: the codec stays precise, and reading in half precision
    # would set torch's default for every thread, also for those that make music meanwhile.
    loaded = registry.load(source, torch.float32, say, streamed=True)
    once = "; the first time takes longer" if place.precision == "int8" else ""
    say(f"preparing {source.name}{once}")
    return Scheduler(
        loaded.model,
        loaded.tokenizer,
        extractor=loaded.extractor,
        checkpoint=source.name,
        device=place.device,
        precision=place.precision,
        codec_device=place.codec_device,
        max_jobs=max_jobs,
        window_s=loaded.window_s,
        kv_cache_dtype=place.kv_cache_dtype,
    )


class EngineOptions(TypedDict, total=False):
    """Arguments of `LocalBackend`, as a server chooses them."""

    device: str
    precision: str
    budget_bytes: int | None
    idle_s: float
    max_jobs: int
    allow_any: bool
    also: Sequence[str]
    kv_cache_dtype: str


class LocalBackend:
    """`protocol.Backend` on this computer. Its methods may be called from any thread.

    Args:
        device: "auto", "cuda", "mps" or "cpu".
        precision: "auto" or one of `linear.PRECISIONS`.
        budget_bytes: memory for all models together; None is by the device.
        idle_s: seconds after which an unused model is unloaded; 0 is never.
        max_jobs: jobs that a model steps together.
        allow_any: whether any Hub id or folder may be asked for, or only what is on this computer
            or in `also`, as on a public server: nothing is downloaded that the host did not list.
        also: checkpoints that the host lists.
        kv_cache_dtype: one of `kv_cache.DTYPES`.
        load: makes a `Scheduler` of a source; tests pass their own.

    Raises:
        RequestError: there is no such device, precision or type of the KV cache here.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: str = "auto",
        budget_bytes: int | None = None,
        idle_s: float = IDLE_S,
        max_jobs: int = 8,
        allow_any: bool = True,
        also: Sequence[str] = (),
        kv_cache_dtype: str = "auto",
        load: Callable[[Source, Place, int, Say], Scheduler] = load_scheduler,
    ) -> None:
        self._threads: dict[threading.Thread, LoggedJob] = {}  # of the jobs that are not through
        self.place = devices.choose(device, precision, kv_cache_dtype)
        self.budget_bytes = budget_bytes or devices.budget_bytes(self.place)
        self._allow_any = allow_any
        self._also = tuple(also)
        self._listed = [source for name in also for source in _named(name)]
        self._cache = ModelCache(
            lambda source, say: load(source, self.place, max_jobs, say),
            self._needs,
            self.budget_bytes,
            idle_s,
            fetch=registry.fetch if load is load_scheduler else None,
            # A GPU tells in time that it is full; a process that takes too much of this is killed.
            free_bytes=None if self.place.device.startswith("cuda") else devices.free_bytes,
        )

    def checkpoints(self) -> list[str]:
        """The names that the page offers, the default first; stereo siblings have a toggle."""
        known = [source.name for source in registry.known().values() if self._is_offered(source)]
        return list(dict.fromkeys(["auto", *self._also, *(n for n in known if "stereo" not in n)]))

    def describe(self, checkpoint: str, adapter: str = "") -> CheckpointInfo:
        """What `checkpoint` can do, without loading it; "auto" is the adapter's base if it has one.

        Asks the Hub about an unknown id.

        Raises:
            RequestError: there is no such checkpoint or adapter, or it is not allowed.
        """
        if adapter and checkpoint == "auto":
            checkpoint = self._adapted(GenerationRequest(adapter=adapter))[0].checkpoint
        source = self._resolve(checkpoint, False)
        info = registry.describe(source, self.place.bytes_a_weight)
        weights = memory.weight_bytes(registry.config_of(source), self.place.precision)
        info = dataclasses.replace(info, fits=weights <= self.budget_bytes)
        if info.stereo == "choice" and not self._has_stereo(checkpoint):
            return dataclasses.replace(info, stereo="never")
        return info

    def status(self) -> Status:
        """What is loaded or loading, where, in which precision and memory."""
        models = self._cache.all()
        loaded = [model for model in models if model.scheduler]
        precisions = {model.scheduler.precision: None for model in loaded if model.scheduler}
        return Status(
            loaded=tuple(model.source.name for model in loaded),
            loading=tuple(model.note for model in models if not model.scheduler),
            device=self.place.label,
            precision=" + ".join(precisions) or self.place.precision,
            reason=self.place.reason,
            nbytes=sum(model.nbytes for model in loaded),
        )

    def health(self) -> Health:
        """See `Backend.health`: a worker's dead thread or a step without an end is trouble."""
        models = [model for model in self._cache.all() if model.scheduler]
        workers = [model.worker for model in models if model.worker]
        schedulers = [worker.scheduler for worker in workers]
        age_s = max((worker.step_age_s for worker in workers), default=0.0)
        troubles = [self._cache.trouble, *(worker.trouble for worker in workers)]
        if age_s > STUCK_S:
            troubles.append(Trouble.STUCK)
        if not all(worker.alive for worker in workers):
            troubles.append(Trouble.THREAD_ENDED)
        return Health(
            next(filter(None, troubles), None),
            {model.source.name: model.nbytes for model in models},
            jobs=sum(len(scheduler.running) for scheduler in schedulers),
            waiting=sum(len(scheduler.queue) for scheduler in schedulers),
            step_age_s=age_s,
            warnings=tuple(filter(None, [STORE.trouble])),
        )

    def submit(
        self,
        request: GenerationRequest,
        client: str = "",
        made: Mapping[int, np.ndarray] | None = None,
    ) -> LoggedJob:
        """See `Backend.submit`: `Progress` of stage LOADING comes first where a model is loaded.

        Args:
            request: what to make.
            client: who takes turns with others.
            made: codes that another machine made of it before, see `LoggedJob`.
        """
        job = LoggedJob(request, client, made)
        # A thread of its own, asleep most of the time: the Hub may be silent, and no other job may
        # wait for that.
        thread = threading.Thread(target=self._run, args=(job,), name="musicgen-job", daemon=True)
        self._threads[thread] = job
        thread.start()
        return job

    def generate(self, request: GenerationRequest) -> list[Finished]:
        """Makes the takes of a request, for scripts: returns when all are done.

        Raises:
            RequestError: with the sentence that says why there is no take.
        """
        job = self.submit(request)
        takes = []
        for event in job.follow():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                takes.append(event)
        return takes

    def _run(self, job: LoggedJob) -> None:
        try:
            job.request, source, adapter = self._prepared(job.request)
            with self._cache.acquire(source) as model:
                if not _wait_for_load(job, model):
                    return
                if adapter:
                    model.loaded().adapters.add(job.request.adapter, adapter)
                self._cache.worker(model).add(job)
                job.log.wait()
        except BaseException as error:
            job.log.append(Failed(faults.for_caller(error)))
        finally:
            del self._threads[threading.current_thread()]

    @contextlib.contextmanager
    def use(self, checkpoint: str = "auto", stereo: bool = False) -> Iterator[Scheduler]:
        """The loaded model, after a wait for the load; it stays in memory until the end.

        Raises:
            RequestError: there is no such checkpoint, it cannot be read, or memory is short.
        """
        source = registry.with_contents(self._resolve(checkpoint, stereo))
        with self._cache.acquire(source) as model:
            yield model.loaded()

    def preload(
        self, checkpoint: str = "auto", report: Callable[[str], object] | None = None
    ) -> None:
        """See `Preloads.preload`."""
        source = registry.with_contents(self._resolve(checkpoint, False))
        with self._cache.acquire(source) as model:
            while report and not model.ready.done():
                report(model.note)
                futures.wait([model.ready], REPORT_S)
            model.loaded()

    def unload(self) -> None:
        """Frees the memory of every idle model."""
        self._cache.unload()

    def close(self) -> None:
        """Unloads every model, those in use when they are done, and refuses further requests.

        Waits for the threads of jobs that have ended, which may be unloading: Python would abort if
        it ended while they are in torch.
        """
        self._cache.close()
        for thread, job in list(self._threads.items()):
            if job.ended and thread is not threading.current_thread():
                thread.join()

    def _prepared(
        self, request: GenerationRequest
    ) -> tuple[GenerationRequest, Source, Path | None]:
        """The request with its adapter's base, its checkpoint, and the folder of its adapter."""
        folder = None
        if request.adapter:
            request, folder = self._adapted(request)
        source = self._resolve(request.checkpoint, request.stereo)
        registry.require_able(source, request)
        return request, registry.with_contents(source), folder

    def _adapted(self, request: GenerationRequest) -> tuple[GenerationRequest, Path]:
        """The request with its adapter's base, and the adapter's folder."""
        if not self._allow_any:
            raise RequestError("LoRA adapters are disabled on this server.", "adapter")
        found = lora.find(request.adapter)
        folder = lora.fetch(found)
        return lora.with_base(request, found, folder, self.place.device), folder

    def _resolve(self, checkpoint: str, stereo: bool) -> Source:
        if self._allow_any:
            return registry.resolve(checkpoint, stereo, self.place.device)
        listed = checkpoint in ("auto", *self._also)
        words = registry.known()
        if not listed and checkpoint not in {*words, *(source.name for source in words.values())}:
            raise self._not_offered()
        source = registry.resolve(checkpoint, stereo, self.place.device)
        if (stereo or not listed) and not self._is_offered(source):
            raise self._not_offered()
        return source

    def _has_stereo(self, checkpoint: str) -> bool:
        try:
            self._resolve(checkpoint, True)
        except RequestError:
            return False
        return True

    def _is_offered(self, source: Source) -> bool:
        """Whether visitors may have a known checkpoint: on a public server nothing is fetched that
        the host did not list."""
        here = self._allow_any or source.folder or source in self._listed
        return bool(here) or hub.cached(source.name) is not None

    def _not_offered(self) -> RequestError:
        return RequestError(
            f"This server offers these checkpoints alone: {', '.join(self.checkpoints())}.",
            "checkpoint",
        )

    def _needs(self, source: Source) -> int:
        """The memory that a checkpoint will hold, in bytes.

        Raises:
            RequestError: its weights alone are more than the budget.
        """
        config = registry.config_of(source)
        others = registry.known_configs()
        memory.require_fits(source.name, config, self.place, self.budget_bytes, others)
        return memory.estimate_bytes(config, self.place.bytes_a_weight)


def _named(checkpoint: str) -> list[Source]:
    """What a name of the host's list means, if it is a checkpoint's; "auto" may mean several."""
    try:
        return [] if checkpoint == "auto" else [registry.resolve(checkpoint)]
    except RequestError:
        return []


def _wait_for_load(job: LoggedJob, model: CachedModel) -> bool:
    """Reports the load until the model is ready; False where the job has ended before."""
    reported = ""
    while not model.ready.done():
        if model.note != reported:
            reported = model.note
            job.log.append(Progress(Stage.LOADING, note=reported))
        if job.log.wait(LOOK_S):
            return False
    return not job.ended
