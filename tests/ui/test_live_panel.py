"""Live mode's controls as changes, and its words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.admission import Client
from musicgen_ui.engine.protocol import Chunk, Progress, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.steering import Steering
from musicgen_ui.ui import live_panel
from tests.helpers.page import TAB, values


def controls(**values: Any) -> dict[str, Any]:
    prompts = {f"live_prompt_{n}": "" for n in range(1, 5)}
    rest = {"live_fader": 0.25, "live_guidance": 3, "live_temperature": 1, "live_top_k": 250}
    return {**prompts, "live_pad": [0.0, 0.0, 0.0, 0.0], **rest, **values}


@pytest.mark.parametrize(
    ("values", "prompts"),
    [
        ({}, (("of the form", 1.0),)),
        ({"live_prompt_2": "b"}, (("b", 1.0),)),
        ({"live_prompt_1": "a", "live_prompt_2": "b"}, (("a", 0.75), ("b", 0.25))),
        ({"live_prompt_1": "a", "live_prompt_2": "b", "live_fader": 1}, (("b", 1.0),)),
        (
            {"live_prompt_1": "a", "live_prompt_3": "c", "live_pad": [0.75, 0, 0.25, 0]},
            (("a", 0.75), ("c", 0.25)),
        ),
    ],
)
def test_controls_are_a_mix_of_the_prompts_that_have_words(values, prompts):
    assert live_panel.steering_of(controls(**values), "of the form").prompts == prompts


@pytest.mark.parametrize(("of_the_form", "shown"), [(50, 50), (1, 1), (0, 250), (2048, 250)])
def test_switch_begins_with_the_settings_of_the_form(handlers, of_the_form, shown):
    updates = live_panel.LiveMode(handlers).switch(True, "calm", 2.0, 0.7, of_the_form)
    begins = controls() | {name: u for name, u in updates.items() if not isinstance(u, dict)}
    steered = live_panel.steering_of({n: begins[n] for n in live_panel.CONTROLS}, "")
    assert (steered.guidance_scale, steered.temperature, steered.top_k) == (2.0, 0.7, shown)
    assert steered.prompts == (("calm", 1.0),)


def test_only_what_changed_is_sent():
    before = live_panel.steering_of(controls(), "x")
    after = live_panel.steering_of(controls(live_top_k=5), "x")
    assert live_panel.difference(after, before) == Steering(top_k=5)
    assert live_panel.difference(before, before) is None
    silent = {"live_prompt_1": "a", "live_prompt_3": "c"}
    with pytest.raises(RequestError, match="a weight above 0"):
        live_panel.steering_of(controls(**silent), "x")


def test_a_live_piece_has_the_style_of_the_forms_clip(handlers, clip):
    form = values(prompt="", style=clip, style_start_s=1.0)
    steered = live_panel.steering_of(controls(live_prompt_1="rock"), "")
    job = live_panel.LiveMode(handlers)._submit(form, steered, Client.of(TAB))
    for event in job.follow():
        if isinstance(event, Chunk):
            job.stop()
    (request,) = handlers.backend.backend.requests
    assert request.live and request.style.duration_s == 5 and request.style_start_s == 1
    ((at_s, change),) = request.automation
    assert (at_s, change.prompts) == (0, (("rock", 1.0),))


def test_the_line_says_when_a_model_is_too_slow():
    fast = Progress(Stage.COMPOSING, done_s=9, speed=4.0, ahead_s=0.84, underruns=1)
    assert "0.8 s ahead · 250 ms of work a second of music · 1 underrun<" in live_panel.line(fast)
    assert "alert" not in live_panel.line(fast)
    slow = live_panel.line(Progress(Stage.COMPOSING, done_s=9, speed=0.6))
    assert "makes 0.6 s of music a second here" in slow and "smaller model" in slow


def test_a_piece_that_falls_silent_is_said_until_it_sounds_again():
    piece = live_panel.Piece(None, "x", Steering(), said="2.0 s are kept as a take.")
    silence, music = (Clip(np.full((1, 16_000), level, "f4"), 16_000) for level in (0.001, 0.1))
    for _ in range(3):
        assert piece.remark == "2.0 s are kept as a take."
        piece.measure(silence)
    assert piece.remark == live_panel.NEARLY_SILENT
    piece.measure(music)
    assert piece.remark == "2.0 s are kept as a take."
