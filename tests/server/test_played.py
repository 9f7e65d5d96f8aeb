"""Reports of what a page has played reach its job alone."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.testclient import TestClient

from musicgen_ui.engine.job import LoggedJob
from musicgen_ui.request import GenerationRequest
from musicgen_ui.server import played


def test_reports_reach_the_owners_job_alone():
    job = LoggedJob(GenerationRequest(live=True))

    def find(id: str, session: str) -> LoggedJob | None:
        return job if (id, session) == ("job", "mine") else None

    client = TestClient(Starlette(routes=[played.route(find)]))  # type: ignore[arg-type]

    def post(body: object, session: str = "mine") -> int:
        answer = client.post("/jobs/job/played", json=body, headers={"x-session": session})
        return answer.status_code

    assert post({"samples": 8000, "underruns": 2}) == 204
    assert job.listener.heard_s(16_000) == 0.5 and job.listener.underruns == 2
    assert post({"samples": 9000, "underruns": 2}, "other") == 404
    for wrong in ({}, [], {"samples": "x", "underruns": 0}, {"samples": -1, "underruns": 0}):
        assert post(wrong) == 400
    assert job.listener.heard_s(16_000) == 0.5
