"""Which replica makes a job, by what each of them reported."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import SimpleNamespace

from musicgen_ui.backends.ray_pool import LOAD_BYTES_S, Placement, Pool, pool_for
from musicgen_ui.backends.ray_replica import CPU_ROW, GPU_ROW, Report
from musicgen_ui.engine.protocol import Health, Status

SMALL, LARGE = 20_000_000, 6_500_000_000  # bytes


def report(
    name: str,
    models: dict[str, int],
    jobs: tuple[str, ...] = (),
    budget_bytes: int = 2 * LARGE,
    most_bytes: int = 0,
    row_cost: float = GPU_ROW,
    rows: int = 4,
) -> Report:
    health = Health(None, models)
    return Report(name, 0, rows, most_bytes, budget_bytes, row_cost, jobs, 0.0, Status(), health)


def pool_of(*reports: Report, up: bool = True) -> Pool:
    pool = Pool(SimpleNamespace(options=lambda stream: None))
    pool._there_s = time.monotonic() if up else -math.inf
    pool._reports = {each.replica: (each, pool._there_s) for each in reports}
    return pool


def placed(id: str, replica: str, checkpoint: str = "") -> Placement:
    return Placement(None, id, checkpoint, (replica,))


def best(
    pool: Pool,
    checkpoint: str,
    nbytes: int,
    own: Sequence[Placement] = (),
    duration_s: float = 30.0,
) -> str:
    return pool.order(pool.jobs("us", own), checkpoint, nbytes, duration_s)[0]


def test_job_goes_where_its_checkpoint_is_loaded():
    pool = pool_of(report("a", {}), report("b", {"large": LARGE}))
    assert best(pool, "large", LARGE) == "b" == best(pool, "large", 0)


def test_second_job_on_cpus_goes_to_the_idle_replica():
    """Which loads the checkpoint for it, if that is small."""
    for models in ({"bundled": SMALL}, {}):
        pool = pool_of(
            report("a", {"bundled": SMALL}, ("them-1",), row_cost=CPU_ROW),
            report("b", models, row_cost=CPU_ROW),
        )
        assert best(pool, "bundled", SMALL, duration_s=1.0) == "b"


def test_jobs_on_gpus_share_steps_until_that_costs_more_than_a_load():
    own = [placed(f"us-{n}", "a", "large") for n in range(8)]
    pool = pool_of(report("a", {"large": LARGE}, rows=32), report("b", {}, rows=32))
    few = int(LARGE / LOAD_BYTES_S / (GPU_ROW * 30.0))
    assert best(pool, "large", LARGE, own[:few]) == "a"
    assert best(pool, "large", LARGE, own[: few + 1]) == "b"


def test_checkpoint_that_is_being_loaded_is_not_loaded_twice():
    pool = pool_of(report("a", {}), report("b", {}))
    for name in "ab":
        assert best(pool, "large", LARGE, [placed("us-1", name, "large")]) == name


def test_load_beside_others_comes_before_one_in_their_place():
    pool = pool_of(
        report("instead", {"small": 2 * LARGE}),
        report("beside", {"small": LARGE}),
        report("never", {}, budget_bytes=SMALL),
    )
    jobs = pool.jobs("us", [])
    assert pool.order(jobs, "large", LARGE, 30.0) == ("beside", "instead", "never")


def test_load_in_the_place_of_what_is_used_waits_for_it():
    pool = pool_of(*(report(name, {"small": 2 * LARGE}) for name in "ab"))
    for used, idle in ("ab", "ba"):
        own = [placed("us-1", used, "small")]
        assert best(pool, "large", LARGE, own, 1.0) == idle


def test_full_replica_comes_last():
    jobs = tuple(f"them-{n}" for n in range(4))
    pool = pool_of(report("a", {"large": LARGE}, jobs), report("b", {"other": 2 * LARGE}))
    assert best(pool, "large", LARGE) == "b"
    assert pool.free_rows(pool.jobs("us", [])) == 4


def test_rows_of_own_jobs_that_ended_are_free_at_once():
    """A report that is older has them still."""
    pool = pool_of(report("a", {}, ("us-1", "us-2", "them-1")), report("b", {}))
    own = [placed("us-2", "b"), placed("us-3", "b")]  # one was taken by another
    jobs = pool.jobs("us", own)
    assert {name: len(each) for name, each in jobs.items()} == {"a": 2, "b": 1}
    assert pool.free_rows(jobs) == 5


def test_replica_whose_stream_broke_is_not_used_until_it_answers():
    pool = pool_of(report("a", {}, ("us-1",)), report("b", {}))
    pool.lost(placed("us-1", "b"))
    assert [each.replica for each in pool.fresh()] == ["b"]
    assert pool.health()[0].keys() == {"a", "b"} and not pool.health()[0]["a"].up


def test_pool_of_a_job_goes_by_bytes_and_by_what_is_loaded():
    cpu = report("", {"bundled": 1}, most_bytes=10)
    gpus, cpus = both = [pool_of(report("", {"large": 1})), pool_of(cpu)]
    assert pool_for(both, both, "large", 100) is gpus is pool_for(both, both, "?", 0)
    assert pool_for(both, both, "small", 8) is cpus is pool_for(both, both, "bundled", 1)
    assert pool_for(both, [gpus], "small", 8) is gpus
    assert pool_for(both, [cpus], "large", 100) is None
    with_small = [pool_of(report("", {"large": 1, "small": 1})), cpus]
    assert pool_for(with_small, with_small, "small", 8) is with_small[0]
    without = [pool_of(report("", {"large": 1}), up=False), cpus]
    assert pool_for(without, [cpus], "large", 100) is cpus
