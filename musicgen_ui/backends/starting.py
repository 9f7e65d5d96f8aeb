"""The engine while it is still being built: clicks wait for it, the page need not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from musicgen_ui.engine.protocol import Description, Engine, Event, Health, Progress
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

log = logging.getLogger(__name__)

CLOSE_S = 2.0  # that is waited for an engine which is being built: an import cannot be broken off


class BackgroundEngine:
    """An engine that is still being built: what needs it waits, what need not says so."""

    def __init__(self, build: Callable[[], Engine], checkpoint: str) -> None:
        self._checkpoint = checkpoint
        self._ready = threading.Event()
        self._engine: Engine | None = None
        self._error: Exception | None = None
        self._closed = False
        self._build = build
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begins to build the engine and to load the first checkpoint, in a thread."""
        self._thread.start()

    def _run(self) -> None:
        try:
            self._engine = self._build()
        except RequestError as error:  # a setting that only the engine knows to be wrong
            self._error = error
        except Exception as error:
            log.exception("The engine could not be started")
            self._error = error
        finally:
            self._ready.set()
        preload = getattr(self._engine, "preload", None)
        if preload and not self._closed:
            try:
                preload(self._checkpoint)
            except RequestError as error:  # a click loads again and shows the reason
                log.error("The first checkpoint could not be loaded ahead: %s", error)
            except Exception:
                log.exception("The first checkpoint could not be loaded ahead")

    @property
    def refusal(self) -> RequestError | None:
        """Why there is no engine, where a setting is wrong."""
        return self._error if isinstance(self._error, RequestError) else None

    def close(self) -> None:
        """See `Engine.close`."""
        self._closed = True
        if self._engine is not None:
            self._engine.close()  # ends a load, too
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)

    def _get(self) -> Engine:
        self._ready.wait()
        if self._engine is None:
            raise RequestError(
                "The server could not start its engine: see its log."
            ) from self._error
        return self._engine

    async def starting(self, stop: threading.Event | None = None) -> AsyncIterator[Progress]:
        """Says that the engine is on its way until it is there, or `stop` is set."""
        while not (self._ready.is_set() or (stop is not None and stop.is_set())):
            yield Progress("loading", note="starting the engine")
            await asyncio.sleep(0.2)

    async def stream(
        self,
        request: GenerationRequest,
        stop: threading.Event | None = None,
        visitor: str = "",
    ) -> AsyncIterator[Event]:
        """See `Engine.stream`; waits for the engine first."""
        async for progress in self.starting(stop):
            yield progress
        if stop is not None and stop.is_set():
            return
        events: Any = self._get().stream(request, stop, visitor)
        async with contextlib.aclosing(events):  # a click that is closed early frees its rows now
            async for event in events:
                yield event

    def checkpoints(self) -> list[str]:
        """The chosen checkpoint first, then the others."""
        names = self._get().checkpoints()
        return [self._checkpoint, *(n for n in names if n != self._checkpoint)]

    def describe(self, checkpoint: str, adapter: str = "") -> Description:
        """See `Engine.describe`."""
        return self._get().describe(checkpoint, adapter)

    def status(self) -> str:
        """See `Engine.status`."""
        if self._engine is not None:
            return self._engine.status()
        return "engine failed, see the log" if self._error else "starting …"

    def health(self) -> Health:
        """See `Engine.health`; an engine that could not be built is trouble, one on its way not."""
        if self._engine is not None:
            return self._engine.health()
        return Health("the engine could not be started" if self._error else "")

    def unload(self) -> None:
        """See `Engine.unload`."""
        if self._engine is not None:
            self._engine.unload()
