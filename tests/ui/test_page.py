"""The page's parts: what reads what, and what its limits and descriptions say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from musicgen_ui.request import CHECKPOINT_FIELDS, CLIP_FIELDS, FIELDS
from musicgen_ui.ui import page
from musicgen_ui.ui.events import Parts
from tests.helpers.fakes import FakeEngine


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> gr.Blocks:
    return page.build(FakeEngine(), page.PageOptions(), tmp_path_factory.mktemp("takes"))


def event(built: gr.Blocks, api_name: str) -> Any:
    return next(fn for fn in built.fns.values() if fn.api_name == api_name)


def test_generate_reads_every_setting_from_the_field_that_shows_it(built: gr.Blocks) -> None:
    read = [component.elem_id for component in event(built, "compose").inputs]
    assert read == [None, None, *FIELDS]  # the takes and what follows the checkpoint come first


@pytest.mark.parametrize("api_name", ["use_settings", "restore", "enter"])
def test_settings_come_back_to_the_fields_that_show_them(built: gr.Blocks, api_name: str) -> None:
    filled = {component.elem_id for component in event(built, api_name).outputs}
    assert set(FIELDS) - set(CLIP_FIELDS) <= filled


def test_an_idea_fills_the_form_without_asking_the_server(built: gr.Blocks) -> None:
    """Its answer could come after the user has typed on."""
    ideas = next(block for block in built.blocks.values() if block.elem_id == "ideas")
    idea = next(fn for fn in built.fns.values() if ideas in fn.inputs)
    assert idea.fn is None and "lo-fi" in idea.js


def test_a_name_is_given_to_one_component_alone() -> None:
    parts = Parts()
    parts["key"] = "the drop-down"
    with pytest.raises(KeyError, match="key"):
        parts["key"] = "the tab's"


def test_a_slider_offers_all_that_a_request_may_have(built: gr.Blocks) -> None:
    sliders = [block for block in built.blocks.values() if isinstance(block, gr.Slider)]
    assert len(sliders) > 5
    for slider in sliders:
        about = FIELDS[slider.elem_id].metadata
        assert (slider.minimum, slider.maximum) == (about["min"], about["max"]), slider.elem_id
    numbers = [block for block in built.blocks.values() if isinstance(block, gr.Number)]
    assert all(n.minimum is None and n.maximum is None and n.precision is None for n in numbers)


def test_a_short_server_offers_no_more_than_it_makes(tmp_path: Path) -> None:
    short = page.build(FakeEngine(), page.PageOptions(max_duration_s=5), tmp_path)
    at = {b.elem_id: b for b in short.blocks.values() if getattr(b, "elem_id", None)}
    assert at["duration_s"].maximum == at["duration_s"].value == 5
    assert all(seconds <= 5 for _, seconds in at["ideas"].samples)
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
