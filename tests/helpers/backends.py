"""Every kind of backend for tests of what they do alike; the last one starts a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.engine.protocol import Backend
from tests.helpers.ray_cluster import FakeCluster

OPTIONS = {"device": "cpu", "precision": "float32"}
NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="needs requirements-ray.txt")
REAL = [  # marks of tests with a real cluster
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    NEEDS_RAY,
]
CLUSTER = pytest.param("ray", marks=REAL)
# This computer, a front over replicas in this process, and one over replicas in a Ray cluster.
KINDS = ["local", "front", CLUSTER]


@contextmanager
def backend_of(kind: str, checkpoint: Path) -> Iterator[Backend]:
    """A backend of one of `KINDS`."""
    if kind == "front":
        cluster = FakeCluster(checkpoint)
        backend: Backend = cluster.front()
    elif kind == "local":
        backend = LocalBackend(**OPTIONS)
    else:
        from musicgen_ui.backends.ray_cluster import Cluster, connect

        backend = connect(Cluster(replicas=1), OPTIONS, str(checkpoint))
    try:
        yield backend
    finally:
        backend.close()
        if kind == "front":
            cluster.close()
