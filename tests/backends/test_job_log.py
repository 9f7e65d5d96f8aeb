"""One line a job, true and safe to print."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from musicgen_ui.backends.admission import Admission
from musicgen_ui.backends.job_log import JobRecord, Outcome, line
from musicgen_ui.errors import RequestError
from musicgen_ui.request import FIELDS
from musicgen_ui.ui.handlers import Handlers
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import wait_for

TAB = SimpleNamespace(session_hash="secret-tab", client=SimpleNamespace(host="192.0.2.77"))
CHUNK = re.compile(r"(\w+)=(\"(?:[^\"\\]|\\.)*\"|\S+)")


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    """The lines of the job log as dictionaries."""
    lines = [r.getMessage() for r in caplog.records if r.name == "musicgen_ui.backends.job_log"]
    assert all("\n" not in text for text in lines)
    return [dict(CHUNK.findall(text)) for text in lines]


@pytest.fixture
def handlers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Handlers:
    caplog.set_level(logging.INFO)
    return Handlers(Admission(FakeBackend(), tmp_path, queue_length=2))


def compose(handlers: Handlers, leave: bool = False, stop: bool = False, **changes: Any) -> None:
    values = {name: spec.default for name, spec in FIELDS.items()} | {"duration_s": 1.0} | changes

    async def run() -> None:
        updates = handlers.compose({}, TAB, **values)
        async for update in updates:
            if update.get("live", {}).get("done_s"):
                if leave:
                    break
                if stop:
                    await handlers.stop(TAB)
        await updates.aclose()

    asyncio.run(run())
    wait_for(lambda: not handlers.backend.job_log.open)


def test_a_finished_job_is_a_line(handlers: Handlers, caplog: pytest.LogCaptureFixture) -> None:
    handlers.backend.backend.speed = 10.0
    compose(handlers, variations=2, prompt="my private song")
    (one,) = told(caplog)
    assert one["outcome"] == "finished" and one["takes"] == "2"
    assert one["checkpoint"] == "fake"  # as it was resolved
    assert one["asked_s"] == one["made_s"] == "2.00" and one["realtime"] == "10.00"
    assert 0 <= float(one["waited_s"]) <= float(one["first_audio_s"]) < float(one["took_s"]) < 5
    for secret in ("private", "secret-tab", "192.0.2.77"):
        assert secret not in caplog.text
    assert not handlers.backend.job_log.open


def test_prompts_are_told_where_they_are_asked_for_and_stay_on_their_line() -> None:
    evil = 'a"b\nINFO job=fake outcome=finished\x1b[2J'
    text = line(
        JobRecord("a", prompt=evil, checkpoint="my folder/with space", outcome=Outcome.CLOSED), True
    )
    assert text.isprintable() and text.count("outcome=") == 2  # one of them quoted
    values = dict(CHUNK.findall(text))
    assert values["outcome"] == "closed" and values["checkpoint"] == '"my folder/with space"'


def test_each_end_has_its_outcome(handlers: Handlers, caplog: pytest.LogCaptureFixture) -> None:
    handlers.backend.backend.speed = 5.0
    compose(handlers, leave=True, duration_s=20)
    compose(handlers, stop=True, duration_s=20)
    for failure in (RequestError("The memory is full."), ZeroDivisionError()):
        handlers.backend.backend.failure = failure
        with pytest.raises(gr.Error):
            compose(handlers)
    with pytest.raises(gr.Error):
        compose(handlers, temperature=99)
    with pytest.raises(gr.Error, match="at most 2 takes"):
        compose(handlers, variations=3)
    lines = told(caplog)
    outcomes = ["closed", "stopped", "refused", "failed", "refused", "refused"]
    assert [one["outcome"] for one in lines] == outcomes
    assert 0 < float(lines[0]["made_s"]) < 20 and 0 < float(lines[1]["made_s"]) < 20
    assert len({one["job"] for one in lines}) == 6
