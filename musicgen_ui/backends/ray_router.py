"""Which replica takes a job: Serve's request router, by the bytes of its checkpoint.

Serve imports this in each front, so that it is a module of its own: nothing else imports Ray
without being asked to.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from musicgen_ui.backends.ray_scaling import ranked

MODEL = 5  # the argument `model` of `Replica.compose`


class BytesRouter(RequestRouter):  # type: ignore[misc] # Ray has no types
    """Hands jobs to replicas in the order of `ray_scaling.ranked`, of a rank the least busy."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter.choose_replicas`: the first one of a rank with a free row is taken."""
        arguments = pending_request.args if pending_request else ()
        if pending_request:  # between two looks at replicas without a free row
            pending_request.routing_context.should_backoff = True
        name, nbytes = arguments[MODEL] if len(arguments) > MODEL else ("", 0)
        stats = {each.replica_id.unique_id: each.routing_stats for each in candidate_replicas}
        by_id = {each.replica_id.unique_id: each for each in candidate_replicas}
        jobs = {
            id: self.replica_queue_len_cache.get(each.replica_id) or 0 for id, each in by_id.items()
        }
        return [[by_id[id] for id in rank] for rank in ranked(stats, name, nbytes, jobs)]
