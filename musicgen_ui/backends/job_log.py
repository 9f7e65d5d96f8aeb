"""What became of every job: a line in the log, and the records that the metrics count.

A record follows a job from its click to its end by the job's events. A line has key=value pairs,
one job a line, whatever the values hold; prompts are left out unless the host asks for them, and
who the client was is never in it.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from musicgen_ui.engine.protocol import Chunk, Event, Failed, Finished, Progress, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """How a job ended; of a job's takes the last in this list counts."""

    FINISHED = "finished"
    STOPPED = "stopped"  # by the user or by the end of the server
    CLOSED = "closed"  # the client left
    REFUSED = "refused"  # a sentence said why
    FAILED = "failed"  # our fault


@dataclass(eq=False)
class JobRecord:
    """A job, all its variations together."""

    id: str
    takes: int = 1  # variations
    asked_s: float = 0.0  # seconds of new music, all takes together
    checkpoint: str = ""
    prompt: str = ""
    stage: Stage = Stage.WAITING
    made_s: float = 0.0
    outcome: Outcome | None = None  # while it is under way
    waited_s: float | None = None  # until the first step
    first_audio_s: float | None = None  # until the first audio
    took_s: float = 0.0
    speeds: list[float] = field(default_factory=list)  # of each take
    began_s: float = field(default_factory=time.monotonic)

    def set_request(self, request: GenerationRequest) -> None:
        """What is asked for is known, or known better."""
        self.takes = request.variations
        self.asked_s = 0.0 if request.live else request.variations * request.end_s
        self.checkpoint, self.prompt = request.checkpoint, request.prompt

    @property
    def realtime(self) -> float | None:
        """Seconds of music a second of work, of the mean take."""
        return sum(self.speeds) / len(self.speeds) if self.speeds else None

    def note(self, event: Event) -> None:
        """Follows the job by one of its events."""
        after_s = time.monotonic() - self.began_s
        if isinstance(event, Progress) and self.waited_s is None:
            self.stage = event.stage
            if event.stage is Stage.COMPOSING:
                self.waited_s = after_s
        elif isinstance(event, Chunk):
            self.made_s += event.clip.duration_s
            self.first_audio_s = self.first_audio_s or after_s
        elif isinstance(event, Finished):
            self.speeds += [event.speed] if event.speed else []
            self.checkpoint = event.request.checkpoint
            ended = Outcome.STOPPED if event.stopped else Outcome.FINISHED
            self._end_as(Outcome.FAILED if event.fault else ended)
        elif isinstance(event, Failed):
            refused = isinstance(event.error, RequestError)
            self._end_as(Outcome.REFUSED if refused else Outcome.FAILED)

    def _end_as(self, outcome: Outcome) -> None:
        order = list(Outcome)
        self.outcome = max(self.outcome or outcome, outcome, key=order.index)


class JobLog:
    """The jobs under way, and a line for each when it ends.

    Args:
        prompts: whether the lines hold the prompts.
    """

    def __init__(self, prompts: bool = False) -> None:
        self.prompts = prompts
        self.open: set[JobRecord] = set()
        self.count: Callable[[JobRecord], None] = lambda record: None  # called at each one's end

    def begin(self, record: JobRecord) -> None:
        """A job is under way."""
        self.open.add(record)

    def end(self, record: JobRecord, closed: bool = False) -> None:
        """A job is over; `closed` is whether its client left."""
        record.took_s = time.monotonic() - record.began_s
        if closed and record.outcome is not Outcome.FAILED:
            record.outcome = Outcome.CLOSED
        record.outcome = record.outcome or Outcome.STOPPED
        self.open.discard(record)
        self.count(record)
        log.info("%s", line(record, self.prompts))


def line(record: JobRecord, prompts: bool = False) -> str:
    """A record as "job=… outcome=…"; what is not known is left out."""
    values = {
        "job": record.id,
        "outcome": record.outcome,
        "checkpoint": record.checkpoint,
        "takes": record.takes,
        "asked_s": record.asked_s,
        "made_s": record.made_s,
        "waited_s": record.waited_s,
        "first_audio_s": record.first_audio_s,
        "took_s": record.took_s,
        "realtime": record.realtime,
    } | ({"prompt": record.prompt} if prompts else {})
    return " ".join(f"{key}={_value(value)}" for key, value in values.items() if value is not None)


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    word = str(value)
    return word if re.fullmatch(r"[\w./-]+", word, re.ASCII) else json.dumps(word)
