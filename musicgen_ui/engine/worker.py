"""A thread that drives a batch for many callers.

Callers hand requests in and read events as asynchronous iterators on their own event loops; the
thread sleeps while there is nothing to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator

from musicgen_ui.engine.batch import Batch
from musicgen_ui.engine.events import Event, Finished
from musicgen_ui.request import GenerationRequest


class Worker:
    """Drives `batch` until closed. Its methods may be called from any thread."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._wake = threading.Event()
        self._closed = False
        self._stepped_s = time.monotonic()  # when it last stepped, or had nothing to do
        self._thread = threading.Thread(target=self._run, name="musicgen-worker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed:
            busy = self.batch.step()
            self._stepped_s = time.monotonic()
            if not busy:
                self._wake.wait()
                self._wake.clear()

    @property
    def alive(self) -> bool:
        """Its thread runs."""
        return self._thread.is_alive()

    @property
    def step_age_s(self) -> float:
        """Seconds since the last step; 0 while there is nothing to do."""
        return time.monotonic() - self._stepped_s if self.batch.busy else 0.0

    async def stream(
        self,
        request: GenerationRequest,
        stop: threading.Event | None = None,
        visitor: str = "",
    ) -> AsyncIterator[Event]:
        """The events of a request, ending with one `Finished` a variation.

        Setting `stop` ends it with what was made so far; closing the iterator without a take.

        Raises:
            RequestError: what the user can mend.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()

        def deliver(event: Event | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # its loop has ended: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        if not self.batch.busy:
            self._stepped_s = time.monotonic()  # its age counts from here
        ticket = self.batch.submit(request, stop, deliver, visitor)
        self._wake.set()
        try:
            unfinished = request.variations
            while unfinished:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                unfinished -= isinstance(event, Finished)
                yield event
        finally:
            ticket.close()
            self._wake.set()

    def close(self) -> None:
        """Ends the thread after its present step; callers should have ended before."""
        self._closed = True
        self._wake.set()
        self._thread.join()
