"""Live pieces: changes act at frames, recordings can be made again, and nothing runs away."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import numpy as np
import pytest
import torch

from musicgen_ui.engine import job as jobs
from musicgen_ui.engine import live, sampling
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.live import Draws, LiveVariation
from musicgen_ui.engine.protocol import Chunk, Failed, Finished, Progress, Recorded
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest, steering
from musicgen_ui.steering import Steering
from tests.helpers.by_hand import steered
from tests.helpers.engine import PIANO, ROCK, make_batch, noise
from tests.helpers.melody import SCALE, melody_batch
from tests.helpers.style import style_batch

MIX = Steering(prompts=((ROCK, 0.25), (PIANO, 0.75)))
RATE = 32_000


def begin(batch: Scheduler, **values: Any) -> tuple[LoggedJob, LiveVariation]:
    request = GenerationRequest(**{"prompt": ROCK, "seed": 3, "live": True} | values)
    job = batch.submit(request)
    batch.step()
    (variation,) = batch.running
    assert isinstance(variation, LiveVariation)
    return job, variation


def listen(batch: Scheduler, job: LoggedJob, until_s: float, step_s: float = 0.1) -> None:
    """Steps as far as a listener hears that much."""
    at = job.listener.samples
    while at < until_s * RATE:
        at += round(step_s * RATE)
        job.played(at)
        job.listener._moving = False  # no clock in tests
        for _ in range(40):
            batch.step()


def music(job: LoggedJob) -> np.ndarray:
    chunks = [e.clip.samples for e in job.log.so_far() if isinstance(e, Chunk)]
    return np.concatenate(chunks, axis=1)


def recorded(batch: Scheduler, job: LoggedJob, start_s: float, end_s: float) -> Finished:
    job.record_stretch(start_s, end_s)
    batch.step()
    return [e for e in job.log.so_far() if isinstance(e, Recorded)][-1].take


def made_again(batch: Scheduler, take: Finished) -> Finished:
    """The take of the settings of another one, as its file holds them."""
    settings = json.loads(json.dumps(take.request.settings()))
    names = {"checkpoint": "auto"}
    job = batch.submit(GenerationRequest.parse(settings | names))
    while batch.step():
        pass
    (again,) = [e for e in job.log.so_far() if isinstance(e, Finished)]
    assert not again.stopped
    return again


def end(batch: Scheduler, job: LoggedJob) -> None:
    job.stop()
    while batch.step():
        pass
    assert job.ended


def test_draws_are_those_of_the_whole_piece():
    whole = sampling.uniforms(7, 400, 4)
    draws = Draws(7, 4)
    for first, count in ((0, 103), (100, 103), (150, 20), (297, 103)):
        assert torch.equal(draws.rows(first, count), whole[first : first + count])


def test_steered_columns_equal_transformers_stepped_by_hand(folder, batch):
    job, variation = begin(batch, do_sample=False)
    script = {
        0: (((ROCK, 1.0),), 3.0),
        9: (MIX.prompts, 3.0),
        14: (((PIANO, 1.0),), 1.0),
        21: (((ROCK, 0.5), ("fast drums", 0.5)), 5.0),
    }
    while variation.window.written < 30:
        if variation.window.written in script:
            prompts, scale = script.pop(variation.window.written)
            job.steer(Steering(prompts=prompts, guidance_scale=scale))
        batch.step()
    columns = variation.window.columns[:, :31].clone()
    script = {round(at_s * 50): change for at_s, change in variation.automation}
    by_hand = {f: (c.prompts, c.guidance_scale) for f, c in script.items()}
    by_hand.setdefault(0, (((ROCK, 1.0),), 3.0))
    assert sorted(by_hand) == [0, 9, 14, 21]
    assert torch.equal(columns, steered(folder, batch, by_hand, 40)[:, :31])
    end(batch, job)


CHANGES = {
    0.3: MIX,
    0.9: Steering(temperature=0.5, top_k=20),
    1.1: Steering(store=2),
    1.3: Steering(prompts=((PIANO, 1.0),), guidance_scale=1.0),
    2.4: Steering(recall=2),
    2.42: Steering(guidance_scale=4.0),
    3.1: Steering(prompts=((ROCK, 0.5), ("fast drums", 0.5))),
}


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_recording_made_again_is_the_same(tiny_mono, precision):
    """Over several windows, with mixes, a memory slot and a beginning within the piece."""
    batch = make_batch(tiny_mono, precision=precision, window_s=1.6)
    again_on = make_batch(tiny_mono, precision=precision, window_s=1.6)
    job, variation = begin(batch, overlap_s=20)  # 1.07 s of such a window
    for at_s, change in CHANGES.items():
        listen(batch, job, at_s)
        job.steer(change)
    listen(batch, job, 5)
    assert len(variation.automation) == len(CHANGES)
    for start_s, end_s in ((0, 4.4), (1.5, 3.7)):
        take = recorded(batch, job, start_s, end_s)
        heard = music(job)[:, round(start_s * RATE) : round(end_s * RATE)]
        assert np.array_equal(take.clip.samples, heard)
        again = made_again(again_on, take)
        assert np.array_equal(again.clip.samples, heard)
        assert np.array_equal(again.codes, take.codes)
        assert take.codes.shape == (4, round((end_s - start_s) * 50))
    plain = made_again(again_on, dataclasses.replace(take, request=GenerationRequest(ROCK, seed=3)))
    assert not np.array_equal(plain.clip.samples[:, : heard.shape[1]], heard)
    end(batch, job)
    (last,) = [e for e in job.log.so_far() if isinstance(e, Finished)]
    assert not last.clip.samples.size  # nobody recorded it


def test_a_melody_checkpoint_is_steered_too(tiny_melody):
    batch, again_on = melody_batch(tiny_melody), melody_batch(tiny_melody)
    job, _ = begin(batch, melody=SCALE)
    for at_s in (0.2, 0.6):
        listen(batch, job, at_s)
        job.steer(MIX if at_s == 0.2 else Steering(guidance_scale=1.0))
    listen(batch, job, 2)
    take = recorded(batch, job, 0, 1.6)
    job_again = again_on.submit(dataclasses.replace(take.request, melody=SCALE))
    while again_on.step():
        pass
    (again,) = [e for e in job_again.log.so_far() if isinstance(e, Finished)]
    assert np.array_equal(again.clip.samples, take.clip.samples)
    end(batch, job)


def test_a_style_checkpoint_is_steered_too(tiny_style):
    """Its prompts change, its style stays; words are missed where there is no style clip."""
    batch, again_on = style_batch(tiny_style), style_batch(tiny_style)
    clip = noise(3.5, seed=5)
    job, variation = begin(batch, style=clip)
    for at_s in (0.2, 0.6):
        listen(batch, job, at_s)
        job.steer(MIX if at_s == 0.2 else Steering(prompts=(("", 1.0),)))
    listen(batch, job, 2)
    take = recorded(batch, job, 0, 1.6)
    assert [change.prompts for _, change in take.request.automation] == [MIX.prompts, (("", 1.0),)]
    end(batch, job)

    def again(request: GenerationRequest) -> np.ndarray:
        job = again_on.submit(request)
        while again_on.step():
            pass
        (made,) = [e for e in job.log.so_far() if isinstance(e, Finished)]
        return made.clip.samples

    assert np.array_equal(again(dataclasses.replace(take.request, style=clip)), take.clip.samples)
    other = dataclasses.replace(take.request, style=noise(3.5, seed=6))
    assert not np.array_equal(again(other), take.clip.samples)

    job, variation = begin(batch, prompt="", automation=((0.0, Steering(prompts=((ROCK, 1.0),))),))
    job.steer(Steering(prompts=(("", 1.0),)))
    listen(batch, job, 0.5)
    assert variation.note.startswith("Without a style clip this checkpoint needs words")
    assert [change.prompts for _, change in variation.automation] == [((ROCK, 1.0),)]
    end(batch, job)


def test_no_more_is_made_than_the_look_ahead(tiny_mono):
    batch = make_batch(tiny_mono)
    job, variation = begin(batch)
    for heard_s in (0.0, 0.5, 3.0):
        job.played(round(heard_s * RATE))
        job.listener._moving = False
        for _ in range(200):
            batch.step()
        assert batch.idles
        made_s = variation.window.frames_done / 50
        assert made_s == pytest.approx(heard_s + live.LOOK_AHEAD_S, abs=0.021)
        assert music(job).shape[1] / RATE - heard_s > live.LOOK_AHEAD_S - 0.3
    frame = variation.window.frames_done
    job.steer(MIX)
    job.played(round(3.1 * RATE), underruns=2)
    batch.step()
    ((at_s, _),) = variation.automation
    assert at_s * 50 <= frame + 3  # the next frame: its last codebook is written three steps later
    time.sleep(0.3)
    batch.step()
    progress = [e for e in job.log.so_far() if isinstance(e, Progress)][-1]
    assert progress.underruns == 2 and progress.work_ms > 0
    assert 0 < progress.ahead_s <= live.LOOK_AHEAD_S
    end(batch, job)


def test_others_run_while_a_live_piece_waits(tiny_mono):
    batch = make_batch(tiny_mono, max_jobs=2)
    job, _ = begin(batch)
    refused = batch.submit(GenerationRequest(live=True))
    other = batch.submit(GenerationRequest(PIANO, duration_s=2, seed=1))
    while not other.ended:
        batch.step()
    (failed,) = refused.log.so_far()
    assert isinstance(failed, Failed) and "Too many live pieces" in str(failed.error)
    assert isinstance(other.log.so_far()[-1], Finished) and not job.ended
    end(batch, job)


def test_memory_of_an_endless_piece_is_bounded(tiny_mono, monkeypatch):
    monkeypatch.setattr(live, "KEPT_S", 2.0)
    monkeypatch.setattr(jobs, "LIVE_EVENTS", 20)
    batch = make_batch(tiny_mono, window_s=2.0)
    job, variation = begin(batch)
    held = []
    for until_s in (6, 12, 18):
        listen(batch, job, until_s, step_s=0.5)
        recorder = variation.recorder
        samples = sum(piece.nbytes for _, piece in recorder._kept)
        codes = sum(piece.nbytes for _, piece in recorder._kept_codes)
        held.append((samples + codes, len(job.log.so_far()), len(variation._draws._rows)))
    for nbytes, events, rows in held:
        assert nbytes < 3.5 * RATE * 4 and events <= 40 and rows < 110
    job.record_stretch(3, 5)
    batch.step()
    assert "can be recorded" in variation.note
    assert recorded(batch, job, 16.5, 17.5).clip.duration_s == 1.0
    end(batch, job)


def test_wrong_changes_and_recordings_are_refused(tiny_mono):
    finite = LoggedJob(GenerationRequest())
    for wrong in (lambda: finite.steer(MIX), lambda: finite.record_stretch(0, 5)):
        with pytest.raises(RequestError, match="Only a live piece"):
            wrong()
    piece = LoggedJob(GenerationRequest(live=True))
    for start_s, end_s in ((0, 0.2), (0, 301), (-1, 5)):
        with pytest.raises(RequestError, match=r"0\.5 to 300 s"):
            piece.record_stretch(start_s, end_s)
    batch = make_batch(tiny_mono)
    job = batch.submit(GenerationRequest(audio_prompt=noise(1.0), live=True))
    batch.step()
    assert "cannot continue a clip" in str(job.log.so_far()[-1].error)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "must change one or more of prompts"),
        ({"volume": 3}, "must change one or more of prompts"),
        ({"prompts": [["a", 1, 2]]}, "rows of words and a weight"),
        ({"prompts": [["a", -1]]}, "0 or more"),
        ({"prompts": [["a", 0]]}, "a weight above 0"),
        ({"prompts": [[str(n), 1] for n in range(5)]}, "at most 4"),
        ({"temperature": 9}, "Temperature must be between"),
        ({"top_k": 2.5}, "whole number"),
        ({"store": 4}, "memory slot from 1 to 3"),
    ],
)
def test_wrong_automation_is_refused(change, says):
    with pytest.raises(RequestError, match=says):
        steering(change)
    with pytest.raises(RequestError, match=says):
        GenerationRequest.parse({"automation": json.dumps([[0, change]])})


@pytest.mark.parametrize(
    "rows", ["nonsense", [[1]], [[2, {"top_k": 5}], [1, {"top_k": 5}]], [["x", {}]]]
)
def test_wrong_rows_of_automation_are_refused(rows):
    with pytest.raises(RequestError, match="Automation"):
        GenerationRequest.parse({"automation": rows})


def test_live_is_no_setting():
    with pytest.raises(RequestError, match="not a setting"):
        GenerationRequest.parse({"live": True})
    assert "live" not in GenerationRequest(live=True).settings()
