"""Who is next: visitors in turn, nobody overtaken, places and waits that come true."""

from __future__ import annotations

import threading
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_ui.engine import job_queue as line_module
from musicgen_ui.engine.job_queue import Line, Pace, Ticket, starts_after
from musicgen_ui.engine.protocol import Progress
from musicgen_ui.request import GenerationRequest


def ticket(visitor: str = "", variations: int = 1, steps: int = 10, heard: list | None = None):
    request = GenerationRequest(variations=variations, seed=1)
    deliver = (heard if heard is not None else []).append
    return Ticket(request, threading.Event(), deliver, variations, steps, visitor)


def joined(*tickets: Ticket) -> Line:
    line = Line()
    for each in tickets:
        line.add(each)
    line.take_in()
    return line


def drained(line: Line) -> list[str]:
    """The visitors in the order in which their jobs start."""
    return [entry[0].visitor for entry in iter(line.pop, None)]


def test_visitors_take_turns_in_the_order_of_their_arrival():
    line = joined(ticket("a", 4), ticket("b"), ticket("a"), ticket("c", 2))
    assert drained(line) == ["a", "b", "c", "a", "c", "a", "a", "a"]


def test_a_visitors_own_jobs_keep_their_order():
    first, second = ticket("a", 2), ticket("a")
    line = joined(first, ticket("b"), second)
    own = [entry for entry in iter(line.pop, None) if entry[0].visitor == "a"]
    assert own == [(first, 0), (first, 1), (second, 0)]


def test_requests_without_a_name_are_visitors_of_their_own():
    first, second = ticket("", 2), ticket("")
    line = joined(first, second)
    assert [entry[0] for entry in iter(line.pop, None)] == [first, second, first]


@given(st.lists(st.one_of(st.none(), st.sampled_from("abcde")), max_size=40))
def test_nobody_is_overtaken_by_a_later_visitor(moves):
    """Between a visitor's arrival and turn, nobody who came later starts; None lets one start."""
    line, arrived = Line(), defaultdict(list)  # visitors in line, the first in front
    ring: list[str] = []
    for move in moves:
        if move is None:
            entry = line.pop()
            assert (entry is None) == (not ring)
            if entry:
                visitor = entry[0].visitor
                assert ring.pop(0) == visitor
                arrived[visitor].pop()
                ring += [visitor] if arrived[visitor] else []
            continue
        line.add(ticket(move))
        line.take_in()
        ring += [] if arrived[move] else [move]
        arrived[move].append(1)
    assert [entry[0].visitor for entry in line.entries()] == drained(line)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(line_module.time, "monotonic", lambda: self.now_s)


def test_those_who_close_or_stop_leave_and_the_places_are_told_within_a_second(monkeypatch):
    clock, heard = Clock(monkeypatch), []
    gone, stopped, last = ticket("a", 2), ticket("b"), ticket("c", heard=heard)
    line = joined(gone, stopped, last)
    line.tell((), [0])
    assert heard[-1].place == 3
    gone.close()
    line.drop_closed()
    clock.now_s += 1
    line.tell((), [0])
    assert heard[-1].place == 2
    stopped.stop.set()
    assert line.pop_stopped() == [(stopped, 0)]
    clock.now_s += 1
    line.tell((), [0])
    assert heard[-1].place == 1 and len(line) == 1


def test_who_joins_is_told_at_once_and_alone(monkeypatch):
    Clock(monkeypatch)
    heard: dict[str, list[Progress]] = defaultdict(list)
    line = joined(ticket("a", heard=heard["a"]))
    line.tell((), [9])
    line.add(ticket("b", heard=heard["b"]))
    line.take_in()
    line.tell((), [8])
    line.tell((), [7])
    assert [p.place for p in heard["a"]] == [1] and [p.place for p in heard["b"]] == [2]


def test_places_count_jobs_and_the_running_are_not_told():
    heard: dict[str, list[Progress]] = defaultdict(list)
    many = ticket("a", 3, heard=heard["a"])
    line = joined(many, ticket("b", heard=heard["b"]), ticket("a", heard=heard["second"]))
    line.pop()
    line.tell([many], [0])
    assert not heard["a"]
    assert heard["b"][-1].place == 1  # it is b's turn, then twice a's
    assert heard["second"][-1].place == 4


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


def test_the_wait_is_the_steps_before_at_the_pace_of_the_last(monkeypatch):
    clock, heard = Clock(monkeypatch), []
    line = joined(ticket("a", steps=100), ticket("b", heard=heard))
    line.tell((), [50, 80])
    assert heard[-1].wait_s == 0  # no pace is known yet
    for _ in range(30):
        clock.now_s += 0.2
        line.stepped()
    line.tell((), [50, 80])
    assert heard[-1].wait_s == pytest.approx(80 * 0.2)
    count = len(heard)
    line.tell((), [49, 79])
    assert len(heard) == count  # not with every step
    clock.now_s += 1
    line.tell((), [20, 50])
    assert heard[-1].wait_s == pytest.approx(50 * 0.2)


def test_steps_while_places_are_free_tell_no_pace(monkeypatch):
    """A crowd that fills them is slow, and soon over."""
    clock, heard = Clock(monkeypatch), []
    line = joined(ticket(heard=heard))
    for seconds, left in [(1.0, [9, 0])] * 40 + [(0.2, [9, 9])] * 40:
        line.tell((), left)
        clock.now_s += seconds
        line.stepped()
    clock.now_s += 1
    line.tell((), [10, 10])
    assert heard[-1].wait_s == pytest.approx(10 * 0.2)


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
