"""What a page shows when it is opened again: the takes of its tab, and jobs that are under way."""

from __future__ import annotations

import json

import gradio as gr

from musicgen_ui.backends.admission import Client
from musicgen_ui.ui import take_panel
from musicgen_ui.ui.components import Updates
from musicgen_ui.ui.page_jobs import BROKEN, UNDER_WAY, JobReader
from musicgen_ui.ui.player import JobMessage, JobState
from musicgen_ui.ui.request_form import Restoring
from musicgen_ui.ui.sessions import BACK, Sessions


def back() -> str:
    """The script that gives a page the form as it was, and says so of a take that is lost."""
    message = JobState().message("failed", BROKEN)
    return BACK.replace("CUT_OFF", json.dumps(message))


class Pages:
    """The answer to a page that is opened."""

    def __init__(self, sessions: Sessions, restoring: Restoring | None = None) -> None:
        self.sessions = sessions
        self.restoring = restoring or Restoring()

    def enter(self, key: str, request: gr.Request) -> Updates:
        """A page was opened: shows again what its tab had before.

        Where jobs are under way, "job_id" gets the id of one: `Handlers.follow` reads their events
        then.
        """
        client = Client.of(request)
        tab = self.sessions.enter(client.session, key, client.address)
        if tab is None or not tab.settings:
            return {}
        message: JobMessage | None = None
        for job in list(tab.jobs):
            if job.ended:
                reader = JobReader(JobState(), returned=True)
                reader.read(job.log.so_far())
                tab.end(job, take_panel.group(reader.takes))
                message = reader.end()
            else:
                tab.note(job)
        shown, _ = self.restoring.form(tab.settings)  # asked for here, so nothing changes
        if tab.history:
            shown |= take_panel.show(tab.history, -1, 0)
        if message:
            shown["live"] = message
        if tab.job:
            message = JobState().message("waiting", UNDER_WAY)
            shown |= {"live": message, "job_id": tab.job.id}
        return shown
