"""How handlers' updates reach the page's components."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import gradio as gr
from gradio.blocks import postprocess_update_dict

from musicgen_ui.ui.components import Updates
from musicgen_ui.ui.events import Events


def test_each_answer_repeats_all_before_it_whatever_gradio_does_with_the_first() -> None:
    """A slow browser merges two answers, and shows what the second one holds."""
    title = gr.HTML(render=False)
    events = Events.__new__(Events)
    events.by_name = {"take_title": title, "take_facts": gr.HTML(render=False)}

    async def handler() -> AsyncGenerator[Updates, None]:
        yield {"take_title": gr.update(value="a waltz")}
        yield {"take_facts": "2 s"}

    async def run() -> list[dict[str, object]]:
        answers = events.named(handler)()
        assert isinstance(answers, AsyncGenerator)
        return [postprocess_update_dict(title, answer[title]) async for answer in answers]

    first, second = asyncio.run(run())
    assert first["value"] == second["value"] == "a waltz"
