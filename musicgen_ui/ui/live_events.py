"""Which event of live mode calls which handler; see `events` for the rest of the page."""

from __future__ import annotations

import gradio as gr
from gradio.blocks import Block
from gradio.events import Dependency

from musicgen_ui.request import FIELDS
from musicgen_ui.ui import live_panel
from musicgen_ui.ui.components import QUIET, Components
from musicgen_ui.ui.events import Events
from musicgen_ui.ui.handlers import Handlers


def connect(c: Components, handlers: Handlers, page: gr.Blocks) -> Dependency:
    """Connects the panel's components to `LiveMode`; the event of a piece, from start to end."""
    events, mode, panel = Events(c), live_panel.LiveMode(handlers), c.live
    notice = [c.head.notice]
    form = [c.request.prompt, c.request.guidance_scale, c.request.temperature, c.request.top_k]
    shown: list[Block] = [panel.live_column, panel.live_prompt_1]
    shown += [panel.live_guidance, panel.live_temperature, panel.live_top_k]
    events.on(panel.live_mode.input, mode.switch, [panel.live_mode, *form], shown, "live_mode")
    more = [panel.live_prompt_3, panel.live_prompt_4]
    for prompt in more:
        weights: list[Block] = [panel.live_fader, panel.live_pad]
        events.on(prompt.change, mode.weights, more, weights, "live_weights")
    controls = {name: events.by_name[name] for name in live_panel.CONTROLS}
    buttons = [events.by_name[name] for name in live_panel.playing(True)]
    played: Dependency = panel.live_start.click(
        events.named(mode.start),
        inputs=[c.take.history, c.form.checkpoint_defaults],
        inputs_kwargs=controls | {name: events.by_name[name] for name in FIELDS},
        outputs=[
            *(c.take.live, panel.live_line, panel.live_listener, c.head.notice),
            *buttons,
            *events.shown_take,
        ],
        concurrency_limit=None,
        show_progress="hidden",
        api_name="live_start",
        api_visibility="private",
    )
    gr.on(
        [
            *(each.input for each in controls.values() if isinstance(each, (gr.Slider, gr.HTML))),
            *(each.submit for each in controls.values() if isinstance(each, gr.Textbox)),
            *(each.blur for each in controls.values() if isinstance(each, gr.Textbox)),
        ],
        events.named(mode.steer),
        inputs_kwargs=controls,
        outputs=notice,
        trigger_mode="always_last",
        api_name="live_steer",
        **QUIET,
    )
    stores = (panel.live_store_1, panel.live_store_2, panel.live_store_3)
    recalls = (panel.live_recall_1, panel.live_recall_2, panel.live_recall_3)
    pressed: list[Block] = [panel.live_record, *recalls, *notice]
    for slot, (store, recall) in enumerate(zip(stores, recalls, strict=True), start=1):
        events.on(store.click, mode.store(slot), [], pressed, f"live_store_{slot}")
        events.on(recall.click, mode.recall(slot), [], pressed, f"live_recall_{slot}")
    events.on(panel.live_record.click, mode.record, [], pressed, "live_record")
    events.on(panel.live_stop.click, mode.stop, [], pressed, "live_stop")
    page.unload(mode.closed)
    return played
