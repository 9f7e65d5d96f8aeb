"""The best of several variations, and takes that are drawn again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from musicgen_ui import takes as take_files
from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.admission import Saved
from musicgen_ui.backends.clap import Clap
from musicgen_ui.backends.ranking import Ranking
from musicgen_ui.engine.protocol import Chunk, Event, Finished, Progress
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.ui.handlers import summary
from tests.helpers.fakes import FakeBackend
from tests.helpers.jobs import made, takes


class Faulty(FakeBackend):
    """Music that moves, but by seed: silent and stuck ones."""

    def __init__(self, silent: Iterable[int] = (), stuck: Iterable[int] = ()) -> None:
        super().__init__()
        self.silent, self.stuck = set(silent), set(stuck)

    def _music(self, request: GenerationRequest) -> np.ndarray:
        t = np.arange(round(request.duration_s * self.sampling_rate)) / self.sampling_rate
        if request.seed in self.silent:
            return np.zeros((1, len(t)), np.float32)
        steps = 0 * t if request.seed in self.stuck else np.floor(4 * t) * 3 % 11
        decay = 1 if request.seed in self.stuck else np.exp(-6 * (t % 0.25))
        return (0.3 * np.sin(1_400 * 2 ** (steps / 12) * t) * decay)[None].astype(np.float32)

    def _finished(self, request, index, made_s, speed) -> Finished:
        finished = super()._finished(request, index, made_s, speed)
        named = dataclasses.replace(finished.request, checkpoint=request.checkpoint)
        return dataclasses.replace(finished, request=named)

    def describe(self, checkpoint: str, adapter: str = ""):
        return super().describe("auto" if "bundled" in checkpoint else checkpoint, adapter)


class Judge(Clap):
    """CLAP that likes takes by their loudness; or cannot be had."""

    def __init__(self, there: bool = True) -> None:
        super().__init__()
        self.there, self.asked = there, list[str]()

    def load(self, report) -> None:
        report("downloading")
        if not self.there:
            raise RequestError("There is no network.")

    def similarity(self, words: str, clips: list[Clip]) -> list[float]:
        self.asked.append(words)
        return [0.1 * i for i in range(len(clips))]


REQUEST = GenerationRequest("techno", duration_s=2.0, seed=10, variations=4, keep=2)


def seeds(events: list[Event]) -> list[int]:
    return [take.request.seed for take in takes(events)]


@pytest.mark.parametrize("keep", [0, 1])
def test_job_and_takes_have_one_drawn_seed(keep):
    request = GenerationRequest("techno", duration_s=1.0, checkpoint="bundled", keep=keep)
    job = Ranking(Faulty()).submit(request)
    (take,) = takes(list(job.follow()))
    assert take.request.seed == job.request.seed >= 0


def test_jobs_queue_in_the_order_of_their_calls(monkeypatch):
    backend, submitted = Faulty(), list[str]()
    backend.max_jobs, submit = 20, backend.submit
    monkeypatch.setattr(backend, "submit", lambda r, c: submitted.append(r.prompt) or submit(r, c))
    ranking = Ranking(backend)
    prompts = [str(number) for number in range(20)]
    for number, prompt in enumerate(prompts):
        ranking.submit(dataclasses.replace(REQUEST, prompt=prompt, keep=number % 2))
    assert submitted == prompts


def test_best_takes_are_kept_and_scored():
    backend = Faulty(silent=[10], stuck=[12])
    events = made(Ranking(backend), REQUEST)
    assert seeds(events) == [11, 13] and backend.requests[0].keep == 0
    first, second = takes(events)
    assert first.score >= second.score > 0.9
    assert first.notes[-1].startswith("Number 1 of 4 by score, ")
    assert {event.variation for event in events if isinstance(event, Chunk)} == {0, 1, 2, 3}


def test_faulty_takes_rank_by_how_bad_they_are():
    events = made(Ranking(Faulty(silent=[10], stuck=[11])), dataclasses.replace(REQUEST, keep=4))
    assert seeds(events)[:2] == [12, 13] and takes(events)[3].score < 0.2
    assert any("silent" in take.notes[-1] for take in takes(events)[2:])


def test_clap_ranks_where_it_is_asked_for():
    judge = Judge()
    request = dataclasses.replace(REQUEST, rank_by_prompt=True)
    events = made(Ranking(Faulty(silent=[13]), judge), request)
    assert judge.asked == ["techno"] and seeds(events) == [12, 11]  # the last one is silent
    assert takes(events)[0].score == pytest.approx(0.2, abs=0.02)
    assert "fit to the prompt 0.20" in takes(events)[0].notes[-1]
    made(Ranking(Faulty(), judge), REQUEST)
    assert len(judge.asked) == 1


def test_without_clap_faults_rank_and_the_takes_say_so():
    request = dataclasses.replace(REQUEST, rank_by_prompt=True)
    events = made(Ranking(Faulty(silent=[10]), Judge(there=False)), request)
    assert seeds(events) == [11, 12]
    assert "faults alone rank. There is no network." in takes(events)[0].notes[-1]
    wordless = made(Ranking(Faulty(), Judge()), dataclasses.replace(request, prompt=""))
    assert takes(wordless)[0].notes[-1] == "There are no words to rank by: faults alone rank."


def test_a_stopped_job_keeps_the_best_of_what_there_is():
    backend = Faulty(silent=[10])
    backend.speed = 2.0
    job = Ranking(backend).submit(REQUEST)
    events = []
    for event in job.follow():
        events.append(event)
        if isinstance(event, Chunk):
            job.stop()
    found = takes(events)
    assert [take.request.seed for take in found] == [11, 12] and found[0].stopped
    assert job.ended and 0 < found[0].clip.duration_s < 2


def test_a_failure_is_passed_on():
    backend = Faulty()
    backend.failure = RequestError("The disk is full.")
    with pytest.raises(RequestError, match="disk is full"):
        made(Ranking(backend), REQUEST)


def test_bundled_takes_are_drawn_again_with_the_next_seed():
    request = dataclasses.replace(REQUEST, checkpoint="bundled", keep=0, variations=3)
    backend = Faulty(silent=[10], stuck=[12, 13])
    events = made(Ranking(backend), request)
    found = {take.variation: take for take in takes(events)}
    # 13 and 14 take the places of 10 and 12; 13 is stuck too, so 15 takes its place.
    assert {v: take.request.seed for v, take in found.items()} == {0: 15, 1: 11, 2: 14}
    assert "The take of seed 12 was stuck on one sound, so seed 14 was drawn" in found[2].notes[-1]
    assert {v for v, take in found.items() if take.redrawn} == {0, 2}
    assert not found[1].notes and not any(
        isinstance(e, Progress) and e.variation > 2 for e in events
    )
    again = takes(made(Ranking(Faulty(silent=[10], stuck=[12, 13])), request))
    assert {t.variation: t.request.seed for t in again} == {0: 15, 1: 11, 2: 14}


def test_takes_that_stay_unusable_come_with_advice():
    request = dataclasses.replace(REQUEST, checkpoint="bundled", keep=0, variations=1)
    (take,) = takes(made(Ranking(Faulty(silent=range(99))), request))
    assert take.request.seed == 12 and "silent: try another seed" in take.notes[-1]


@pytest.mark.parametrize("change", [{"checkpoint": "mono"}, {"do_sample": False}])
def test_other_checkpoints_and_greedy_takes_stay_as_they_are(change):
    request = dataclasses.replace(REQUEST, checkpoint="bundled", keep=0)
    events = made(Ranking(Faulty(silent=[10])), dataclasses.replace(request, **change))
    assert sorted(seeds(events)) == [10, 11, 12, 13] and not takes(events)[0].notes


def test_score_is_in_the_takes_settings(tmp_path: Path):
    best = takes(made(Ranking(Faulty(silent=[10])), REQUEST))[0]
    kept = take_files.save(best, tmp_path)
    settings = take_files.read_settings(kept.flac)
    assert settings["score"] == best.score and settings["keep"] == 0 and settings["seed"] == 11


def test_scores_are_in_the_apis_answer(tmp_path: Path):
    best = takes(made(Ranking(Faulty(silent=[10])), REQUEST))
    saved = [
        Saved(**vars(take), take=take_files.save(take, tmp_path))
        for take in (*best, dataclasses.replace(best[0], score=None))
    ]
    listed = summary(saved)["takes"]
    assert [take.get("score") for take in listed] == [best[0].score, best[1].score, None]
    assert [take["seed"] for take in listed[:2]] == seeds(best)
