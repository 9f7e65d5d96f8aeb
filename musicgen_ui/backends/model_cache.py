"""Models in memory: loaded once however many ask, lent while in use, evicted when idle.

Each model is loaded by a thread of its own while every caller waits and is told how far it is. A
lease counts for each caller from the first moment, waiting included: a model with leases is never
evicted, and a download or a wait that nobody waits for any more is given up, so Stop and a closed
tab end them too. Downloads go on side by side, and hold no other model's load up; loads come one
after another. Before a load, idle models go, the longest unused first, until the new one fits the
budget; an idle model also goes after `idle_s` or when `unload` is called. A failed load leaves
nothing behind, so the next request tries again. A model whose device failed is loaded anew in its
place, for those who use it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from musicgen_ui.checkpoints.hub import Abandoned
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.engine import faults
from musicgen_ui.engine.device import give_memory_back
from musicgen_ui.engine.faults import out_of_memory
from musicgen_ui.engine.scheduler import Batch
from musicgen_ui.engine.worker import Worker
from musicgen_ui.errors import RequestError

Say = Callable[[str], None]


@dataclass(eq=False)
class Resident:
    """A checkpoint in memory, or on its way there."""

    source: Source
    ready: Future[None] = field(default_factory=Future)  # done when loaded, or holds the error
    batch: Batch | None = None  # the model, once it is loaded
    worker: Worker | None = None  # drives the batch once a caller streams from it
    note: str = ""  # how far the load is, in words
    leases: int = 0  # callers that use it or wait for it
    used_s: float = 0.0  # when the last lease ended, on the monotonic clock
    timer: threading.Timer | None = None  # counts the idle time
    stale: bool = False  # its folder holds other weights by now; it goes with its last lease

    @property
    def place(self) -> object:
        """The same for every name of a checkpoint."""
        return self.source.folder or self.source.name

    @property
    def key(self) -> object:
        """The place with what lay there: weights that were trained again are another model."""
        return self.place, self.source.contents

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes; 0 until it is loaded."""
        return self.batch.nbytes if self.batch else 0

    def loaded(self) -> Batch:
        """The model, after a wait for the load; raises what the load raised."""
        self.ready.result()
        assert self.batch is not None
        return self.batch


class Residents:
    """The models in memory together.

    Args:
        load: reads a checkpoint, telling how far it is; what telling raises ends the load.
        needs: an estimate of the bytes that a checkpoint will hold; may raise `RequestError`.
        budget_bytes: what all may hold together.
        idle_s: seconds after which an unused model is unloaded; 0 is never.
        fetch: downloads what a checkpoint lacks here; told as `load` is.
        free_bytes: memory that can be had now; None where a load that finds too little fails.
    """

    def __init__(
        self,
        load: Callable[[Source, Say], Batch],
        needs: Callable[[Source], int],
        budget_bytes: int,
        idle_s: float,
        fetch: Callable[[Source, Say], object] | None = None,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._load = load
        self._free_bytes = free_bytes
        self._fetch = fetch
        self.trouble = ""  # what keeps models from being loaded, in words
        self._needs = needs
        self._budget_bytes = budget_bytes
        self._idle_s = idle_s
        self._loading = threading.Lock()  # one load at a time, since each needs its room
        self._changed = threading.Condition()  # guards what follows; told of every lease's end
        self._residents: dict[object, Resident] = {}
        self._closed = False

    @contextlib.contextmanager
    def lease(self, source: Source) -> Iterator[Resident]:
        """Lends a model, which may be on its way still: wait for it with `loaded`."""
        resident = self._take(Resident(source, note=f"loading {source.name}"))
        try:
            yield resident
        finally:
            self._return(resident)

    def worker(self, resident: Resident) -> Worker:
        """The thread that drives a loaded model for all its callers."""
        batch = resident.loaded()
        with self._changed:
            resident.worker = resident.worker or Worker(batch, lambda: self._reload(resident))
            return resident.worker

    def all(self) -> list[Resident]:
        """Every model that is loaded or on its way, in the order they were asked for."""
        with self._changed:
            return list(self._residents.values())

    def unload(self) -> None:
        """Gives the memory of every idle model back."""
        with self._changed:
            idle = self._idle()
            for resident in idle:
                self._forget(resident)
        _release(idle)

    def close(self) -> None:
        """Unloads everything: what is idle now, what is in use when its leases end."""
        self._closed = True
        self.unload()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RequestError("The app is closing: start it again.")

    def _take(self, new: Resident) -> Resident:
        with self._changed:
            self._refuse_if_closed()
            for other in self._residents.values():
                if other.place == new.place:
                    other.stale = other.key != new.key
            stale = self._without_stale()
            resident = self._residents.setdefault(new.key, new)
            resident.leases += 1
            if resident.timer:
                resident.timer.cancel()
            if resident is new:
                threading.Thread(target=self._fill, args=(new, stale), daemon=True).start()
            else:
                _release_apart(stale)
            return resident

    def _without_stale(self) -> list[Resident]:
        """Takes the idle models whose folders hold other weights by now off the list."""
        stale = [resident for resident in self._idle() if resident.stale]
        for resident in stale:
            self._forget(resident)
        return stale

    def _return(self, resident: Resident) -> None:
        with self._changed:
            resident.leases -= 1
            self._count_idle_time(resident)
            stale = self._without_stale()
        _release_apart(stale)
        if self._closed:
            self.unload()

    def _count_idle_time(self, resident: Resident) -> None:
        resident.used_s = time.monotonic()
        if self._idle_s and not self._closed and resident in self._idle():
            resident.timer = threading.Timer(self._idle_s, self._expire, (resident,))
            resident.timer.daemon = True
            resident.timer.start()
        self._changed.notify_all()

    def _expire(self, resident: Resident) -> None:
        with self._changed:
            unused_s = time.monotonic() - resident.used_s
            if resident not in self._idle() or unused_s < self._idle_s:
                return
            self._forget(resident)
        _release([resident])

    def _idle(self) -> list[Resident]:
        """The loaded models that nobody uses, the longest unused first."""
        idle = [r for r in self._residents.values() if r.batch and not r.leases]
        return sorted(idle, key=lambda resident: resident.used_s)

    def _forget(self, resident: Resident) -> None:
        if self._residents.get(resident.key) is resident:
            del self._residents[resident.key]
        if resident.timer:
            resident.timer.cancel()

    # On the thread of a load

    def _fill(self, resident: Resident, stale: list[Resident]) -> None:
        _release(stale)

        def say(note: str) -> None:
            with self._changed:
                self._refuse_if_closed()
                if not resident.leases:
                    self._forget(resident)
                    raise Abandoned
                resident.note = note

        try:
            needed = self._needs(resident.source)  # before gigabytes are fetched
            if self._fetch:
                self._fetch(resident.source, say)
            with self._loading:
                say(f"loading {resident.source.name}")
                batch = self._load_in_room(resident.source, needed, say)
        except BaseException as error:
            with self._changed:
                self._forget(resident)
            self._note(error)
            resident.ready.set_exception(
                RequestError(faults.LOST) if faults.of_the_device(error) else faults.told(error)
            )
            return
        self._note(None)
        with self._changed:
            resident.batch = batch
            resident.ready.set_result(None)
            self._count_idle_time(resident)  # every caller may have left meanwhile
        if self._closed:
            self.unload()

    def _note(self, error: BaseException | None) -> None:
        self.trouble = faults.LOST if error and faults.of_the_device(error) else ""

    def _reload(self, resident: Resident) -> Batch:
        """Loads a model again whose device failed; on the thread of its worker."""
        try:
            with self._loading:
                batch = self._load_in_room(resident.source, 0, lambda note: None)
            with self._changed:
                if self._residents.get(resident.key) is not resident:
                    raise Abandoned
                resident.batch = batch
                return batch
        except BaseException as error:
            with self._changed:
                self._forget(resident)  # the next request tries again
            self._note(error)
            raise

    def _load_in_room(self, source: Source, needed: int, say: Say) -> Batch:
        """Loads, and once more without the idle models if the memory does not suffice."""
        self._make_room(source, needed, say)
        try:
            return self._load(source, say)
        except Exception as error:
            if not out_of_memory(error):
                raise
        # Out of the handler: the error held on to what had been read.
        self.unload()
        give_memory_back()
        say(f"loading {source.name} again, with more room")
        try:
            return self._load(source, say)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise _no_memory(source) from error

    def _make_room(self, source: Source, needed: int, say: Say) -> None:
        """Evicts idle models until `needed` bytes fit the budget and the memory; waits for those
        in use.

        Raises:
            RequestError: no model is left, and there still is too little free memory.
        """
        while True:
            with self._changed:
                held = sum(resident.nbytes for resident in self._residents.values())
                fits = not held or held + needed <= self._budget_bytes
                is_free = self._free_bytes is None or needed <= self._free_bytes()
                if fits and is_free:
                    return
                if not held:
                    raise _no_memory(source)
                idle = self._idle()[:1]
                if idle:
                    self._forget(idle[0])
                else:
                    say("waiting for room: another checkpoint is in use")
                    self._changed.wait(1.0)
            _release(idle)


def _no_memory(source: Source) -> RequestError:
    return RequestError(
        f"There is not enough free memory for {source.name}: choose a smaller checkpoint, or end "
        "other programs that use the memory.",
        "checkpoint",
    )


def _release_apart(residents: list[Resident]) -> None:
    """Frees models, but not on the thread of a caller, who may be an event loop."""
    if residents:
        threading.Thread(target=_release, args=(residents,), daemon=True).start()


def _release(residents: list[Resident]) -> None:
    """Frees models that were taken off the list."""
    for resident in residents:
        if resident.worker:
            resident.worker.close()
        resident.worker = resident.batch = None
    if residents:
        give_memory_back()
