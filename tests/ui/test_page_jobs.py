"""Several takes under way for one page: a row each, one in the player, all of them kept."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.admission import Admission, Client
from musicgen_ui.engine.protocol import Progress, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.ui.components import Updates
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.page_jobs import UNDER_WAY, PageJobs
from musicgen_ui.ui.pages import Pages
from musicgen_ui.ui.sessions import Tab
from tests.helpers.fakes import FakeBackend
from tests.helpers.page import TAB, land, state, values

KEY = "a" * 32


class Page:
    """A page on which takes are asked for."""

    def __init__(self, folder: Path, client_jobs: int = 0, **engine: Any) -> None:
        self.engine = FakeBackend(**{"speed": 5.0, "chunk_s": 0.1, "max_jobs": 1, **engine})
        self.handlers = Handlers(Admission(self.engine, folder, client_jobs=client_jobs))
        self.updates: list[dict[str, Any]] = []

    async def generate(self, prompt: str, **changes: Any) -> None:
        async for update in self.handlers.compose({}, TAB, **values(prompt=prompt, **changes)):
            self.updates.append(update)

    async def begin(self, *prompts: str, **changes: Any) -> asyncio.Task[None]:
        """Presses Generate for each; the task of the first click, which shows all of them."""
        first = asyncio.create_task(self.generate(prompts[0], **changes))
        await self.until(lambda: self.now["live"]["stage"] == "composing")
        for prompt in prompts[1:]:
            await asyncio.wait_for(self.generate(prompt, **changes), 0.5)  # and goes on at once
        await self.until(lambda: len(self.rows) == len(prompts))
        return first

    async def until(self, there: Any) -> None:
        async with asyncio.timeout(10):
            while not (self.updates and there()):
                await asyncio.sleep(0.01)

    @property
    def now(self) -> dict[str, Any]:
        return state(self.updates)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.now["jobs"]["rows"]

    async def act(self, act: str, title: str, history: Any = ()) -> dict[str, Any]:
        job = next(row["job"] for row in self.rows if row["title"] == title)
        event = gr.EventData(None, {"act": act, "job": job})
        self.updates.append(await self.handlers.act_on_job(list(history), TAB, event))
        return self.now

    async def land(self, **how: Any) -> None:
        self.updates += await land(self.handlers, self.updates, **how)


def test_takes_are_queued_beside_each_other_and_all_land(tmp_path: Path) -> None:
    page = Page(tmp_path)

    async def run() -> None:
        first = await page.begin("one", "two", "three")
        waiting = ["Waiting: you are next", "Waiting at place 2"]
        await page.until(lambda: sorted(row["text"] for row in page.rows[1:]) == sorted(waiting))
        one = page.rows[0]
        assert page.now["jobs"]["followed"] == one["job"] and one["stage"] == "composing"
        assert page.now["generate"]["value"] == "Queue another"
        await page.act("stop", "three")
        await first
        assert [row["title"] for row in page.rows] == ["two"]  # what is in the player has none
        await page.land()
        await page.land()  # the page asks again before it has the answer
        assert [group[0].settings["prompt"] for group in page.now["history"]] == ["one", "two"]
        assert "one" in page.now["take_title"]["value"] and page.rows[0]["take"]
        shown = await page.act("show", "two", page.now["history"])
        assert "two" in shown["take_title"]["value"] and page.rows == []
        assert shown["take_audio"]["picture"]  # it was drawn when it landed

    asyncio.run(run())
    assert not page.engine.running


@pytest.mark.parametrize("failure", [None, RequestError("broken")])
def test_what_ends_while_an_update_is_sent_is_shown(
    tmp_path: Path, failure: Exception | None
) -> None:
    """A slow connection takes an update only after the job has ended."""
    page = Page(tmp_path, speed=0.0, failure=failure)
    job = page.handlers.backend.submit(page.handlers.builder.check(values()), Client("page"))
    jobs = PageJobs("page", Tab())
    jobs.add(job)

    async def run() -> list[Updates]:
        updates = jobs.updates()
        shown = [await anext(updates)]
        while jobs.under_way:
            await asyncio.sleep(0.01)
        return shown + [update async for update in updates]

    *_, last = asyncio.run(run())
    assert last["live"]["stage"] == ("failed" if failure else "finished")
    assert last["landed"] == job.id


def test_the_player_follows_the_take_that_is_picked(tmp_path: Path) -> None:
    page = Page(tmp_path, max_jobs=2, speed=1.5)

    async def run() -> None:
        first = await page.begin("one", "two", duration_s=2.0)
        picked = page.rows[1]["job"]
        await page.act("show", "two")
        assert page.updates[-1] == {}  # it could come after the last word on the jobs
        await page.until(lambda: page.now["jobs"]["followed"] == picked)
        assert page.now["live"]["job"] == picked
        await page.until(lambda: page.now["live"]["done_s"] > 0)
        await page.handlers.stop(TAB)  # that one alone
        await first
        assert page.engine.requests[0].prompt == "one" and page.now["live"]["stage"] == "stopped"
        await page.land()
        assert "two" in page.now["take_title"]["value"]
        made = {g[0].settings["prompt"]: g[0].settings["made_s"] for g in page.now["history"]}
        assert made["one"] == 2.0 and 0 < made["two"] < 2.0
        assert [row["title"] for row in page.rows] == ["one"]

    asyncio.run(run())


def test_a_refusal_is_said_at_its_row_and_ends_nothing_else(tmp_path: Path) -> None:
    page = Page(tmp_path, client_jobs=1)

    async def run() -> None:
        first = await page.begin("one", "two")
        await page.until(lambda: page.rows[1]["stage"] == "failed")
        assert "a visitor's share" in page.rows[1]["text"] and page.now["live"]["stage"] != "failed"
        await first  # raises nothing
        await page.land()
        assert [row["title"] for row in page.rows] == ["two"] and len(page.now["history"]) == 1
        assert (await page.act("dismiss", "two"))["jobs"]["rows"] == []

    asyncio.run(run())


def test_what_plays_meanwhile_goes_on_when_a_take_lands(tmp_path: Path) -> None:
    page = Page(tmp_path, speed=0.0)

    async def run() -> None:
        await page.generate("one")
        await page.land()
        shown = page.now
        await page.generate("two")
        page.updates += await land(
            page.handlers, [{"landed": page.now["landed"]}], shown["history"], elsewhere=True
        )
        assert len(page.now["history"]) == 2 and page.now["chosen"] == [0, 0]
        assert page.now["take_audio"] == shown["take_audio"]
        assert [row["title"] for row in page.rows] == ["two"]

    asyncio.run(run())


def test_a_page_that_is_loaded_anew_finds_every_job(tmp_path: Path) -> None:
    page = Page(tmp_path, speed=2.0)
    handlers, after = page.handlers, SimpleNamespace(session_hash="after")

    async def run() -> None:
        pages = Pages(handlers.sessions)
        pages.enter(KEY, TAB)
        first = await page.begin("one", "two")
        first.cancel()
        handlers.closed(TAB)
        found = pages.enter(KEY, after)
        updates = [u async for u in handlers.follow(found["job_id"], after)]
        titles = [[row["title"] for row in u["jobs"]["rows"]] for u in updates]
        assert titles[0] == ["one", "two"] and UNDER_WAY in updates[1]["live"]["text"]
        end = state(updates + await land(handlers, updates, page=after))
        assert [group[0].settings["prompt"] for group in end["history"]] == ["one", "two"]

    asyncio.run(run())


def test_rows_of_takes_that_landed_hold_no_audio(tmp_path: Path) -> None:
    page = Page(tmp_path)
    clips: list[weakref.ref[Clip]] = []

    async def run() -> None:
        await page.generate("one")
        (row,) = page.handlers._pages[TAB.session_hash].rows.values()
        clips.extend(weakref.ref(take.clip) for take in row.reader.takes)
        row.job.log.rewrite(lambda event: Progress(Stage.COMPOSING))  # as for those before it
        await page.land()

    asyncio.run(run())
    page.updates.clear()
    gc.collect()
    assert clips and not any(there() for there in clips)
    assert page.handlers._pages[TAB.session_hash].rows
