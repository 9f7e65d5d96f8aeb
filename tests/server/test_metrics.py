"""/healthz and /metrics: what they say, and to whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.admission import Admission
from musicgen_ui.backends.job_log import JobLog, JobRecord
from musicgen_ui.engine.protocol import (
    Chunk,
    Finished,
    Health,
    Progress,
    ReplicaHealth,
    Stage,
    Trouble,
)
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.server.metrics import Metrics, metrics_routes
from tests.helpers.fakes import FakeBackend

LOCAL = ("127.0.0.1", 4000)


class Watched:
    """A server's two routes over a fake engine."""

    def __init__(self, token: str = "", proxied: bool = False) -> None:
        self.backend, self.job_log = FakeBackend(), JobLog()
        self.app = Starlette(
            routes=metrics_routes(Metrics(self.backend, self.job_log), token, proxied)
        )

    def get(self, path: str, peer: Any = LOCAL, host: str = "127.0.0.1:7860", **headers: str):
        client = TestClient(self.app, base_url=f"http://{host}", client=peer)
        return client.get(path, headers=headers)

    def values(self) -> dict[str, float]:
        """The samples by name and label values."""
        text = self.get("/metrics").text
        return {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def run(job_log: JobLog, made_s: float = 2.0, speed: float = 4.0) -> None:
    """A job's life."""
    request = GenerationRequest(duration_s=2, checkpoint="fake")
    clip = Clip(np.zeros((1, round(made_s * 1000)), np.float32), 1000)
    record = JobRecord("a")
    record.set_request(request)
    job_log.begin(record)
    record.note(Progress(Stage.WAITING, place=1))
    record.note(Progress(Stage.COMPOSING))
    record.note(Chunk(0, clip))
    record.note(Finished(0, clip, request, 0.0, speed))
    job_log.end(record)


def test_health_is_the_engines() -> None:
    watched = Watched()
    well = watched.get("/healthz", peer=("192.0.2.1", 1))
    assert well.status_code == 200 and well.json()["status"] == "ok"
    watched.backend.trouble = Trouble.THREAD_ENDED
    ill = watched.get("/healthz")
    assert ill.status_code == 503 and ill.json()["status"] == "failed"
    assert ill.json()["trouble"] == watched.backend.trouble
    assert watched.values()["musicgen_up"] == 0


def test_what_works_less_well_is_a_warning_and_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    assert "warnings" not in watched.get("/healthz").json()
    health = Health(warnings=("compiled kernels cannot be kept",))
    monkeypatch.setattr(watched.backend, "health", lambda: health)
    told = watched.get("/healthz")
    assert told.status_code == 200 and told.json()["warnings"] == list(health.warnings)


def test_each_replica_of_a_cluster_has_its_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    assert not any("replica" in name for name in watched.values())
    well, ill = ReplicaHealth(True, 8, 3, 0, 1, 12.5), ReplicaHealth(False, 8, 0, 0, 0, 4.0)
    health = Health(replicas={"a": well, "b": ill})
    monkeypatch.setattr(watched.backend, "health", lambda: health)
    values = watched.values()
    assert values["musicgen_replica_up a"] == 1 and values["musicgen_replica_up b"] == 0
    assert values["musicgen_replica_jobs a"] == 3
    assert values["musicgen_replica_music_seconds a"] == 12.5


def test_jobs_are_counted_and_timed() -> None:
    watched = Watched()
    before = watched.values()
    assert before["musicgen_jobs_total finished"] == before["musicgen_jobs_total failed"] == 0
    run(watched.job_log)
    run(watched.job_log, speed=2.0)
    Admission(watched.backend, None, job_log=watched.job_log).refuse(RequestError("No."))
    now = watched.values()
    assert now["musicgen_jobs_total finished"] == 2 and now["musicgen_jobs_total refused"] == 1
    assert now["musicgen_music_seconds_total"] == 4
    assert now["musicgen_realtime_factor_sum"] == 6 and now["musicgen_realtime_factor_count"] == 2
    assert now["musicgen_first_audio_seconds_count"] == now["musicgen_waited_seconds_count"] == 2
    assert now["musicgen_models_resident"] == 1 and now["musicgen_model_bytes fake"] == 1e6
    assert now["process_resident_memory_bytes"] > 1e6


def test_the_queue_is_told_by_stage() -> None:
    watched = Watched()
    waiting, composing = JobRecord("a"), JobRecord("b")
    watched.job_log.begin(waiting), watched.job_log.begin(composing)
    composing.note(Progress(Stage.COMPOSING))
    now = watched.values()
    stages = [now[f"musicgen_queue {stage}"] for stage in ("waiting", "loading", "composing")]
    assert stages == [1, 0, 1]
    watched.job_log.end(waiting)
    assert watched.values()["musicgen_queue waiting"] == 0


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]:7860", "peer": ("::1", 4000)}, 200),
        ({"peer": ("192.0.2.1", 4000)}, 403),
        ({"host": "music.example"}, 403),  # a name that was made to point here, or a tunnel
        ({"x-forwarded-for": "127.0.0.1"}, 403),
        ({"forwarded": "for=127.0.0.1"}, 403),
        ({"via": "1.1 proxy"}, 403),
    ],
)
def test_without_a_token_the_metrics_are_for_this_computer_alone(asked: dict, status: int) -> None:
    assert Watched().get("/metrics", **asked).status_code == status
    assert Watched(proxied=True).get("/metrics", **asked).status_code == 403


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer let-me-in", 200),
        ("bearer  let-me-in", 200),
        ("Bearer let-me-on", 401),
        ("Bearer ", 401),
        ("Basic let-me-in", 401),
        ("let-me-in", 401),
        ("Bearer l\u00e4t", 401),
        ("", 401),
    ],
)
def test_a_token_opens_the_metrics_from_anywhere(authorization: str, status: int) -> None:
    watched = Watched(token="let-me-in", proxied=True)
    headers: dict[str, Any] = {"authorization": authorization.encode("latin-1")}
    answer = watched.get("/metrics", peer=("192.0.2.1", 1), host="music.example", **headers)
    assert answer.status_code == status
    assert ("musicgen_up" in answer.text) == (status == 200)
    assert "let-me-in" not in answer.text
