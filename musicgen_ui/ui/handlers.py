"""Between the page or the API and the backend: values become a job, its events become answers.

`compose` serves the page and yields named updates, `generate` serves the API and yields (files,
JSON); both read the events of a job. While a page has jobs under way, one call of `compose` shows
all of them (`page_jobs`); a page that comes back after a lost connection reads the same events
again: `follow`. What has ended is landed by an event of its own, with the history as it is then.
This is the only module that raises `gr.Error`: a `RequestError` shows its sentence, anything else
an apology, with the traceback in the log.
"""

from __future__ import annotations

import html
import inspect
import os
import tempfile
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TypeVar

import gradio as gr
from anyio import to_thread

from musicgen_ui import retake, takes
from musicgen_ui.backends.admission import Admission, AdmittedJob, Client, Saved
from musicgen_ui.engine.protocol import Failed, Progress
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CHECKPOINT_FIELDS, FIELDS, MAX_DURATION_S
from musicgen_ui.ui import take_panel
from musicgen_ui.ui.components import Updates, notice, sent_by
from musicgen_ui.ui.page_jobs import PageJobs
from musicgen_ui.ui.request_builder import RequestBuilder, without_unchanged
from musicgen_ui.ui.sessions import TABS, Sessions, Tab
from musicgen_ui.ui.wording import error_text, progress_text

_Handler = TypeVar("_Handler", bound=Callable[..., object])


def name_parameters(handler: Callable[..., object], names: Iterable[str]) -> None:
    """Names the `**values` of a handler as optional parameters: Gradio reads the signature."""
    signature = inspect.signature(handler)
    first = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in names]
    handler.__dict__["__signature__"] = signature.replace(parameters=first + named)


def names_every_setting(handler: _Handler) -> _Handler:
    """Gives a handler that takes `**values` the request's fields as named, optional parameters.

    Gradio reads the parameters of the API and of MCP tools from the signature and the docstring,
    where `{settings}` becomes a line for each.
    """
    name_parameters(handler, FIELDS)
    its = "the checkpoint's own, else "
    lines = (
        f"{n}: {f.metadata['help']} (default {its if n in CHECKPOINT_FIELDS else ''}{f.default!r})"
        for n, f in FIELDS.items()
    )
    doc = inspect.cleandoc(handler.__doc__ or "")
    handler.__doc__ = doc.replace("{settings}", "\n    ".join(lines))
    return handler


class Handlers:
    """The page's and the API's functions over one backend."""

    def __init__(self, backend: Admission, max_duration_s: float = MAX_DURATION_S) -> None:
        self.backend = backend
        # On ZeroGPU every second of a job is out of the visitor's few minutes a day.
        self.sessions = Sessions(backend, grace=not os.environ.get("SPACES_ZERO_GPU"))
        folders = [folder for folder in (backend.folder, backend.spare) if folder]
        self.builder = RequestBuilder(backend, max_duration_s, folders)
        self.max_duration_s = max_duration_s
        self._pages: OrderedDict[str, PageJobs] = OrderedDict()  # by session

    @names_every_setting
    def validate(self, given: object = None, **values: object) -> list[dict[str, object]]:
        """What is wrong with the form, at its field and before anything is queued.

        Gradio takes an answer for each input of `compose`, `given` included.
        """
        at = {name: gr.validate(True, "") for name in ("given", *FIELDS)}
        try:
            self.builder.check(values)
        except RequestError as error:
            at[error.field or "prompt"] = gr.validate(False, str(error))
        return list(at.values())

    @names_every_setting
    async def compose(
        self, given: dict[str, object], request: gr.Request, **values: object
    ) -> AsyncGenerator[Updates, None]:
        """The page's Generate: how its jobs stand, until none is under way.

        A setting that still is as a checkpoint gave it to the page (`given`) is left to the chosen
        checkpoint, which the page may not know yet.
        """
        client = Client.of(request)
        try:
            job = self._submit(without_unchanged(values, given), client)
        except RequestError as error:
            raise self._shown(error) from None
        async for update in self._begun(job, client.session):
            yield update

    async def retake_from(
        self,
        history: list[take_panel.Group],
        chosen: list[int],
        variation: int | None,
        at_s: float | None,
        request: gr.Request,
    ) -> AsyncGenerator[Updates, None]:
        """Makes the take on show anew from a place on, with another seed."""
        make = lambda kept: retake.retake(kept, float(at_s or 0.0))  # noqa: E731
        async for update in self._made_from(history, chosen, variation, make, request):
            yield update

    async def extend(
        self,
        history: list[take_panel.Group],
        chosen: list[int],
        variation: int | None,
        request: gr.Request,
    ) -> AsyncGenerator[Updates, None]:
        """Makes the take on show longer, by its own settings."""
        make = lambda kept: retake.extend(kept, take_panel.EXTEND_S)  # noqa: E731
        async for update in self._made_from(history, chosen, variation, make, request):
            yield update

    async def _made_from(
        self,
        history: list[take_panel.Group],
        chosen: list[int],
        variation: int | None,
        make: Callable[[takes.Kept], retake.Derived],
        request: gr.Request,
    ) -> AsyncGenerator[Updates, None]:
        client = Client.of(request)
        try:
            take = take_panel.chosen_take(history, chosen, variation)
            if take.wav is None:
                raise RequestError("This take could not be saved, so nothing can be made of it.")
            derived = make(await to_thread.run_sync(takes.load, take.wav))
            if derived.request.duration_s > self.max_duration_s:
                raise RequestError(
                    f"This server makes at most {self.max_duration_s:g} s at once, and this would "
                    f"be {derived.request.duration_s:.1f} s."
                )
        except RequestError as error:
            self.backend.refuse(error)
            raise self._shown(error) from None
        job = self.backend.submit(derived.request, client, origin=derived.origin)
        async for update in self._begun(job, client.session):
            yield update

    async def _begun(self, job: AdmittedJob, session: str) -> AsyncGenerator[Updates, None]:
        """What the page shows with another job of its own.

        Where an earlier click still shows how the page's jobs stand, it shows this one's too.
        """
        page = self._page(session)
        page.tab.begin(job)
        page.add(job)
        if page.is_shown:
            return
        try:
            async with aclosing(page.updates()) as updates:
                async for update in updates:
                    yield update
        finally:
            if not page.tab.sessions:  # nobody can come back to them
                for row in page.under_way:
                    row.job.leave()
        if error := page.failure:
            raise self._shown(error) from None

    def _page(self, session: str) -> PageJobs:
        """The jobs of a page."""
        tab, page = self.sessions.of(session), self._pages.get(session)
        if page is None:
            page = self._pages[session] = PageJobs(session, tab or Tab())
        elif tab and page.tab is not tab:  # it has said since then which tab it is in
            tab.take_over(page.tab)
            page.tab = tab
        self._pages.move_to_end(session)
        while len(self._pages) > TABS:
            self._pages.popitem(last=False)
        return page

    async def follow(self, key: str, request: gr.Request) -> AsyncGenerator[Updates, None]:
        """A page that comes back reads the events of its tab's jobs from the first one on."""
        session = Client.of(request).session
        tab = self.sessions.of(session)
        if not (tab and key and tab.jobs):
            return
        page = self._page(session)
        for job in tab.jobs:
            page.add(job, returned=True)
        if page.is_shown:
            return
        async with aclosing(page.updates()) as updates:
            async for update in updates:
                yield update

    async def act_on_job(
        self,
        history: list[take_panel.Group],
        request: gr.Request,
        event: gr.EventData,
    ) -> Updates:
        """A button of a job's row; see `assets/player/jobs.js`."""
        page, job = self._page(Client.of(request).session), str(sent_by(event, "job") or "")
        act, shown = sent_by(event, "act"), Updates()
        if act == "stop":
            page.stop(job)
        elif act == "dismiss":
            page.dismiss(job)
        elif act == "show":
            page.follow(job)
            row = page.rows.get(job)
            if row and row.group:
                shown = take_panel.show(history, take_panel.place_of(history, row.group), 0)
        # Else `updates` says it, and an answer that comes after its last one would undo that.
        return shown if page.is_shown else page.now() | shown

    async def land(
        self,
        landed: str,
        history: list[take_panel.Group],
        chosen: list[int],
        elsewhere: bool,
        request: gr.Request,
    ) -> AsyncGenerator[Updates, None]:
        """Jobs have ended: their takes join the history, and the player where it follows the job.

        Args:
            landed: which; changes with each.
            history: of the page.
            chosen: the take on show.
            elsewhere: the player plays something else meanwhile, which goes on.
        """
        page = self._page(Client.of(request).session)
        on_show = in_player = take_panel.group_on_show(history, chosen)
        rows = page.land(elsewhere)
        if not rows:  # an event before it took them; what it says of the history holds
            yield {"jobs": page.state()}
            return
        for row in rows:
            history = page.tab.end(row.job, row.group, history)
            in_player = row.group if row.group and row.job.id == page.followed else in_player
        which = take_panel.place_of(history, in_player)
        lists = take_panel.listed(history, which, chosen[1])
        shown = lists if in_player is on_show else take_panel.show(history, which, 0)
        state: Updates = {"jobs": page.state()}
        yield state | shown
        for row in rows:
            for first in row.group[:1]:
                await to_thread.run_sync(take_panel.draw, first)
        if in_player is not on_show:
            yield take_panel.picture(in_player[0])

    @names_every_setting
    async def generate(
        self, request: gr.Request, **values: object
    ) -> AsyncGenerator[tuple[list[str] | None, dict[str, object]], None]:
        """Makes music from words, or continues a clip. Returns WAV and FLAC files and settings.

        While the music is made, the intermediate results are (None, progress).

        Args:
            {settings}

        Returns:
            The files, WAV and FLAC of each variation in turn, and the settings that made them.
        """
        ended: list[Saved] = []
        try:
            job = self._submit(values, Client.of(request))
            try:
                async with aclosing(job.events()) as events:
                    async for event in events:
                        if isinstance(event, Failed):
                            raise event.error
                        if isinstance(event, Saved):
                            ended.append(event)
                        elif isinstance(event, Progress):
                            status = progress_text(event)
                            yield None, {"job": job.id, "stage": event.stage, "status": status}
            finally:
                job.leave()
            saved = [take for take in ended if take.take]
            if not saved:
                lost = next((take.error for take in ended if take.error), None)
                raise lost or RequestError("The take was stopped before its first sound.")
        except Exception as error:
            raise gr.Error(error_text(error), print_exception=False) from None
        files = [str(path) for s in saved if s.take for path in (s.take.wav, s.take.flac)]
        yield files, summary(saved)

    def export(
        self,
        history: list[take_panel.Group],
        chosen: list[int],
        variation: int | None,
        ending: str,
        loop_bars: float | None,
        fade_out_s: float | None,
    ) -> Updates:
        """Writes the take on show as a file to download."""
        folder = self.backend.spare or Path(tempfile.gettempdir())
        try:
            path = take_panel.export(
                history, chosen, variation, ending, loop_bars, fade_out_s, folder
            )
        except RequestError as error:
            return {"notice": notice(str(error), wrong=True)}
        return {"exported": gr.update(value=str(path))}

    async def stop(self, request: gr.Request) -> Updates:
        """Stops the job that the player follows; what was made so far comes as a take."""
        session = Client.of(request).session
        page = self._pages.get(session)
        if (page and page.stop()) or self.sessions.stop(session):
            return {"stop": gr.update(value="Stopping …", interactive=False)}
        return {"stop": gr.update(visible=False)}

    def unfollow(self, session: str) -> None:
        """The player of a page is for something else now: its jobs go on as rows."""
        if page := self._pages.get(session):
            page.follow("")

    def closed(self, request: gr.Request) -> None:
        """The page is gone: its jobs end, and only its own, unless its tab comes back."""
        session = Client.of(request).session
        self.sessions.lost(session)
        self._pages.pop(session, None)

    def _submit(self, values: dict[str, object], client: Client) -> AdmittedJob:
        """Submits what is asked for.

        Raises:
            RequestError: a value is wrong.
        """
        try:
            request = self.builder.check(values)
        except RequestError as error:
            self.backend.refuse(error)
            raise
        return self.backend.submit(request, client, partial(self.builder.complete, values=values))

    def _shown(self, error: Exception) -> gr.Error:
        # Gradio shows it as HTML, and it may quote what somebody typed.
        text = html.escape(error_text(error), quote=False)
        return gr.Error(text, print_exception=False)


def summary(saved: list[Saved]) -> dict[str, object]:
    """The API's JSON: the settings of the first take, and what differs from take to take."""
    each = ("seed", "score", "made_s", "prompt_s", "speed_x", "stopped")
    made = [saved_one.take for saved_one in saved if saved_one.take]
    listed = [
        {n: value for n, value in take.settings.items() if n in each} | {"notes": list(take.notes)}
        for take in made
    ]
    return {**made[0].settings, "variations": len(made), "takes": listed}
