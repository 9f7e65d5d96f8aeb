"""Which event of the form calls which handler: settings that come back, presets, trimming, undo."""

from __future__ import annotations

import gradio as gr
from gradio.blocks import Block

from musicgen_ui.ui import audio_panel, request_form
from musicgen_ui.ui.components import QUIET, Components
from musicgen_ui.ui.events import Events
from musicgen_ui.ui.get_model import GetModelView
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.presets import Presets
from musicgen_ui.ui.request_form import CheckpointFacts, Restoring

# `page.js` notes the form before settings are filled in.
UNDO_SETTINGS = "(...form) => window.musicgenBefore ?? form"
CHOOSE_PROMPT = "(chosen, prompt) => chosen ?? prompt"


def connect(
    c: Components, handlers: Handlers, page: gr.Blocks, adapters: bool, offers_download: bool
) -> None:
    """Connects the form's panels.

    Args:
        c: the page's components.
        handlers: of the page.
        page: all of it.
        adapters: whether the form shows the adapter.
        offers_download: whether the real model is on offer.
    """
    events = Events(c)
    typed = [c.form.checkpoint_defaults, *events.settings]
    c.form.undo_settings.click(None, typed, typed, js=UNDO_SETTINGS)
    restoring = Restoring(handlers.max_duration_s, adapters)
    form(events)
    settings_from_files(events, restoring)
    trimming(events)
    presets(events, Presets(restoring), page)
    if offers_download:
        facts = CheckpointFacts(handlers.backend, handlers.max_duration_s)
        getting(events, GetModelView(handlers.backend, facts.choices), page)


def form(events: Events) -> None:
    """Buttons of the form."""
    c = events.c
    shown = [c.take.history, c.take.chosen, c.take.take_variation]
    events.on(
        c.form.keep_seed.input,
        request_form.keep_seed,
        [c.form.keep_seed, c.request.seed, *shown],
        [c.request.seed, c.head.notice],
        "keep_seed",
    )
    defaults = c.form.checkpoint_defaults
    events.on(
        c.form.reset_sampling.click,
        request_form.reset_sampling,
        [c.form.checkpoint_facts, defaults],
        [defaults, *(events.by_name[name] for name in request_form.SAMPLING)],
        "reset_sampling",
    )


def settings_from_files(events: Events, restoring: Restoring) -> None:
    """Settings that a take's file holds."""
    c = events.c
    filled = [*events.settings, c.form.checkpoint_defaults]
    filled += [c.audio.offer, c.audio.offered, c.head.notice]
    offered, file = [c.audio.offered, *events.settings], [c.form.restore, *events.settings]
    events.on(c.audio.offer.click, restoring.settings, offered, filled, "use_settings")
    events.on(c.form.restore.upload, restoring.file, file, filled, "restore")


def trimming(events: Events) -> None:
    """A part of the clip, and all of it again."""
    request, audio = events.c.request, events.c.audio
    clips: list[Block] = [request.audio_prompt, request.melody]
    trimmed = [*clips, audio.untrimmed, events.c.head.notice]
    events.on(audio.trim.click, audio_panel.trim, [audio.clip_use, *clips], trimmed, "trim")
    asked = [audio.clip_use, audio.untrimmed]
    events.on(audio.undo_trim.click, audio_panel.untrim, asked, clips, "untrim")


def presets(events: Events, answers: Presets, page: gr.Blocks) -> None:
    """Presets and recent prompts."""
    c, panel = events.c, events.c.presets
    chosen, kept = panel.preset, panel.presets
    listed = [kept, chosen, c.head.notice]
    recent = [panel.prompts, panel.recent]
    events.on(page.load, answers.load, [kept, panel.prompts], [chosen, panel.recent], "presets")
    prompts = [panel.prompts, c.request.prompt]
    events.on(c.form.generate.click, answers.remember, prompts, recent, "remember_prompt")
    events.on(panel.recent_clear.click, answers.forget, [], recent, "forget_prompts")
    panel.recent.input(None, [panel.recent, c.request.prompt], c.request.prompt, js=CHOOSE_PROMPT)
    events.on(chosen.input, answers.choose, [chosen], [panel.preset_name], "preset")
    form = [kept, panel.preset_name, *events.settings]
    events.on(panel.preset_save.click, answers.save, form, listed, "preset_save")
    filled = [*events.settings, c.form.checkpoint_defaults, c.head.notice]
    asked = [kept, chosen, *events.settings]
    events.on(panel.preset_use.click, answers.use, asked, filled, "preset_use")
    named = [kept, chosen, panel.preset_name]
    events.on(panel.preset_rename.click, answers.rename, named, listed, "preset_rename")
    gone = [*listed, panel.deleted, panel.preset_name]
    events.on(panel.preset_delete.click, answers.delete, [kept, chosen], gone, "preset_delete")
    back = [kept, panel.deleted]
    events.on(panel.undo_preset.click, answers.undelete, back, gone, "preset_undelete")


def getting(events: Events, view: GetModelView, page: gr.Blocks) -> None:
    """The real model: offered, downloaded, chosen."""
    c, panel = events.c, events.c.get_model
    buttons: list[Block] = [panel.get_start, panel.get_cancel, panel.get_later]
    shown = [panel.get_panel, panel.get_line, *buttons, panel.get_timer]
    events.on(page.load, view.offer, [panel.get_put_off], shown, "get_offer")
    events.on(panel.get_start.click, view.start, [], shown, "get_start")
    events.on(panel.get_cancel.click, view.cancel, [], shown, "get_cancel")
    put_off: list[Block] = [panel.get_put_off, panel.get_panel]
    events.on(panel.get_later.click, view.put_off, [], put_off, "get_later")
    done = [*shown, c.request.checkpoint, c.head.notice]
    panel.get_timer.tick(events.named(view.tick), None, done, api_name="get_tick", **QUIET)
