"""The drivers of a batch: `Worker`, a thread for many callers, and `stream`, inline for one.

The worker's callers hand requests in and read events as asynchronous iterators on their own event
loops; the thread sleeps while there is nothing to do. Should it end, for whatever reason, its
callers are told and another one takes its place. Should the device fail, the model on it is dropped
and loaded again: who waits goes on waiting, and who had heard nothing yet begins again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from musicgen_ui.engine import faults
from musicgen_ui.engine.device import give_memory_back
from musicgen_ui.engine.protocol import Event, Finished, Progress
from musicgen_ui.engine.scheduler import Batch
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

WAIT_S = 0.1  # between two looks whether a failed device is back

log = logging.getLogger(__name__)


class Worker:
    """Drives `batch` until closed. Its methods may be called from any thread.

    Args:
        batch: to drive.
        reload: makes the same batch again after the device failed; None ends the worker then.
    """

    def __init__(self, batch: Batch, reload: Callable[[], Batch] | None = None) -> None:
        self.batch = batch
        self.trouble = ""  # what keeps music from being made, in words
        self._reload = reload
        self._submitting = threading.Lock()  # held while the batch is changed, too
        self._wake = threading.Event()
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._stepped_s = time.monotonic()  # when it last stepped, or had nothing to do
        thread = threading.Thread(target=self._run, name="musicgen-worker", daemon=True)
        thread.start()
        self._thread = thread  # not before it runs: `close` may join it

    def _run(self) -> None:
        try:
            while not self._closed:
                busy = self.batch.step()
                self._stepped_s = time.monotonic()
                if not busy:
                    self._wake.wait()
                    self._wake.clear()
        except BaseException as error:  # SystemExit too: those who wait must not wait for ever
            log.critical("The worker failed", exc_info=error)
            self._recover(error)

    def _recover(self, error: BaseException) -> None:
        try:
            if self._reload and faults.of_the_device(error):
                self._change_batch(error, self._reload)
            else:
                told = RequestError(faults.WORKER)
                told.__cause__ = error
                self.batch.losses.end_all(told)
        except BaseException as failure:
            log.critical("The model could not be loaded again", exc_info=failure)
            with self._submitting:
                self.trouble = faults.LOST
                self.batch.losses.end_all(RequestError(faults.LOST))
            return
        if not self._closed:
            self._start()

    def _change_batch(self, error: BaseException, reload: Callable[[], Batch]) -> None:
        old = self.batch
        with self._submitting:
            self.trouble = "the device failed: the model is loaded again"
            old.losses.end_all(RequestError(faults.DEVICE), carry=True)
            old.let_go()
        traceback.clear_frames(error.__traceback__)  # they hold on to its memory
        give_memory_back()
        batch = reload()
        with self._submitting:
            batch.line.take_over(old.line)
            self.batch, self.trouble = batch, ""

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

        while self.trouble:  # it ends, or there never will be a batch
            if self.trouble == faults.LOST:
                raise RequestError(faults.LOST)
            yield Progress("loading", note=self.trouble)
            await asyncio.sleep(WAIT_S)
        with self._submitting:
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
        while self._thread.is_alive():  # it may be starting another one in its place
            self._thread.join()


def stream(
    batch: Batch, request: GenerationRequest, stop: threading.Event | None = None
) -> Iterator[Event]:
    """The events of one request on a batch that nobody else drives.

    Closing the iterator frees its rows without a take.

    Raises:
        RequestError: what the user can mend.
    """
    events: deque[Event | Exception] = deque()
    ticket = batch.submit(request, stop, events.append)
    try:
        while ticket.open or events:
            if not events:
                try:
                    batch.step()
                except Exception as error:
                    batch.losses.end_all(error)
                continue
            event = events.popleft()
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        ticket.close()
        batch.step()  # frees the rows; nothing else is in flight here
