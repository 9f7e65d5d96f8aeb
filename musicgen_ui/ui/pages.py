"""What a page shows when it is opened again: the takes of its tab, and one that is under way."""

from __future__ import annotations

import json

import gradio as gr

from musicgen_ui.backends.admission import Visitor
from musicgen_ui.ui import take_panel
from musicgen_ui.ui.components import Updates
from musicgen_ui.ui.handlers import busy
from musicgen_ui.ui.live_player import LiveStream
from musicgen_ui.ui.request_form import Restoring
from musicgen_ui.ui.sessions import BACK, Recall

UNDER_WAY = "Your take is still being made: it comes here when it is done."
DONE = "Finished while the page was away: here is your take."
BROKEN = "Your take could not be finished: press Generate to try again."


def back() -> str:
    """The script that gives a page the form as it was, and says so of a take that is lost."""
    message = LiveStream(1.0).message("failed", BROKEN)
    return BACK.replace("CUT_OFF", json.dumps(message))


class Pages:
    """The answers to a page that is opened."""

    def __init__(self, recall: Recall, restoring: Restoring | None = None) -> None:
        self.recall = recall
        self.restoring = restoring or Restoring()

    def enter(self, key: str, request: gr.Request) -> Updates:
        """A page was opened: shows again what its tab had before."""
        visitor = Visitor.of(request)
        tab = self.recall.enter(visitor.tab, key, visitor.address)
        if tab is None or not tab.settings:
            return {}
        shown, _ = self.restoring.form(tab.settings)  # asked for here, so nothing changes
        if tab.history:
            shown |= take_panel.show(tab.history, -1, 0)
        if tab.jobs:
            shown |= busy(True) | {"live": LiveStream(1.0).message("waiting", UNDER_WAY)}
            shown["watch"] = gr.Timer(active=True)
        elif tab.news:
            tab.news = False
            shown["live"] = LiveStream(1.0).message("finished", DONE, done_s=1.0)
        return shown

    def news(self, request: gr.Request) -> Updates:
        """Whether the take is done that a page found under way."""
        tab = self.recall.of(Visitor.of(request).tab)
        if tab and tab.jobs:
            return {}
        ending = LiveStream(1.0).message("failed", BROKEN)
        shown = busy(False) | {"watch": gr.Timer(active=False)}
        if tab and tab.news:
            tab.news = False
            take_panel.draw(tab.history[-1][0])
            shown |= take_panel.show(tab.history, -1, 0)
            ending = LiveStream(1.0).message("finished", DONE, done_s=1.0)
        return shown | {"live": ending}
