"""Who is who, what each may have, and that nobody gets more by another name."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends import admission
from musicgen_ui.backends.admission import Admission, AdmittedJob, Client, HourlyQuota, Saved
from musicgen_ui.backends.job_log import JobRecord, Outcome
from musicgen_ui.engine.protocol import Chunk, Failed
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CLIP_FIELDS, FIELDS, GenerationRequest
from musicgen_ui.server.app import close, launch
from musicgen_ui.server.settings import Settings, settings
from tests.helpers.fakes import FakeBackend, tone
from tests.helpers.jobs import takes
from tests.helpers.local import free_port, wait_for

ANNA = Client("anna", "192.0.2.1")


class Clock:
    now_s = 5000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def have(quota: HourlyQuota, client: Client, asked_s: float, made_s: float | None = None) -> None:
    """A job that ends at once."""
    record = JobRecord("a", asked_s=asked_s)
    with quota.reserve(client, record):
        record.made_s = asked_s if made_s is None else made_s


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::"),  # a household's own network
        ("fe80::1%eth0", "fe80::"),
        ("127.0.0.1", ""),
        ("::1", ""),
        ("testclient", ""),
        ("", ""),
    ],
)
def test_an_address_stands_for_a_visitor(host: str, name: str) -> None:
    request = SimpleNamespace(session_hash="s", client=SimpleNamespace(host=host))
    assert Client.of(request) == Client("s", name)


def test_a_visitor_takes_turns_by_address_and_by_tab_where_there_is_none() -> None:
    assert ANNA.name == "192.0.2.1"
    assert Client("anna").name == "anna"
    assert Client.of(SimpleNamespace(session_hash=None, client=None)).names == ["nameless"]


def test_a_name_that_the_client_chooses_is_short() -> None:
    assert len(Client.of(SimpleNamespace(session_hash="x" * 10**6)).session) < 100


def test_an_hours_share_is_kept_and_comes_back(clock: Clock) -> None:
    quota = HourlyQuota(60, clock)
    have(quota, ANNA, 30)
    clock.now_s += 600
    have(quota, ANNA, 25)
    with pytest.raises(RequestError, match=r"60 s of music an hour is used up.* about 50 minutes"):
        have(quota, ANNA, 10)
    have(quota, ANNA, 5)
    clock.now_s += 3000 - 20
    with pytest.raises(RequestError, match=r"come back in about 20 s\."):
        have(quota, ANNA, 10)
    clock.now_s += 20
    have(quota, ANNA, 30)
    with pytest.raises(RequestError):
        have(quota, ANNA, 1)


def test_what_was_told_to_wait_for_is_there_then(clock: Clock) -> None:
    """Whenever somebody comes back as told, the take is made."""
    quota, refused = HourlyQuota(100, clock), 0
    for number in range(40):
        asked_s = 10.0 + 7 * (number % 5)
        try:
            have(quota, ANNA, asked_s)
        except RequestError as error:
            words = str(error).split("about ")[1].split()
            refused += 1
            clock.now_s += float(words[0]) * (60 if "minutes" in words[1] else 1) + 31
            have(quota, ANNA, asked_s)
        clock.now_s += 100
    assert refused > 5


def test_no_hour_holds_more_than_the_share(clock: Clock) -> None:
    quota, had = HourlyQuota(100, clock), []
    for number in range(500):
        clock.now_s += 17 * (number % 9)
        try:
            have(quota, ANNA, 9)
        except RequestError:
            continue
        had.append((clock.now_s, 9))
        assert sum(s for at, s in had if at > clock.now_s - 3600) <= 100
    assert len(had) > 80  # and what is free again is given


def test_only_what_was_made_counts(clock: Clock) -> None:
    quota = HourlyQuota(60, clock)
    have(quota, ANNA, 60, made_s=4)
    have(quota, ANNA, 56)
    with pytest.raises(RequestError):
        have(quota, ANNA, 1)


def test_what_is_being_made_counts(clock: Clock) -> None:
    quota = HourlyQuota(60, clock)
    with (
        quota.reserve(ANNA, JobRecord("a", asked_s=50)),
        pytest.raises(RequestError, match="60 minutes"),
    ):
        have(quota, ANNA, 20)
    have(quota, ANNA, 60)


def test_a_new_tab_or_a_new_address_does_not_renew_the_share(clock: Clock) -> None:
    quota = HourlyQuota(60, clock)
    have(quota, ANNA, 60)
    for same in (Client("another tab", ANNA.address), Client(ANNA.session, "192.0.2.99")):
        with pytest.raises(RequestError):
            have(quota, same, 1)
    have(quota, Client("bert", "192.0.2.2"), 60)
    have(quota, Client("at home"), 60)
    have(quota, Client("another at home"), 60)


def test_more_than_the_share_at_once_is_said_as_such(clock: Clock) -> None:
    with pytest.raises(RequestError, match="shorter length or fewer variations"):
        have(HourlyQuota(60, clock), ANNA, 61)


def test_the_quota_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "CLIENTS", 50)
    quota = HourlyQuota(10_000, clock)
    for number in range(200):
        clock.now_s += 1
        have(quota, Client(f"page {number}"), 1)
        have(quota, ANNA, 1)  # often seen, so remembered
    assert len(quota) <= 50
    with pytest.raises(RequestError):
        have(quota, ANNA, 9_801)
    assert len(quota._given["session anna"]) <= 200 / admission.SLOT_S + 1
    clock.now_s += 4000
    have(quota, Client("next"), 1)
    assert len(quota) == 1
    assert not quota._under_way


def submitted(backend: Admission, client: Client, takes: int = 1) -> AdmittedJob:
    return backend.submit(GenerationRequest(variations=takes, duration_s=20), client)


def refusal(job: AdmittedJob) -> str:
    (failed,) = job.log.so_far()
    assert isinstance(failed, Failed)
    return str(failed.error)


@pytest.fixture
def slow() -> Iterator[FakeBackend]:
    backend = FakeBackend(speed=0.5)
    yield backend
    wait_for(lambda: not backend.running)


def test_a_full_queue_says_so(slow: FakeBackend) -> None:
    backend = Admission(slow, None, queue_length=2)
    job = submitted(backend, Client("a"), 2)
    assert "queue is full: 2 takes" in refusal(submitted(backend, Client("b")))
    job.stop()
    list(job.follow())
    assert len(backend) == 0
    assert "at most 2 takes" in refusal(submitted(backend, Client("b"), 3))


def test_takes_of_a_client_are_bounded_by_both_names(slow: FakeBackend) -> None:
    backend = Admission(slow, None, queue_length=10, client_jobs=3)
    submitted(backend, ANNA, 2)
    for same in (ANNA, Client("other", ANNA.address), Client(ANNA.session)):
        assert "2 of your takes" in refusal(submitted(backend, same, 2))
    submitted(backend, ANNA, 1)
    submitted(backend, Client("b", "192.0.2.2"), 3)
    assert len(backend) == 6
    backend.stop_all()


def test_stop_reaches_the_jobs_of_a_session_alone(slow: FakeBackend) -> None:
    backend = Admission(slow, None)
    mine, more, theirs = (
        submitted(backend, client) for client in (ANNA, ANNA, Client("other", ANNA.address))
    )
    assert backend.stop("anna") == 2
    for job in (mine, more):
        assert list(job.follow())[-1].stopped
    assert not theirs.stopping.is_set()
    backend.stop_all()
    assert "being stopped" in refusal(submitted(backend, ANNA))
    list(theirs.follow())
    assert backend.stop("anna") == 0


def test_a_job_is_found_by_its_id() -> None:
    backend = Admission(FakeBackend(), None)
    job = submitted(backend, ANNA)
    list(job.follow())
    assert backend.job(job.id) is job and backend.job("x") is None


def test_a_take_is_saved_once_for_all_readers(tmp_path: Path) -> None:
    job = submitted(Admission(FakeBackend(), tmp_path), ANNA, 2)
    first, second = list(job.follow()), list(job.follow())
    assert first == second and len(list(tmp_path.glob("*.wav"))) == 2
    saved = [event for event in first if isinstance(event, Saved)]
    assert [one.take.wav.exists() for one in saved] == [True, True]


def test_a_client_that_leaves_gets_no_take(tmp_path: Path, slow: FakeBackend) -> None:
    slow.speed = 5.0
    backend, ended = Admission(slow, tmp_path), []
    backend.job_log.count = ended.append
    job = submitted(backend, ANNA)
    next(event for event in job.follow() if isinstance(event, Chunk))
    job.leave()
    list(job.follow())
    assert [record.outcome for record in ended] == [Outcome.CLOSED]
    assert not list(tmp_path.iterdir())


def test_audio_of_ended_jobs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "KEPT_BYTES", 1)
    backend = Admission(FakeBackend(), None)
    old, new = submitted(backend, ANNA), submitted(backend, ANNA)
    list(old.follow()), list(new.follow())
    wait_for(lambda: (backend.job(old.id) is None) != (backend.job(new.id) is None))
    sizes = sorted(sum(e.clip.samples.size for e in takes(list(j.follow()))) for j in (old, new))
    assert sizes == [0, 320_000]


@pytest.mark.parametrize("name", CLIP_FIELDS)
def test_clips_of_ended_jobs_are_freed(tmp_path: Path, name: str) -> None:
    clip, fake = Clip(tone(1, 6.0, 16_000, 1), 16_000), FakeBackend()
    there, backend = weakref.ref(clip), Admission(fake, tmp_path)
    job = backend.submit(GenerationRequest(duration_s=0.5, **{name: clip}), ANNA)
    del clip
    events = list(job.follow())
    fake.requests.clear()
    wait_for(lambda: gc.collect() is None or there() is None)
    assert backend.job(job.id) is job and takes(events)


def test_shares_are_off_at_home_and_on_in_public(monkeypatch: pytest.MonkeyPatch) -> None:
    home = settings([])
    monkeypatch.setenv("SPACE_ID", "owner/name")
    public = settings([])
    assert home.visitor_jobs == home.visitor_seconds == 0 and home.trusted_proxies == ""
    assert public.visitor_jobs and public.visitor_seconds >= public.max_duration_s
    assert "10.0.0.0/8" in public.trusted_proxies


@contextmanager
def server(**changes: Any) -> Iterator[tuple[str, FakeBackend]]:
    engine = FakeBackend()
    demo, temporary = launch(Settings(port=free_port(), **changes), engine)
    try:
        yield demo.local_url, engine
    finally:
        close(demo, temporary)


def generate(url: str, **headers: str) -> str:
    call = f"{url}gradio_api/call/generate"
    values = [None] * len(FIELDS)
    event = httpx.post(call, json={"data": values}, headers=headers).json()["event_id"]
    return httpx.get(f"{call}/{event}", timeout=30).text


@pytest.mark.parametrize(
    ("trusted", "forwarded", "address"),
    [
        ("", "198.51.100.7", ""),  # anybody can write that
        ("127.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("127.0.0.1", "6.6.6.6, 198.51.100.7", "198.51.100.7"),  # the left is the visitor's word
        ("127.0.0.1,10.0.0.0/8", "6.6.6.6, 198.51.100.7, 10.1.2.3", "198.51.100.7"),
    ],
)
def test_an_address_is_believed_of_a_trusted_proxy_alone(
    trusted: str, forwarded: str, address: str
) -> None:
    with server(trusted_proxies=trusted) as (url, engine):
        assert "event: complete" in generate(url, **{"x-forwarded-for": forwarded})
        (client,) = engine.clients
        assert client == address if address else client not in ("", forwarded)


def test_a_share_that_is_used_up_is_said_to_the_client() -> None:
    with server(trusted_proxies="127.0.0.1", visitor_seconds=15.0) as (url, _):
        mine = {"x-forwarded-for": "198.51.100.7"}
        assert "event: complete" in generate(url, **mine)
        assert "come back in about 60 minutes" in generate(url, **mine)
        assert "event: complete" in generate(url, **{"x-forwarded-for": "198.51.100.8"})
