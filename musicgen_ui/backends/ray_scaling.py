"""How many replicas a cluster should have, and which of them takes a checkpoint.

Their number goes by the seconds of music that wait, not by requests; the place of a checkpoint by
the bytes that it needs, not by a number of models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

TARGET_WAIT_S = 15.0  # in which what waits should be begun
IDLE_S = 120.0  # that fewer replicas must be enough before one is stopped
FEW_SINCE = "few_since_s"


class RoutingStats(TypedDict, total=False):
    """What a replica says of itself to those who hand out jobs."""

    rows: int  # variations that it steps together
    models: dict[str, int]  # bytes held, by checkpoint
    budget_bytes: int  # for all of them


def desired_replicas(waiting_s: float, busy: int, rows: int, replicas: int, speed: float) -> int:
    """Replicas that the cluster should have, before the host's limits.

    Args:
        waiting_s: seconds of music in the queues of all fronts.
        busy: variations that are being made.
        rows: variations that a replica steps together.
        replicas: there are, or are being started.
        speed: seconds of music a second of work of a replica whose rows are full.
    """
    needed = math.ceil(busy / rows)
    if not waiting_s:
        return max(1, min(replicas, needed))
    # What is being made takes its time, so what waits needs replicas beside it.
    extra = math.ceil(waiting_s / (max(speed, 0.1) * TARGET_WAIT_S))
    return max(replicas, needed + extra)


def policy(context: AutoscalingContext) -> tuple[int, dict[str, object]]:
    """Serve's autoscaling policy: more replicas at once, fewer when that was enough for a while.

    Args:
        context: Serve's; its metrics are what replicas record.

    Returns:
        Replicas that there should be, and what is to be remembered until the next call.
    """
    metrics = context.aggregated_metrics or {}

    def recorded(name: str) -> list[float]:
        return [float(value) for value in metrics.get(name, {}).values()]

    there, now = int(context.target_num_replicas), float(context.current_time or time.time())
    wanted = desired_replicas(
        max(recorded("waiting_s"), default=0.0),  # each replica knows what waits in all fronts
        math.ceil(sum(recorded("busy"))),
        round(max(recorded("rows"), default=1.0)),
        there,
        max(recorded("speed"), default=1.0),
    )
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    wanted = max(least, min(most, wanted))
    if wanted >= there:
        return wanted, {}
    few_since_s = float((context.policy_state or {}).get(FEW_SINCE, now))
    if now - few_since_s < IDLE_S:
        return there, {FEW_SINCE: few_since_s}
    return there - 1, {}


def ranked(
    replicas: Mapping[str, RoutingStats], name: str, nbytes: int, jobs: Mapping[str, int]
) -> list[list[str]]:
    """Replicas in the order in which they should take a job; those of a rank are alike.

    First those where its checkpoint is loaded, as long as they have a free row: a checkpoint is
    loaded at another place only once these are full. Then those where it fits beside what is there,
    then those where it takes the place of others.

    Args:
        replicas: what `Replica.record_routing_stats` gave, by replica.
        name: of the checkpoint.
        nbytes: that it needs; 0 is not known.
        jobs: of each replica; one without a free row comes last.
    """
    full = [id for id, stats in replicas.items() if jobs.get(id, 0) >= stats.get("rows", math.inf)]
    ranks: list[list[str]] = [[], [], [], []]
    for replica, stats in replicas.items():
        if replica in full:
            continue
        models, budget = stats.get("models", {}), stats.get("budget_bytes", 0)
        if name in models:
            ranks[0].append(replica)
        elif not (nbytes and budget) or sum(models.values()) + nbytes <= budget:
            ranks[1].append(replica)
        else:
            ranks[2 if nbytes <= budget else 3].append(replica)
    # Where it never fits it is refused, so that is no place while there is another.
    found = [rank for rank in ranks[:3] if rank]
    return [rank for rank in (*(found or ranks[3:]), full) if rank]
