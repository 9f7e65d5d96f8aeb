"""Which replica takes a job: Serve's request router, in the order that the front gives.

Serve imports this in each front, so that it is a module of its own: nothing else imports Ray
without being asked to.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

ORDER = 5  # the argument `order` of `Replica.compose`


class OrderedRouter(RequestRouter):  # type: ignore[misc] # Ray has no types
    """Hands a job to the first replica of its `order` that is there, see `Pool.order`."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter.choose_replicas`: of a rank the least busy one is taken."""
        arguments = pending_request.args if pending_request else ()
        if pending_request:  # between two looks at replicas that are full
            pending_request.routing_context.should_backoff = True
        order = arguments[ORDER] if len(arguments) > ORDER else ()
        there = {each.replica_id.unique_id: each for each in candidate_replicas}
        ranks = [[there.pop(name)] for name in order if name in there]
        return [*ranks, list(there.values())] if there else ranks
