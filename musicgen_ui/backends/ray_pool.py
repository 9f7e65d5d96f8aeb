"""The replicas of one deployment as a front sees them, such as those on GPUs or those on CPUs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from musicgen_ui.backends.ray_replica import HEARTBEAT_S, Report
from musicgen_ui.engine.protocol import ReplicaHealth

if TYPE_CHECKING:  # Ray need not be installed
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

BEAT_TIMEOUT_S = 2.0  # for a replica to answer a beat
ILL_S = 60.0  # a replica that is silent is reported for so long

log = logging.getLogger(__name__)


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

    def fresh(self) -> list[Report]:
        """The reports of replicas that answer."""
        oldest_s = time.monotonic() - BEAT_TIMEOUT_S - 2 * HEARTBEAT_S
        return [report for report, seen_s in list(self._reports.values()) if seen_s >= oldest_s]

    def well(self) -> list[Report]:
        """The reports of replicas that can make music."""
        return [report for report in self.fresh() if not report.health.trouble]

    @property
    def there(self) -> bool:
        """Replicas answer, or did so lately."""
        return time.monotonic() - self._there_s <= ILL_S

    def free_rows(self, own: Collection[str]) -> int:
        """Rows that are not in use by this front, with the ids of its jobs here, and by others."""
        well = self.well()
        others = sum(len(set(report.jobs).difference(own)) for report in well)
        return sum(report.rows for report in well) - others - len(own)

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
