"""The simulated cluster with few visitors: waits, fairness, and replicas that come and go."""

from __future__ import annotations

import numpy as np

from tests.load.simulate_cluster import CPU, Simulation


def test_simulated_visitors_wait_less_with_more_replicas():
    few, many = (Simulation(visitors=60, machine=CPU, replicas=n).run(0.2) for n in (1, 4))
    assert 0 < few.takes < many.takes and many.wait_s(95) < few.wait_s(95)
    assert few.fairness() > 0.95 and many.wait_s(50) < 1


def test_simulated_cluster_grows_while_music_waits():
    grown = Simulation(visitors=60, machine=CPU, replicas=1, most=8).run(0.2)
    alone = Simulation(visitors=60, machine=CPU, replicas=1).run(0.2)
    assert 1 < grown.most_replicas <= 8 and grown.takes > alone.takes


def test_simulated_visitors_who_ask_for_many_wait_for_their_turns():
    outcome = Simulation(visitors=60, machine=CPU, replicas=3, greedy=8).run(0.2)
    assert np.mean(outcome.by_visitor["many"]) > 1.2 * outcome.wait_s(95)
    assert outcome.fairness() > 0.95
