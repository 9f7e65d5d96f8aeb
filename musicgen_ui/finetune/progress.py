"""What happens during a run, as events in a file that other processes read: `progress.jsonl`.

The command line prints them, the page draws them. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

FILE = "progress.jsonl"


class Kind(StrEnum):
    """What an event says."""

    PREPARING = "preparing"  # songs are read and encoded, or the checkpoint is loaded
    NOTE = "note"  # something the user should know, such as a file that was skipped
    ESTIMATE = "estimate"  # time and memory, measured before the first step
    STEP = "step"
    SAVED = "saved"  # the adapter and the state to resume from
    SAMPLE = "sample"  # a take with the adapter as it is
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    kind: Kind
    sentence: str = ""  # for the user
    step: int = 0  # steps done
    steps: int = 0  # of the whole run
    loss: float = 0.0  # nats, of a step
    left_s: float = 0.0  # about how long the run still takes
    file: str = ""  # the sample's WAV, the adapter's folder
    time_s: float = 0.0  # Unix time


Report = Callable[[Event], None]


class ProgressFile:
    """Appends events to the file of a run's folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE

    def __call__(self, event: Event) -> None:
        """Writes an event as a line."""
        stamped = dataclasses.replace(event, time_s=round(time.time(), 2))
        line = {name: value for name, value in dataclasses.asdict(stamped).items() if value}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read(folder: Path, offset: int = 0) -> tuple[list[Event], int]:
    """The events of a run from byte `offset` of its file on, and the offset after them."""
    try:
        with (folder / FILE).open("rb") as file:
            file.seek(offset)
            content = file.read()
    except OSError:
        return [], offset
    whole = content[: content.rfind(b"\n") + 1]  # the last line may be half written
    return list(_events(whole)), offset + len(whole)


def _events(content: bytes) -> Iterator[Event]:
    for line in content.splitlines():
        try:
            values = json.loads(line)
            yield Event(**{**values, "kind": Kind(values["kind"])})
        except (ValueError, TypeError, KeyError):  # a line that a power cut left
            continue


def curve(events: list[Event]) -> list[tuple[int, float]]:
    """Step and loss in the order of the steps; a step that was made again counts once."""
    losses = {event.step: event.loss for event in events if event.kind is Kind.STEP}
    return sorted(losses.items())
