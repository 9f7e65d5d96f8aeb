"""Jobs in front of others: what they hand on, whichever of the two ends first."""

from __future__ import annotations

import pytest

from musicgen_ui.engine.job import LoggedJob, RelayedJob
from musicgen_ui.request import GenerationRequest


class Ending(LoggedJob):
    """A job that is taken from behind the other one while it is looked at."""

    front: RelayedJob

    def __bool__(self) -> bool:
        self.front.set_behind(None)
        return True


@pytest.mark.parametrize("ask", [RelayedJob.stop, lambda job: job.played(100)])
def test_job_that_ends_while_it_is_asked_raises_nothing(ask) -> None:
    front, behind = RelayedJob(GenerationRequest()), Ending(GenerationRequest())
    front.begin()
    front._behind, behind.front = behind, front
    ask(front)
    assert behind.stopping.is_set() or behind.listener.samples == 100
