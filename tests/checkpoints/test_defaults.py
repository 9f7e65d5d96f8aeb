"""What a checkpoint states of its sampling counts where nothing is asked for, and nothing else."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.checkpoints import lora, registry
from musicgen_ui.checkpoints.config import GENERATION_FILE
from musicgen_ui.request import CHECKPOINT_FIELDS, FIELDS, completed
from musicgen_ui.ui import request_form
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.request_form import Restoring
from tests.helpers.fakes import OWN, FakeBackend
from tests.helpers.page import compose, handlers, state

__all__ = ["handlers"]  # a fixture
APPS = {name: FIELDS[name].default for name in CHECKPOINT_FIELDS}


@pytest.fixture
def folder(tiny_mono: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_mono, tmp_path / "checkpoint"))


def defaults_of(folder: Path) -> dict:
    return registry.describe(registry.resolve(str(folder))).defaults


def test_only_what_the_file_states_counts(folder):
    file = folder / GENERATION_FILE
    file.write_text(json.dumps({"temperature": 0.8, "top_k": 40, "max_length": 1503}))
    assert defaults_of(folder) == {"temperature": 0.8, "top_k": 40}
    file.write_text(json.dumps({"do_sample": False, "guidance_scale": 4, "top_p": 1.0}))
    assert defaults_of(folder) == {"do_sample": False, "guidance_scale": 4.0, "top_p": 0.0}
    file.unlink()
    assert defaults_of(folder) == {}


def test_a_length_is_a_default_where_it_is_less_than_the_apps(folder):
    file = folder / GENERATION_FILE
    file.write_text(json.dumps({"max_length": 253}))  # three columns more than frames
    assert defaults_of(folder) == {"duration_s": 5.0}
    file.write_text(json.dumps({"max_new_tokens": 153, "max_length": 253}))
    assert defaults_of(folder) == {"duration_s": 3.0}


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"temperature": 0}', '{"top_k": -1, "top_p": "much"}', '{"max_length": 20}'),
        *('{"guidance_scale": [3]}', '{"max_length": "long"}', '{"guidance_scale": NaN}'),
    ],
)
def test_what_no_request_may_have_is_left_out(folder, text):
    (folder / GENERATION_FILE).write_text(text)
    assert defaults_of(folder) == {}


def test_the_bundled_checkpoints_state_what_they_were_measured_with():
    for name in ("bundled", "bundled-stereo"):
        own = registry.describe(registry.resolve(name)).defaults
        assert (own["temperature"], own["top_k"], own["guidance_scale"]) == (0.7, 50, 2.0)


def test_what_is_asked_for_wins_and_a_complete_request_asks_no_checkpoint():
    def own(checkpoint: str, adapter: str) -> dict:
        assert checkpoint == "wide"
        return OWN["wide"]

    values = completed({"checkpoint": "wide", "top_k": 9, "temperature": None}, own)
    assert values == {"checkpoint": "wide", "top_k": 9, "temperature": 0.7}
    assert completed(APPS, lambda *names: pytest.fail("asked")) == APPS


def test_an_adapter_alone_takes_its_bases_settings(folder, tmp_path):
    """The bundled checkpoint, which "auto" is without an adapter, states temperature 0.7."""
    (folder / GENERATION_FILE).write_text(json.dumps({"temperature": 1.3, "top_k": 40}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / lora.CONFIG).write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    save_file({"a": torch.zeros(1)}, adapter / lora.WEIGHTS)
    manager = LocalBackend(device="cpu")
    stated = lambda *names: manager.describe(*names).defaults  # noqa: E731
    values = completed({"adapter": str(adapter)}, stated)
    assert (values["temperature"], values["top_k"]) == (1.3, 40)
    assert completed({}, stated)["temperature"] == 0.7
    named = completed({"adapter": str(adapter), "checkpoint": "bundled"}, stated)
    assert named["temperature"] == 0.7
    manager.close()


def test_a_request_without_settings_takes_the_checkpoints_and_its_take_says_so(handlers: Handlers):
    def made(**values) -> tuple[float, int]:
        asked = {"temperature": None, "top_k": None, **values}
        end = state(compose(handlers, checkpoint="wide", **asked))
        settings = end["history"][-1][0].settings
        return settings["temperature"], settings["top_k"]

    assert made() == (0.7, 50)
    assert made(temperature=1.5) == (1.5, 50)


def test_the_page_follows_the_checkpoint_but_keeps_what_the_user_changed():
    facts = asyncio.run(request_form.CheckpointFacts(FakeBackend()).choose("wide"))[
        "checkpoint_facts"
    ]
    told = request_form.follow_checkpoint(facts, APPS, *APPS.values())
    assert (told["temperature"], told["top_k"]) == (0.7, 50)
    # What does not change is not said: the user may be changing it while the answer is on its way.
    assert not {"guidance_scale", "duration_s"} & set(told)
    assert "sets temperature 0.7, top-k 50" in told["checkpoint_line"]
    mine = {**APPS, "temperature": 1.2}
    told = request_form.follow_checkpoint(facts, APPS, *mine.values())
    assert "temperature" not in told and told["top_k"] == 50
    assert "temperature 0.7; yours is kept" in told["checkpoint_line"]
    # Another one that states nothing: what followed goes back, what was changed stays.
    shown = {**mine, "top_k": 50}
    other = asyncio.run(request_form.CheckpointFacts(FakeBackend()).choose("mono"))[
        "checkpoint_facts"
    ]
    back = request_form.follow_checkpoint(other, told["checkpoint_defaults"], *shown.values())
    assert back["top_k"] == 250 and "temperature" not in back


def test_a_click_before_the_page_knows_its_checkpoint_leaves_its_settings_to_it(
    handlers: Handlers,
):
    """Also one between another checkpoint's choice and its answer."""
    general = {name: FIELDS[name].default for name in CHECKPOINT_FIELDS}
    for own in (general, general | {"temperature": 0.5}):
        shown = own | {"top_p": 0.9, "duration_s": 1.0}
        compose(handlers, given=own, checkpoint="wide", **shown)
        asked = handlers.backend.backend.requests[-1]
        assert (asked.temperature, asked.top_k) == (0.7, 50)
        assert (asked.top_p, asked.duration_s) == (0.9, 1.0)


def test_what_a_file_restored_stays_whatever_its_checkpoint_states(handlers: Handlers):
    del handlers
    facts = asyncio.run(request_form.CheckpointFacts(FakeBackend()).choose("wide"))[
        "checkpoint_facts"
    ]
    restored = Restoring().settings({"temperature": 1.0, "checkpoint": "wide"})
    told = request_form.follow_checkpoint(facts, restored["checkpoint_defaults"], *APPS.values())
    assert not set(CHECKPOINT_FIELDS) & set(told)


def test_a_stated_length_is_no_more_than_the_server_makes():
    facts = asyncio.run(request_form.CheckpointFacts(FakeBackend(), longest_s=5.0).choose("wide"))[
        "checkpoint_facts"
    ]
    assert request_form.follow_checkpoint(facts, APPS, *APPS.values())["duration_s"] == 5.0
