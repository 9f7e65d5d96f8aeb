"""What a page shows when it is opened again: the takes of its tab, and jobs that are under way.

The form is not the server's to give back: see `sessions.RESTORE`.
"""

from __future__ import annotations

import json

import gradio as gr

from musicgen_ui.backends.admission import Client
from musicgen_ui.backends.job_log import Outcome
from musicgen_ui.engine.protocol import Stage
from musicgen_ui.ui import take_panel
from musicgen_ui.ui.components import Updates
from musicgen_ui.ui.page_jobs import BROKEN, UNDER_WAY, JobReader
from musicgen_ui.ui.player import JobMessage, JobState
from musicgen_ui.ui.sessions import BACK, Sessions


def back() -> str:
    """The script that says so of a take that is lost."""
    message = JobState().message(Outcome.FAILED, BROKEN)
    return BACK.replace("CUT_OFF", json.dumps(message))


class Pages:
    """The answer to a page that is opened."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    def enter(self, key: str, request: gr.Request) -> Updates:
        """A page was opened: shows again what its tab had before.

        Where jobs are under way, "job_id" gets the id of one: `Handlers.follow` reads their events
        then.
        """
        client = Client.of(request)
        tab = self.sessions.enter(client.session, key, client.address)
        if tab is None or not tab.holds_something:
            return {}
        message: JobMessage | None = None
        for job in list(tab.jobs):
            if job.ended:
                reader = JobReader(JobState(), returned=True)
                reader.read(job.log.so_far())
                tab.end(job, take_panel.group(reader.takes))
                message = reader.end()
        shown: Updates = take_panel.show(tab.history, -1, 0) if tab.history else {}
        if message:
            shown["live"] = message
        if tab.job:
            message = JobState().message(Stage.WAITING, UNDER_WAY)
            shown |= {"live": message, "job_id": tab.job.id}
        return shown
