"""What runs on ZeroGPU's GPU: a call of `compose`, in a forked worker.

The weights lie on the GPU when a worker begins. Its first call packs them into a `Scheduler`,
later ones find it there. Arguments and results are pickled, so a stop is a file that appears, which
the worker sees at its next step, and events travel in parts: the first ones at once, then about one
a second, but never so late that a listener's music runs out. Visitors have minutes of GPU a day, so
a call asks for the seconds that the calls before it needed (`Pace`).

Outside ZeroGPU `spaces.GPU` does nothing and everything here runs in one process.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import spaces

from musicgen_ui.checkpoints.registry import Loaded
from musicgen_ui.engine.cuda_graph import CudaGraphStepper
from musicgen_ui.engine.protocol import Chunk, Event, Failed, Finished
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

PART_S = (0.25, 1.0)  # between two parts, at least and at most
MARGIN, SLACK_S = 1.25, 2.0  # what is asked for beyond the seconds that calls needed before


@dataclass(frozen=True)
class StopFile:
    """A stop event between processes: it is set when the file is there."""

    path: str

    def is_set(self) -> bool:
        """Whether the caller asked to stop."""
        return os.path.exists(self.path)  # noqa: PTH110 - asked at every step

    def set(self) -> None:
        """Asks the worker to stop at its next step."""
        Path(self.path).touch()

    def clear(self) -> None:
        """Deletes the file."""
        Path(self.path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Spent:
    """What a call took, as its worker measured it."""

    start_s: float  # until the first sound, a new worker's own start included
    step_s: float | None  # a frame's; None where there were too few to tell


Item = Event | Spent
Part = list[Item]


class Pace:
    """The seconds that a call will need, learnt from the calls before it.

    Until a checkpoint's first call has ended they are a cautious guess.
    """

    def __init__(self, start_s: float = 15.0, step_s: float = 0.025) -> None:
        self._guess_s = start_s, step_s
        self._start_s: dict[str, float] = {}  # the longest: a call may find no worker
        self._step_s: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=8))

    def learn(self, name: str, spent: Spent) -> None:
        """Takes a call's figures in."""
        self._start_s[name] = max(spent.start_s, self._start_s.get(name, 0.0))
        if spent.step_s is not None:
            self._step_s[name].append(spent.step_s)

    def seconds(self, name: str, request: GenerationRequest) -> int:
        """What to ask for."""
        start_s = self._start_s.get(name, self._guess_s[0])
        step_s = max(self._step_s[name], default=self._guess_s[1])
        work = _work(request, request.duration_s)
        return math.ceil(SLACK_S + MARGIN * (start_s + step_s * work))


def _work(request: GenerationRequest, made_s: float) -> float:
    """Frames of a single take that `made_s` seconds of every variation are worth."""
    return 50 * made_s * (1 + 0.25 * (request.variations - 1))  # they share their steps


PACE = Pace()
MODELS: dict[str, Loaded] = {}  # filled before the workers are forked
_SCHEDULERS: dict[str, Scheduler] = {}  # a worker's own


def gpu_seconds(name: str, request: GenerationRequest, stop: StopFile) -> int:  # noqa: ARG001
    """The duration of `compose`, called with its arguments in the server's process."""
    return PACE.seconds(name, request)


@spaces.GPU(duration=gpu_seconds)  # type: ignore[untyped-decorator] # spaces has no types
def compose(name: str, request: GenerationRequest, stop: StopFile) -> Iterator[Part]:
    """The events of a request in parts, with what it took in the end.

    Runs in a worker. A sentence for the user travels in a `Failed`, since of an exception no more
    than its name comes through.
    """
    if stop.is_set():  # while it waited for its GPU
        return
    began_s = time.time() if _SCHEDULERS else psutil.Process().create_time()
    try:
        scheduler = _scheduler(name)
        yield from _parts(_events(scheduler, request, stop), request, began_s)
    except RequestError as error:
        yield [Failed(error)]


def _events(scheduler: Scheduler, request: GenerationRequest, stop: StopFile) -> Iterator[Event]:
    """The events of a request on a scheduler that nothing else steps."""
    job = scheduler.submit(request)

    def step() -> None:
        if stop.is_set():
            job.stop()
        scheduler.poll()

    try:
        for event in job.follow(poll=step):
            if isinstance(event, Failed):
                raise event.error
            yield event
    finally:
        job.stop()
        while scheduler.busy:
            scheduler.poll()


def _scheduler(name: str) -> Scheduler:
    if name not in _SCHEDULERS:
        loaded = MODELS[name]
        device = loaded.model.device
        on_gpu = device.type == "cuda"
        _SCHEDULERS[name] = scheduler = Scheduler(
            loaded.model,
            loaded.tokenizer,
            extractor=loaded.extractor,
            checkpoint=name,
            device=device,
            precision="bfloat16" if on_gpu else "float32",
            max_jobs=4,
            graphs=False,
            window_s=loaded.window_s,
        )
        if on_gpu:  # no warm-up: it would capture graphs for lengths that nobody asked for
            scheduler.stepper = CudaGraphStepper(scheduler.decoder, scheduler.max_jobs)
    return _SCHEDULERS[name]


def _parts(events: Iterator[Event], request: GenerationRequest, began_s: float) -> Iterator[Part]:
    """Gathers events; a listener who is far behind can wait longer for the next part."""
    part: Part = []
    sent_s, wait_s = 0.0, 0.0
    first_s: float | None = None  # when the first sound came
    first_made_s = made_s = 0.0
    for event in events:
        part.append(event)
        now_s = time.time()
        if isinstance(event, Chunk) and event.variation == 0:
            made_s += event.clip.duration_s
            if first_s is None:
                first_s, first_made_s, wait_s = now_s, made_s, 0.0
        if now_s - sent_s >= wait_s or isinstance(event, Finished):
            yield part
            part, sent_s = [], now_s
            ahead_s = made_s - (now_s - (first_s or now_s))
            wait_s = min(max(ahead_s / 2, PART_S[0]), PART_S[1])
    if first_s is None:
        return
    work = _work(request, made_s - first_made_s)
    yield [Spent(first_s - began_s, (time.time() - first_s) / work if work >= 100 else None)]
