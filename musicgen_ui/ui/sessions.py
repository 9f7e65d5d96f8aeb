"""What a browser's tab finds again after it lost its connection or was loaded anew.

Gradio forgets a page whose connection breaks: its job ends, and when the connection is back the
browser loads a new page that knows nothing. So a tab keeps a key of its own, which nobody can
guess, in the browser's session storage, and its takes are remembered under that key. A job whose
page is gone goes on for a while; the page that comes back in time is told of it and shows the take
when it is done. A page that is closed says so, and its tab's jobs end soon, unless another page of
the tab is open: browsers copy the key into a duplicated tab.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from musicgen_ui.ui.take_panel import KEPT_GROUPS, Group

GRACE_S = 60.0  # that a job goes on whose page lost its connection
LEFT_S = 3.0  # and one whose page was closed: loading it anew takes less
TABS = 1000  # remembered: the one longest unseen goes first
KEY = re.compile("([0-9a-f]{32})([0-9a-f]{32})?")  # a tab's, and one of the page in it
SESSIONS_KEPT = 8  # pages of a tab, open or not

ENTER = """() => {
  const random = () => Array.from(
    crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, '0')).join('');
  if (!/^[0-9a-f]{32}$/.test(sessionStorage.musicgen || '')) sessionStorage.musicgen = random();
  const name = sessionStorage.musicgen + random();
  addEventListener('pagehide', () => navigator.sendBeacon('left', name));
  return [name];
}"""

# The form lies in the browser, too: a server that begins anew knows nothing of it. Nothing is kept
# before what was kept is read, since the page fills its fields in while it opens.
KEEP = """(...form) => {
  if (window.musicgenForm) sessionStorage.musicgenForm = JSON.stringify(form);
  return [];
}"""
BACK = """(live, ...form) => {
  const kept = JSON.parse(sessionStorage.musicgenForm || '[]');
  const cut_off = sessionStorage.musicgenBusy && !live;
  window.musicgenForm = true;
  addEventListener('pagehide', () => {
    const message = window.musicgenLive?.message;
    sessionStorage.musicgenBusy = message && !message.last ? 'yes' : '';
  });
  return [cut_off ? CUT_OFF : live, ...(kept.length === form.length ? kept : form)];
}"""

_UNDER_WAY: set[asyncio.Task] = set()


@dataclass(eq=False)
class Tab:
    """One tab of a browser, whichever page it shows."""

    address: str = ""  # of its visitor
    sessions: list[str] = field(default_factory=list)  # Gradio's names of its pages, the last last
    open: dict[str, str] = field(default_factory=dict)  # its open pages' keys, by session
    history: list[Group] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # of the last click
    jobs: int = 0  # under way
    news: bool = False  # a take was finished that no page has shown
    timer: threading.Timer | None = None  # stops its jobs

    @property
    def holds_something(self) -> bool:
        """Whether there is anything to find again."""
        return bool(self.history or self.settings)

    def cancel(self) -> None:
        """Lets its jobs go on."""
        if self.timer:
            self.timer.cancel()
            self.timer = None


class Recall:
    """The tabs that were here.

    Args:
        stop: asks the jobs of a session to stop; how many there were.
        grace: whether a job goes on for a while whose page is gone.
    """

    def __init__(self, stop: Callable[[str], int], grace: bool = True) -> None:
        self._stop, self._grace = stop, grace
        self._tabs: OrderedDict[str, Tab] = OrderedDict()  # by key
        self._keys: dict[str, str] = {}  # by session

    def enter(self, session: str, key: str, address: str = "") -> Tab | None:
        """A page was opened; the tab that it is in, None for a key that no page makes.

        Args:
            session: Gradio's name of the page.
            key: the tab's, and the page's after it.
            address: the visitor's.
        """
        keys = KEY.fullmatch(key or "")
        if not keys:
            return None
        self._take_out(session)
        tab = self._tabs.setdefault(keys[1], Tab(address))
        self._tabs.move_to_end(keys[1])
        self._keys[session] = keys[1]
        tab.sessions.append(session)
        tab.open[session] = keys[2] or ""
        if len(tab.sessions) > SESSIONS_KEPT:  # it was loaded anew many times
            self._take_out(min(tab.sessions[:-1], key=lambda other: other in tab.open))
        tab.cancel()
        self._make_room()
        return tab

    def _take_out(self, session: str) -> None:
        """Forgets a page."""
        if tab := self._tabs.get(self._keys.pop(session, "")):
            tab.sessions.remove(session)
            tab.open.pop(session, None)

    def _make_room(self) -> None:
        """Forgets tabs beyond the limit: never one with a job; first those with nothing to find,
        and those of the visitor who has the most."""
        while len(self._tabs) > TABS:
            of = Counter(tab.address for tab in self._tabs.values())
            idle = [key for key, tab in self._tabs.items() if not tab.jobs][:-1]
            if not idle:
                return
            tabs = self._tabs
            self._forget(min(idle, key=lambda k: (tabs[k].holds_something, -of[tabs[k].address])))

    def of(self, session: str) -> Tab | None:
        """The tab that shows, or showed, a page."""
        return self._tabs.get(self._keys.get(session, ""))

    def lost(self, session: str) -> None:
        """A page's connection has ended: its jobs do after a while, unless its tab comes back."""
        tab = self.of(session)
        if tab is None:
            self._stop(session)
            return
        tab.open.pop(session, None)
        if not tab.open and tab.timer is None:
            self._stop_after(tab, GRACE_S if self._grace else 0.0)

    def left(self, key: str) -> None:
        """A page was closed: its tab's jobs end soon, unless the tab shows or opens another."""
        keys = KEY.fullmatch(key)
        tab = self._tabs.get(keys[1]) if keys else None
        if keys is None or tab is None:
            return
        for session, page in list(tab.open.items()):
            if page == (keys[2] or ""):
                del tab.open[session]
        if not tab.open:
            tab.cancel()
            self._stop_after(tab, LEFT_S if self._grace else 0.0)

    def stop(self, session: str) -> int:
        """Asks the jobs of a page to stop; where it has none, those it shows of its tab's other
        pages. How many."""
        tab = self.of(session)
        return self._stop(session) or sum(map(self._stop, tab.sessions if tab else ()))

    def route(self) -> Route:
        """Where a page says that it is closed."""

        async def left(request: Request) -> Response:
            self.left((await request.body())[:65].decode("ascii", "replace"))
            return Response(status_code=204)

        return Route("/left", left, methods=["POST"])

    def _stop_after(self, tab: Tab, seconds: float) -> None:
        if not tab.jobs:
            return
        tab.timer = threading.Timer(seconds, lambda: [self._stop(s) for s in tab.sessions])
        tab.timer.daemon = True
        tab.timer.start()

    def _forget(self, key: str) -> None:
        tab = self._tabs.pop(key)
        tab.cancel()
        for session in tab.sessions:
            self._keys.pop(session, None)
            self._stop(session)


def keep(tab: Tab, group: Group, history: list[Group]) -> None:
    """Remembers a new take and those before it."""
    tab.history = [*(history or tab.history), group][-KEPT_GROUPS:]
    tab.news = True


async def outliving(tab: Tab, updates: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The updates of a job that goes on to its end when this iterator is closed."""
    waiting: asyncio.Queue[Any] = asyncio.Queue()
    read = True

    async def work() -> None:
        end: Any = None
        try:
            async with aclosing(updates):
                async for update in updates:
                    if read:
                        waiting.put_nowait(update)
        except Exception as error:
            end = error
        finally:
            tab.jobs -= 1
            if not tab.jobs:
                tab.cancel()
            waiting.put_nowait(end)

    tab.jobs += 1
    task = asyncio.create_task(work())
    _UNDER_WAY.add(task)  # the event loop itself would forget it
    task.add_done_callback(_UNDER_WAY.discard)
    try:
        while (update := await waiting.get()) is not None:
            if isinstance(update, Exception):
                raise update
            yield update
    finally:
        read = False
