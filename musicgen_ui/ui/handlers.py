"""Between the page and the engine: browser values become a request, its events become updates.

A job has its place at the desk from its click to its end, so that Stop and a closed tab end their
own jobs and nobody else's, and a record in the journal. `compose` serves the page and yields named
updates, `generate` serves the API and yields (files, JSON); both read the same stream. This is the
only module that raises `gr.Error`: a `RequestError` shows its sentence, anything else an apology,
with the traceback in the log.
"""

from __future__ import annotations

import html
import inspect
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from anyio import to_thread

from musicgen_ui import takes
from musicgen_ui.backends.admission import Desk, Visitor
from musicgen_ui.backends.starting import BackgroundEngine
from musicgen_ui.engine.protocol import Chunk, Engine, Finished, Progress
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CHECKPOINT_FIELDS, FIELDS, MAX_DURATION_S, GenerationRequest
from musicgen_ui.server.job_log import Journal
from musicgen_ui.ui import asking, take_panel
from musicgen_ui.ui.asking import Asking
from musicgen_ui.ui.components import Updates
from musicgen_ui.ui.live_player import LiveStream, status_text
from musicgen_ui.ui.sessions import Recall, keep, outliving

log = logging.getLogger(__name__)

SORRY = "Something went wrong on the server; your settings are kept. Try again in a moment."
STATUS_EVERY_S = 0.15  # progress is shown this often at most; chunks go out as they come
NEW_AT_LEAST_S = 0.02  # a take with less new music than a frame is none


@dataclass(frozen=True)
class Saved:
    """A finished variation and its files."""

    finished: Finished
    take: takes.Take


def names_every_setting(handler: Callable) -> Callable:
    """Gives a handler that takes `**values` the request's fields as named, optional parameters.

    Gradio reads the parameters of the API and of MCP tools from the signature and the docstring,
    where `{settings}` becomes a line for each.
    """
    signature = inspect.signature(handler)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in FIELDS]
    handler.__signature__ = signature.replace(parameters=own + named)  # type: ignore[attr-defined]
    its = "the checkpoint's own, else "
    lines = (
        f"{n}: {f.metadata['help']} (default {its if n in CHECKPOINT_FIELDS else ''}{f.default!r})"
        for n, f in FIELDS.items()
    )
    doc = inspect.cleandoc(handler.__doc__ or "")
    handler.__doc__ = doc.replace("{settings}", "\n    ".join(lines))
    return handler


def sentence(error: Exception) -> str:
    """What the visitor reads about an error."""
    if isinstance(error, RequestError):
        return str(error)
    log.error("A job failed", exc_info=error)
    return SORRY


class Handlers:
    """The page's and the API's functions over one engine."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        desk: Desk,
        max_duration_s: float = MAX_DURATION_S,
        spare: Path | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.engine = engine
        self.folder, self.spare = folder, spare
        self.desk, self.journal = desk, journal or Journal()
        # On ZeroGPU every second of a job is out of the visitor's few minutes a day.
        self.recall = Recall(desk.stop, grace=not os.environ.get("SPACES_ZERO_GPU"))
        self.asking = Asking(engine, max_duration_s)
        self.max_duration_s = max_duration_s

    @names_every_setting
    def validate(self, history: Any = None, own: Any = None, **values: Any) -> list[dict[str, Any]]:
        """What is wrong with the form, said at the field; before anything is queued."""
        at = {name: gr.validate(True, "") for name in ("history", "own", *FIELDS)}
        try:
            self.asking.check(values)
        except RequestError as error:
            at[error.field or "prompt"] = gr.validate(False, str(error))
        return list(at.values())

    @names_every_setting
    async def compose(
        self,
        history: list[take_panel.Group],
        own: dict[str, Any],
        request: gr.Request,
        **values: Any,
    ) -> AsyncGenerator[Updates, None]:
        """The page's Generate: status and live music first, then the takes.

        What still is as the page had it from a checkpoint (`own`) is left to the chosen one: who
        clicks before the page knows that one hears it as it is meant to be heard.
        """
        values = asking.following(values, own)
        live, visitor = LiveStream(total_s=1.0), Visitor.of(request)
        yield busy(True) | {"live": live.message("waiting", "Getting ready …")}
        job = self._updates(live, history, visitor, values)
        tab = self.recall.of(visitor.tab)
        try:
            async with aclosing(outliving(tab, job) if tab else job) as updates:
                async for update in updates:
                    yield update
            if tab:
                tab.news = False
        except Exception as error:
            said = sentence(error)
            yield busy(False) | {"live": live.message("failed", said)}
            # Gradio shows it as HTML, and it may quote what somebody typed.
            raise gr.Error(html.escape(said, quote=False), print_exception=False) from None

    @names_every_setting
    async def generate(
        self, request: gr.Request, **values: Any
    ) -> AsyncGenerator[tuple[list[str] | None, dict[str, Any]], None]:
        """Makes music from words, or continues a clip. Returns WAV and FLAC files and settings.

        While the music is made, the intermediate results are (None, progress).

        Args:
            {settings}

        Returns:
            The files, WAV and FLAC of each variation in turn, and the settings that made them.
        """
        saved: list[Saved] = []
        lost: takes.UnsavedError | None = None
        try:
            async with aclosing(self._events(values, Visitor.of(request))) as events:
                async for event in events:
                    if isinstance(event, Saved):
                        saved.append(event)
                    elif isinstance(event, takes.UnsavedError):
                        lost = event
                    elif isinstance(event, Progress):
                        yield None, {"stage": event.stage, "status": status_text(event)}
            if not saved:
                raise lost or RequestError("The take was stopped before its first sound.")
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        yield [str(path) for s in saved for path in (s.take.wav, s.take.flac)], summary(saved)

    def stop(self, request: gr.Request) -> Updates:
        """Asks this tab's jobs to stop; what was made so far comes as a take."""
        if self.recall.stop(Visitor.of(request).tab):
            return {"stop": gr.update(value="Stopping …", interactive=False)}
        return busy(False)

    def closed(self, request: gr.Request) -> None:
        """The page is gone: its jobs end, and only its own, unless its tab comes back."""
        self.recall.lost(Visitor.of(request).tab)

    async def _updates(
        self,
        live: LiveStream,
        history: list[take_panel.Group],
        visitor: Visitor,
        values: dict[str, Any],
    ) -> AsyncGenerator[Updates, None]:
        latest = Progress("waiting")
        progress: dict[int, Progress] = {}
        saved: list[Saved] = []
        group: take_panel.Group = []
        shown_at = 0.0
        tab = self.recall.of(visitor.tab)
        async with aclosing(self._events(values, visitor)) as events:
            async for event in events:
                if isinstance(event, GenerationRequest):
                    live.total_s = event.duration_s
                    if tab:
                        seed = values.get("seed")  # as the form had it, not as it was drawn
                        tab.settings = event.settings() | {"seed": -1 if seed is None else seed}
                elif isinstance(event, Progress):
                    progress[event.variation] = event
                    news = (event.stage, event.note) != (latest.stage, latest.note)
                    latest = min(progress.values(), key=lambda p: p.done_s)
                    if news or time.monotonic() - shown_at > STATUS_EVERY_S:
                        shown_at = time.monotonic()
                        yield {"live": live.progress(latest)}
                elif isinstance(event, Chunk) and event.variation == 0:
                    live.add(event.clip)
                    yield {"live": live.progress(latest)}
                elif isinstance(event, Saved):
                    saved.append(event)
                    group.append(take_panel.shown(event.take))
                elif isinstance(event, takes.UnsavedError):
                    group.append(take_panel.unsaved(event))
        if saved:  # a stopped take is as long as what was made
            live.total_s = saved[0].take.settings["made_s"]
        done_s = live.total_s if group else 0.0
        end: Updates = {"live": live.message(*ending(saved, group), done_s=done_s)}
        if not group:
            yield busy(False) | end
            return
        if tab:
            keep(tab, group, history)
        history = [*history, group]
        yield take_panel.show(history, -1, 0) | end
        await to_thread.run_sync(take_panel.draw, group[0])
        # Generate only now: while this event lasts, the page passes a click on it over.
        yield take_panel.picture(group[0]) | busy(False)

    async def _events(
        self, values: dict[str, Any], visitor: Visitor
    ) -> AsyncGenerator[GenerationRequest | Progress | Chunk | Saved | takes.UnsavedError, None]:
        """The resolved request, then the engine's events, with the takes saved."""
        with ExitStack() as until_the_end:
            record = until_the_end.enter_context(self.journal.job())
            record.asks(self.asking.check(values))
            stop = until_the_end.enter_context(self.desk.place(visitor, record.takes))
            if isinstance(self.engine, BackgroundEngine):  # what a checkpoint states, it knows
                async for progress in self.engine.starting(stop):
                    yield progress
                if stop.is_set():
                    return
            request, notes = await to_thread.run_sync(self.asking.read, values)
            record.asks(request)
            until_the_end.enter_context(self.desk.ledger.share(visitor, record))
            yield request
            stream: Any = self.engine.stream(request, stop, visitor.name)
            async with aclosing(stream) as events:
                async for event in events:
                    record.note(event)
                    if not isinstance(event, Finished):
                        yield event
                    elif event.clip.duration_s - event.prompt_s >= NEW_AT_LEAST_S:
                        finished = replace(event, notes=(*notes, *event.notes))
                        yield await to_thread.run_sync(self._save, finished)

    def _save(self, finished: Finished) -> Saved | takes.UnsavedError:
        """Never fails the job: whoever heard the music is told what became of its files."""
        try:
            return Saved(finished, takes.save(finished, self.folder, spare=self.spare))
        except takes.UnsavedError as error:
            log.error("A take could not be saved", exc_info=error)
            return error


def busy(on: bool) -> Updates:
    """Generate and Stop take turns."""
    return {
        "generate": gr.update(visible=not on),
        "stop": gr.update(visible=on, interactive=on, value="Stop"),
    }


def ending(saved: list[Saved], group: take_panel.Group) -> tuple[str, str]:
    """The last stage and what is said at the end."""
    if lost := [take for take in group if take.wav is None]:
        return "finished", lost[0].notes[0]
    if not saved:
        return "stopped", "Stopped before the first sound: there is nothing to keep"
    made_s = saved[0].take.settings["made_s"]
    if fault := next((s.finished.fault for s in saved if s.finished.fault), ""):
        return "stopped", f"Broken off, what was made is kept. {fault}"
    if saved[0].finished.stopped:
        return "stopped", f"Stopped: {made_s:.1f} s are kept as a take"
    count = f"{len(saved)} takes of " if len(saved) > 1 else ""
    return (
        "finished",
        f"Finished: {count}{made_s:.1f} s at {saved[0].finished.speed:.1f}× real time",
    )


def summary(saved: list[Saved]) -> dict[str, Any]:
    """The API's JSON: the settings of the first take, and what differs from take to take."""
    each = ("seed", "made_s", "prompt_s", "speed_x", "stopped")
    told = [{n: s.take.settings[n] for n in each} | {"notes": list(s.take.notes)} for s in saved]
    return {**saved[0].take.settings, "variations": len(saved), "takes": told}
