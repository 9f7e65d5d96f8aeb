"""The backend while the real one is being built: a click waits for it, the page need not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from musicgen_ui.engine.job import RelayedJob
from musicgen_ui.engine.protocol import (
    Backend,
    CheckpointInfo,
    Failed,
    Health,
    Job,
    Preloads,
    Progress,
    Stage,
    Status,
    Trouble,
)
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

log = logging.getLogger(__name__)

CLOSE_S = 2.0  # to wait for a backend that is being built: an import cannot be interrupted


class StartingBackend:
    """A `protocol.Backend` that builds another one in the background and then stands for it.

    Args:
        build: makes the backend; slow.
        checkpoint: loaded ahead of the first request, and the first in the list.
    """

    def __init__(self, build: Callable[[], Backend], checkpoint: str) -> None:
        self._checkpoint = checkpoint
        self._ready = threading.Event()
        self._backend: Backend | None = None
        self._error: Exception | None = None
        self._closed = False
        self._build = build
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begins to build the backend and to load the first checkpoint, in a thread."""
        self._thread.start()

    def _run(self) -> None:
        try:
            self._backend = self._build()
        except RequestError as error:  # a setting that only the backend knows to be wrong
            self._error = error
        except Exception as error:
            log.exception("The engine could not be started")
            self._error = error
        finally:
            self._ready.set()
        if self._closed:  # meanwhile: what was built is not left behind, such as a cluster
            if self._backend is not None:
                self._backend.close()
            return
        if isinstance(self._backend, Preloads):
            try:
                self._backend.preload(self._checkpoint)
            except RequestError as error:  # a click loads again and shows the reason
                log.error("The first checkpoint could not be loaded ahead: %s", error)
            except Exception:
                log.exception("The first checkpoint could not be loaded ahead")

    @property
    def refusal(self) -> RequestError | None:
        """Why there is no backend, where a setting is wrong."""
        return self._error if isinstance(self._error, RequestError) else None

    def close(self) -> None:
        """See `Backend.close`."""
        self._closed = True
        if self._backend is not None:
            self._backend.close()  # ends a load, too
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)

    def _get(self) -> Backend:
        self._ready.wait()
        if self._backend is None:
            raise RequestError(
                "The server could not start its engine: see its log."
            ) from self._error
        return self._backend

    def submit(self, request: GenerationRequest, client: str = "") -> Job:
        """See `Backend.submit`; until the backend is ready the job says so."""
        if self._backend is not None:
            return self._backend.submit(request, client)
        job = RelayedJob(request, client)
        job.log.append(Progress(Stage.LOADING, note="starting the engine"))
        threading.Thread(target=self._relay, args=(job,), daemon=True).start()
        return job

    def _relay(self, job: RelayedJob) -> None:
        try:
            backend = self._get()
            if job.begin():
                behind = backend.submit(job.request, job.client)
                job.set_behind(behind)
                for event in behind.follow():
                    job.log.append(event)
        except Exception as error:
            job.log.append(Failed(error))

    def checkpoints(self) -> list[str]:
        """The chosen checkpoint first, then the others."""
        names = self._get().checkpoints()
        return [self._checkpoint, *(n for n in names if n != self._checkpoint)]

    def describe(self, checkpoint: str, adapter: str = "") -> CheckpointInfo:
        """See `Backend.describe`; waits for the backend."""
        return self._get().describe(checkpoint, adapter)

    def preload(
        self, checkpoint: str = "auto", report: Callable[[str], object] | None = None
    ) -> None:
        """See `Preloads.preload`; waits for the backend. One that cannot does nothing."""
        if isinstance(backend := self._get(), Preloads):
            backend.preload(checkpoint, report)

    def status(self) -> Status:
        """See `Backend.status`."""
        if self._backend is not None:
            return self._backend.status()
        return Status(starting=not self._error)

    def health(self) -> Health:
        """See `Backend.health`; a backend that could not be built is trouble."""
        if self._backend is not None:
            return self._backend.health()
        return Health(Trouble.NOT_STARTED if self._error else None)

    def unload(self) -> None:
        """See `Backend.unload`."""
        if self._backend is not None:
            self._backend.unload()
