"""What a browser's tab finds again after it lost its connection or was loaded anew.

Gradio forgets a page whose connection breaks: its job ends, and when the connection is back the
browser loads a new page that knows nothing. So a tab keeps a key of its own, which nobody can
guess, in the browser's session storage, and its takes are remembered under that key. A job whose
page is gone goes on for a while; the page that comes back in time is told of it and shows the take
when it is done. A page that is closed says so, and its jobs end soon.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import OrderedDict
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
KEY = re.compile("[0-9a-f]{32}")

ENTER = """() => {
  if (!/^[0-9a-f]{32}$/.test(sessionStorage.musicgen || '')) {
    const random = crypto.getRandomValues(new Uint8Array(16));
    sessionStorage.musicgen = Array.from(random, (b) => b.toString(16).padStart(2, '0')).join('');
  }
  addEventListener('pagehide', () => navigator.sendBeacon('left', sessionStorage.musicgen));
  return [sessionStorage.musicgen];
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

    sessions: list[str] = field(default_factory=list)  # Gradio's names of its pages, the last last
    history: list[Group] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # of the last click
    jobs: int = 0  # under way
    news: bool = False  # a take was finished that no page has shown
    timer: threading.Timer | None = None  # stops its jobs

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

    def enter(self, session: str, key: str) -> Tab | None:
        """A page was opened; the tab that it is in, None for a key that no page makes."""
        if not KEY.fullmatch(key or ""):
            return None
        tab = self._tabs.setdefault(key, Tab())
        self._tabs.move_to_end(key)
        self._keys[session] = key
        tab.sessions.append(session)
        for gone in tab.sessions[:-4]:  # a tab that was loaded anew many times
            self._keys.pop(gone, None)
            tab.sessions.remove(gone)
        tab.cancel()
        while len(self._tabs) > TABS:
            self._forget(next(iter(self._tabs)))
        return tab

    def of(self, session: str) -> Tab | None:
        """The tab that shows, or showed, a page."""
        return self._tabs.get(self._keys.get(session, ""))

    def lost(self, session: str) -> None:
        """A page's connection has ended: its jobs do after a while, unless its tab comes back."""
        tab = self.of(session)
        if tab is None:
            self._stop(session)
        elif tab.sessions[-1] == session and tab.timer is None:
            self._stop_after(tab, GRACE_S if self._grace else 0.0)

    def left(self, key: str) -> None:
        """A tab closed its page: its jobs end soon, unless it opens another."""
        if tab := self._tabs.get(key):
            tab.cancel()
            self._stop_after(tab, LEFT_S if self._grace else 0.0)

    def stop(self, session: str) -> int:
        """Asks the jobs of a page's tab to stop, those of its earlier pages too; how many."""
        tab = self.of(session)
        sessions = tab.sessions if tab else [session]
        return sum(map(self._stop, sessions))

    def route(self) -> Route:
        """Where a page says that it is closed."""

        async def left(request: Request) -> Response:
            self.left((await request.body())[:64].decode("ascii", "replace"))
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
