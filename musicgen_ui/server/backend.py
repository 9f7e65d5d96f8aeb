"""The backend of a server, as its settings say: this computer's engine, or a cluster's replicas."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from musicgen_ui.backends.starting import StartingBackend
from musicgen_ui.engine.protocol import Backend
from musicgen_ui.server.settings import Settings

if TYPE_CHECKING:  # torch
    from musicgen_ui.backends.local import EngineOptions


def of_settings(chosen: Settings) -> StartingBackend:
    """The backend of a server, built and warmed up in the background once it is started."""

    def build() -> Backend:
        from musicgen_ui.backends.clap import Clap
        from musicgen_ui.backends.local import LocalBackend
        from musicgen_ui.backends.ranking import Ranking

        # The libraries and the page stay until the end: the garbage collector need not look through
        # them, which held all threads up for a third of a second each time.
        gc.collect()
        gc.freeze()
        backend: Backend
        if chosen.backend == "ray":
            backend = _ray_backend(chosen)
        else:
            backend = LocalBackend(**_engine_options(chosen))
        return Ranking(backend, Clap(may_download=chosen.any_checkpoint))

    return StartingBackend(build, chosen.checkpoint)


def _engine_options(chosen: Settings) -> EngineOptions:
    """Of `LocalBackend`, here and in each replica."""
    return {
        "device": chosen.device,
        "precision": chosen.precision,
        "budget_bytes": round(chosen.memory_gb * 1e9) or None,
        "idle_s": chosen.idle_s,
        "max_jobs": chosen.jobs,
        "allow_any": chosen.any_checkpoint,
        "also": chosen.listed_checkpoints,
        "kv_cache_dtype": chosen.kv_cache_dtype,
    }


def _ray_backend(chosen: Settings) -> Backend:
    from musicgen_ui.backends import ray_cluster

    cluster = ray_cluster.Cluster(
        chosen.ray_address,
        chosen.replicas,
        chosen.max_replicas,
        chosen.front_only,
        chosen.cpu_replicas,
    )
    return ray_cluster.connect(cluster, _engine_options(chosen), chosen.checkpoint)
