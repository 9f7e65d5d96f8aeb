"""The form's answers while it is filled in: clip, window, stereo, settings from a take."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest

from musicgen_ui.engine.protocol import CheckpointInfo, Status
from musicgen_ui.request import FIELDS
from musicgen_ui.ui import audio_panel, request_form
from musicgen_ui.ui.components import CONTINUE, FOLLOW
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.request_form import Restoring
from tests.helpers.fakes import FakeBackend
from tests.helpers.page import compose, state

WINDOW = (10.0, 0.0, 12.0)  # length, context and overlap in s


def test_the_window_is_explained(clip: str) -> None:
    told = audio_panel.read_clip(clip, 25.0, 0.0, 12.0)
    assert "last 5.0 s of 5.0 s, 25.0 s new, the 30 s window is full" in told["clip_line"]
    assert "last 2.0 s of 5.0 s, 10.0 s new<" in audio_panel.clip_line(
        told["clip"], 10.0, 2.0, 12.0
    )
    assert "last 5.0 s of 5.0 s, 30.0 s new, 30 s at a time" in audio_panel.clip_line(
        told["clip"], 30.0, 0.0, 12.0
    )
    of_audiogen = {"window_s": 10.0}
    assert "last 4.0 s of 5.0 s, 6.0 s new, the 10 s window is full" in audio_panel.clip_line(
        told["clip"], 6.0, 0.0, 2.0, of_audiogen
    )


def test_page_knows_the_window_of_the_checkpoint() -> None:
    class Short(FakeBackend):
        def describe(self, checkpoint: str, adapter: str = "") -> CheckpointInfo:
            return dataclasses.replace(super().describe(checkpoint, adapter), window_s=10.0)

    told = asyncio.run(request_form.CheckpointFacts(Short()).choose("auto"))
    assert told["checkpoint_facts"]["window_s"] == 10


def test_a_file_that_is_no_audio_is_refused_beside_its_field(tmp_path: Path) -> None:
    page = tmp_path / "page.wav"
    page.write_text("<html>hello</html>")
    told = audio_panel.read_clip(str(page), 10.0, 0.0, 12.0)
    assert told["audio_prompt"] is None and 'role="alert"' in told["clip_line"]
    # The field is empty now, which asks again: the sentence must still be there.
    again = audio_panel.read_clip(None, *WINDOW, {}, told["clip"])
    assert again["clip_line"] == told["clip_line"]
    assert "alert" not in audio_panel.read_clip(None, *WINDOW, {}, again["clip"])["clip_line"]


def test_a_take_offers_its_settings(handlers: Handlers) -> None:
    end = state(compose(handlers, prompt="slow waltz", temperature=0.7, variations=2))
    told = audio_panel.read_clip(end["wav"]["value"], *WINDOW)
    assert told["offer"]["visible"] and "seed 7" in told["offer"]["value"]
    filled = Restoring().settings(told["offered"])
    assert filled["prompt"] == "slow waltz" and filled["temperature"] == 0.7
    assert filled["variations"] == 1 and filled["seed"] == 7
    assert Restoring().file(end["flac"]["value"])["prompt"] == "slow waltz"


def test_a_take_can_be_continued(handlers: Handlers) -> None:
    end = state(compose(handlers))
    told = audio_panel.continue_take(end["history"], end["chosen"], *WINDOW)
    assert told["audio_prompt"] == end["take_audio"]["wav"]["path"]
    # Its fold may be closed, and then its field would not have it checked.
    assert "of 1.0 s" in told["clip_line"] and told["offered"]["seed"] == 7
    assert audio_panel.continue_take([], [0, 0], *WINDOW)["audio_prompt"].endswith("example.wav")


@pytest.mark.parametrize("use", [CONTINUE, FOLLOW])
def test_a_file_that_was_dropped_becomes_the_clip_or_is_refused_in_view(
    use: str, clip: str, tmp_path: Path
) -> None:
    field, line = {CONTINUE: ("audio_prompt", "clip_line"), FOLLOW: ("melody", "melody_line")}[use]
    told = audio_panel.dropped(clip, use, *WINDOW)
    assert told[field] == clip and "5.0 s" in told[line] and told["audio_panel"]["open"]
    letter = tmp_path / "letter.docx"
    letter.write_text("Dear …")
    told = audio_panel.dropped(str(letter), use, *WINDOW)
    assert told[field] is None and 'role="alert"' in told[line] and told["audio_panel"]["open"]


def test_a_file_without_settings_is_said_to_have_none(clip: str) -> None:
    told = Restoring().file(clip)
    assert set(told) == {"notice"} and told["notice"]["wrong"]


def test_automation_comes_back_as_text() -> None:
    rows = [[0.0, {"prompts": [["rock", 1.0]]}], [2.5, {"top_k": 5}]]
    told = Restoring().settings({"automation": rows, "skip_s": 3.0})
    assert json.loads(told["automation"]) == rows and told["skip_s"] == 3.0
    assert Restoring().settings({"automation": []})["automation"] == ""


def test_what_a_server_does_not_take_of_a_file_is_changed_and_named() -> None:
    settings = {"duration_s": 90.0, "sections": [[0.0, "a"], [70.0, "b"]], "adapter": "a/lora"}
    told = Restoring(longest_s=60.0, adapters=False).settings(settings)
    assert told["duration_s"] == 60.0 and told["adapter"] == ""
    assert told["sections"] == [[0.0, "a"]]
    said = " ".join(told["notice"]["items"])
    assert all(word in said for word in ("90 s", "60 s", "Sections", "a/lora"))
    assert len(told["notice"]["items"]) == 3
    assert Restoring().settings(settings)["notice"]["items"] == []


def test_filled_in_settings_say_what_changes_with_undo() -> None:
    before = {name: FIELDS[name].default for name in request_form.SETTINGS}
    before |= {"sections": [["", ""]], "prompt": "jazz"}  # as an untouched form has it
    settings = {"prompt": "rock", "temperature": 0.7, "stereo": True, "sections": [[1.0, "a"]]}
    told = Restoring().settings(settings, *before.values())["notice"]
    assert told["undo"] == "settings" and told["items"] == [
        "Prompt: “rock” instead of “jazz”.",
        "Sections: 1 row instead of 0 rows.",
        "Stereo: on instead of off.",
        "Temperature: 0.7 instead of 1.",
    ]
    same = Restoring().settings({"prompt": "jazz", "sections": []}, *before.values())["notice"]
    assert same["items"] == [] and same["text"].endswith("Nothing changed.")


def test_what_a_take_went_on_from_is_told_since_its_file_does_not_hold_it(
    handlers: Handlers, clip: str
) -> None:
    end = state(compose(handlers, audio_prompt=clip))
    assert len(Restoring().file(end["wav"]["value"])["notice"]["items"]) == 1


def test_the_same_seed_is_told_to_stay(handlers: Handlers) -> None:
    end = state(compose(handlers))
    told = request_form.same_seed(end["history"], end["chosen"])
    assert told["seed"] == 7 and "7" in told["notice"]["text"]


def test_what_is_marked_counts_before_the_page_shows_it(handlers: Handlers) -> None:
    end = state(compose(handlers, variations=2))
    history, shown = end["history"], [0, 0]
    assert request_form.same_seed(history, shown, 1)["seed"] == 8
    assert audio_panel.continue_take(history, shown, *WINDOW, {}, 1)["audio_prompt"] == str(
        history[0][1].wav
    )
    assert request_form.same_seed(history, shown, 2)["seed"] == 7  # marked in a list that is gone


def test_the_lock_keeps_a_seed_until_it_is_opened(handlers: Handlers) -> None:
    end = state(compose(handlers))
    shown = end["history"], end["chosen"]
    assert request_form.keep_seed(True, -1, *shown)["seed"] == 7
    assert request_form.keep_seed(True, 12, *shown) == {}
    assert request_form.keep_seed(False, 12, *shown) == {"seed": -1}


def test_reset_gives_the_checkpoints_sampling_back() -> None:
    facts = {"defaults": {"temperature": 0.7, "guidance_scale": 2.0}}
    reset = request_form.reset_sampling(facts, {"top_k": 9, "guidance_scale": 4})
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 250, "top_p": 0.0}
    # They follow the next checkpoint again; guidance is none of the fold's.
    assert reset == {**sampling, "checkpoint_defaults": {**sampling, "guidance_scale": 4}}


@pytest.mark.parametrize(
    ("checkpoint", "value", "usable"),
    [("auto", None, True), ("mono", False, False), ("wide", True, False)],
)
def test_the_stereo_toggle_follows_the_checkpoint(
    checkpoint: str, value: bool | None, usable: bool
) -> None:
    told = asyncio.run(request_form.CheckpointFacts(FakeBackend()).choose(checkpoint))["stereo"]
    assert told["interactive"] is usable and told.get("value") is value
    assert told["info"]


def test_an_unknown_checkpoint_is_said_beside_its_field() -> None:
    told = asyncio.run(request_form.CheckpointFacts(FakeBackend()).choose("nonsense"))
    assert "There is no checkpoint" in told["checkpoint_line"] and "stereo" not in told


def test_a_tab_asks_seldom_once_it_is_settled_what_is_loaded() -> None:
    engine = FakeBackend()
    assert request_form.CheckpointFacts(engine).tick()["timer"].value == request_form.LATER_S

    class Loading(FakeBackend):
        def status(self) -> Status:
            return Status(loading=("reading 0.3 of 2.4 GB",))

    assert request_form.CheckpointFacts(Loading()).tick()["timer"].value == request_form.SOON_S


def test_list_of_checkpoints_says_what_each_needs() -> None:
    known = CheckpointInfo("facebook/musicgen-small", "choice", 32_000, "", nbytes=1_100_000_000)
    label = request_form.checkpoint_label
    name = known.checkpoint
    assert label(name, known) == "musicgen-small · 1.1 GB · mono or stereo"
    remote = dataclasses.replace(known, melody=True, download_bytes=2_300_000_000)
    assert label(name, remote).endswith("follows melodies · 2.3 GB to download")
    assert label(name, dataclasses.replace(remote, fits=False)).endswith(
        "too large for this computer"
    )


def test_demo_model_says_what_makes_real_music() -> None:
    class Two(FakeBackend):
        fits = True

        def describe(self, checkpoint: str, adapter: str = "") -> CheckpointInfo:
            info = super().describe("auto")
            name = "bundled" if checkpoint == "auto" else checkpoint
            size = {"nbytes": 1_100_000_000, "download_bytes": 2_300_000_000}
            return dataclasses.replace(info, checkpoint=name, fits=self.fits, **size)

    engine = Two()
    line = asyncio.run(request_form.CheckpointFacts(engine).choose("auto"))["checkpoint_line"]
    assert "small demo model" in line and "2.3 GB to download once, about 1.1 GB of memory" in line
    engine.fits = False
    line = asyncio.run(request_form.CheckpointFacts(engine).choose("auto"))["checkpoint_line"]
    assert "demo" not in line
