"""What became of every job: a line in the log, and the records that the metrics count.

A record follows a job from its click to its end by the events that its caller gets. The line says
key=value, one job a line, whatever its values hold; prompts are left out unless they are asked
for, and who asked is never in it.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from musicgen_ui.engine.protocol import Chunk, Finished, Progress, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

log = logging.getLogger(__name__)

# closed: nobody listened any more; refused: a sentence told the visitor why; failed: our fault
Outcome = Literal["finished", "stopped", "closed", "refused", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("finished", "stopped", "closed", "refused", "failed")


@dataclass(eq=False)
class Record:
    """A job, all its variations together."""

    takes: int = 1  # variations
    asked_s: float = 0.0  # seconds of new music, all takes together
    checkpoint: str = ""
    prompt: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    stage: Stage = "waiting"
    made_s: float = 0.0
    outcome: Outcome | None = None  # while it is under way
    waited_s: float | None = None  # until the first step
    first_audio_s: float | None = None  # until the first sound
    took_s: float = 0.0
    speeds: list[float] = field(default_factory=list)  # of each take
    began_s: float = field(default_factory=time.monotonic)

    def asks(self, request: GenerationRequest) -> None:
        """What is asked for is known, or known better."""
        self.takes = request.variations
        self.asked_s = request.variations * request.duration_s
        self.checkpoint, self.prompt = request.checkpoint, request.prompt

    @property
    def realtime(self) -> float | None:
        """Seconds of music a second of work, of the mean take."""
        return sum(self.speeds) / len(self.speeds) if self.speeds else None

    def note(self, event: Any) -> None:
        """Follows the job by one of its events."""
        after_s = time.monotonic() - self.began_s
        if isinstance(event, Progress) and self.waited_s is None:
            self.stage = event.stage
            if event.stage == "composing":
                self.waited_s = after_s
        elif isinstance(event, Chunk):
            self.made_s += event.clip.duration_s
            self.first_audio_s = self.first_audio_s or after_s
        elif isinstance(event, Finished):
            self.speeds += [event.speed] if event.speed else []
            self.checkpoint = event.request.checkpoint
            now: Outcome = "failed" if event.fault else "stopped" if event.stopped else "finished"
            self.outcome = max(self.outcome or now, now, key=OUTCOMES.index)  # the worst counts

    def end(self, error: BaseException | None) -> None:
        """It is over, by an error or not."""
        self.took_s = time.monotonic() - self.began_s
        if isinstance(error, (GeneratorExit, CancelledError)):
            self.outcome = "closed"
        elif isinstance(error, RequestError):
            self.outcome = "refused"
        elif error is not None:
            self.outcome = "failed"
        self.outcome = self.outcome or "stopped"


class Journal:
    """The jobs under way, and a line for each when it ends.

    Args:
        prompts: whether the lines tell what was asked for in words.
    """

    def __init__(self, prompts: bool = False) -> None:
        self.prompts = prompts
        self.open: set[Record] = set()
        self.count: Callable[[Record], None] = lambda record: None  # called with each at its end

    @contextmanager
    def job(self) -> Iterator[Record]:
        """Keeps a record while the job is under way; afterwards it is told."""
        record = Record()
        self.open.add(record)
        error: BaseException | None = None
        try:
            yield record
        except BaseException as raised:
            error = raised
            raise
        finally:
            record.end(error)
            self.open.discard(record)
            self.count(record)
            log.info("%s", line(record, self.prompts))


def line(record: Record, prompts: bool = False) -> str:
    """A record as "job=… outcome=…"; what is not known is left out."""
    told = {
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
    return " ".join(f"{key}={_value(value)}" for key, value in told.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    word = str(value)
    return word if re.fullmatch(r"[\w./-]+", word, re.ASCII) else json.dumps(word)
