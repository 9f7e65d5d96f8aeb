"""How many replicas there should be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from musicgen_ui.backends.ray_scaling import desired_replicas, policy


@pytest.mark.parametrize(
    ("waiting_s", "busy", "replicas", "wanted"),
    [
        (0, 0, 3, 1),  # nothing to do
        (0, 5, 3, 2),  # rows of two are enough
        (0, 12, 3, 3),
        (30, 12, 3, 4),  # half of what a replica makes in the target time
        (300, 12, 3, 8),
        (300, 4, 8, 8),  # those that start count
    ],
)
def test_replicas_go_by_the_music_that_waits(waiting_s, busy, replicas, wanted):
    assert desired_replicas(waiting_s, busy, 4, replicas, speed=4.0) == wanted


def context(there: int, metrics: bool = True, **recorded: float) -> SimpleNamespace:
    values = {"waiting_s": 0.0, "busy": 0.0, "rows": 4.0, "speed": 4.0, **recorded}
    aggregated = {name: dict.fromkeys(range(there), v) for name, v in values.items()}
    return SimpleNamespace(
        aggregated_metrics=aggregated if metrics else None,
        target_num_replicas=there,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=6,
    )


def test_policy_adds_at_once_and_stops_replicas_one_by_one():
    assert policy(context(2, waiting_s=90, busy=4)) == (4, {})
    assert policy(context(2, waiting_s=9000, busy=4)) == (6, {})  # the limit
    assert policy(context(4)) == (3, {})  # once Serve's delay has passed
    assert policy(context(1)) == (1, {})
    assert policy(context(4, busy=4)) == (4, {})  # they are needed


def test_policy_keeps_the_number_before_anything_is_recorded():
    assert policy(context(3, metrics=False)) == (3, {})
