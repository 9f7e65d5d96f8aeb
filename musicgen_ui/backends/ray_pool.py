"""The replicas of one deployment as a front sees them, such as those on GPUs or those on CPUs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from musicgen_ui.backends.ray_replica import HEARTBEAT_S, Report
from musicgen_ui.engine.protocol import ReplicaHealth

if TYPE_CHECKING:  # Ray need not be installed
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

BEAT_TIMEOUT_S = 2.0  # for a replica to answer a beat
SILENT_S = BEAT_TIMEOUT_S + 2 * HEARTBEAT_S  # one that is silent for so long is not used
ILL_S = 60.0  # a replica that is silent is reported for so long
LOAD_BYTES_S = 500e6  # of a checkpoint: read from a disk and made ready

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where one try of a variation is made."""

    pool: Pool | None = None  # None before the first try
    id: str = ""  # of the try; the ids of a front begin alike
    checkpoint: str = ""  # that it needs
    order: tuple[str, ...] = ()  # of the replicas that may make it

    @property
    def replica(self) -> str:
        """The replica that should have taken it."""
        return self.order[0] if self.order else ""


class Pool:
    """Replicas that are alike, and what each of them reported last.

    Args:
        handle: Serve's handle of the deployment of `Replica`.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._streaming = handle, handle.options(stream=True)
        self._reports: dict[str, tuple[Report, float]] = {}  # and when, by replica
        self._there_s = time.monotonic()  # when a replica answered last

    def compose(self, *arguments: object) -> DeploymentResponseGenerator:
        """The stream of a variation: see `Replica.compose`."""
        return self._streaming.compose.remote(*arguments)

    def ask(self, timeout_s: float, method: str, *arguments: object) -> list[object]:
        """What the replicas answer, or raise. All are asked, beside their jobs: none waits for a
        row.
        """
        response = self._handle.broadcast(method, *arguments)
        answers: list[object] = response.results(timeout_s=timeout_s, return_exceptions=True)
        return answers

    async def tell(self, method: str, *arguments: object) -> None:
        """Calls a method of all replicas: which of them has a job is not known here."""
        with contextlib.suppress(Exception):  # the stream of a replica that died says so
            await asyncio.to_thread(self.ask, BEAT_TIMEOUT_S, method, *arguments)

    async def beat(self, front: str, waiting_s: float) -> None:
        """Renews the lease of a front's jobs, and asks all replicas how they are."""
        try:
            answers = await asyncio.to_thread(self.ask, BEAT_TIMEOUT_S, "beat", front, waiting_s)
        except Exception as error:  # no replica, as while the first one starts
            log.debug("No replica answers", exc_info=error)
            answers = []
        now = time.monotonic()
        for answer in answers:
            if isinstance(answer, Report):
                self._reports[answer.replica] = (answer, now)
                self._there_s = now
        for name, (_, seen_s) in list(self._reports.items()):
            if now - seen_s > ILL_S:
                del self._reports[name]

    def lost(self, placed: Placement) -> None:
        """Counts the replica of a stream that broke as gone until it answers a beat."""
        name = self._replica_of(placed)
        if name in self._reports:
            report, _ = self._reports[name]
            self._reports[name] = report, time.monotonic() - SILENT_S

    def fresh(self) -> list[Report]:
        """The reports of replicas that answer."""
        oldest_s = time.monotonic() - SILENT_S
        return [report for report, seen_s in list(self._reports.values()) if seen_s > oldest_s]

    def well(self) -> list[Report]:
        """The reports of replicas that can make music."""
        return [report for report in self.fresh() if not report.health.trouble]

    @property
    def there(self) -> bool:
        """Replicas answer, or did so lately."""
        return time.monotonic() - self._there_s <= ILL_S

    def jobs(self, front: str, own: Iterable[Placement]) -> dict[str, list[str]]:
        """What each replica that can make music is making: a name for each job.

        Args:
            front: ids of its jobs begin so. Those that a report has may have ended since.
            own: the jobs of this front that are made here.
        """
        jobs = {
            report.replica: [id for id in report.jobs if not id.startswith(front)]
            for report in self.well()
        }
        for placed in own:
            jobs.get(self._replica_of(placed), []).append(placed.checkpoint)
        return jobs

    def _replica_of(self, placed: Placement) -> str:
        """The replica that has a job, or that should have taken it."""
        reports = [report for report, _ in list(self._reports.values())]
        having = [report.replica for report in reports if placed.id in report.jobs]
        return having[0] if having else placed.replica

    def free_rows(self, jobs: Mapping[str, Collection[str]]) -> int:
        """Rows that are not in use."""
        return sum(max(0, report.rows - len(jobs[report.replica])) for report in self.well())

    def order(
        self, jobs: Mapping[str, Collection[str]], checkpoint: str, nbytes: int, duration_s: float
    ) -> tuple[str, ...]:
        """The replicas in the order in which they should take a job: see `cost_s`.

        Those without a free row come last, and after them those where it never fits.

        Args:
            jobs: of each replica.
            checkpoint: that the job needs.
            nbytes: that it needs; 0 is not known.
            duration_s: of its music.
        """
        well = [report for report in self.well() if report.replica in jobs]
        held = [report.health.models.get(checkpoint, 0) for report in well]
        nbytes = nbytes or max(held, default=0)

        def rank(report: Report) -> tuple[bool, bool, float, float]:
            there = jobs[report.replica]
            never = 0 < report.budget_bytes < nbytes and checkpoint not in report.health.models
            full = len(there) >= report.rows
            cost = cost_s(report, there, checkpoint, nbytes, duration_s)
            # Alike ones by chance: fronts do not know each other's newest jobs.
            return never, full, cost, random.random()

        return tuple(report.replica for report in sorted(well, key=rank))

    def holds(self, checkpoint: str) -> bool:
        """Whether a replica has loaded a checkpoint."""
        return any(checkpoint in report.health.models for report in self.well())

    def suits(self, nbytes: int) -> bool:
        """Whether a checkpoint of so many bytes may come here; 0 is not known."""
        most = max((report.most_bytes for report in self.well()), default=0)
        return not most or 0 < nbytes <= most

    @property
    def limited(self) -> bool:
        """Only small checkpoints come here."""
        return any(report.most_bytes for report in self.well())

    def health(self) -> tuple[dict[str, ReplicaHealth], list[str]]:
        """How each replica is, and a sentence for each that is ill."""
        now, fresh = time.monotonic(), self.fresh()
        replicas, warnings = dict[str, ReplicaHealth](), list[str]()
        for name, (report, seen_s) in sorted(self._reports.items()):
            health, answers = report.health, report in fresh
            if not answers:
                warnings.append(f"Replica {name} has not answered for {now - seen_s:.0f} s.")
            elif health.trouble:
                warnings.append(f"Replica {name} cannot make music: {health.trouble}.")
            warnings += [f"Replica {name}: {text}" for text in health.warnings if answers]
            replicas[name] = ReplicaHealth(
                up=answers and not health.trouble,
                rows=report.rows,
                jobs=health.jobs if answers else 0,
                waiting=health.waiting if answers else 0,
                models=len(health.models) if answers else 0,
                music_s=report.music_s,
            )
        return replicas, warnings


def cost_s(
    report: Report, jobs: Collection[str], checkpoint: str, nbytes: int, duration_s: float
) -> float:
    """The seconds that a job costs at a replica: of sharing its steps, and of a load.

    A further row makes each step longer by `Report.row_cost`, for the job and for those beside it;
    so two jobs of a CPU's two replicas are made at one each, while on a GPU jobs of a large
    checkpoint stay together until they lose more than another load takes. A load that takes the
    place of others counts their bytes too, since they come back, and waits for the jobs there.

    Args:
        report: of the replica.
        jobs: that it is making, by their checkpoints.
        checkpoint: that the job needs.
        nbytes: that it needs; 0 is not known.
        duration_s: of its music.
    """
    shared_s = report.row_cost * len(jobs) * duration_s
    models = report.health.models
    if checkpoint in models or checkpoint in jobs:  # or it is being loaded for them
        return shared_s
    evicted = max(0, sum(models.values()) + nbytes - report.budget_bytes)
    waits_s = duration_s * len(jobs) if evicted else 0.0
    return shared_s + waits_s + (nbytes + evicted) / LOAD_BYTES_S


def pool_for(
    pools: Collection[Pool], free: Collection[Pool], checkpoint: str, nbytes: int
) -> Pool | None:
    """The pool that makes a job now; None while those that may are full.

    Small checkpoints go to replicas that are for them alone, so that the others are free for the
    large ones; where those are full, or it is loaded elsewhere, they go to the others too.

    Args:
        pools: all of them.
        free: those with a free row.
        checkpoint: that the job needs.
        nbytes: that it needs; 0 is not known.
    """
    # Where those for its size have all been gone for a while the others make it, slow as that is.
    suited = [pool for pool in pools if pool.there and pool.suits(nbytes)] or pools
    found = [pool for pool in suited if pool in free]
    return min(found, key=lambda p: (not p.holds(checkpoint), not p.limited), default=None)
