"""The first visit: the small demo model is playing, and here is what the real one needs.

One button downloads and loads it, with progress, and afterwards it is chosen. There is one download
for the server: a page that is loaded anew goes on showing it. It is offered where the computer is
its user's alone.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import gradio as gr
from anyio import to_thread

from musicgen_ui.checkpoints.memory import size_in_words
from musicgen_ui.engine.protocol import Backend, CheckpointInfo, Preloads
from musicgen_ui.errors import RequestError
from musicgen_ui.ui.components import GetModel, Updates, notice
from musicgen_ui.ui.presets import SECRET
from musicgen_ui.ui.request_form import DEMO, REAL
from musicgen_ui.ui.wording import error_text

TICK_S = 0.7
NAME = "MusicGen small"
INTRO = f"The small demo model that comes with this app is playing. {NAME} makes real music"


class Stage(StrEnum):
    """How far the download is."""

    NONE = "none"
    RUNNING = "running"
    STOPPING = "stopping"  # cancelled, and not ended yet
    DONE = "done"
    FAILED = "failed"


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """Ends the load from within its report."""


@dataclass
class Download:
    """The download and the load of a checkpoint, on a thread of its own."""

    stage: Stage = Stage.NONE
    note: str = ""  # how far it is, in words
    share: float | None = None  # of the bytes that are here, while they come
    failure: str = ""

    def start(self, backend: Preloads, checkpoint: str) -> None:
        """Begins, unless it is under way."""
        if self.stage in (Stage.RUNNING, Stage.STOPPING):
            return
        self.stage, self.note, self.share, self.failure = Stage.RUNNING, "asking the Hub", None, ""
        work = threading.Thread(target=self._run, args=(backend, checkpoint), daemon=True)
        work.start()

    def cancel(self) -> None:
        """Ends it at the next report; what came stays for the next attempt."""
        if self.stage is Stage.RUNNING:
            self.stage = Stage.STOPPING

    def _report(self, note: str) -> None:
        if self.stage is Stage.STOPPING:
            raise Cancelled
        # Of a `checkpoints.hub.Downloading`; that module takes a second to import.
        self.note, self.share = note, getattr(note, "share", None)

    def _run(self, backend: Preloads, checkpoint: str) -> None:
        try:
            backend.preload(checkpoint, self._report)
            # Cancelled after its last report: it is here, but is not chosen.
            self.stage = Stage.NONE if self.stage is Stage.STOPPING else Stage.DONE
        except Cancelled:
            self.stage = Stage.NONE
        except Exception as error:
            self.failure, self.stage = error_text(error), Stage.FAILED


def panel() -> GetModel:
    """The components, not placed yet."""

    def button(label: str, name: str) -> gr.Button:
        return gr.Button(label, size="sm", min_width=60, elem_id=name, render=False)

    return GetModel(
        get_panel=gr.Row(visible=False, elem_id="get_model", render=False),
        get_line=gr.HTML("", apply_default_css=False, elem_id="get_line", render=False),
        get_start=button(f"Get {NAME}", "get_start"),
        get_cancel=button("Cancel", "get_cancel"),
        get_later=button("Not now", "get_later"),
        get_timer=gr.Timer(TICK_S, active=False, render=False),
        get_put_off=gr.BrowserState(
            False, storage_key="musicgen-get-model", secret=SECRET, render=False
        ),
    )


def lay_out(panel: GetModel, place: Callable[..., None]) -> None:
    """Places the components."""
    place(panel.get_panel)
    with panel.get_panel:
        place(panel.get_line, panel.get_start, panel.get_cancel, panel.get_later)
    place(panel.get_timer, panel.get_put_off)


class GetModelView:
    """Answers the panel's events.

    Args:
        backend: which loads the model.
        choices: the list of checkpoints, each with what it needs.
    """

    def __init__(self, backend: Backend, choices: Callable[[], list[tuple[str, str]]]) -> None:
        self._backend = backend
        self._choices = choices
        self._download = Download()

    async def offer(self, put_off: object) -> Updates:
        """A page was opened: what is on offer, or how far it is."""
        if self._download.stage in (Stage.RUNNING, Stage.STOPPING):
            return self._progress()
        return await to_thread.run_sync(self._offered, put_off is True)

    def _offered(self, put_off: bool) -> Updates:
        try:
            playing, real = self._backend.describe("auto"), self._backend.describe(REAL)
        except RequestError:  # not on offer here
            return {}
        is_here = not real.download_bytes or real.checkpoint == DEMO
        if put_off or is_here or playing.checkpoint != DEMO:
            return {}
        return {
            "get_panel": gr.update(visible=True),
            "get_line": line(f"{INTRO}: {needs(real)}"),
            "get_start": gr.update(value=button_text(real), visible=real.fits),
            "get_cancel": gr.update(visible=False),
            "get_later": gr.update(visible=True),
        }

    def start(self) -> Updates:
        """Get it."""
        if isinstance(self._backend, Preloads):
            self._download.start(self._backend, REAL)
        return self._progress()

    def cancel(self) -> Updates:
        """Cancel."""
        self._download.cancel()
        return self._progress()

    def put_off(self) -> Updates:
        """Not now: the line does not come back in this browser."""
        return {"get_put_off": True, "get_panel": gr.update(visible=False)}

    def tick(self) -> Updates:
        """How far it is; at its end the model is chosen."""
        stage = self._download.stage
        if stage in (Stage.RUNNING, Stage.STOPPING):
            return self._progress()
        if stage is Stage.DONE:
            return {
                "get_panel": gr.update(visible=False),
                "get_timer": gr.Timer(active=False),
                "checkpoint": gr.update(value=REAL, choices=self._choices()),
                "notice": notice(f"{NAME} is here and chosen: the next take is made with it."),
            }
        ended = self._offered(False)
        ended["get_timer"] = gr.Timer(active=False)
        if stage is Stage.FAILED:
            ended["get_line"] = line(self._download.failure, wrong=True)
        return ended

    def _progress(self) -> Updates:
        stopping = self._download.stage is Stage.STOPPING
        note = self._download.note
        text = "Stopping …" if stopping else note[:1].upper() + note[1:]
        return {
            "get_panel": gr.update(visible=True),
            "get_line": line(text, self._download.share),
            "get_start": gr.update(visible=False),
            "get_cancel": gr.update(visible=True, interactive=not stopping),
            "get_later": gr.update(visible=False),
            "get_timer": gr.Timer(active=True),
        }


def needs(real: CheckpointInfo) -> str:
    """What the real model needs of this computer."""
    disk = size_in_words(real.download_bytes)
    memory = size_in_words(real.nbytes)
    fits = "which this computer has" if real.fits else "more than models may use here"
    return f"{disk} to download once, about {memory} of memory, {fits}."


def button_text(real: CheckpointInfo) -> str:
    """The button, with what it fetches: "Get MusicGen small: 2.4 GB"."""
    return f"Get {NAME}: {size_in_words(real.download_bytes)}"


def line(text: str, share: float | None = None, wrong: bool = False) -> str:
    """The panel's sentence as HTML, with a bar while there is a share of a whole to show."""
    role = "alert" if wrong else "status"
    if share is None:
        wrong_class = " wrong" if wrong else ""
        return f'<p class="get-words{wrong_class}" role="{role}">{html.escape(text)}</p>'
    words = f'<p class="get-words">{html.escape(text)}</p>'  # not read aloud at every percent
    percent = f"{100 * share:.0f}"
    return (
        f'{words}<div class="get-bar" role="progressbar" aria-label="Download" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{percent}"><i style="width:{percent}%"></i></div>'
    )
