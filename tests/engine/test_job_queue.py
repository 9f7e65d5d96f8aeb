"""Which variation is next: clients in turn, none overtaken, places and waits that come true."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_ui.engine import job_queue
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.job_queue import JobQueue, Pace, starts_after
from musicgen_ui.engine.protocol import Failed, Progress
from musicgen_ui.engine.variation import Specification
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest


def specified(client: str = "", variations: int = 1, steps: int = 10) -> list[Specification]:
    job = LoggedJob(GenerationRequest(variations=variations, seed=1), client)
    return [
        Specification(job, index, job.request.variation(index), None, steps)
        for index in range(variations)
    ]


def joined(*jobs: list[Specification]) -> JobQueue:
    queue = JobQueue()
    for each in jobs:
        queue.add(each)
    queue.take_in()
    return queue


def drained(queue: JobQueue) -> list[str]:
    """The clients in the order in which their variations start."""
    return [each.job.client for each in iter(queue.pop, None)]


def reports(variations: list[Specification]) -> list[Progress]:
    """What a job was told so far."""
    return list(variations[0].job.log.so_far())


def test_clients_take_turns_in_the_order_of_arrival():
    queue = joined(specified("a", 4), specified("b"), specified("a"), specified("c", 2))
    assert drained(queue) == ["a", "b", "c", "a", "c", "a", "a", "a"]


def test_client_whose_next_one_has_no_place_keeps_its_turn():
    queue = joined(specified("a", steps=100), specified("b"), specified("c"))
    assert queue.pop(lambda each: each.steps < 100).job.client == "b"
    assert queue.pop(lambda each: each.steps > 100) is None
    assert drained(queue) == ["a", "c"]


def test_jobs_of_a_client_keep_their_order():
    first, second = specified("a", 2), specified("a")
    queue = joined(first, specified("b"), second)
    assert [each for each in iter(queue.pop, None) if each.job.client == "a"] == first + second


def test_a_job_without_a_client_is_one_of_its_own():
    first, second = specified("", 2), specified("")
    queue = joined(first, second)
    assert list(iter(queue.pop, None)) == [first[0], second[0], first[1]]


@given(st.lists(st.one_of(st.none(), st.sampled_from("abcde")), max_size=40))
def test_no_client_is_overtaken_by_a_later_one(moves):
    """Between a client's arrival and turn no later one starts; None lets one start."""
    queue, arrived = JobQueue(), defaultdict(list)
    ring: list[str] = []
    for move in moves:
        if move is None:
            found = queue.pop()
            assert (found is None) == (not ring)
            if found:
                client = found.job.client
                assert ring.pop(0) == client
                arrived[client].pop()
                ring += [client] if arrived[client] else []
            continue
        queue.add(specified(move))
        queue.take_in()
        ring += [] if arrived[move] else [move]
        arrived[move].append(1)
    assert [each.job.client for each in queue.waiting()] == drained(queue)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(job_queue.time, "monotonic", lambda: self.now_s)


def test_a_queue_that_shortens_reports_new_places_in_a_second(monkeypatch):
    clock = Clock(monkeypatch)
    failed, stopped, last = specified("a", 2), specified("b"), specified("c")
    queue = joined(failed, stopped, last)
    queue.report((), [0])
    assert reports(last)[-1].place == 3
    failed[0].job.log.append(Failed(RequestError("No.")))
    queue.drop_ended()
    clock.now_s += 1
    queue.report((), [0])
    assert reports(last)[-1].place == 2
    stopped[0].job.stopping.set()
    assert queue.pop_stopped() == stopped
    clock.now_s += 1
    queue.report((), [0])
    assert reports(last)[-1].place == 1 and len(queue) == 1


def test_a_new_job_learns_its_place_at_once_and_alone(monkeypatch):
    Clock(monkeypatch)
    first, second = specified("a"), specified("b")
    queue = joined(first)
    queue.report((), [9])
    queue.add(second)
    queue.take_in()
    queue.report((), [8])
    queue.report((), [7])
    assert [p.place for p in reports(first)] == [1] and [p.place for p in reports(second)] == [2]


def test_places_count_variations_and_running_jobs_get_none():
    many, other, later = specified("a", 3), specified("b"), specified("a")
    queue = joined(many, other, later)
    queue.pop()
    queue.report([many[0].job], [0])
    assert not reports(many)
    assert reports(other)[-1].place == 1  # it is b's turn, then twice a's
    assert reports(later)[-1].place == 4


def test_starts_follow_from_the_steps_left_in_each_place():
    assert starts_after([30, 10], [5, 5, 100, 1]) == [10, 15, 20, 30]


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=4), st.lists(st.integers(1, 50), max_size=8)
)
def test_starts_are_those_of_a_step_by_step_run(left, waiting):
    places, queue, starts = list(left), list(waiting), []
    for step in range(1000):
        for index, steps in enumerate(places):
            while not steps and queue:
                starts.append(step)
                steps = places[index] = queue.pop(0)
        places = [max(0, steps - 1) for steps in places]
    assert starts_after(left, waiting) == starts


def test_the_wait_is_the_steps_before_at_the_last_pace(monkeypatch):
    clock, last = Clock(monkeypatch), specified("b")
    queue = joined(specified("a", steps=100), last)
    queue.report((), [50, 80])
    assert reports(last)[-1].wait_s == 0  # no pace is known yet
    for _ in range(30):
        clock.now_s += 0.2
        queue.stepped()
    queue.report((), [50, 80])
    assert reports(last)[-1].wait_s == pytest.approx(80 * 0.2)
    count = len(reports(last))
    queue.report((), [49, 79])
    assert len(reports(last)) == count  # not with every step
    clock.now_s += 1
    queue.report((), [20, 50])
    assert reports(last)[-1].wait_s == pytest.approx(50 * 0.2)


def test_steps_while_places_are_free_give_no_pace(monkeypatch):
    """A crowd that fills them is slow, and soon over."""
    clock, waiting = Clock(monkeypatch), specified()
    queue = joined(waiting)
    for seconds, left in [(1.0, [9, 0])] * 40 + [(0.2, [9, 9])] * 40:
        queue.report((), left)
        clock.now_s += seconds
        queue.stepped()
    clock.now_s += 1
    queue.report((), [10, 10])
    assert reports(waiting)[-1].wait_s == pytest.approx(10 * 0.2)


def test_the_pace_forgets_and_leaves_out_the_time_without_a_queue(monkeypatch):
    clock, pace = Clock(monkeypatch), Pace()
    for seconds, counts in [(0.2, True)] * 40 + [(1000.0, False)] + [(0.02, True)] * 200:
        clock.now_s += seconds
        pace.stepped(counts)
    assert pace.step_s == pytest.approx(0.02)


def test_one_slow_step_tells_no_pace(monkeypatch):
    """The first step beside others may compile what they share."""
    clock, pace = Clock(monkeypatch), Pace()
    for seconds in (0.0, 8.0, 0.02, 0.02):
        clock.now_s += seconds
        pace.stepped(True)
    assert pace.step_s == 0


def test_the_pace_of_a_slow_machine_is_known_too(monkeypatch):
    clock, pace = Clock(monkeypatch), Pace()
    for _ in range(40):
        clock.now_s += 2.0
        pace.stepped(True)
    assert pace.step_s == pytest.approx(2.0)
