"""A take that goes on from codes made elsewhere is the take that one machine makes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from musicgen_ui.engine import code_window
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.protocol import Chunk, Failed, Finished
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import ROCK, noise
from tests.helpers.melody import melody_batch

WINDOW, OVERLAP = 100, 50  # frames: short windows show what long ones do


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_window, "WINDOW_S", WINDOW / 50)


def piece(**settings: object) -> GenerationRequest:
    values = {"prompt": ROCK, "duration_s": 4.0, "overlap_s": OVERLAP / 50, "seed": 7}
    return GenerationRequest(**values | {"do_sample": False} | settings)


def play(
    scheduler: Scheduler, request: GenerationRequest, made: Mapping[int, np.ndarray] | None = None
) -> tuple[Finished, list[Chunk]]:
    """The take and the chunks of a job."""
    job = LoggedJob(request, made={} if made is None else made)
    scheduler.add(job, scheduler.encode(job.request))
    events = list(job.follow(poll=scheduler.poll))
    assert not isinstance(events[-1], Failed), events[-1]
    assert isinstance(events[-1], Finished)
    return events[-1], [event for event in events if isinstance(event, Chunk)]


PIECES = {
    "greedy": piece(),
    "sampled": piece(do_sample=True),
    "prompted": piece(audio_prompt=noise(0.6), duration_s=2.5),
    "sections": piece(sections=((0.9, "slow piano"), (2.5, "drums"))),
}


# In the middle, at a change of the text, at the end of a window, in the next one, in the last one.
@pytest.mark.parametrize("kind", PIECES)
def test_resumed_take_is_the_undisturbed_one(batch, kind):
    whole, chunks = play(batch, PIECES[kind])
    new = whole.codes[:, whole.context_frames :]
    sent = np.concatenate([chunk.clip.codes for chunk in chunks], axis=1)
    assert np.array_equal(sent, new)
    for frames in (40, 45, 100, 101, 124, new.shape[1]):
        resumed, again = play(batch, PIECES[kind], {0: new[:, :frames]})
        assert np.array_equal(resumed.codes, whole.codes), frames
        assert np.allclose(resumed.clip.samples, whole.clip.samples, atol=1e-4)
        assert again[0].start_sample == 0 and again[0].clip.codes.shape[1] >= frames
        assert not resumed.stopped and not batch.busy


@pytest.mark.parametrize("melody", ["tiny_melody", "tiny_stereo_melody"])
def test_resumed_take_follows_its_melody(request, melody):
    scheduler = melody_batch(request.getfixturevalue(melody))
    asked = piece(melody=noise(3.0), sections=((1.5, "drums"),))
    whole, _ = play(scheduler, asked)
    resumed, _ = play(scheduler, asked, {0: whole.codes[:, :130]})
    assert np.array_equal(resumed.codes, whole.codes)


def test_steps_of_made_codes_are_not_taken_again(batch):
    whole, _ = play(batch, piece())
    steps, step = [], batch.stepper.step
    batch.stepper.step = lambda jobs: (steps.append(1), step(jobs))
    try:
        play(batch, piece(), {0: whole.codes[:, :190]})
    finally:
        batch.stepper.step = step
    assert len(steps) < 20


def test_job_that_stays_here_sends_no_codes(batch):
    job = batch.submit(piece())
    events = list(job.follow(poll=batch.poll))
    assert not any(e.clip.codes is not None for e in events if isinstance(e, Chunk))
