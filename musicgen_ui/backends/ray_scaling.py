"""How many replicas a cluster should have: by the seconds of music that wait, not by requests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

TARGET_WAIT_S = 15.0  # in which what waits should be begun
IDLE_S = 120.0  # that fewer replicas must be enough before one is stopped
DELAYS = {"upscale_delay_s": 0.0, "downscale_delay_s": IDLE_S}  # of Serve's configuration


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
    """Serve's autoscaling policy: more replicas at once, fewer one by one.

    How long fewer must have been enough is `IDLE_S`, which Serve counts: `DELAYS`.

    Args:
        context: Serve's; its metrics are what replicas record.

    Returns:
        Replicas that there should be, and nothing to be remembered until the next call.
    """
    metrics = context.aggregated_metrics or {}

    def recorded(name: str) -> list[float]:
        return [float(value) for value in metrics.get(name, {}).values()]

    there = int(context.target_num_replicas)
    if not metrics:  # as while the first one starts
        return there, {}
    wanted = desired_replicas(
        max(recorded("waiting_s"), default=0.0),  # each replica knows what waits in all fronts
        math.ceil(sum(recorded("busy"))),
        round(max(recorded("rows"), default=1.0)),
        there,
        max(recorded("speed"), default=1.0),
    )
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, max(wanted, there - 1))), {}
