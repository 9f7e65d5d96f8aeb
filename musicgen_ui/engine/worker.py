"""The thread that steps a scheduler for all its clients.

It sleeps while there is nothing to do. Should it end, for whatever reason, its jobs fail with a
sentence and another thread takes its place. Should the device fail, the model is dropped and loaded
again: jobs that wait go on waiting, and those without audio start again.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable

from musicgen_ui.engine import faults
from musicgen_ui.engine.device import give_memory_back
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.protocol import Progress, Stage, Trouble
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.errors import Fault

IDLE_S = 0.02  # between two looks whether a live piece is to go on
RELOAD_LOOK_S = 0.1  # between two looks whether the model is loaded again

log = logging.getLogger(__name__)


class Worker:
    """Steps `scheduler` until closed. Its methods may be called from any thread.

    Args:
        scheduler: to step.
        reload: makes the same scheduler again after the device failed; None ends the worker then.
    """

    def __init__(self, scheduler: Scheduler, reload: Callable[[], Scheduler] | None = None) -> None:
        self.scheduler = scheduler
        self.trouble: Trouble | None = None  # what keeps music from being made
        self._reload = reload
        self._changing = threading.Lock()  # held while jobs are added or the scheduler is changed
        self._encoding = threading.Lock()  # one audio prompt at a time
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
                busy = self.scheduler.step()
                self._stepped_s = time.monotonic()
                if not busy or self.scheduler.idles:
                    self._wake.wait(IDLE_S if busy else None)
                    self._wake.clear()
        except BaseException as error:  # SystemExit too: no job may wait for ever
            log.critical("The worker failed", exc_info=error)
            self._recover(error)

    def _recover(self, error: BaseException) -> None:
        try:
            if self._reload and faults.of_the_device(error):
                self._change_scheduler(error, self._reload)
            else:
                self.scheduler.fail_all(faults.error_of(Fault.WORKER, error))
        except BaseException as failure:
            log.critical("The model could not be loaded again", exc_info=failure)
            with self._changing:
                self.trouble = Trouble.DEVICE_LOST
                self.scheduler.fail_all(faults.error_of(Fault.DEVICE_LOST))
            return
        if not self._closed:
            self._start()

    def _change_scheduler(self, error: BaseException, reload: Callable[[], Scheduler]) -> None:
        old = self.scheduler
        with self._changing:
            self.trouble = Trouble.RELOADING
            old.fail_all(faults.error_of(Fault.DEVICE), retry=True)
            old.free_model()
        traceback.clear_frames(error.__traceback__)  # they hold on to its memory
        give_memory_back()
        new = reload()
        with self._changing:
            new.queue.take_over(old.queue)
            self.scheduler, self.trouble = new, None

    @property
    def alive(self) -> bool:
        """Its thread runs."""
        return self._thread.is_alive()

    @property
    def step_age_s(self) -> float:
        """Seconds since the last step; 0 while there is nothing to do."""
        return time.monotonic() - self._stepped_s if self.scheduler.busy else 0.0

    def add(self, job: LoggedJob) -> None:
        """Encodes the job's audio prompt on this thread and queues the job.

        Raises:
            RequestError: the device is lost.
        """
        while self._is_ready(job):
            scheduler = self.scheduler
            try:
                with self._encoding:
                    prompt = scheduler.encode(job.request)
            except Exception:
                if self.scheduler is scheduler and not self.trouble:
                    raise
                continue  # the device failed meanwhile
            with self._changing:
                if self.scheduler is not scheduler or self.trouble:
                    continue
                if not scheduler.busy:
                    self._stepped_s = time.monotonic()  # its age counts from here
                scheduler.add(job, prompt)
            self._wake.set()
            return

    def _is_ready(self, job: LoggedJob) -> bool:
        """Waits while the model is loaded again; False where the job has ended meanwhile."""
        if self.trouble is Trouble.RELOADING:
            note = "the device failed: the model is loaded again"
            job.log.append(Progress(Stage.LOADING, note=note))
        while self.trouble is Trouble.RELOADING and not job.log.wait(RELOAD_LOOK_S):
            pass
        if self.trouble is Trouble.DEVICE_LOST:
            raise faults.error_of(Fault.DEVICE_LOST)
        return not job.ended

    def close(self) -> None:
        """Ends the thread after its present step; its jobs should have ended before."""
        self._closed = True
        self._wake.set()
        while self._thread.is_alive():  # it may be starting another one in its place
            self._thread.join()
