"""The engine that the page, the API and the command line know.

`ModelManager` joins the rooms below it: `checkpoints` finds and reads what a request names,
`residents` keeps models in memory and lends them, the engine's `Batch` makes the music, driven by
a `Worker` for many callers or inline for one. It adds what only the whole can say: whether a
checkpoint will ever fit this computer, and the status line.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from anyio import CapacityLimiter, to_thread

from musicgen_ui.backends.model_cache import Resident, Residents, Say
from musicgen_ui.checkpoints import hub, lora, memory, registry
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.engine import device as devices
from musicgen_ui.engine import worker
from musicgen_ui.engine.cpu.machine_code import STORE
from musicgen_ui.engine.device import Place
from musicgen_ui.engine.protocol import Description, Event, Health, Progress
from musicgen_ui.engine.scheduler import Batch
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

IDLE_S = 1800.0
LOOKUPS = 500  # requests that are being prepared at once; a server's queue is shorter
_LOOK_S = 0.05  # between two looks at a load that is under way
STUCK_S = 60.0  # a step that takes longer will not end: the slowest machines take seconds


def load_batch(source: Source, place: Place, max_jobs: int, say: Say) -> Batch:
    """Reads a checkpoint and makes it ready on its device.

    Raises:
        RequestError: it cannot be had or read, see `checkpoints.load`.
    """
    # float32 whatever will be computed in: the codec stays precise, and reading in half precision
    # would set torch's default for every thread, also for those that make music meanwhile.
    loaded = registry.load(source, torch.float32, say, streamed=True)
    once = "; the first time takes longer" if place.precision == "int8" else ""
    say(f"preparing {source.name}{once}")
    return Batch(
        loaded.model,
        loaded.tokenizer,
        extractor=loaded.extractor,
        checkpoint=source.name,
        device=place.device,
        precision=place.precision,
        codec_device=place.codec_device,
        max_jobs=max_jobs,
        window_s=loaded.window_s,
    )


class ModelManager:
    """The one implementation of `engine.events.Engine`. Its methods may be called by any thread.

    Args:
        device: "auto", "cuda", "mps" or "cpu".
        precision: "auto" or one of `linear.PRECISIONS`.
        budget_bytes: memory for all models together; None is by the device.
        idle_s: seconds after which an unused model is unloaded; 0 is never.
        max_jobs: jobs that a model steps together.
        allow_any: whether any Hub id or folder may be asked for, or only what is on this computer
            or in `also`, as on a public server: nothing is downloaded that the host did not list.
        also: checkpoints that the host lists.
        load: makes a `Batch` of a source; tests hand in their own.

    Raises:
        RequestError: there is no such device or precision here.
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
        load: Callable[[Source, Place, int, Say], Batch] = load_batch,
    ) -> None:
        self.place = devices.choose(device, precision)
        self.budget_bytes = budget_bytes or devices.budget_bytes(self.place)
        self._allow_any = allow_any
        self._also = tuple(also)
        self._listed = [source for name in also for source in _named(name)]
        self._lookups = CapacityLimiter(LOOKUPS)
        self._residents = Residents(
            lambda source, say: load(source, self.place, max_jobs, say),
            self._needs,
            self.budget_bytes,
            idle_s,
            fetch=registry.fetch if load is load_batch else None,
            # A GPU tells in time that it is full; a process that takes too much of this is killed.
            free_bytes=None if self.place.device.startswith("cuda") else devices.free_bytes,
        )

    def checkpoints(self) -> list[str]:
        """The names that the page offers, the default first; stereo siblings have a toggle."""
        known = [source.name for source in registry.known().values() if self._is_offered(source)]
        return list(dict.fromkeys(["auto", *self._also, *(n for n in known if "stereo" not in n)]))

    def describe(self, checkpoint: str, adapter: str = "") -> Description:
        """What `checkpoint` can do, without loading it; "auto" is the adapter's base if it has one.

        Asks the Hub about an unknown id.

        Raises:
            RequestError: there is no such checkpoint or adapter, or it is not allowed.
        """
        if adapter and checkpoint == "auto":
            checkpoint = self._adapted(GenerationRequest(adapter=adapter))[0].checkpoint
        source = self._resolve(checkpoint, False)
        told = registry.describe(source, self.place.bytes_a_weight)
        if told.stereo == "choice" and not self._has_stereo(checkpoint):
            return dataclasses.replace(told, stereo="never")
        return told

    def status(self) -> str:
        """What is loaded, where, in which precision and memory: "bundled · CPU … · 34 MB"."""
        residents = self._residents.all()
        loaded = [resident for resident in residents if resident.batch]
        parts = [resident.note for resident in residents if not resident.batch]
        if loaded or not parts:
            parts += [" + ".join(r.source.name for r in loaded) or "nothing loaded"]
        precisions = {r.batch.precision: None for r in loaded if r.batch}
        parts += [self.place.label, " + ".join(precisions) or self.place.precision]
        if self.place.reason:
            parts[-1] += f" ({self.place.reason})"
        if loaded:
            parts.append(memory.size_in_words(sum(r.nbytes for r in loaded)))
        return " · ".join(parts)

    def health(self) -> Health:
        """See `Engine.health`: a worker's dead thread or a step without an end is trouble."""
        residents = [resident for resident in self._residents.all() if resident.batch]
        workers = [resident.worker for resident in residents if resident.worker]
        batches = [worker.batch for worker in workers]
        age_s = max((worker.step_age_s for worker in workers), default=0.0)
        troubles = [self._residents.trouble, *(worker.trouble for worker in workers)]
        if age_s > STUCK_S:
            troubles.append(f"no step for {age_s:.0f} s")
        if not all(worker.alive for worker in workers):
            troubles.append("the thread that makes music has ended")
        trouble = next(filter(None, troubles), "")
        return Health(
            trouble,
            {resident.source.name: resident.nbytes for resident in residents},
            jobs=sum(len(batch.jobs) for batch in batches),
            waiting=sum(len(batch.line) for batch in batches),
            step_age_s=age_s,
            warnings=tuple(filter(None, [STORE.trouble])),
        )

    async def stream(
        self,
        request: GenerationRequest,
        stop: threading.Event | None = None,
        visitor: str = "",
    ) -> AsyncIterator[Event]:
        """The events of a request: `Progress("loading")` first where a model must be loaded.

        Never blocks the event loop. Setting `stop` while it loads ends the stream at once, without
        a take, since nothing was made; after that see `Worker.stream`.

        Raises:
            RequestError: what the user can mend.
        """
        stop = stop or threading.Event()
        # Threads of its own: the Hub may be silent, and nobody else may wait for that.
        request, source, adapter = await to_thread.run_sync(
            self._prepared, request, abandon_on_cancel=True, limiter=self._lookups
        )
        with self._residents.lease(source) as resident:
            for event in _load_events(resident):
                if stop.is_set():
                    return
                if event:
                    yield event
                await asyncio.sleep(_LOOK_S)
            if adapter:
                await asyncio.to_thread(resident.loaded().adapters.add, request.adapter, adapter)
            events: Any = self._residents.worker(resident).stream(request, stop, visitor)
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event

    def stream_sync(
        self, request: GenerationRequest, stop: threading.Event | None = None
    ) -> Iterator[Event]:
        """`stream` for one caller without an event loop: its own thread does the work.

        A manager is driven this way or by `stream`, not by both at once.
        """
        stop = stop or threading.Event()
        request, source, adapter = self._prepared(request)
        with self._residents.lease(source) as resident:
            for event in _load_events(resident):
                if event:
                    yield event
                if stop.wait(_LOOK_S):
                    return
            batch = resident.loaded()
            if adapter:
                batch.adapters.add(request.adapter, adapter)
            yield from worker.stream(batch, request, stop)

    @contextlib.contextmanager
    def use(self, checkpoint: str = "auto", stereo: bool = False) -> Iterator[Batch]:
        """Lends the loaded model, after a wait for the load; it stays while it is lent.

        Raises:
            RequestError: there is no such checkpoint, it cannot be read, or there is no room.
        """
        source = registry.with_contents(self._resolve(checkpoint, stereo))
        with self._residents.lease(source) as resident:
            yield resident.loaded()

    def preload(self, checkpoint: str = "auto") -> None:
        """Loads a checkpoint ahead of the first request."""
        with self.use(checkpoint):
            pass

    def unload(self) -> None:
        """Gives the memory of every idle model back."""
        self._residents.unload()

    def close(self) -> None:
        """Unloads every model, those in use when they are done, and refuses further requests."""
        self._residents.close()

    def _prepared(
        self, request: GenerationRequest
    ) -> tuple[GenerationRequest, Source, Path | None]:
        """The request with its adapter's base, its checkpoint, and the folder of its adapter."""
        folder = None
        if request.adapter:
            request, folder = self._adapted(request)
        return request, self._source(request), folder

    def _adapted(self, request: GenerationRequest) -> tuple[GenerationRequest, Path]:
        """The request with its adapter's base, and the adapter's folder."""
        if not self._allow_any:
            raise RequestError("LoRA adapters are disabled on this server.", "adapter")
        found = lora.find(request.adapter)
        folder = lora.fetch(found)
        return lora.with_base(request, found, folder, self.place.device), folder

    def _source(self, request: GenerationRequest) -> Source:
        source = self._resolve(request.checkpoint, request.stereo)
        if request.melody:
            registry.require_melody(source)
        return registry.with_contents(source)

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


def _load_events(resident: Resident) -> Iterator[Progress | None]:
    """Until the model is loaded: what is new about the load, or None."""
    told = ""
    while not resident.ready.done():
        note = resident.note
        yield Progress("loading", note=note) if note != told else None
        told = note
