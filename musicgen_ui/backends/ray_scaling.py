"""How many replicas a cluster should have: by the seconds of music that wait, not by requests."""

from __future__ import annotations

import math

TARGET_WAIT_S = 15.0  # in which what waits should be begun


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
