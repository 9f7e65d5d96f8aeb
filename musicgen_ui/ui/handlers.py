"""Between the page or the API and the backend: values become a job, its events become answers.

`compose` serves the page and yields named updates, `generate` serves the API and yields (files,
JSON); both read the events of a job. A page that comes back after a lost connection reads the
same events again: `follow`. This is the only module that raises `gr.Error`: a `RequestError` shows
its sentence, anything else an apology, with the traceback in the log.
"""

from __future__ import annotations

import html
import inspect
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

import gradio as gr
from anyio import to_thread

from musicgen_ui import retake, takes
from musicgen_ui.backends.admission import Admission, AdmittedJob, Client, Saved
from musicgen_ui.engine.protocol import Event, Failed, Progress, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CHECKPOINT_FIELDS, FIELDS, MAX_DURATION_S
from musicgen_ui.ui import take_panel
from musicgen_ui.ui.components import Updates, notice
from musicgen_ui.ui.player import JobMessage, JobState
from musicgen_ui.ui.request_builder import RequestBuilder, without_unchanged
from musicgen_ui.ui.sessions import Sessions, Tab
from musicgen_ui.ui.wording import ending, error_text, progress_text

UNDER_WAY = "Your take is still being made."
DONE = "Finished while the page was away: here is your take."
BROKEN = "Your take could not be finished: press Generate to try again."
STATUS_EVERY_S = 0.15  # progress is shown this often at most; chunks go out as they come


_Handler = TypeVar("_Handler", bound=Callable[..., object])


def name_parameters(handler: Callable[..., object], names: Iterable[str]) -> None:
    """Names the `**values` of a handler as optional parameters: Gradio reads the signature."""
    signature = inspect.signature(handler)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in names]
    handler.__dict__["__signature__"] = signature.replace(parameters=own + named)


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

    @names_every_setting
    def validate(
        self, history: object = None, own: object = None, **values: object
    ) -> list[dict[str, object]]:
        """What is wrong with the form, said at the field; before anything is queued."""
        at = {name: gr.validate(True, "") for name in ("history", "own", *FIELDS)}
        try:
            self.builder.check(values)
        except RequestError as error:
            at[error.field or "prompt"] = gr.validate(False, str(error))
        return list(at.values())

    @names_every_setting
    async def compose(
        self,
        history: list[take_panel.Group],
        own: dict[str, object],
        request: gr.Request,
        **values: object,
    ) -> AsyncGenerator[Updates, None]:
        """The page's Generate: status and live music first, then the takes.

        A setting that still is as the page had it from a checkpoint (`own`) is left to the chosen
        checkpoint, which the page may not know yet.
        """
        client = Client.of(request)
        live = JobState(session=client.session)
        yield busy(True) | {"live": live.message("waiting", "Getting ready …")}
        try:
            job = self._submit(without_unchanged(values, own), client)
        except RequestError as error:
            yield self._failed(live, error)
            raise self._shown(error) from None
        async for update in self._followed(job, live, history, values.get("seed")):
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
        live = JobState(session=client.session)
        yield busy(True) | {"live": live.message("waiting", "Getting ready …")}
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
            yield self._failed(live, error)
            raise self._shown(error) from None
        job = self.backend.submit(derived.request, client, origin=derived.origin)
        async for update in self._followed(job, live, history, -1):
            yield update

    async def _followed(
        self, job: AdmittedJob, live: JobState, history: list[take_panel.Group], seed: object
    ) -> AsyncGenerator[Updates, None]:
        """What the page shows of a job of its own; `seed` is the form's."""
        live.job = job.id
        tab = self.sessions.begin(live.session, job, seed)
        try:
            async with aclosing(self._updates(job, live, history, tab)) as updates:
                async for update in updates:
                    yield update
        finally:
            if not tab:  # nobody can come back to it
                job.leave()

    async def follow(self, key: str, request: gr.Request) -> AsyncGenerator[Updates, None]:
        """A page that comes back reads the events of its tab's job from the first one on."""
        session = Client.of(request).session
        tab = self.sessions.of(session)
        if not (tab and key and (job := tab.job)):
            return
        live = JobState(session=session, job=job.id)
        updates = self._updates(job, live, list(tab.history), tab, returned=True)
        async with aclosing(updates):
            async for update in updates:
                yield update

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
                            yield None, {"stage": event.stage, "status": progress_text(event)}
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

    def stop(self, request: gr.Request) -> Updates:
        """Stops this tab's jobs; what was made so far comes as a take."""
        if self.sessions.stop(Client.of(request).session):
            return {"stop": gr.update(value="Stopping …", interactive=False)}
        return busy(False)

    def closed(self, request: gr.Request) -> None:
        """The page is gone: its jobs end, and only its own, unless its tab comes back."""
        self.sessions.lost(Client.of(request).session)

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
        return self.backend.submit(request, client, lambda: self.builder.complete(request, values))

    async def _updates(
        self,
        job: AdmittedJob,
        live: JobState,
        history: list[take_panel.Group],
        tab: Tab | None,
        returned: bool = False,
    ) -> AsyncGenerator[Updates, None]:
        """What the page shows of a job; one that `returned` is told that it was not forgotten."""
        reader = JobReader(live, returned)
        async with aclosing(job.events()) as events:
            async for event in events:
                if isinstance(event, Failed):
                    if tab:
                        tab.end(job)
                    yield self._failed(live, event.error, returned)
                    if returned:
                        return
                    raise self._shown(event.error) from None
                live.total_s = job.request.duration_s
                if message := reader.message(event):
                    yield {"live": message}
        group = take_panel.group(reader.takes, job.id)
        if tab:
            history = tab.end(job, group, history)
        elif group:
            history = [*history, group]
        end: Updates = {"live": reader.end()}
        if not group:
            yield busy(False) | end
            return
        yield take_panel.show(history, -1, 0) | end
        await to_thread.run_sync(take_panel.draw, group[0])
        # Generate only now: while this event lasts, the page ignores a click on it.
        yield take_panel.picture(group[0]) | busy(False)

    def _failed(self, live: JobState, error: Exception, returned: bool = False) -> Updates:
        text = BROKEN if returned else error_text(error)
        end = busy(False)
        end["live"] = live.message("failed", text)
        return end

    def _shown(self, error: Exception) -> gr.Error:
        # Gradio shows it as HTML, and it may quote what somebody typed.
        text = html.escape(error_text(error), quote=False)
        return gr.Error(text, print_exception=False)


class JobReader:
    """Turns the events of a job into messages to the live player, and collects the takes."""

    def __init__(self, live: JobState, returned: bool = False) -> None:
        self.takes: list[Saved] = []
        self._live = live
        self._returned = returned
        self._latest = Progress(Stage.WAITING)
        self._progress: dict[int, Progress] = {}  # by variation
        self._shown_s = 0.0

    def read(self, events: Iterable[Event]) -> None:
        """Collects the takes of events without a message for each."""
        self.takes += [event for event in events if isinstance(event, Saved)]

    def message(self, event: Event) -> JobMessage | None:
        """What the player should show now; None where nothing is new."""
        if isinstance(event, Saved):
            self.takes.append(event)
        elif isinstance(event, Progress):
            before, self._progress[event.variation] = self._latest, event
            self._latest = min(self._progress.values(), key=lambda p: p.done_s)
            changed = (event.stage, event.note) != (before.stage, before.note)
            if changed or time.monotonic() - self._shown_s > STATUS_EVERY_S:
                self._shown_s = time.monotonic()
                return self._now()
        return None

    def _now(self) -> JobMessage:
        text = progress_text(self._latest)
        if self._returned:
            text = f"{UNDER_WAY} {text}"
        now = self._latest
        return self._live.message(now.stage, text, now.done_s, now.speed)

    def end(self) -> JobMessage:
        """The last message."""
        saved = next((take.take for take in self.takes if take.take), None)
        if saved:  # a stopped take is as long as what was made
            self._live.total_s = saved.settings["made_s"]
        stage, text = ending(self.takes)
        kept = saved or any(take.error for take in self.takes)
        if self._returned:
            stage, text = ("finished", DONE) if kept else ("failed", BROKEN)
        return self._live.message(stage, text, done_s=self._live.total_s if kept else 0.0)


def busy(on: bool) -> Updates:
    """Generate and Stop take turns."""
    return {
        "generate": gr.update(visible=not on),
        "stop": gr.update(visible=on, interactive=on, value="Stop"),
    }


def summary(saved: list[Saved]) -> dict[str, object]:
    """The API's JSON: the settings of the first take, and what differs from take to take."""
    each = ("seed", "made_s", "prompt_s", "speed_x", "stopped")
    made = [saved_one.take for saved_one in saved if saved_one.take]
    listed = [
        {n: value for n, value in take.settings.items() if n in each} | {"notes": list(take.notes)}
        for take in made
    ]
    return {**made[0].settings, "variations": len(made), "takes": listed}
