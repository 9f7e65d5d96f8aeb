"""What the form holds is what the take is made with, in Chromium: every field, and every limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Page, expect

from musicgen_ui import takes
from musicgen_ui.audio.clip import Clip
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.request import CLIP_FIELDS, FIELDS, GenerationRequest
from tests.helpers.browser import Open, download, finished, generate, serving, set_number, unfold
from tests.helpers.fakes import FakeBackend, tone

# Nothing here is a default, and much is what the command line alone used to take.
EVERYTHING = GenerationRequest(
    prompt="slow waltz",
    negative_prompt="drums",
    sections=((0.0, "piano"), (1.5, "strings")),
    tempo_bpm=92.5,
    key="E minor",
    time_signature="3/4",
    context_s=30,
    include_prompt=False,
    chords="C G A:min F,G:7",
    chord_strength=1.5,
    style_start_s=0.5,
    style_length_s=1.5,
    style_codebooks=2,
    text_guidance=4,
    checkpoint="wide",
    adapter="someone/their-lora",
    adapter_strength=0.35,
    stereo=True,
    duration_s=2.25,
    overlap_s=25,
    guidance_scale=15,
    do_sample=False,
    temperature=4,
    top_k=100_000,
    top_p=0.5,
    seed=2**32 - 1,
    variations=2,
    keep=2,
    rank_by_prompt=True,
    normalize=True,
)


def saved(request: GenerationRequest, folder: Path) -> Path:
    """A take's file that holds the settings of a request."""
    music = Clip(tone(1, 0.5, 16_000, 1), 16_000)
    return takes.save(Finished(0, music, request, 0.0, 1.0), folder).wav


@pytest.fixture
def tune(tmp_path: Path) -> Path:
    path = tmp_path / "tune.wav"
    soundfile.write(path, 0.2 * np.sin(np.arange(32_000) / 9), 16_000)
    return path


def restore(page: Page, file: Path) -> None:
    unfold(page, "Advanced")
    with page.expect_file_chooser() as choosing:
        page.locator("#restore").click()
    choosing.value.set_files(file)
    expect(page.locator(".notice-words")).not_to_be_empty()


def test_every_field_goes_through_the_page_into_the_take(
    open_page: Open, engine: FakeBackend, tmp_path: Path, tune: Path
) -> None:
    assert all(
        getattr(EVERYTHING, name) != spec.default
        for name, spec in FIELDS.items()
        if name not in (*CLIP_FIELDS, "automation", "skip_s")  # those are refused beside a clip
    )
    page = open_page()
    restore(page, saved(EVERYTHING, tmp_path))
    set_number(page, "variations", 2)  # a file is one take
    unfold(page, "Start from audio")
    page.locator("#audio_prompt input[type=file]").set_input_files(tune)
    expect(page.locator("#clip_line")).to_contain_text("of 2.0 s")
    page.locator("#generate").click()
    expect(page.locator("#take_facts")).to_contain_text("E minor")
    finished(page)
    asked = engine.requests[-1]
    assert asked.audio_prompt is not None and replace(asked, audio_prompt=None) == EVERYTHING
    held = takes.read_settings(download(page, "flac", tmp_path))
    told = EVERYTHING.settings() | {
        "checkpoint": "fake",
        "variations": 1,
        "keep": 0,
    }  # as the engine says it
    assert held is not None and told.items() <= held.items()
    page.locator("#clip_use").get_by_label("follow its melody").click()
    expect(page.locator("#melody_line")).to_contain_text("2.0 s")
    page.locator("#generate").click()
    expect(page.locator("#take_facts")).to_contain_text("follows a melody")
    finished(page)
    assert engine.requests[-1].melody is not None and engine.requests[-1].audio_prompt is None


def test_a_number_beyond_its_slider_is_said_at_its_field_and_stays_as_typed(
    open_page: Open, engine: FakeBackend
) -> None:
    page = open_page()
    asked = len(engine.requests)
    guidance = page.locator("#guidance_scale input[type=number]")
    set_number(page, "guidance_scale", 25)
    generate(page, "calm", 1)
    expect(page.locator("#guidance_scale .validation-error")).to_contain_text("between 1 and 20")
    page.evaluate("document.querySelector('#guidance_scale .validation-error').remove()")
    expect(page.locator(".notice.is-wrong .notice-words")).to_contain_text("between 1 and 20")
    expect(guidance).to_have_value("25")
    assert len(engine.requests) == asked
    set_number(page, "guidance_scale", 20)
    unfold(page, "Sampling")
    set_number(page, "temperature", 0.01)
    temperature = page.locator("#temperature input[type=number]")
    temperature.fill("")  # emptied: as it was
    temperature.press("Tab")
    expect(temperature).to_have_value("0.01")
    set_number(page, "top_k", 2_000_000)
    unfold(page, "Sampling")  # closed: what is wrong is brought into view
    page.locator("#generate").click()
    expect(page.locator("#top_k .validation-error").first).to_be_in_viewport()
    set_number(page, "top_k", 1_000_000)
    page.locator("#key input").click()
    page.get_by_role("option", name="A minor", exact=True).click()
    page.locator("#generate").click()
    finished(page)
    made = engine.requests[-1]
    assert (made.guidance_scale, made.temperature, made.top_k) == (20, 0.01, 1_000_000)
    assert made.key == "A minor"


def test_a_server_with_a_limit_says_what_of_a_file_it_cannot_take(
    open_page: Open, tmp_path: Path
) -> None:
    long = replace(EVERYTHING, duration_s=120, sections=((0.0, "piano"), (90.0, "strings")))
    engine = FakeBackend()
    with serving(engine, max_duration_s=4, any_checkpoint=False) as url:
        page = open_page(url=url)
        expect(page.locator("#duration_s input[type=number]")).to_have_value("4")
        restore(page, saved(long, tmp_path))
        told = page.locator(".notice-words")
        for word in ("120 s", "4 s", "Sections", "someone/their-lora"):
            expect(told).to_contain_text(word)
        page.locator("#generate").click()
        finished(page)
        assert engine.requests[-1].duration_s == 4 and engine.requests[-1].adapter == ""
        assert engine.requests[-1].sections == ((0.0, "piano"),)
        expect(told).to_be_hidden()
        page.locator("#same_seed").click()
        expect(told).to_contain_text(str(long.seed))
        set_number(page, "duration_s", 9)
        page.locator("#generate").click()
        # Gradio takes it from the field with the answer to another event: the notice says it then.
        said = page.locator("#duration_s .validation-error, .notice.is-wrong .notice-words").first
        expect(said).to_contain_text("4 s")
