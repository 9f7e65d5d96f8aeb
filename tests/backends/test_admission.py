"""Who is who, what each may have, and that nobody gets more by another name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from musicgen_ui.backends import admission
from musicgen_ui.backends.admission import Desk, Ledger, Visitor
from musicgen_ui.errors import RequestError
from musicgen_ui.request import FIELDS
from musicgen_ui.server.app import close, launch
from musicgen_ui.server.job_log import Record
from musicgen_ui.server.settings import Settings, settings
from tests.helpers.fakes import FakeEngine

ANNA = Visitor("anna", "192.0.2.1")


class Clock:
    now_s = 5000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def have(ledger: Ledger, visitor: Visitor, asked_s: float, made_s: float | None = None) -> None:
    """A job that ends at once."""
    record = Record(asked_s=asked_s)
    with ledger.share(visitor, record):
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
    assert Visitor.of(request) == Visitor("s", name)


def test_a_visitor_takes_turns_by_address_and_by_tab_where_there_is_none() -> None:
    assert ANNA.name == "192.0.2.1"
    assert Visitor("anna").name == "anna"
    assert Visitor.of(SimpleNamespace(session_hash=None, client=None)).names == ["nameless"]


def test_a_name_that_the_client_chooses_is_short() -> None:
    assert len(Visitor.of(SimpleNamespace(session_hash="x" * 10**6)).tab) < 100


def test_an_hours_share_is_kept_and_comes_back(clock: Clock) -> None:
    ledger = Ledger(60, clock)
    have(ledger, ANNA, 30)
    clock.now_s += 600
    have(ledger, ANNA, 25)
    with pytest.raises(RequestError, match=r"60 s of music an hour is used up.* about 50 minutes"):
        have(ledger, ANNA, 10)
    have(ledger, ANNA, 5)
    clock.now_s += 3000 - 20
    with pytest.raises(RequestError, match=r"come back in about 20 s\."):
        have(ledger, ANNA, 10)
    clock.now_s += 20
    have(ledger, ANNA, 30)
    with pytest.raises(RequestError):
        have(ledger, ANNA, 1)


def test_what_was_told_to_wait_for_is_there_then(clock: Clock) -> None:
    """Whenever somebody comes back as told, the take is made."""
    ledger = Ledger(100, clock)
    for number in range(40):
        asked_s = 10.0 + 7 * (number % 5)
        try:
            have(ledger, ANNA, asked_s)
        except RequestError as error:
            words = str(error).split("about ")[1].split()
            clock.now_s += float(words[0]) * (60 if "minutes" in words[1] else 1) + 31
            have(ledger, ANNA, asked_s)
        clock.now_s += 100


def test_no_hour_holds_more_than_the_share(clock: Clock) -> None:
    ledger, had = Ledger(100, clock), []
    for number in range(500):
        clock.now_s += 17 * (number % 9)
        try:
            have(ledger, ANNA, 9)
        except RequestError:
            continue
        had.append((clock.now_s, 9))
        assert sum(s for at, s in had if at > clock.now_s - 3600) <= 100
    assert len(had) > 80  # and what is free again is given


def test_only_what_was_made_counts(clock: Clock) -> None:
    ledger = Ledger(60, clock)
    have(ledger, ANNA, 60, made_s=4)
    have(ledger, ANNA, 56)


def test_what_is_being_made_counts(clock: Clock) -> None:
    ledger = Ledger(60, clock)
    with ledger.share(ANNA, Record(asked_s=50)), pytest.raises(RequestError, match="60 minutes"):
        have(ledger, ANNA, 20)
    have(ledger, ANNA, 60)


def test_a_new_tab_or_a_new_address_does_not_renew_the_share(clock: Clock) -> None:
    ledger = Ledger(60, clock)
    have(ledger, ANNA, 60)
    for same in (Visitor("another tab", ANNA.address), Visitor(ANNA.tab, "192.0.2.99")):
        with pytest.raises(RequestError):
            have(ledger, same, 1)
    have(ledger, Visitor("bert", "192.0.2.2"), 60)
    have(ledger, Visitor("at home"), 60)
    have(ledger, Visitor("another at home"), 60)


def test_more_than_the_share_at_once_is_said_as_such(clock: Clock) -> None:
    with pytest.raises(RequestError, match="shorter length or fewer variations"):
        have(Ledger(60, clock), ANNA, 61)


def test_the_ledger_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "VISITORS", 50)
    ledger = Ledger(10_000, clock)
    for number in range(200):
        clock.now_s += 1
        have(ledger, Visitor(f"tab {number}"), 1)
        have(ledger, ANNA, 1)  # often seen, so remembered
    assert len(ledger) <= 50
    with pytest.raises(RequestError):
        have(ledger, ANNA, 9_801)
    assert len(ledger._had["tab anna"]) <= 200 / admission.SLOT_S + 1
    clock.now_s += 4000
    have(ledger, Visitor("next"), 1)
    assert len(ledger) == 1
    assert not ledger._under_way


def test_a_full_queue_says_so() -> None:
    desk = Desk(2)
    with desk.place(Visitor("a"), 2), pytest.raises(RequestError, match=r"queue is full: 2 takes"):
        desk.place(Visitor("b")).__enter__()
    assert len(desk) == 0
    with pytest.raises(RequestError, match="at most 2 takes"):
        desk.place(Visitor("b"), 3).__enter__()


def test_a_visitors_places_are_bounded_whatever_tab_asks() -> None:
    desk = Desk(10, each=3)
    with desk.place(ANNA, 2):
        for same in (ANNA, Visitor("other", ANNA.address), Visitor(ANNA.tab)):
            with pytest.raises(RequestError, match=r"2 of your takes .* when one of them"):
                desk.place(same, 2).__enter__()
        with desk.place(ANNA, 1), desk.place(Visitor("b", "192.0.2.2"), 3):
            assert len(desk) == 6


def test_stop_reaches_a_tabs_jobs_and_no_others() -> None:
    desk = Desk(10)
    other = Visitor("other", ANNA.address)
    with desk.place(ANNA) as mine, desk.place(ANNA) as mine_too, desk.place(other) as theirs:
        assert desk.stop("anna") == 2
        assert mine.is_set() and mine_too.is_set() and not theirs.is_set()
    assert theirs.is_set() and desk.stop("anna") == 0


def test_shares_are_off_at_home_and_on_in_public(monkeypatch: pytest.MonkeyPatch) -> None:
    home = settings([])
    monkeypatch.setenv("SPACE_ID", "owner/name")
    public = settings([])
    assert home.visitor_jobs == home.visitor_seconds == 0 and home.trusted_proxies == ""
    assert public.visitor_jobs and public.visitor_seconds >= public.max_duration_s
    assert "10.0.0.0/8" in public.trusted_proxies


@contextmanager
def server(**changes: Any) -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine()
    demo, temporary = launch(Settings(port=7989, **changes), engine)
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
        (visitor,) = engine.visitors
        assert visitor == address if address else visitor not in ("", forwarded)


def test_a_share_that_is_used_up_is_said_to_the_client() -> None:
    with server(trusted_proxies="127.0.0.1", visitor_seconds=15.0) as (url, _):
        mine = {"x-forwarded-for": "198.51.100.7"}
        assert "event: complete" in generate(url, **mine)
        assert "come back in about 60 minutes" in generate(url, **mine)
        assert "event: complete" in generate(url, **{"x-forwarded-for": "198.51.100.8"})
