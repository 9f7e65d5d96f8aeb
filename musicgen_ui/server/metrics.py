"""What whoever watches a server sees: /healthz for all, /metrics for Prometheus.

/healthz tells whether the engine lives and answers 503 when it does not, so that whatever keeps
the server up can start it again. /metrics is for those who have the token; without one set it
answers on the server's own computer alone, where nothing hints at a proxy in between.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from collections import Counter as Count
from collections.abc import Iterator, Mapping
from typing import TypedDict

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from musicgen_ui.backends.job_log import JobLog, JobRecord, Outcome
from musicgen_ui.engine.protocol import Backend, ReplicaHealth
from musicgen_ui.server import sign_in
from musicgen_ui.ui.wording import status_text

SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
FACTORS = (0.1, 0.2, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50)
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


class _Common(TypedDict):
    namespace: str
    registry: prometheus.CollectorRegistry


class Metrics(Collector):
    """Counts jobs as they end, and looks at backend and job log when it is asked."""

    def __init__(self, backend: Backend, job_log: JobLog) -> None:
        self.backend = backend
        self.job_log = job_log
        self.registry = prometheus.CollectorRegistry()
        common: _Common = {"namespace": "musicgen", "registry": self.registry}
        self.jobs = prometheus.Counter("jobs", "Jobs that ended", ["outcome"], **common)
        self.music = prometheus.Counter("music_seconds", "Music that was made", **common)
        self.waited = prometheus.Histogram(
            "waited_seconds", "From the click to the first step", buckets=SECONDS, **common
        )
        self.first_audio = prometheus.Histogram(
            "first_audio_seconds", "From the click to the first sound", buckets=SECONDS, **common
        )
        self.realtime = prometheus.Histogram(
            "realtime_factor", "Seconds of music a second of work", buckets=FACTORS, **common
        )
        for outcome in Outcome:
            self.jobs.labels(outcome)
        prometheus.ProcessCollector(registry=self.registry)
        self.registry.register(self)
        job_log.count = self.count

    def count(self, record: JobRecord) -> None:
        """A job ended."""
        self.jobs.labels(record.outcome).inc()
        self.music.inc(record.made_s)
        for histogram, value in (
            (self.waited, record.waited_s),
            (self.first_audio, record.first_audio_s),
            (self.realtime, record.realtime),
        ):
            if value is not None:
                histogram.observe(value)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What holds now."""
        health = self.backend.health()
        stages = Count[str](record.stage for record in tuple(self.job_log.open))
        yield gauge("up", "Whether music can be made", not health.trouble)
        yield gauge(
            "queue", "Jobs under way by stage", stages, "stage", "waiting loading composing"
        )
        rows = {"composing": health.jobs, "waiting": health.waiting}
        yield gauge("rows", "Variations in the engine", rows, "state", "composing waiting")
        yield gauge("models_resident", "Models in memory", len(health.models))
        yield gauge("model_bytes", "Memory of models and their jobs", health.models, "checkpoint")
        yield gauge("step_age_seconds", "Since the last step, with work to do", health.step_age_s)
        yield from replica_gauges(health.replicas)


def replica_gauges(replicas: dict[str, ReplicaHealth]) -> Iterator[GaugeMetricFamily]:
    """What holds for each replica of a cluster; nothing without one."""
    for name, help in (
        {
            "up": "Whether the replica answers and can make music",
            "rows": "Variations that the replica steps together at most",
            "jobs": "Variations that the replica makes",
            "waiting": "Variations that wait at the replica",
            "models": "Models in the replica's memory",
            "music_s": "Seconds of music that the replica has made",
        }.items()
        if replicas
        else ()
    ):
        values = {replica: getattr(health, name) for replica, health in replicas.items()}
        yield gauge(f"replica_{name.replace('_s', '_seconds')}", help, values, "replica")


def gauge(
    name: str, help: str, value: float | Mapping[str, float], label: str = "", always: str = ""
) -> GaugeMetricFamily:
    """One value, or one for each label; those of `always` are 0 where they are not in it."""
    family = GaugeMetricFamily(f"musicgen_{name}", help, labels=[label] * bool(label))
    values = dict.fromkeys(always.split(), 0.0)
    values |= value if isinstance(value, Mapping) else {"": value}
    for word, number in values.items():
        family.add_metric([word] * bool(label), float(number))
    return family


def metrics_routes(metrics: Metrics, token: str, proxied: bool) -> list[Route]:
    """/healthz and /metrics.

    Args:
        metrics: of the server.
        token: what a reader of /metrics must bring as a bearer; "" lets in this computer alone.
        proxied: whether requests come through a proxy, so that none is surely of this computer.
    """

    def healthz(_: Request) -> Response:
        health = metrics.backend.health()
        answer: dict[str, object] = {
            "status": "failed" if health.trouble else "ok",
            "engine": status_text(metrics.backend.status()),
        }
        answer |= {"trouble": health.trouble} if health.trouble else {}
        answer |= {"warnings": health.warnings} if health.warnings else {}
        answer |= {"jobs": health.jobs, "waiting": health.waiting}
        answer |= {"step_age_s": round(health.step_age_s, 1)}
        return JSONResponse(answer, 503 if health.trouble else 200, {"cache-control": "no-store"})

    attempts = sign_in.Attempts()

    async def metrics_page(request: Request) -> Response:
        if token:
            scheme, _, brought = request.headers.get("authorization", "").partition(" ")
            with attempts.one(request.scope) as may_try:
                if not may_try:
                    return PlainTextResponse(f"{sign_in.TOO_MANY}\n", 429)
                if scheme.lower() != "bearer" or not secrets.compare_digest(
                    brought.strip().encode(), token.encode()
                ):
                    await asyncio.sleep(sign_in.WRONG_S if brought else 0)
                    needed = {"www-authenticate": "Bearer"}
                    return PlainTextResponse(
                        "The metrics token is missing or wrong.\n", 401, needed
                    )
        elif proxied or not local(request):
            text = "Set MUSICGEN_UI_METRICS_TOKEN to read the metrics from another computer.\n"
            return PlainTextResponse(text, 403)
        page = prometheus.generate_latest(metrics.registry)
        return Response(page, media_type=prometheus.CONTENT_TYPE_LATEST)

    return [Route("/healthz", healthz), Route("/metrics", metrics_page)]


def local(request: Request) -> bool:
    """Whether a request surely comes from this computer: by peer, by name, through no proxy."""
    hosts = (request.client.host if request.client else "", request.url.hostname or "")
    forwarded = any(name in request.headers for name in FORWARDED)
    return not forwarded and all(host == "localhost" or _loopback(host) for host in hosts)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
