"""A job's log: every reader sees every event, in order, whenever it begins to read."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.event_log import EventLog
from musicgen_ui.engine.protocol import Event, Failed, Finished, Progress, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

NOTHING = Clip(np.zeros((1, 0), np.float32), 32_000)


def finished(variation: int = 0) -> Finished:
    return Finished(variation, NOTHING, GenerationRequest(), 0.0, 0.0)


async def read(log: EventLog, after: int = 0) -> list[Event]:
    return [event async for event in log.events(after)]


def test_readers_on_loops_and_threads_see_all_events_in_order():
    log = EventLog()
    sent = [Progress(Stage.COMPOSING, done_s=n) for n in range(200)] + [finished()]
    followed: list[Event] = []
    thread = threading.Thread(target=lambda: followed.extend(log.follow()))
    thread.start()
    writer = threading.Thread(target=lambda: [log.append(event) for event in sent])

    async def several() -> list[list[Event]]:
        readers = [asyncio.create_task(read(log, after)) for after in (0, 0, 150)]
        await asyncio.sleep(0)
        writer.start()
        return await asyncio.wait_for(asyncio.gather(*readers), 10)

    assert asyncio.run(several()) == [sent, sent, sent[150:]]
    thread.join(10)
    assert followed == sent == asyncio.run(read(log))


def test_a_log_ends_with_its_last_variation_or_with_a_failure():
    log = EventLog(variations=2)
    log.append(finished(1))
    assert not log.ended
    log.append(finished(0))
    log.append(Progress(Stage.COMPOSING))
    assert log.ended and len(log) == 2
    failing = EventLog(variations=2)
    failing.append(Failed(RequestError("No room.")))
    assert failing.ended


def test_a_reader_that_leaves_is_forgotten():
    log = EventLog()
    log.append(Progress(Stage.WAITING))

    async def leaves() -> None:
        events = log.events()
        await anext(events)
        await events.aclose()

    asyncio.run(leaves())
    assert not log._wakers
    log.append(finished())


def test_a_caller_without_a_loop_can_make_the_events_it_reads():
    log, coming = EventLog(), [Progress(Stage.WAITING), finished()]
    assert list(log.follow(poll=lambda: log.append(coming.pop(0)))) == [
        log._events[0],
        log._events[1],
    ]


@pytest.mark.parametrize("ending", [finished(), Failed(RequestError("No room."))])
def test_a_reader_of_an_ended_log_returns_at_once(ending: Event):
    log = EventLog()
    log.append(ending)
    assert asyncio.run(asyncio.wait_for(read(log, 1), 1)) == []
