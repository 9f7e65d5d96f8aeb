"""A cluster and its visitors as discrete events, with the queue and the scaling rule of the app.

`python -m tests.load.simulate_cluster` prints the table of docs/scaling.md. Every visitor asks for
a take, listens to it, thinks, and asks again. A replica steps its rows together: the duration of a
step by the number of rows is what assets/bench/*.json measured, interpolated. Replicas that are
added take `START_S` until they make music.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from musicgen_ui.backends.ray_scaling import IDLE_S, desired_replicas
from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.engine.job_queue import JobQueue
from musicgen_ui.engine.variation import Specification
from musicgen_ui.request import GenerationRequest
from tests.helpers.requirements import ROOT

FRAME_RATE = 50
START_S = 60.0  # of a replica, its checkpoint included
SCALE_EVERY_S = 10.0
BEAT_S = 1.0  # until a front knows of a new replica


@dataclass(frozen=True)
class Machine:
    """Measured step times of a kind of replica."""

    name: str
    file: str
    precision: str
    rows: int

    def step_s(self) -> Callable[[int], float]:
        """The duration of a step in s by the rows that are stepped."""
        found = json.loads((ROOT / "assets" / "bench" / self.file).read_text())
        measured = {
            row["jobs"]: row["jobs"] / (row["real_time_factor"] * FRAME_RATE)
            for row in found
            if not row["peer"] and row["precision"] == self.precision and row["duration_s"] == 10
        }
        jobs = sorted(measured)
        return lambda rows: float(np.interp(rows, jobs, [measured[each] for each in jobs]))


GPU = Machine("H200, bfloat16", "h200.json", "bfloat16", 32)
CPU = Machine("2 cores of Zen 5, int8", "epyc-zen5-2-cores.json", "int8", 4)


@dataclass(eq=False)
class SimulatedReplica:
    """Its rows advance together; `left` is in frames."""

    left: dict[Specification, float] = field(default_factory=dict)
    seen_s: float = 0.0  # until when `left` holds
    version: int = 0  # events of older ones are void
    stopping: bool = False


@dataclass
class Outcome:
    """What the visitors had of it."""

    # From the click to the first step; "many" are those who ask for several takes at a time.
    by_visitor: dict[str, list[float]] = field(default_factory=dict)
    slow: int = 0  # takes that were made slower than they play
    takes: int = 0
    most_replicas: int = 0
    replica_hours: float = 0.0
    busy_hours: float = 0.0  # of them, with something to do

    def wait_s(self, percent: float) -> float:
        """Of those who ask for one take at a time."""
        one = [w for visitor, waits in self.by_visitor.items() if visitor != "many" for w in waits]
        return float(np.percentile(one, percent))

    def fairness(self) -> float:
        """Jain's index over the visitors' mean waits plus 1 s; 1 is the same for all."""
        ones = [waits for visitor, waits in self.by_visitor.items() if visitor != "many"]
        means = np.array([1 + np.mean(waits) for waits in ones])
        return float(means.sum() ** 2 / (len(means) * (means**2).sum()))


class Simulation:
    """Runs for `hours`.

    Args:
        machine: what the replicas run on.
        visitors: pages that are open.
        replicas: at the start; the number stays where `most` is 0.
        most: replicas that scaling may start.
        think_s: mean pause of a visitor after a take was played.
        greedy: visitors who ask for this many takes at a time: the first ten.
    """

    def __init__(
        self,
        machine: Machine,
        visitors: int,
        replicas: int,
        most: int = 0,
        think_s: float = 60.0,
        greedy: int = 1,
        seed: int = 0,
    ) -> None:
        self.machine, self.most, self.think_s, self.greedy = machine, most, think_s, greedy
        self.step_s = machine.step_s()
        self.speed = machine.rows / (self.step_s(machine.rows) * FRAME_RATE)
        self.random = random.Random(seed)
        self.queue, self.outcome = JobQueue(), Outcome()
        self.now, self._events, self._number = 0.0, [], count()
        self.replicas = [SimulatedReplica() for _ in range(replicas)]
        self.starting = 0
        self.open: dict[str, int] = {}  # takes of a visitor that are made or wait
        self.asked_s: dict[Specification, float] = {}
        self.began_s: dict[Specification, float] = {}
        self.few_since_s: float | None = None
        for visitor in range(visitors):
            self.at(self.random.uniform(0, 2 * think_s), self.ask, f"v{visitor}")
        if most:
            self.at(SCALE_EVERY_S, self.scale)

    def at(self, in_s: float, act: Callable, *arguments: object) -> None:
        event = (self.now + in_s, next(self._number), act, arguments)
        heapq.heappush(self._events, event)

    def run(self, hours: float) -> Outcome:
        end_s = hours * 3600
        while self._events and self._events[0][0] < end_s:
            before = self.now
            self.now, _, act, arguments = heapq.heappop(self._events)
            passed = (self.now - before) / 3600
            self.outcome.replica_hours += passed * (len(self.replicas) + self.starting)
            self.outcome.busy_hours += passed * sum(bool(r.left) for r in self.replicas)
            act(*arguments)
        return self.outcome

    def ask(self, visitor: str) -> None:
        takes = self.greedy if self.asks_many(visitor) else 1
        for _ in range(takes):
            duration_s = self.random.choice([8.0, 10.0, 15.0, 30.0])
            job = LoggedJob(GenerationRequest(seed=1, duration_s=duration_s), visitor)
            steps = round(duration_s * FRAME_RATE) + 3
            specification = Specification(job, 0, job.request, None, steps)
            self.asked_s[specification] = self.now
            self.queue.add([specification])
        self.open[visitor] = takes
        self.dispatch()

    def asks_many(self, visitor: str) -> bool:
        return self.greedy > 1 and int(visitor[1:]) < 10

    def dispatch(self) -> None:
        """As the front: while there is a free row, the replica with the fewest takes gets one."""
        self.queue.take_in()
        while True:
            free = [r for r in self.replicas if len(r.left) < self.machine.rows and not r.stopping]
            if not free or (specification := self.queue.pop()) is None:
                return
            replica = min(free, key=lambda each: len(each.left))
            self.advance(replica)
            replica.left[specification] = specification.steps
            self.began_s[specification] = self.now
            wait_s = self.now - self.asked_s.pop(specification)
            visitor = specification.job.client
            name = "many" if self.asks_many(visitor) else visitor
            self.outcome.by_visitor.setdefault(name, []).append(wait_s)
            self.expect(replica)

    def advance(self, replica: SimulatedReplica) -> None:
        """Counts the frames that were made since it was looked at."""
        if replica.left:
            frames = (self.now - replica.seen_s) / self.step_s(len(replica.left))
            replica.left = {each: left - frames for each, left in replica.left.items()}
        replica.seen_s = self.now

    def expect(self, replica: SimulatedReplica) -> None:
        """The event of its next take that ends."""
        replica.version += 1
        if replica.left:
            in_s = max(0.0, min(replica.left.values())) * self.step_s(len(replica.left))
            self.at(in_s, self.finish, replica, replica.version)

    def finish(self, replica: SimulatedReplica, version: int) -> None:
        if version != replica.version:
            return
        self.advance(replica)
        for specification in [each for each, left in replica.left.items() if left < 0.5]:
            del replica.left[specification]
            made_s = self.now - self.began_s.pop(specification)
            duration_s = specification.request.duration_s
            self.outcome.takes += 1
            self.outcome.slow += made_s > duration_s
            listens_s = max(0.0, duration_s - made_s)
            pause_s = listens_s + self.random.expovariate(1 / self.think_s)
            visitor = specification.job.client
            self.open[visitor] -= 1
            if not self.open[visitor]:
                self.at(pause_s, self.ask, visitor)
        self.expect(replica)
        if replica.stopping and not replica.left:
            self.replicas.remove(replica)
        self.dispatch()

    def scale(self) -> None:
        waiting_s = sum(each.request.duration_s for each in self.asked_s)
        busy = sum(len(replica.left) for replica in self.replicas)
        there = len(self.replicas) + self.starting
        wanted = desired_replicas(waiting_s, busy, self.machine.rows, there, self.speed)
        wanted = min(wanted, self.most)
        for _ in range(wanted - there):
            self.starting += 1
            self.at(START_S + BEAT_S, self.started)
        self.few_since_s = (self.few_since_s or self.now) if wanted < there else None
        if self.few_since_s and self.now - self.few_since_s >= IDLE_S and len(self.replicas) > 1:
            least = min(self.replicas, key=lambda replica: len(replica.left))
            least.stopping = True
            if not least.left:
                self.replicas.remove(least)
            self.few_since_s = None
        self.outcome.most_replicas = max(self.outcome.most_replicas, there)
        self.at(SCALE_EVERY_S, self.scale)

    def started(self) -> None:
        self.starting -= 1
        self.replicas.append(SimulatedReplica(seen_s=self.now))
        self.dispatch()


CASES: dict[str, dict[str, Any]] = {
    "1 GPU": {"machine": GPU, "replicas": 1},
    "2 GPUs": {"machine": GPU, "replicas": 2},
    "25 CPU replicas": {"machine": CPU, "replicas": 25},
    "50 CPU replicas": {"machine": CPU, "replicas": 50},
    "50 CPU replicas, pauses of 150 s": {"machine": CPU, "replicas": 50, "think_s": 150},
    "2 to 50 CPU replicas, pauses of 150 s": {
        **{"machine": CPU, "replicas": 2, "most": 50, "think_s": 150}
    },
    "50 CPU replicas, ten of the visitors ask for 8 at a time": {
        **{"machine": CPU, "replicas": 50, "greedy": 8}
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visitors", type=int, default=1000)
    parser.add_argument("--hours", type=float, default=1.0)
    flags = parser.parse_args()
    print(
        "| cluster | takes an hour | wait p50 | p95 | p99 | slower than it plays | in use "
        "| fairness | replicas |"
    )
    print("|---" + "|---:" * 8 + "|")
    for name, case in CASES.items():
        outcome = Simulation(visitors=flags.visitors, **case).run(flags.hours)
        waits = " | ".join(f"{outcome.wait_s(percent):.1f} s" for percent in (50, 95, 99))
        slow, used = outcome.slow / outcome.takes, outcome.busy_hours / outcome.replica_hours
        cells = [f"{outcome.takes / flags.hours:,.0f}", waits, f"{slow:.0%}", f"{used:.0%}"]
        cells += [f"{outcome.fairness():.2f}", f"{outcome.replica_hours / flags.hours:.1f}"]
        if "many" in outcome.by_visitor:
            name += f" (they wait {np.mean(outcome.by_visitor['many']):.0f} s)"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
