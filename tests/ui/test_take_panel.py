"""What the page shows of a take: the chords that it followed, its score, whose music played."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from musicgen_ui import takes
from musicgen_ui.audio import chords
from musicgen_ui.audio.chords import Progression
from musicgen_ui.audio.clip import Chroma, Clip
from musicgen_ui.backends.admission import Saved
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.request import GenerationRequest
from musicgen_ui.ui import audio_panel, player, take_panel
from tests.helpers.fakes import tone


def saved(finished: Finished, folder: Path) -> Saved:
    values = {each.name: getattr(finished, each.name) for each in fields(Finished)}
    return Saved(**values, take=takes.save(finished, folder))


def made(**changes: object) -> Finished:
    clip = Clip(tone(1, 1.0, 16_000, 1), 16_000)
    finished = Finished(0, clip, GenerationRequest("rock", chords="C G", duration_s=1), 0.0, 2.0)
    return replace(finished, **changes)


def test_player_gets_the_chords_and_the_melody() -> None:
    placed = Progression(chords.parse("C A:min"), 0.5).placed(1.0)
    settings = {**made().request.settings(), "prompt_s": 0.0, "made_s": 1.0}
    state = player.take_state(None, settings, "rock", melody=Chroma(np.empty(0), 0.1, placed))
    assert state["chords"] == [[0, 0.5, "C", (0, 4, 7)], [0.5, 1.0, "A:min", (0, 4, 9)]]
    assert state["melody"] == "" and player.take_state(None, settings, "rock")["chords"] == []


def test_player_marks_what_the_model_has_heard() -> None:
    """A checkpoint of a shorter window hears less; older files do not say it."""
    settings = {**made().request.settings(), "prompt_s": 25.0, "made_s": 10.0, "duration_s": 10.0}
    heard = player.take_state(None, {**settings, "context_used_s": 5.0}, "rock")["context_s"]
    assert (heard, player.take_state(None, settings, "rock")["context_s"]) == (5.0, 20.0)
    looped = {**settings, "context_used_s": 5.0, "prompt_s": 0.0}
    assert player.take_state(None, looped, "rock")["context_s"] == 0.0


def test_score_and_chords_are_among_the_facts(tmp_path: Path) -> None:
    (take,) = take_panel.group([saved(made(score=0.4321), tmp_path)])
    facts = take_panel.facts_line(take)
    assert "<dd>0.43</dd>" in facts and "<dd>C G</dd>" in facts


def test_redrawn_take_is_not_what_was_streamed(tmp_path: Path) -> None:
    first, again = (saved(made(redrawn=redrawn), tmp_path) for redrawn in (False, True))
    assert [take_panel.group([each], "job")[0].job for each in (first, again)] == ["job", ""]


def test_chords_are_shown_where_they_can_be_followed_or_were_written() -> None:
    def shown(facts: dict[str, object], text: str) -> bool:
        return bool(audio_panel.offer_chords(facts, text)["chord_column"]["visible"])

    assert shown({"melody": True}, "") and shown({}, "C G")
    assert not shown({}, "") and not shown({"melody": False}, "")
