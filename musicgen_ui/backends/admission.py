"""Who visits, and each visitor's share of the server.

A visitor is known by two names: the tab, which is the session that Gradio gives to a page or an
API client, and the network address. A tab is free to be had, so both names count, and whichever
share is used up first ends the welcome. The address is the peer's, or what a trusted proxy in
front says it is: uvicorn reads X-Forwarded-For from the networks of `Settings.trusted_proxies`
alone, from the right, so a visitor cannot invent one. Loopback tells nobody apart and is no name.

The desk has a place for each job from its click to its end. It refuses more than the queue or a
visitor's share holds and knows which stop events belong to which tab.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from musicgen_ui.errors import RequestError
from musicgen_ui.server.job_log import Record
from musicgen_ui.ui.live_player import about

HOUR_S = 3600.0
SLOT_S = 60.0  # what a visitor had within so long is one entry of the ledger
VISITORS = 5000  # in the ledger: the one longest unseen goes first
NAME_CHARACTERS = 64  # of a tab's name, which the client chooses


@dataclass(frozen=True)
class Visitor:
    """Who is asking."""

    tab: str  # one page in a browser, or one API client
    address: str = ""  # "" where it tells nobody apart

    @classmethod
    def of(cls, request: Any) -> Visitor:
        """The visitor behind a `gr.Request`."""
        client = getattr(request, "client", None)
        session = (request.session_hash or "")[:NAME_CHARACTERS]
        return cls(session, named(getattr(client, "host", None) or ""))

    @property
    def name(self) -> str:
        """Who takes turns with others: an address, however many tabs it has."""
        return self.address or self.tab

    @property
    def names(self) -> list[str]:
        """Whose shares a job counts in."""
        names = [f"tab {self.tab}"] * bool(self.tab) + [f"at {self.address}"] * bool(self.address)
        return names or ["nameless"]


def named(host: str) -> str:
    """The address that stands for a visitor: of IPv6 the network of 64 bits; "" for loopback."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if address.is_loopback:
        return ""
    if address.version == 6:
        return str(ipaddress.ip_network((int(address), 64), strict=False).network_address)
    return str(address)


class Ledger:
    """Seconds of music that visitors had within the last hour.

    Args:
        limit_s: what each may have; 0 is no limit.
        clock: seconds that never go back.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._had: OrderedDict[str, deque[list[float]]] = OrderedDict()  # [until, seconds] by name
        self._under_way: dict[str, float] = {}  # seconds that are being made

    def __len__(self) -> int:
        return len(self._had)

    @contextmanager
    def share(self, visitor: Visitor, record: Record) -> Iterator[None]:
        """Sets what a job may take aside until its end, when what it made counts.

        Raises:
            RequestError: the hour's share does not hold it; says when it will.
        """
        if not self.limit_s:
            yield
            return
        for name in visitor.names:
            self._check(name, record.asked_s)
        for name in visitor.names:
            self._under_way[name] = self._under_way.get(name, 0.0) + record.asked_s
        try:
            yield
        finally:
            for name in visitor.names:
                self._under_way[name] -= record.asked_s
                if self._under_way[name] < 1e-6:
                    del self._under_way[name]
                self._add(name, record.made_s)

    def _check(self, name: str, asked_s: float) -> None:
        if asked_s > self.limit_s:
            raise RequestError(
                f"A visitor may have {self.limit_s:g} s of music an hour here: choose a shorter "
                "length or fewer variations."
            )
        under_way_s, had = self._under_way.get(name, 0.0), self._current(name)
        left_s = self.limit_s - under_way_s - sum(seconds for _, seconds in had)
        if asked_s <= left_s + 1e-6:
            return
        wait_s = HOUR_S  # what is being made counts for an hour from its end
        for until_s, seconds in had:
            left_s += seconds
            if asked_s <= left_s + 1e-6:
                wait_s = until_s - self._clock()
                break
        raise RequestError(
            f"Your share of {self.limit_s:g} s of music an hour is used up: come back in "
            f"{about(wait_s)}."
        )

    def _current(self, name: str) -> deque[list[float]]:
        """What a visitor had and still counts, the oldest first."""
        had = self._had.get(name, deque())
        while had and had[0][0] <= self._clock():
            had.popleft()
        return had

    def _add(self, name: str, seconds: float) -> None:
        if not seconds:
            return
        had, until_s = self._current(name), self._clock() + HOUR_S
        if had and had[-1][0] > until_s - SLOT_S:
            had[-1] = [until_s, had[-1][1] + seconds]
        else:
            had.append([until_s, seconds])
        self._had[name] = had
        self._had.move_to_end(name)
        while len(self._had) > VISITORS or not self._current(next(iter(self._had))):
            self._had.popitem(last=False)


class Desk:
    """The jobs in flight: no more takes than `limit`, and of each visitor no more than `each`.

    Args:
        limit: takes that are being made or wait.
        each: takes of one visitor among them; 0 is as many as there is room for.
        ledger: each visitor's share of an hour.
    """

    def __init__(self, limit: int, each: int = 0, ledger: Ledger | None = None) -> None:
        self.limit = limit
        self.each = each
        self.ledger = Ledger(0) if ledger is None else ledger
        self._jobs: dict[threading.Event, tuple[Visitor, int]] = {}  # takes by stop event
        self._closed = False

    def __len__(self) -> int:
        return sum(takes for _, takes in self._jobs.values())

    @contextmanager
    def place(self, visitor: Visitor, takes: int = 1) -> Iterator[threading.Event]:
        """A job's place: yields its stop event and sets it at the end, however it ends.

        Raises:
            RequestError: the queue or the visitor's share of it is full.
        """
        self._check(visitor, takes)
        stop = threading.Event()
        self._jobs[stop] = visitor, takes
        try:
            yield stop
        finally:
            stop.set()
            del self._jobs[stop]

    def stop(self, tab: str) -> int:
        """Asks a tab's jobs to stop; how many there were."""
        stops = [stop for stop, (visitor, _) in self._jobs.items() if visitor.tab == tab]
        for stop in stops:
            stop.set()
        return len(stops)

    def close(self) -> None:
        """Asks every job to stop, and takes no more."""
        self._closed = True
        for stop in list(self._jobs):
            stop.set()

    def _check(self, visitor: Visitor, takes: int) -> None:
        if self._closed:
            raise RequestError("The server is being stopped: try again when it is back.")
        most = min(self.limit, self.each or self.limit)
        if takes > most:
            raise RequestError(
                f"This server makes at most {most} takes at once for a visitor: choose fewer.",
                "variations",
            )
        for name in visitor.names if self.each else ():
            own = sum(count for other, count in self._jobs.values() if name in other.names)
            if own + takes > self.each:
                raise RequestError(
                    f"{own} of your takes are being made or waiting, and {self.each} are a "
                    "visitor's share: try again when one of them is finished."
                )
        if len(self) + takes > self.limit:
            raise RequestError(
                f"The queue is full: {len(self)} takes are being made or waiting. "
                "Try again in a minute."
            )
