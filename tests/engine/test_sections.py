"""A prompt that changes on the way: what may be asked for, and when it is heard."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen_ui import takes
from musicgen_ui.engine import code_window
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import PIANO, ROCK, codes_of, noise, run, submit, whole
from tests.helpers.sections import switched

SECTIONS = ((0.3, "slow piano"), (0.6, "fast drums"))


def test_words_are_the_prompt_the_section_and_what_training_wrote_behind_it():
    request = GenerationRequest("rock.", sections=[(2, "piano"), (5, ""), (7, "drums")])
    heard = {at_s: request.words(at_s) for at_s in (0, 1.99, 2, 4, 5, 6, 7, 9)}
    assert set(heard.values()) == {"rock.", "rock, piano", "rock, drums"}
    assert heard[1.99] == "rock." and heard[2] == "rock, piano" and heard[6] == "rock."
    keyed = GenerationRequest.parse(request.settings() | {"tempo_bpm": 120, "key": "f♯ MINOR"})
    assert keyed.words() == "rock. bpm: 120. key: f# minor"
    assert keyed.words(7) == "rock, drums. bpm: 120. key: f# minor"
    assert GenerationRequest(tempo_bpm=92.5).words() == "bpm: 92.5"
    assert GenerationRequest().words() == ""
    assert request.texts == ["rock.", "rock, piano", "rock, drums"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([[5, "a"], [2, "b"]], "row 2 starts before the one above it"),
        ([[5, "a"], [5, "b"]], "row 2 starts at 5 s, as the one before"),
        ([[0, "a"], [10, "b"]], "starts at 10 s, but the piece ends at 10 s"),
        ([["soon", "a"]], "row 1 must start at a number of s, or at m:ss, not “soon”"),
        ([["1:75", "a"]], "row 1 must start at a number of s, or at m:ss, not “1:75”"),
        ([[float("inf"), "a"]], "row 1 must start at a number"),
        ([[-1, "a"]], "row 1 must start at a number"),
        ([[0, "a"], [None, "b"]], "row 2 has no start"),
        ([[0, 7]], "row 1 must be text"),
        ([[0, "a" * 2001]], "row 1 has 2,001 characters"),
        ([[i / 10, "a"] for i in range(51)], "has 51 rows"),
        ([[i, "a" * 1501] for i in range(4)], "has 6,004 characters in all"),
        ("piano", "must be rows"),
        ('[[0, "a"]', "must be rows"),
        ([[0, "a", 1]], "must be rows"),
        (7, "must be rows"),
        ({"a": 1}, "must be rows"),
    ],
)
def test_wrong_sections_are_refused_in_a_sentence(rows, says):
    with pytest.raises(RequestError) as caught:
        GenerationRequest.parse({"sections": rows})
    assert says in str(caught.value) and str(caught.value).endswith((".", "]]."))
    assert caught.value.field == "sections"


def test_sections_come_as_json_or_a_table_and_go_with_the_take(tmp_path):
    rows = sections_of('[[0, "piano"], ["5.5", " drums "]]')
    assert rows == ((0.0, "piano"), (5.5, "drums"))
    minutes = sections_of([["0:02.5", "a"], ["0:30", "b"], ["1:05", "c"]], duration_s=90)
    assert [start_s for start_s, _ in minutes] == [2.5, 30, 65]
    table = [[0, "piano"], [None, ""], ["", None], [5.5, "drums"], [float("nan"), ""]]
    assert sections_of(table) == rows
    request = GenerationRequest(sections=rows, tempo_bpm=100, key="C minor", seed=1)
    assert GenerationRequest.parse(json.loads(json.dumps(request.settings()))) == request
    finished = takes.Finished(0, noise(0.5), request, 0.0, 1.0)
    take = takes.save(finished, tmp_path)
    for file in (take.wav, take.flac):
        assert GenerationRequest.parse(restored(file)) == request


def sections_of(value: Any, **settings: Any) -> tuple[tuple[float, str], ...]:
    return GenerationRequest.parse({"sections": value, **settings}).sections


def restored(file: Path) -> dict:
    held = takes.read_settings(file)
    return {name: held[name] for name in GenerationRequest().settings()}


def test_the_longest_words_go_with_the_take(tmp_path):
    sections = tuple((i / 10, "🎹" * 120) for i in range(50))
    request = GenerationRequest("🎹" * 2000, "🎹" * 2000, sections=sections, seed=1)
    take = takes.save(takes.Finished(0, noise(0.5), request, 0.0, 1.0), tmp_path)
    for file in (take.wav, take.flac):
        assert GenerationRequest.parse(restored(file)) == request


@pytest.mark.parametrize(
    ("key", "says"), [("H dur", "not “H dur”"), ("C", "like C minor"), ("x" * 30, "30 characters")]
)
def test_keys_are_those_of_the_list(key, says):
    with pytest.raises(RequestError, match=says):
        GenerationRequest.parse({"key": key})


def test_the_change_is_heard_from_its_frame_on_and_nothing_is_taken_in_again(folder, batch):
    """Against transformers' decoder, whose cross-attention is given other states at that frame."""
    request = GenerationRequest(ROCK, sections=SECTIONS, duration_s=1.0, do_sample=False)
    windows, _, _ = run(batch, request)
    codes = windows[0]
    assert torch.equal(codes, switched(folder, request, frames=50))
    plain = run(batch, dataclasses.replace(request, sections=()))[0][0]
    assert torch.equal(codes[0, :15], plain[0, :15])
    assert not torch.equal(codes[0, 15:30], plain[0, 15:30])


def test_a_section_that_begins_with_the_piece_is_its_prompt(batch):
    settings = {"duration_s": 0.6, "seed": 3}
    whole_piece = GenerationRequest("rock, slow piano", **settings)
    section = GenerationRequest("rock", sections=[(0, "slow piano")], **settings)
    assert torch.equal(run(batch, section)[0][0], run(batch, whole_piece)[0][0])


def test_a_section_without_words_beside_one_with_them_is_guided_where_there_are_any(batch):
    """The rows of a job are the same in all of its sections."""
    request = GenerationRequest("", sections=[(0.3, PIANO)], duration_s=0.6, do_sample=False)
    codes = run(batch, request)[0][0]
    alone = run(batch, GenerationRequest("", duration_s=0.6, do_sample=False))[0][0]
    assert torch.equal(codes[0, :15], alone[0, :15])
    assert not torch.equal(codes, alone)


def test_sections_of_a_long_piece_and_neighbours_that_change_too(batch, monkeypatch):
    """Each row hears its own words, in whatever window a change falls."""
    monkeypatch.setattr(code_window, "WINDOW_S", 1.6)
    sections = [(0.7, PIANO), (1.6, "fast drums"), (1.98, "")]  # the second begins with a window
    request = GenerationRequest(ROCK, sections=sections, duration_s=2.8, overlap_s=1, seed=4)
    alone = whole(run(batch, request)[0])
    events: list = []
    other = GenerationRequest(PIANO, sections=[(0.5, ROCK)], duration_s=1.0, seed=9)
    submit(batch, other, events.append)
    for _ in range(9):
        batch.step()
    submit(batch, request, events.append)
    batch.step()
    beside = next(job for job in batch.running if job.request.seed == 4)
    windows = {}
    while batch.running:
        batch.step()
        windows[beside.window.start] = codes_of(beside)
    assert torch.equal(whole(windows), alone)


def test_sections_count_from_the_end_of_the_audio_prompt(batch):
    clip = noise(0.5, batch.codec.channels)
    request = GenerationRequest(
        ROCK, audio_prompt=clip, sections=[(0.3, PIANO)], duration_s=0.6, do_sample=False
    )
    codes = run(batch, request)[0][0][0]
    plain = run(batch, dataclasses.replace(request, sections=()))[0][0][0]
    assert torch.equal(codes[: 25 + 15], plain[: 25 + 15])
    assert not torch.equal(codes[25 + 15 :], plain[25 + 15 :])
