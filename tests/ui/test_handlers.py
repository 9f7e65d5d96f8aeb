"""What a click becomes: updates by name, files, sentences; over a fake engine."""

from __future__ import annotations

import asyncio
import base64
import inspect
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import soundfile

from musicgen_ui import takes
from musicgen_ui.audio import load
from musicgen_ui.backends.admission import Admission
from musicgen_ui.engine.protocol import Chunk, Progress, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.request import FIELDS, GenerationRequest
from musicgen_ui.server.audio_stream import pcm16
from musicgen_ui.ui import audio_panel, request_form, take_panel
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.wording import SORRY, progress_text
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import wait_for
from tests.helpers.page import TAB, compose, land, state, values
from tests.helpers.takes import finished, with_codes

OTHER_TAB = SimpleNamespace(session_hash="b")


def wav(updates: dict[str, Any]) -> str:
    """The file of the take in the player."""
    return updates["take_audio"]["wav"]["path"]


def test_the_stream_and_the_file_hold_the_same_samples(handlers: Handlers) -> None:
    end = state(compose(handlers, prompt="calm"))
    samples, rate = soundfile.read(wav(end), dtype="int16")
    assert rate == 16_000 and len(samples) == 16_000
    job = handlers.sessions.job(end["live"]["job"], end["live"]["session"])
    assert job is not None and end["live"]["session"] == TAB.session_hash
    streamed = b"".join(pcm16(e.clip) for e in job.follow() if isinstance(e, Chunk))
    assert np.array_equal(np.frombuffer(streamed, "<i2"), samples)
    assert end["take_audio"]["as_streamed"] and end["take_audio"]["job"] == job.id
    for session in ("", "b", "another"):
        assert handlers.sessions.job(job.id, session) is None


def test_the_page_says_what_is_going_on_from_the_first_moment(handlers: Handlers) -> None:
    updates = compose(handlers)
    assert updates[0]["live"]["stage"] == "waiting"
    assert updates[0]["stop"]["visible"] and updates[0]["generate"]["value"] == "Queue another"
    end = state(updates)
    assert end["live"]["stage"] == "finished" and end["live"]["last"]
    assert end["generate"]["value"] == "Generate" and not end["stop"]["visible"]
    assert "seed</dt><dd>7<" in end["take_facts"]
    shown = end["take_audio"]
    assert Path(shown["picture"]["path"]).stat().st_size > 1000
    assert shown["alt"].startswith("Mel spectrogram") and shown["edges"]["channels"] == 1
    assert len(base64.b64decode(shown["peaks"])) == 2 * 100


def test_every_variation_is_a_take_with_its_seed(handlers: Handlers) -> None:
    end = state(compose(handlers, variations=3))
    assert [label for label, _ in end["take_variation"]["choices"]] == [
        "1 · seed 7",
        "2 · seed 8",
        "3 · seed 9",
    ]
    group = end["history"][0]
    shown = take_panel.choose_variation(end["history"], [0, 0], 2)
    assert wav(shown) == str(group[2].wav)
    assert Path(shown["take_audio"]["picture"]["path"]).exists()
    assert takes.read_settings(group[2].wav)["seed"] == 9


def test_earlier_takes_stay_within_reach(handlers: Handlers) -> None:
    first = state(compose(handlers, prompt="one"))
    second = state(compose(handlers, first["history"], prompt="two"))
    labels = [label for label, _ in second["take_history"]["choices"]]
    assert labels[0].startswith("2 · two") and labels[1].startswith("1 · one")
    back = take_panel.choose_earlier(second["history"], 0)
    assert wav(back) == wav(first)
    assert request_form.same_seed(second["history"], back["chosen"])["seed"] == 7


def test_a_title_that_runs_from_right_to_left_leaves_its_line_in_order(handlers: Handlers) -> None:
    first = state(compose(handlers, prompt="בלוז איטי"))
    second = state(compose(handlers, first["history"], prompt="waltz"))
    labels = [label for label, _ in second["take_history"]["choices"]]
    assert "\N{FIRST STRONG ISOLATE}בלוז איטי\N{POP DIRECTIONAL ISOLATE}" in labels[1]
    assert labels[0].startswith("2 · waltz · ")
    assert 'dir="auto"' in first["take_title"]["value"]


def test_stop_keeps_what_was_made(tmp_path: Path) -> None:
    handlers = Handlers(Admission(FakeBackend(speed=5.0, chunk_s=0.1), tmp_path, queue_length=3))

    async def run() -> list[dict[str, Any]]:
        updates, told = [], None
        async for update in handlers.compose({}, TAB, **values(duration_s=20)):
            updates.append(update)
            if update.get("live", {}).get("done_s") and not told:
                await handlers.stop(OTHER_TAB)  # somebody else's stop ends nothing of ours
                told = (await handlers.stop(TAB))["stop"] if len(updates) > 5 else None
                assert told is None or told["value"] == "Stopping …"
        return updates + await land(handlers, updates)

    end = state(asyncio.run(run()))
    made_s = soundfile.info(wav(end)).duration
    assert 0.1 <= made_s < 15
    assert end["live"]["stage"] == "stopped" and f"{made_s:.1f} s" in end["live"]["text"]
    # What was heard is shown as a share of what there is.
    assert end["live"]["total_s"] == pytest.approx(made_s, abs=0.01) == end["live"]["done_s"]


def test_stopped_before_the_first_sound_there_is_no_take(tmp_path: Path) -> None:
    handlers = Handlers(Admission(FakeBackend(speed=1.0), tmp_path, queue_length=3))

    async def run() -> list[dict[str, Any]]:
        updates = []
        async for update in handlers.compose({}, TAB, **values()):
            await handlers.stop(TAB)
            updates.append(update)
        return updates + await land(handlers, updates)

    end = state(asyncio.run(run()))
    assert end["live"]["stage"] == "stopped" and "take_audio" not in end
    assert end["live"]["done_s"] == 0
    assert not end["stop"]["visible"] and end["jobs"]["rows"] == []


def test_a_closed_tab_ends_its_own_jobs_alone(tmp_path: Path) -> None:
    engine = FakeBackend(speed=2.0, chunk_s=0.05)
    handlers = Handlers(Admission(engine, tmp_path, queue_length=3))

    async def job(tab: Any, duration_s: float) -> float:
        async for update in handlers.compose({}, tab, **values(duration_s=duration_s)):
            if tab is TAB and update.get("live", {}).get("done_s"):
                handlers.closed(TAB)
        return float(update["live"]["done_s"])

    async def both() -> list[float]:
        return await asyncio.gather(job(TAB, 5.0), job(OTHER_TAB, 1.0))

    mine_s, other_s = asyncio.run(both())
    assert mine_s < 2 and other_s == 1.0
    assert len(handlers.backend) == 0


def test_closing_the_generator_frees_the_engine(tmp_path: Path) -> None:
    engine = FakeBackend(speed=1.0)
    handlers = Handlers(Admission(engine, tmp_path, queue_length=3))

    async def run() -> None:
        updates = handlers.compose({}, TAB, **values())
        async for update in updates:
            if update.get("live", {}).get("done_s"):
                break
        await updates.aclose()

    asyncio.run(run())
    wait_for(lambda: engine.closed == 1 and engine.running == 0 and len(handlers.backend) == 0)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RequestError("The device is out of memory: choose a shorter length."), "out of memory"),
        (ZeroDivisionError("secret detail"), SORRY),
    ],
)
def test_errors_become_sentences_and_the_page_is_usable_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, failure: Exception, said: str
) -> None:
    engine = FakeBackend(failure=failure)
    handlers = Handlers(Admission(engine, tmp_path, queue_length=3))
    seen: list[dict[str, Any]] = []

    async def run() -> None:
        async for update in handlers.compose({}, TAB, **values()):
            seen.append(update)

    with caplog.at_level(logging.ERROR), pytest.raises(gr.Error, match=said) as raised:
        asyncio.run(run())
    assert "secret" not in raised.value.message
    assert not state(seen)["stop"]["visible"] and state(seen)["live"]["stage"] == "failed"
    assert ("secret detail" in caplog.text) == isinstance(failure, ZeroDivisionError)
    engine.failure = None
    assert state(compose(handlers))["live"]["stage"] == "finished"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": "x" * 2001}, "prompt"),
        ({"duration_s": 0.1}, "duration_s"),
        ({"duration_s": float("nan")}, "duration_s"),
        ({"sections": [[99, "drums"]]}, "sections"),
        ({"seed": 1.5}, "seed"),
        ({"variations": 9}, "variations"),
    ],
)
def test_a_wrong_value_is_said_at_its_field(
    handlers: Handlers, changes: dict[str, Any], field: str
) -> None:
    answers = dict(zip(["given", *FIELDS], handlers.validate({}, **values(**changes)), strict=True))
    assert [name for name, answer in answers.items() if not answer["is_valid"]] == [field]
    assert answers[field]["message"].endswith(".")


def test_a_servers_own_limit_is_said_too(tmp_path: Path) -> None:
    handlers = Handlers(Admission(FakeBackend(), tmp_path, queue_length=3), max_duration_s=5.0)
    with pytest.raises(gr.Error, match="at most 5 s"):
        compose(handlers, duration_s=6)


def test_what_nobody_asked_for_stays_within_a_servers_limit(tmp_path: Path) -> None:
    handlers = Handlers(Admission(FakeBackend(), tmp_path, queue_length=3), max_duration_s=5.0)
    end = state(compose(handlers, duration_s=None))
    assert soundfile.info(wav(end)).duration == 5.0


def test_an_upload_is_continued(handlers: Handlers, clip: str) -> None:
    end = state(compose(handlers, audio_prompt=clip))
    assert soundfile.info(wav(end)).duration == 6.0
    assert "after your clip of" in end["take_facts"]
    alone = state(compose(handlers, audio_prompt=clip, include_prompt=False))
    assert soundfile.info(wav(alone)).duration == 1.0


def test_continued_take_brings_its_codes(handlers: Handlers, tmp_path: Path) -> None:
    """Gradio hands over a copy of the file, elsewhere; another sound of that name has none."""
    made = with_codes(finished())
    kept = takes.save(made, handlers.backend.folder)
    copy = tmp_path / "upload" / kept.wav.name
    copy.parent.mkdir()
    shutil.copy(kept.wav, copy)
    builder, asked = handlers.builder, {"audio_prompt": str(copy)}
    request, _ = builder.complete(builder.check(asked), asked)
    assert request.audio_prompt.codec == "bundled/codec"
    assert np.array_equal(request.audio_prompt.codes, made.codes)
    soundfile.write(copy, np.zeros(8_000) + 0.1, 16_000)
    request, _ = builder.complete(builder.check(asked), asked)
    assert request.audio_prompt.codes is None


def test_the_api_gives_files_first_and_settings_second(handlers: Handlers, clip: str) -> None:
    async def run() -> list[Any]:
        return [answer async for answer in handlers.generate(TAB, **values(variations=2))]

    *progress, (files, settings) = asyncio.run(run())
    assert progress and all(nothing is None and "status" in told for nothing, told in progress)
    assert [Path(f).suffix for f in files] == [".wav", ".flac", ".wav", ".flac"]
    assert settings["seed"] == 7 and [t["seed"] for t in settings["takes"]] == [7, 8]
    assert not any("/" in str(v) for n, v in settings.items() if n != "time_signature")


def test_handlers_name_every_field_and_nothing_else(handlers: Handlers) -> None:
    for handler, own in (
        (handlers.compose, ["given", "request"]),
        (handlers.generate, ["request"]),
    ):
        assert list(inspect.signature(handler).parameters) == [*own, *FIELDS]
    for name in FIELDS:
        assert f"    {name}: " in (handlers.generate.__doc__ or "")


@pytest.mark.parametrize("api", [False, True])
def test_a_click_is_validated_once(
    handlers: Handlers, clip: str, monkeypatch: pytest.MonkeyPatch, api: bool
) -> None:
    """Several variations of a clip; nothing is validated on the threads of the job."""
    checked, read = [], []
    parse, decode = GenerationRequest.parse, load.read
    monkeypatch.setattr(GenerationRequest, "parse", lambda v: checked.append(v) or parse(v))
    monkeypatch.setattr(load, "read", lambda *args: read.append(args) or decode(*args))
    changes = {"variations": 3, "audio_prompt": clip, "temperature": None}
    if api:

        async def run() -> list[Any]:
            return [answer async for answer in handlers.generate(TAB, **values(**changes))]

        asyncio.run(run())
    else:
        audio_panel.read_clip(clip, 10.0, 0.0, 12.0, {})  # as the upload does
        compose(handlers, **changes)
    reads = [path for path, *_ in read if str(path) == clip]
    assert len(checked) == 1 and len(reads) == 1


def test_status_lines() -> None:
    assert progress_text(Progress(Stage.WAITING, place=2)) == "Waiting at place 2"
    assert progress_text(Progress(Stage.WAITING, place=3, wait_s=39.6)) == (
        "Waiting at place 3, about 40 s"
    )
    assert progress_text(Progress(Stage.WAITING, place=1, wait_s=200)).endswith(
        "next, about 3 minutes"
    )
    assert (
        progress_text(Progress(Stage.LOADING, note="0.3 of 2.4 GB"))
        == "Loading the model: 0.3 of 2.4 GB"
    )
    composing = Progress(Stage.COMPOSING, done_s=4.2, total_s=10.0, speed=1.3)
    expected = "Composing 4.2 of 10.0 s at 1.3× real time, about 4 s left"
    assert progress_text(composing) == expected
