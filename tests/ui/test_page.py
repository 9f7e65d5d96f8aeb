"""The page's components: what reads what, their limits and the API's descriptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from musicgen_ui.backends.admission import Admission
from musicgen_ui.library import Library
from musicgen_ui.request import CHECKPOINT_FIELDS, CLIP_FIELDS, FIELDS
from musicgen_ui.ui import page
from musicgen_ui.ui.components import (
    AudioPanel,
    Form,
    GetModel,
    Head,
    LibraryPanel,
    LivePanel,
    PresetPanel,
    RequestFields,
    TakePanel,
    Updates,
)
from tests.helpers.fakes import FakeBackend


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gr.Blocks]:
    folder = tmp_path_factory.mktemp("music")
    library = Library(folder / "takes", folder / "index.sqlite3")
    yield page.build(Admission(FakeBackend(), None), page.PageOptions(), library)
    library.close()


def event(built: gr.Blocks, api_name: str) -> Any:
    return next(fn for fn in built.fns.values() if fn.api_name == api_name)


def names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def test_updates_name_exactly_the_components() -> None:
    groups = (RequestFields, Head, Form, AudioPanel, TakePanel)
    groups += (PresetPanel, GetModel, LibraryPanel, LivePanel)
    every = [name for group in groups for name in names(group)]
    assert len(set(every)) == len(every)
    assert set(every) == set(Updates.__annotations__)


def test_request_fields_are_those_of_a_request() -> None:
    assert names(RequestFields) == list(FIELDS)


def test_every_component_is_placed_on_the_page(tmp_path: Path) -> None:
    with gr.Blocks() as blocks:
        components = page.create(page.PageOptions())
        page.lay_out(components, page.PageOptions(), with_library=True)
    assert all(each._id in blocks.blocks for each in components.by_name().values())


def test_generate_reads_every_setting(built: gr.Blocks) -> None:
    read = [component.elem_id for component in event(built, "compose").inputs]
    assert read == [None, *FIELDS]  # the checkpoint's defaults come first


@pytest.mark.parametrize("api_name", ["use_settings", "restore", "library_act"])
def test_settings_come_back_to_their_fields(built: gr.Blocks, api_name: str) -> None:
    filled = {component.elem_id for component in event(built, api_name).outputs}
    assert set(FIELDS) - set(CLIP_FIELDS) <= filled


def test_no_first_answer_fills_in_a_setting(built: gr.Blocks) -> None:
    """It may come late, after the user has changed the form."""
    opening: set[int] = set()
    written = set()
    for number, fn in sorted(built.fns.items()):
        if ("load" in [name for _, name in fn.targets]) or fn.trigger_after in opening:
            opening.add(number)
            written |= {each.elem_id for each in fn.outputs} if fn.fn else set()
    # The list of checkpoints, and a switch that the checkpoint may decide.
    assert written & set(FIELDS) == {"checkpoint", "stereo"}


@pytest.mark.parametrize("api_name", ["library_filter", "checkpoint"])
def test_first_answer_and_later_ones_keep_their_order(built: gr.Blocks, api_name: str) -> None:
    answer = event(built, api_name)
    assert answer.trigger_mode == "always_last"
    assert {"load", "change"} <= {name for _, name in answer.targets}


def test_ideas_are_added_by_the_browser_alone(built: gr.Blocks) -> None:
    """An answer of the server could come after the user has typed on."""
    ideas = next(block for block in built.blocks.values() if block.elem_id == "ideas")
    idea = next(fn for fn in built.fns.values() if ideas in fn.inputs)
    assert idea.fn is None and "lo-fi" in idea.js


def test_a_slider_offers_all_that_a_request_may_have(built: gr.Blocks) -> None:
    every = [block for block in built.blocks.values() if isinstance(block, gr.Slider)]
    sliders = [slider for slider in every if not slider.elem_id.startswith("live_")]
    assert len(sliders) > 5
    for slider in sliders:
        about = FIELDS[slider.elem_id].metadata
        assert (slider.minimum, slider.maximum) == (about["min"], about["max"]), slider.elem_id
    numbers = [block for block in built.blocks.values() if isinstance(block, gr.Number)]
    assert all(n.minimum is None and n.maximum is None and n.precision is None for n in numbers)


def test_a_short_server_offers_no_more_than_it_makes(tmp_path: Path) -> None:
    short = page.build(Admission(FakeBackend(), None), page.PageOptions(max_duration_s=5))
    at = {b.elem_id: b for b in short.blocks.values() if getattr(b, "elem_id", None)}
    assert at["duration_s"].maximum == at["duration_s"].value == 5
    assert [seconds for _, seconds in at["length_choice"].choices] == [5]
    # The page counts its own length as nobody's choice, so a checkpoint's own may follow.
    own = next(c for c in event(short, "compose").inputs if isinstance(c, gr.JSON) and c.value)
    assert own.value == {name: at[name].value for name in CHECKPOINT_FIELDS}


def test_the_api_describes_its_parameters_and_answers(built: gr.Blocks) -> None:
    told = built.get_api_info()["named_endpoints"]["/generate"]
    for parameter in told["parameters"]:
        about = FIELDS[parameter["parameter_name"]].metadata
        said = parameter["python_type"]["description"]
        assert about["help"] in said
        if isinstance(about["max"], (int, float)):
            assert f"{about['max']:,.15g}" in said
        assert "http" not in str(parameter["example_input"])  # addresses are not fetched
    assert all(answer["python_type"]["description"] for answer in told["returns"])
