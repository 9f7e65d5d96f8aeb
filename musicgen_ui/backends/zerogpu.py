"""ZeroGPU, the Spaces hardware that lends a GPU for the seconds of a call.

The server's process never has a GPU. `ZeroEngine` loads its checkpoints there before the page is
launched and moves them to "cuda", which the package `spaces` only notes down, so that they lie on
the GPU in the workers that it forks (`zero_worker`). A `Call` is one use of such a worker: a thread
draws its events, the visitor's event loop reads them and passes a stop on. A caller who is gone
closes the worker's generator, which ends at its next part. A worker that dies takes nothing along
that was sent: what was heard becomes the take.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musicgen_ui import files
from musicgen_ui.audio import clip
from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.zerogpu_worker import MODELS, PACE, Part, Spent, StopFile, compose
from musicgen_ui.checkpoints import registry
from musicgen_ui.checkpoints.registry import Loaded, Source
from musicgen_ui.engine.protocol import Chunk, Description, Event, Finished, Health, Progress
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

log = logging.getLogger(__name__)

AT_ONCE = 4  # calls that ask for a GPU; the Hub turns away who waits there for a minute
LOOK_S = 0.1  # between two looks at the visitor's stop event
LOST = "The GPU was taken away in the middle"


class ZeroEngine:
    """`engine.events.Engine` on ZeroGPU. Make it in the main thread, before the page is launched.

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
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._open = 0
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

    def describe(self, checkpoint: str, adapter: str = "") -> Description:
        """See `Engine.describe`."""
        return registry.describe(self._source(checkpoint, False), bytes_a_weight=2)

    def status(self) -> str:
        """What is loaded and where."""
        return f"{' + '.join(MODELS)} · ZeroGPU · bfloat16"

    def health(self) -> Health:
        """See `Engine.health`; the GPU's own is the Hub's business."""
        making = min(self._open, AT_ONCE)
        return Health(models=dict(self._nbytes), jobs=making, waiting=self._open - making)

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

    async def stream(
        self,
        request: GenerationRequest,
        stop: threading.Event | None = None,
        visitor: str = "",
    ) -> AsyncIterator[Event]:
        """See `Engine.stream`. Setting `stop` before a GPU was lent ends it without a take.

        First come, first served: the Hub knows the visitors better.

        Raises:
            RequestError: what the user can mend, the Hub's word on quotas and queues included.
        """
        stop = stop or threading.Event()
        source = self._source(request.checkpoint, request.stereo)
        self._open += 1
        try:
            yield Progress("waiting", place=max(0, self._open - AT_ONCE))
            async with self._slots:
                call = Call(source.name, request.with_seed(), self._folder / uuid.uuid4().hex)
                try:
                    async for event in call.events(stop):
                        yield event
                finally:
                    call.close()
        finally:
            self._open -= 1


def _loaded(source: Source, device: str) -> Loaded:
    loaded = registry.load(source, torch.float32, log.info)
    model: Any = loaded.model
    model.decoder.to(torch.bfloat16)  # as it will be packed: half as much to move
    return dataclasses.replace(loaded, model=model.to(device))


class Lost(Exception):  # noqa: N818 - the visitor hears of it in a note
    """The worker died, or was ended for taking too long."""


class Call:
    """A use of the GPU: a thread draws the parts from the worker, an event loop reads them.

    Must be made on that loop, in the context of the visitor's request: the Hub counts the seconds
    by the visitor whom Gradio names there.
    """

    def __init__(self, name: str, request: GenerationRequest, stop_file: Path) -> None:
        self.name = name
        self.request = dataclasses.replace(request, checkpoint=name)
        self.stop = StopFile(str(stop_file))
        self._closed = self._ended = False
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[Part | Exception | None] = asyncio.Queue()
        self._heard: dict[int, list[Clip]] = {}  # of the variations that are not finished
        self._finished = 0
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(self._draw,), name="zero-call", daemon=True).start()

    def close(self) -> None:
        """Nobody listens any more: the worker ends at its next step. Does not wait for it."""
        self._closed = True
        self.stop.set()
        if self._ended:  # the thread has cleared it already
            self.stop.clear()

    async def events(self, stop: threading.Event) -> AsyncIterator[Event]:
        """The events as they come; a visitor's `stop` is passed on to the worker."""
        began_s, begun = time.monotonic(), False
        while True:
            try:
                part = await asyncio.wait_for(self._parts.get(), LOOK_S)
            except TimeoutError:
                if stop.is_set():
                    self.stop.set()
                    if not begun:
                        return
                continue
            begun = True
            if isinstance(part, Lost):
                for finished in self._saved(str(part), time.monotonic() - began_s):
                    yield finished
                return
            if part is None:
                return
            for event in self._read(part):
                yield event

    def _read(self, part: Part | Exception) -> Iterator[Event]:
        if isinstance(part, Exception):
            raise part
        for item in part:
            if isinstance(item, RequestError):
                raise item
            if isinstance(item, Spent):
                PACE.learn(self.name, item)
                continue
            if isinstance(item, Chunk):
                self._heard.setdefault(item.variation, []).append(item.clip)
            elif isinstance(item, Finished):
                self._heard.pop(item.variation, None)
                self._finished += 1
            yield item

    def _saved(self, why: str, worked_s: float) -> Iterator[Finished]:
        """What was heard of the variations that the worker did not finish.

        Raises:
            RequestError: nothing was.
        """
        if not self._heard and not self._finished:
            raise RequestError(f"{why}, before the first sound: press Generate again.")
        for variation, clips in sorted(self._heard.items()):
            new = Clip(np.concatenate([c.samples for c in clips], 1), clips[0].sampling_rate)
            own = self.request.audio_prompt if self.request.include_prompt else None
            if own is not None:
                own = clip.convert(own, new.sampling_rate, new.channels)
            yield Finished(
                variation,
                clip.join(own, new.samples, 0) if own else new,
                dataclasses.replace(self.request.variation(variation), stereo=new.channels == 2),
                own.duration_s if own else 0.0,
                new.duration_s / worked_s,
                stopped=True,
                notes=(f"{why}: this is what was made until then.",),
            )

    # On the thread

    def _draw(self) -> None:
        parts: Any = compose(self.name, self.request, self.stop)
        try:
            for part in parts:
                if self._closed:
                    break
                self._tell(part)
            self._tell(None)
        except Exception as error:
            self._tell(_told(error))
        finally:
            parts.close()  # waits until the worker has ended
            self._ended = True
            self.stop.clear()

    def _tell(self, part: Part | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # its loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self._parts.put_nowait, part)


def _told(error: Exception) -> Exception:
    """What `spaces` raises, which is Gradio's errors with a title, in this house's words."""
    title, message = getattr(error, "title", ""), str(getattr(error, "message", ""))
    if title == "ZeroGPU worker error" and message == "GPU task aborted":
        return Lost(LOST)
    if title == "ZeroGPU worker error":
        log.error("A worker failed with %s; its traceback was printed before", message)
        return Lost("Something went wrong on the GPU")
    return RequestError(message) if str(title).startswith("ZeroGPU") else error
