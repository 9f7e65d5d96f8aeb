"""Which event of jobs calls which handler; see `events` for the rest of the page."""

from __future__ import annotations

import gradio as gr
from gradio.blocks import Block
from gradio.events import Dependency

from musicgen_ui.request import FIELDS
from musicgen_ui.ui.components import PRIVATE, Components, Endpoint
from musicgen_ui.ui.events import Events
from musicgen_ui.ui.handlers import Handlers

PLAYHEAD = """(history, chosen, variation) =>
  [history, chosen, variation, window.musicgenPlayer.sound.position_s]"""
LAND = """(landed, history, chosen) =>
  [landed, history, chosen, Boolean(window.musicgenPlayer?.is_elsewhere)]"""


def connect(c: Components, handlers: Handlers, endpoint: Endpoint) -> Dependency:
    """Generate, Stop, the rows of jobs and the API; the event of takes that have landed.

    The engine itself queues; Gradio's queue only carries.
    """
    events, take = Events(c), c.take
    remaking(events, handlers)
    gr.on(
        [c.form.generate.click],
        events.named(handlers.compose),
        inputs=[c.form.checkpoint_defaults],
        inputs_kwargs={name: events.by_name[name] for name in FIELDS},
        outputs=events.jobs,
        validator=handlers.validate,
        trigger_mode="multiple",  # another one while a take is made
        api_name="compose",
        concurrency_limit=None,
        **PRIVATE,
    )
    events.on(c.form.stop.click, handlers.stop, [], [c.form.stop], "stop")
    shown = [*events.jobs, *events.shown_take]
    events.on(take.jobs.click, handlers.act_on_job, [take.history], shown, "act_on_job")
    landed: Dependency = take.landed.change(
        events.named(handlers.land),
        [take.landed, take.history, take.chosen, take.elsewhere],
        [take.jobs, *events.shown_take],
        js=LAND,
        trigger_mode="always_last",
        api_name="land",
        concurrency_limit=None,
        **PRIVATE,
    )
    endpoint.trigger.click(
        handlers.generate,
        inputs_kwargs=endpoint.parameters,
        outputs=[endpoint.files, endpoint.settings],
        concurrency_limit=None,
        api_name="generate",
    )
    take.job_id.change(
        events.named(handlers.follow),
        take.job_id,
        events.jobs,
        concurrency_limit=None,
        api_name="follow",
        **PRIVATE,
    )
    return landed


def remaking(events: Events, handlers: Handlers) -> None:
    """Takes that are made of the one on show."""
    panel = events.c.take
    of_take: list[Block] = [panel.history, panel.chosen, panel.take_variation]
    panel.retake.click(
        events.named(handlers.retake_from),
        [*of_take, panel.playhead_s],
        events.jobs,
        js=PLAYHEAD,
        trigger_mode="multiple",
        api_name="retake",
        concurrency_limit=None,
        **PRIVATE,
    )
    panel.extend.click(
        events.named(handlers.extend),
        of_take,
        events.jobs,
        trigger_mode="multiple",
        api_name="extend",
        concurrency_limit=None,
        **PRIVATE,
    )
