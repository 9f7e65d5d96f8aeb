"""Reading jobs to their end."""

from __future__ import annotations

from musicgen_ui.engine.protocol import Backend, Event, Failed, Finished, Job
from musicgen_ui.request import GenerationRequest


def read(job: Job) -> list[Event]:
    """All events of a job; raises what it failed with."""
    events = list(job.follow())
    if isinstance(events[-1], Failed):
        raise events[-1].error
    return events


def made(backend: Backend, request: GenerationRequest) -> list[Event]:
    """All events of a request; raises what it failed with."""
    return read(backend.submit(request))


def takes(events: list[Event]) -> list[Finished]:
    return [event for event in events if isinstance(event, Finished)]
