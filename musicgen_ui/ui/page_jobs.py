"""The jobs of a page: a row for each, and the one that the player follows.

Any number of takes may be under way for a tab. The player follows the one that was begun first, or
that was picked; the others are rows, each with a button that ends it. A job that ends is landed:
its takes join the history, and the player where it follows the job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable

import gradio as gr

from musicgen_ui.backends.admission import AdmittedJob, Saved
from musicgen_ui.backends.job_log import Outcome
from musicgen_ui.engine.protocol import Event, Failed, Progress, Stage
from musicgen_ui.ui import take_panel
from musicgen_ui.ui.components import Updates
from musicgen_ui.ui.player import JobMessage, JobsState, JobState, RowState
from musicgen_ui.ui.sessions import Tab
from musicgen_ui.ui.wording import ending, error_text, progress_text

UNDER_WAY = "Your take is still being made."
DONE = "Finished while the page was away: here is your take."
BROKEN = "Your take could not be finished: press Generate to try again."
STATUS_EVERY_S = 0.15  # progress is shown this often at most; chunks go out as they come


class JobReader:
    """Turns the events of a job into messages to the player, and collects the takes.

    Args:
        live: how far the job is, as the player shows it.
        returned: the page was away: it is told that its take was not forgotten.
    """

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
            stage, text = (Outcome.FINISHED, DONE) if kept else (Outcome.FAILED, BROKEN)
        return self._live.message(stage, text, done_s=self._live.total_s if kept else 0.0)

    def failed(self, error: Exception) -> JobMessage:
        """The last message of a job that failed."""
        text = error_text(error)
        return self._live.message(Outcome.FAILED, BROKEN if self._returned else text)


class Row:
    """A job of a page.

    Args:
        job: that the tab asked for.
        session: Gradio's name of the page.
        returned: it was begun by an earlier page of the tab.
    """

    def __init__(self, job: AdmittedJob, session: str, returned: bool = False) -> None:
        self.job = job
        self._live = JobState(job.request.duration_s, session=session, job=job.id)
        self.reader = JobReader(self._live, returned)
        text = UNDER_WAY if returned else "Getting ready …"
        self.message = self._live.message(Stage.WAITING, text)
        self.ended = False  # all of its events were read
        self.landed = False  # its takes are in the history
        self.group: take_panel.Group = []  # as they are there
        self.error: Exception | None = None

    async def read(self, changed: asyncio.Event) -> None:
        """Reads the job's events to the end; sets `changed` for what the page is to show."""
        async for event in self.job.events():
            self._live.total_s = self.job.request.duration_s
            if isinstance(event, Failed):
                self.error = event.error
            elif message := self.reader.message(event):
                self.message = message
                changed.set()
        self.message = self.reader.failed(self.error) if self.error else self.reader.end()
        self.ended = True
        changed.set()

    @property
    def has_takes(self) -> bool:
        """Whether there is something to show of it."""
        return bool(self.group) or any(take.take or take.error for take in self.reader.takes)

    def state(self) -> RowState:
        """The row as the page draws it; see `assets/player/jobs.js`."""
        text = self.message["text"]
        if not self.ended and self.job.stopping.is_set():
            text = "Stopping …"
        wav = self.group[0].wav if self.group else None
        return {
            "job": self.job.id,
            "take": wav.stem if wav else "",
            "title": take_panel.short_title(self.job.request.prompt),
            "text": text,
            "share": min(1.0, self.message["done_s"] / (self.message["total_s"] or 1.0)),
            "stage": self.message["stage"],
            "under_way": not self.ended,
        }


class PageJobs:
    """The jobs of one page. Its methods are called on the event loop.

    Args:
        session: Gradio's name of the page.
        tab: that shows it.
    """

    def __init__(self, session: str, tab: Tab) -> None:
        self.session, self.tab = session, tab
        self.rows: dict[str, Row] = {}  # by the job's id, in the order of their beginning
        self.followed = ""  # the job that the player shows
        self.is_shown = False  # `updates` is being read
        self._changed = asyncio.Event()
        self._readers: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> list[Row]:
        """The rows of jobs that have not ended."""
        return [row for row in self.rows.values() if not row.ended]

    @property
    def failure(self) -> Exception | None:
        """Why the job that the player follows has failed, where no other is under way."""
        row = self.rows.get(self.followed)
        return row.error if row and not self.under_way else None

    def add(self, job: AdmittedJob, returned: bool = False) -> None:
        """Another job; the player follows it where no other is under way."""
        if job.id in self.rows:
            return
        if not self.under_way:
            self.rows = {id: row for id, row in self.rows.items() if not row.landed}
            self.followed = job.id
        self.rows[job.id] = row = Row(job, self.session, returned)
        if self.is_shown:
            self._begin(row)
            self._changed.set()

    def _begin(self, row: Row) -> None:
        self._readers.add(asyncio.create_task(row.read(self._changed)))

    async def updates(self) -> AsyncGenerator[Updates, None]:
        """What the page shows until no job is under way."""
        self._changed, self.is_shown = asyncio.Event(), True
        try:
            for row in self.under_way:
                self._begin(row)
            while True:
                yield self.now()
                if not self.under_way and not self._changed.is_set():  # all of it was said
                    return
                await self._changed.wait()
                await asyncio.sleep(0)  # whoever acts on each update leaves the readers their turn
                self._changed.clear()
                self._go_on()
                for reader in [reader for reader in self._readers if reader.done()]:
                    self._readers.remove(reader)
                    reader.result()
        finally:
            self.is_shown = False
            for reader in self._readers:
                reader.cancel()
            self._readers.clear()

    def _go_on(self) -> None:
        """The player goes on to the next job where the one that it follows made nothing."""
        row = self.rows.get(self.followed)
        if row and row.ended and not row.has_takes and self.under_way:
            self.followed = self.under_way[0].job.id

    def now(self) -> Updates:
        """What the page shows now."""
        row = self.rows.get(self.followed)
        stopping = row is not None and row.job.stopping.is_set()
        updates: Updates = {
            "jobs": self.state(),
            "generate": gr.update(value="Queue another" if self.under_way else "Generate"),
            "stop": gr.update(
                visible=row is not None and not row.ended,
                interactive=not stopping,
                value="Stopping …" if stopping else "Stop",
            ),
        }
        # Without one, for others to say: an event says all that it has said with each answer.
        updates["live"] = row.message if row else gr.update()
        if ended := [id for id, row in self.rows.items() if row.ended and not row.landed]:
            updates["landed"] = " ".join(ended)
        return updates

    def state(self) -> JobsState:
        """The rows as the page draws them. What the player shows of an ended job needs no row, nor
        does a job that was stopped before its first sound.
        """
        rows = [
            row.state()
            for row in self.rows.values()
            if not row.ended or (row.job.id != self.followed and (row.error or row.has_takes))
        ]
        return {"followed": self.followed, "rows": rows}

    def land(self, elsewhere: bool) -> list[Row]:
        """The rows of jobs that have ended since: their takes are to join the history.

        Args:
            elsewhere: the player plays something else, which goes on.
        """
        ended = [row for row in self.rows.values() if row.ended and not row.landed]
        for row in ended:
            row.landed = True
            row.group = take_panel.group(row.reader.takes, row.job.id)
            row.reader.takes.clear()  # they hold the audio, for as long as the page is open
            if elsewhere and row.job.id == self.followed:
                self.followed = ""
        return ended

    def stop(self, job: str = "") -> bool:
        """Stops a job, or the one that the player follows; whether there is one."""
        row = self.rows.get(job or self.followed)
        if row is None or row.ended:
            return False
        if not row.job.stopping.is_set():
            row.job.stop()
            self._changed.set()
        return True

    def follow(self, job: str) -> None:
        """The player follows another job, "" none. What it has played to the end needs no row."""
        if (before := self.rows.get(self.followed)) and before.landed and job != self.followed:
            del self.rows[self.followed]
        self.followed = job if job in self.rows else ""
        self._changed.set()

    def dismiss(self, job: str) -> None:
        """A row is closed whose job has ended."""
        if (row := self.rows.get(job)) and row.ended and row.landed:
            del self.rows[job]
            self._changed.set()
