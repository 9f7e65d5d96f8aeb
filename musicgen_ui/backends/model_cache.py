"""The models in memory: loaded once for all jobs, kept while in use, evicted when idle.

Each model is loaded by a thread of its own, and `note` says how far it is. Whoever acquires a model
is counted as its user from the first moment, waiting included: a model with users is never evicted,
and a download or a wait without users is given up, so a stopped job ends them too.
Downloads run side by side and hold up no other model's load; loads run one
after another. Before a load, idle models go, the longest unused first, until the new one fits the
budget; an idle model also goes after `idle_s` or when `unload` is called. A failed load leaves
nothing behind, so the next request tries again. A model whose device failed is loaded anew in its
place, for its users.
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
from musicgen_ui.engine.protocol import Trouble
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.engine.worker import Worker
from musicgen_ui.errors import Fault, RequestError

Say = Callable[[str], None]


@dataclass(eq=False)
class CachedModel:
    """A checkpoint in memory, or on its way there."""

    source: Source
    ready: Future[None] = field(default_factory=Future)  # done when loaded, or holds the error
    scheduler: Scheduler | None = None  # the model, once it is loaded
    worker: Worker | None = None  # steps the scheduler from the first job on
    note: str = ""  # how far the load is, in words
    users: int = 0  # jobs and others that use it or wait for it
    used_s: float = 0.0  # when its last user left, on the monotonic clock
    timer: threading.Timer | None = None  # counts the idle time
    stale: bool = False  # its folder holds other weights by now; it goes with its last user

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
        return self.scheduler.nbytes if self.scheduler else 0

    def loaded(self) -> Scheduler:
        """The model, after a wait for the load; raises what the load raised."""
        self.ready.result()
        assert self.scheduler is not None
        return self.scheduler


class ModelCache:
    """The models in memory together.

    Args:
        load: reads a checkpoint, reporting how far it is; what the report raises ends the load.
        needs: an estimate of the bytes that a checkpoint will hold; may raise `RequestError`.
        budget_bytes: what all may hold together.
        idle_s: seconds after which an unused model is unloaded; 0 is never.
        fetch: downloads what a checkpoint lacks here; reports as `load` does.
        free_bytes: memory that can be had now; None where a load that finds too little fails.
    """

    def __init__(
        self,
        load: Callable[[Source, Say], Scheduler],
        needs: Callable[[Source], int],
        budget_bytes: int,
        idle_s: float,
        fetch: Callable[[Source, Say], object] | None = None,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._load = load
        self._free_bytes = free_bytes
        self._fetch = fetch
        self.trouble: Trouble | None = None  # what keeps models from being loaded
        self._needs = needs
        self._budget_bytes = budget_bytes
        self._idle_s = idle_s
        self._loading = threading.Lock()  # one load at a time, since each needs its memory
        self._changed = threading.Condition()  # guards what follows; notified when a user leaves
        self._models: dict[object, CachedModel] = {}
        self._closed = False

    @contextlib.contextmanager
    def acquire(self, source: Source) -> Iterator[CachedModel]:
        """A model, which may still be loading: `loaded` waits. It stays until the end."""
        model = self._take(CachedModel(source, note=f"loading {source.name}"))
        try:
            yield model
        finally:
            self._return(model)

    def worker(self, model: CachedModel) -> Worker:
        """The thread that steps a loaded model for all jobs."""
        scheduler = model.loaded()
        with self._changed:
            model.worker = model.worker or Worker(scheduler, lambda: self._reload(model))
            return model.worker

    def all(self) -> list[CachedModel]:
        """Every model that is loaded or on its way, in the order they were asked for."""
        with self._changed:
            return list(self._models.values())

    def unload(self) -> None:
        """Gives the memory of every idle model back."""
        with self._changed:
            idle = self._idle()
            for model in idle:
                self._forget(model)
        _release(idle)

    def close(self) -> None:
        """Unloads everything: what is idle now, what is in use when its last user leaves."""
        self._closed = True
        self.unload()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RequestError("The app is closing: start it again.")

    def _take(self, new: CachedModel) -> CachedModel:
        with self._changed:
            self._refuse_if_closed()
            for other in self._models.values():
                if other.place == new.place:
                    other.stale = other.key != new.key
            stale = self._without_stale()
            model = self._models.setdefault(new.key, new)
            model.users += 1
            if model.timer:
                model.timer.cancel()
            if model is new:
                threading.Thread(target=self._fill, args=(new, stale), daemon=True).start()
            else:
                _release_apart(stale)
            return model

    def _without_stale(self) -> list[CachedModel]:
        """Takes the idle models whose folders hold other weights by now off the list."""
        stale = [model for model in self._idle() if model.stale]
        for model in stale:
            self._forget(model)
        return stale

    def _return(self, model: CachedModel) -> None:
        with self._changed:
            model.users -= 1
            self._count_idle_time(model)
            stale = self._without_stale()
        _release_apart(stale)
        if self._closed:
            self.unload()

    def _count_idle_time(self, model: CachedModel) -> None:
        model.used_s = time.monotonic()
        if self._idle_s and not self._closed and model in self._idle():
            model.timer = threading.Timer(self._idle_s, self._expire, (model,))
            model.timer.daemon = True
            model.timer.start()
        self._changed.notify_all()

    def _expire(self, model: CachedModel) -> None:
        with self._changed:
            unused_s = time.monotonic() - model.used_s
            if model not in self._idle() or unused_s < self._idle_s:
                return
            self._forget(model)
        _release([model])

    def _idle(self) -> list[CachedModel]:
        """The loaded models without a user, the longest unused first."""
        idle = [r for r in self._models.values() if r.scheduler and not r.users]
        return sorted(idle, key=lambda model: model.used_s)

    def _forget(self, model: CachedModel) -> None:
        if self._models.get(model.key) is model:
            del self._models[model.key]
        if model.timer:
            model.timer.cancel()

    # On the thread of a load

    def _fill(self, model: CachedModel, stale: list[CachedModel]) -> None:
        _release(stale)

        def say(note: str) -> None:
            with self._changed:
                self._refuse_if_closed()
                if not model.users:
                    self._forget(model)
                    raise Abandoned
                model.note = note

        try:
            needed = self._needs(model.source)  # before gigabytes are fetched
            if self._fetch:
                self._fetch(model.source, say)
            with self._loading:
                say(f"loading {model.source.name}")
                scheduler = self._load_with_space(model.source, needed, say)
        except BaseException as error:
            with self._changed:
                self._forget(model)
            self._note(error)
            model.ready.set_exception(
                faults.error_of(Fault.DEVICE_LOST)
                if faults.of_the_device(error)
                else faults.for_caller(error)
            )
            return
        self._note(None)
        with self._changed:
            model.scheduler = scheduler
            model.ready.set_result(None)
            self._count_idle_time(model)  # every user may have left meanwhile
        if self._closed:
            self.unload()

    def _note(self, error: BaseException | None) -> None:
        lost = error is not None and faults.of_the_device(error)
        self.trouble = Trouble.DEVICE_LOST if lost else None

    def _reload(self, model: CachedModel) -> Scheduler:
        """Loads a model again whose device failed; on the thread of its worker."""
        try:
            with self._loading:
                scheduler = self._load_with_space(model.source, 0, lambda note: None)
            with self._changed:
                if self._models.get(model.key) is not model:
                    raise Abandoned
                model.scheduler = scheduler
                return scheduler
        except BaseException as error:
            with self._changed:
                self._forget(model)  # the next request tries again
            self._note(error)
            raise

    def _load_with_space(self, source: Source, needed: int, say: Say) -> Scheduler:
        """Loads, and once more without the idle models if there is too little memory."""
        self._make_space(source, needed, say)
        try:
            return self._load(source, say)
        except Exception as error:
            if not out_of_memory(error):
                raise
        # Out of the handler: the error held on to what had been read.
        self.unload()
        give_memory_back()
        say(f"loading {source.name} again, with more free memory")
        try:
            return self._load(source, say)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise _no_memory(source) from error

    def _make_space(self, source: Source, needed: int, say: Say) -> None:
        """Evicts idle models until `needed` bytes fit the budget and the memory; waits for those
        in use.

        Raises:
            RequestError: no model is left, and there still is too little free memory.
        """
        while True:
            with self._changed:
                held = sum(model.nbytes for model in self._models.values())
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
                    say("waiting for memory: another checkpoint is in use")
                    self._changed.wait(1.0)
            _release(idle)


def _no_memory(source: Source) -> RequestError:
    return RequestError(
        f"There is not enough free memory for {source.name}: choose a smaller checkpoint, or end "
        "other programs that use the memory.",
        "checkpoint",
    )


def _release_apart(models: list[CachedModel]) -> None:
    """Frees models, but not on the thread of a user, which may step it."""
    if models:
        threading.Thread(target=_release, args=(models,), daemon=True).start()


def _release(models: list[CachedModel]) -> None:
    """Frees models that were taken off the list."""
    for model in models:
        if model.worker:
            model.worker.close()
        model.worker = model.scheduler = None
    if models:
        give_memory_back()
