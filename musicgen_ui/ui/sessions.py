"""What a browser's tab finds again after it lost its connection or was loaded anew.

Gradio forgets a page whose connection breaks: its job ends, and when the connection is back the
browser loads a new page that knows nothing. So a tab keeps a key of its own, which nobody can
guess, in the browser's session storage, and its takes are remembered under that key. A job whose
page is gone goes on for a while; the page that comes back in time is told of it and shows the take
when it is done. A page that is closed says so, and its tab's jobs end soon, unless another page of
the tab is open: browsers copy the key into a duplicated tab.
"""

from __future__ import annotations

import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from musicgen_ui.backends.admission import Admission, AdmittedJob
from musicgen_ui.ui.take_panel import KEPT_GROUPS, Group

GRACE_S = 60.0  # that a job goes on whose page lost its connection
LEFT_S = 10.0  # and one whose page was closed: loading it anew takes a slow computer some seconds
TABS = 1000  # remembered: the one longest unseen goes first
KEY = re.compile("([0-9a-f]{32})([0-9a-f]{32})?")  # a tab's, and one of the page in it
SESSIONS_KEPT = 8  # pages of a tab, open or not

# What a page is given when it opens may come late. It must not replace a take that the page made
# meanwhile: a click that makes a take waits. In the page's head, so that no click is too early.
HOLD = """(() => {
  let waiting = null;
  const hold = (event) => {
    const button = event.target.closest?.('#generate, #retake, #extend, #live_start');
    if (!button) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    waiting = button;
  };
  addEventListener('click', hold, true);
  window.musicgenEntered = () => {
    removeEventListener('click', hold, true);
    waiting?.click();
  };
})();"""
ENTER = """() => {
  const random = () => Array.from(
    crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, '0')).join('');
  if (!/^[0-9a-f]{32}$/.test(sessionStorage.musicgen || '')) sessionStorage.musicgen = random();
  const name = sessionStorage.musicgen + random();
  addEventListener('pagehide', () => navigator.sendBeacon('left', name));
  return [name];
}"""

# The form lies in the browser alone: it is there at once when the page opens, so that no late
# answer replaces what the user did meanwhile, and after the server was started anew. Nothing is
# kept before what was kept is read, since the page fills its fields in while it opens.
RESTORE = """(...form) => {
  const kept = JSON.parse(sessionStorage.musicgenForm || '[]');
  const fits = kept.length === form.length;
  window.musicgenForm = true;
  window.musicgenNow = fits ? kept : form;
  return fits ? kept : [];
}"""
KEEP = """(...form) => {
  window.musicgenNow = form;
  if (window.musicgenForm) sessionStorage.musicgenForm = JSON.stringify(form);
  return [];
}"""
ENTERED = "() => { window.musicgenEntered?.(); return []; }"
BACK = """(live) => {
  const cut_off = sessionStorage.musicgenBusy && !live;
  addEventListener('pagehide', () => {
    const message = window.musicgenPlayer?.state;
    sessionStorage.musicgenBusy = message && !message.last ? 'yes' : '';
  });
  return [cut_off ? CUT_OFF : live];
}"""


@dataclass(eq=False)
class Tab:
    """One tab of a browser, whichever page it shows."""

    address: str = ""  # of its client
    sessions: list[str] = field(default_factory=list)  # Gradio's names of its pages, in order
    open: dict[str, str] = field(default_factory=dict)  # its open pages' keys, by session
    history: list[Group] = field(default_factory=list)
    jobs: list[AdmittedJob] = field(default_factory=list)  # whose end no page has shown
    timer: threading.Timer | None = None  # stops its jobs

    @property
    def holds_something(self) -> bool:
        """Whether there is anything to find again."""
        return bool(self.history or self.jobs)

    @property
    def job(self) -> AdmittedJob | None:
        """The last of its jobs whose end no page has shown."""
        return self.jobs[-1] if self.jobs else None

    @property
    def is_busy(self) -> bool:
        """A job of it is under way."""
        return any(not job.ended for job in self.jobs)

    def end(
        self, job: AdmittedJob, group: Group | None = None, history: Sequence[Group] = ()
    ) -> list[Group]:
        """A page shows the end of a job; the history with its takes.

        Args:
            job: that has ended.
            group: its takes.
            history: that the page shows; the tab's own where it shows none.
        """
        if job in self.jobs:
            self.jobs.remove(job)
            if group:
                self.history = [*(history or self.history), group][-KEPT_GROUPS:]
        if not self.is_busy:
            self.cancel()
        return self.history

    def begin(self, job: AdmittedJob) -> None:
        """A page of it has a new job."""
        self.jobs.append(job)

    def take_over(self, other: Tab) -> None:
        """The jobs and takes of a page that had not said yet which tab it is in."""
        self.jobs += other.jobs
        self.history = [*self.history, *other.history][-KEPT_GROUPS:]

    def cancel(self) -> None:
        """Lets its jobs go on."""
        if self.timer:
            self.timer.cancel()
            self.timer = None


class Sessions:
    """The tabs that were here. Its methods may be called from any thread.

    Args:
        backend: whose jobs they have.
        grace: whether a job goes on for a while whose page is gone.
    """

    def __init__(self, backend: Admission, grace: bool = True) -> None:
        self._backend, self._grace = backend, grace
        self._tabs: OrderedDict[str, Tab] = OrderedDict()  # by key
        self._keys: dict[str, str] = {}  # by session
        self._lock = threading.RLock()  # guards both

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
        with self._lock:
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
            idle = [key for key, tab in self._tabs.items() if not tab.is_busy][:-1]
            if not idle:
                return
            tabs = self._tabs
            self._forget(min(idle, key=lambda k: (tabs[k].holds_something, -of[tabs[k].address])))

    def of(self, session: str) -> Tab | None:
        """The tab that shows, or showed, a page."""
        with self._lock:
            return self._tabs.get(self._keys.get(session, ""))

    def job(self, id: str, session: str) -> AdmittedJob | None:
        """A job by its id, for a page of the tab that asked for it."""
        job = self._backend.job(id)
        if job is None or not session:
            return None
        tab = self.of(session)
        is_same_tab = tab is not None and tab is self.of(job.owner.session)
        return job if is_same_tab or job.owner.session == session else None

    def lost(self, session: str) -> None:
        """A page's connection has ended: its jobs do after a while, unless its tab comes back."""
        tab = self.of(session)
        if tab is None:
            self._backend.leave(session)
            return
        with self._lock:
            tab.open.pop(session, None)
            if not tab.open and tab.timer is None:
                self._stop_after(tab, GRACE_S if self._grace else 0.0)

    def left(self, key: str) -> None:
        """A page was closed: its tab's jobs end soon, unless the tab shows or opens another."""
        keys = KEY.fullmatch(key)
        with self._lock:
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
        """Stops the jobs of a page; where it has none, those it shows of its tab's other pages.
        How many.
        """
        tab, stop = self.of(session), self._backend.stop
        return stop(session) or sum(map(stop, tab.sessions if tab else ()))

    def route(self) -> Route:
        """Where a page says that it is closed."""

        async def left(request: Request) -> Response:
            self.left((await request.body())[:65].decode("ascii", "replace"))
            return Response(status_code=204)

        return Route("/left", left, methods=["POST"])

    def _stop_after(self, tab: Tab, seconds: float) -> None:
        if not tab.is_busy:
            return
        stop = self._backend.stop
        tab.timer = threading.Timer(seconds, lambda: [stop(s) for s in tuple(tab.sessions)])
        tab.timer.daemon = True
        tab.timer.start()

    def _forget(self, key: str) -> None:
        tab = self._tabs.pop(key)
        tab.cancel()
        for session in tab.sessions:
            self._keys.pop(session, None)
            self._backend.stop(session)
