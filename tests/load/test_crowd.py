"""Many at once: everybody is answered, in order, with their own music, and told the truth."""

from __future__ import annotations

import itertools
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import handle_file

from tests.helpers.visits import Job, Server, Visit, client_of, server, submit, tone

WAITING = re.compile(r"(?:place (\d+)|you are next)(?:, about (\d+) (s|min))?")
BETWEEN_S = 0.12  # two arrivals
CROWD = 32  # clients
LATE_S = 0.5  # until a client has heard what it was told
SAME_S = 0.1  # closer events are one: the journal rounds, and a step admits one job


def request(number: int, folder: Path, scale: float) -> dict[str, Any]:
    """Settings that no other client has; a fourth continue a clip, a fifth are greedy."""
    asked = {
        "prompt": f"client {number} " + ("techno", "slow piano", "80s rock", "funk")[number % 4],
        "seed": 1000 + 10 * number,
        "duration_s": round(scale * (1.0 + 0.5 * (number % 4)) + 0.02 * number, 2),
        "guidance_scale": 1.0 + number % 4,
        "top_k": 50 + number,
        "do_sample": number % 5 != 4,
        "checkpoint": "bundled",
        "variations": 2 if number % 8 == 3 else 1,
    }
    if number % 4 == 1:
        asked["audio_prompt"] = handle_file(tone(folder / f"{number}.wav", 200 + 40 * number))
    return asked


def crowd(server: Server, count: int, folder: Path, scale: float) -> list[Visit]:
    """`count` clients, one after the other but at once."""
    with ThreadPoolExecutor(4) as pool:
        clients = list(pool.map(lambda _: client_of(server), range(count)))
    for number in greedy_one(count):
        clients[number] = clients[greedy_one(count)[0]]
    with ThreadPoolExecutor(count) as pool:
        visits = []
        for number, client in enumerate(clients):
            leaves_s = 1.5 if number % 11 == 7 else None
            asked = request(number, folder, scale)
            visits.append(pool.submit(submit, client, asked, leaves_s))
            time.sleep(BETWEEN_S)
        return [visit.result() for visit in visits]


def by_client(jobs: list[Job]) -> dict[int, Job]:
    """The jobs by their clients' numbers, which their prompts tell."""
    return {int(job.values["prompt"].split()[1]): job for job in jobs}


def greedy_one(count: int) -> range:
    """The clients that are one visitor, who asks three times in a row."""
    return range(count // 3, count // 3 + 3)


def further(jobs: dict[int, Job], count: int) -> list[int]:
    """That visitor's jobs but for the one that started first."""
    own = [number for number in greedy_one(count) if number in jobs]
    return sorted(own, key=lambda number: jobs[number].started or math.inf)[1:]


def check_order(jobs: dict[int, Job], count: int) -> None:
    """Nobody was overtaken by a later visitor, but for what one visitor asked for beside."""
    starting = {number: job for number, job in jobs.items() if job.started}
    later_ones = further(jobs, count)
    for early in (job for number, job in starting.items() if number not in later_ones):
        for number, late in starting.items():
            if late.arrived > early.arrived + SAME_S:
                assert late.started > early.started - SAME_S, (number, late, early)


def check_turns(jobs: dict[int, Job], count: int) -> None:
    """Between two jobs of one visitor starts one of those who waited meanwhile."""
    many = greedy_one(count)
    order = sorted((job.started, number) for number, job in jobs.items() if job.started)
    own = [(start, number) for start, number in order if number in many]
    for (first_s, _), (second_s, number) in itertools.pairwise(own):
        if jobs[number].arrived > first_s - SAME_S:
            continue  # it came when the first had begun
        between = [other for start, other in order if first_s < start < second_s]
        waited = [
            other
            for start, other in order
            if other not in many and jobs[other].arrived < first_s - SAME_S and start > second_s
        ]
        assert between or not waited, (own, waited, order)


def errors_of_waits(visits: dict[int, Visit], jobs: dict[int, Job], since: float) -> list[float]:
    """How far the waits that were told are from those that came, as shares; short ones aside."""
    found = []
    for number, visit in visits.items():
        started = jobs[number].started
        for at, status in visit.told if started else ():
            match = WAITING.search(status)
            if match and match[2] and at > since and started - at > 2:
                told_s = float(match[2]) * (60 if match[3] == "min" else 1)
                found.append(told_s / (started - at) - 1)
    return found


def errors_of_places(visits: dict[int, Visit], jobs: dict[int, Job], since: float) -> list[int]:
    """How far the places that were told are from the count of takes that started before.

    A click's further takes start when it is their turn, which the journal does not tell: the
    count is between that without them and that with all of them.
    """
    later_ones = further(jobs, CROWD)
    rows = [(job, int(job.values["takes"])) for job in jobs.values() if job.started]
    found = []
    for number, visit in visits.items():
        if number in later_ones or not (started := jobs[number].started):
            continue  # a visitor's further jobs let later visitors go first
        for at, status in visit.told:
            match = WAITING.search(status)
            if match and at > since and started > at:
                place = int(match[1] or 1)
                least = sum(at < job.started <= started for job, _ in rows)
                most = sum(n for job, n in rows if at - LATE_S < job.started <= started)
                most += sum(n - 1 for job, n in rows if job.started <= at - LATE_S < job.ended)
                found.append(min(place - least, 0) or max(place - most, 0))
    return found


def check_content(server: Server, visits: list[Visit], every: int) -> None:
    """Each take is its client's own: its settings, its clip, its music as if it were alone."""
    taken = [visit for visit in visits if visit.take]
    for visit in taken:
        samples, settings = visit.take
        asked = {n: v for n, v in visit.asked.items() if n not in ("audio_prompt", "variations")}
        assert {name: settings[name] for name in asked} == asked
        prompt_s = 1.0 if "audio_prompt" in visit.asked else 0.0
        assert len(samples) == prompt_s * 16_000 + round(asked["duration_s"] * 50) * 320
        if prompt_s:  # it begins with the client's own tone
            spectrum = np.abs(np.fft.rfft(samples[:14_000, 0]))
            number = (asked["seed"] - 1000) // 10
            assert np.argmax(spectrum) * 16_000 / 14_000 == pytest.approx(200 + 40 * number, abs=3)
    distinct = {samples.tobytes() for samples, _ in (visit.take for visit in taken)}
    assert len(distinct) == len(taken)
    client = client_of(server)
    for visit in taken[::every]:
        alone = submit(client, visit.asked)
        assert alone.take, alone.error
        difference = alone.take[0].astype(int) - visit.take[0]
        assert np.abs(difference).max() <= 3, visit.asked


def test_a_few_at_once_are_served(few_places: Server, tmp_path: Path) -> None:
    serve_crowd(few_places, tmp_path, count=8, scale=1.0, every=3)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_crowd_is_served(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    with server(tmp_path / "server", "--queue-length", "28") as running:
        visits, jobs = serve_crowd(running, tmp_path, count=CROWD, scale=5.0, every=4)
    waits, places = told_truly(visits, jobs)
    assert len(waits) >= 20 and np.mean(np.abs(waits) < 0.3) > 0.9
    assert np.mean(np.array(places) == 0) > 0.95


def serve_crowd(
    server: Server, folder: Path, count: int, scale: float, every: int
) -> tuple[dict[int, Visit], dict[int, Job]]:
    submit(client_of(server), {"duration_s": 0.5})  # what is compiled once is
    earlier = len(server.jobs)
    visits = crowd(server, count, folder, scale)
    server.settle()
    jobs = by_client(server.jobs[earlier:])
    missing = [visit for number, visit in enumerate(visits) if number not in jobs]
    assert all(visit.cancelled for visit in missing), missing  # before the server began with it
    errors = [visit.error for visit in visits if not visit.ended_well]
    assert not errors, errors
    assert sum(bool(visit.take) for visit in visits) >= 3
    assert any("queue is full" in visit.error for visit in visits)
    check_order(jobs, count)
    check_turns(jobs, count)
    check_content(server, visits, every)
    return {number: visits[number] for number in jobs}, jobs


def told_truly(visits: dict[int, Visit], jobs: dict[int, Job]) -> tuple[list[float], list[int]]:
    """How far off waits and places were after the last one had left, which nobody can foresee."""
    left = [job.ended for job in jobs.values() if job.values["outcome"] == "closed"]
    waits = errors_of_waits(visits, jobs, max(left, default=0.0))
    places = errors_of_places(visits, jobs, max(left, default=0.0))
    outcomes = sorted(job.values["outcome"] for job in jobs.values())
    wrong = sum(place != 0 for place in places)
    low, middle, high = np.quantile(waits or 0, (0.05, 0.5, 0.95))
    print({name: outcomes.count(name) for name in set(outcomes)})
    span = f"{middle:+.0%} in the middle, 90 % by {low:+.0%} to {high:+.0%}"
    print(f"{len(waits)} waits told: off by {span}")
    print(f"{len(places)} places told, {wrong} of them wrong")
    return waits, places
