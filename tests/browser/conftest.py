"""One Chromium and one server for all journeys; a fresh browser context for each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.helpers.browser import Open, serving, settled
from tests.helpers.fakes import FakeBackend

# Chromium loads two pages of its address bar into each window, which cost more than ours. It obeys
# the last list of features alone, so what Playwright turns off stands here too.
NO_FEATURES = (
    "WebUIOmniboxPopup,WebUIOmniboxAimPopup,AimEnabled,AvoidCorsURLLoaderRestartOnRedirect,"
    "AvoidUnnecessaryBeforeUnloadCheckSync,DestroyProfileOnBrowserClose,HttpsUpgrades,LensOverlay,"
    "HttpsFirstBalancedModeAutoEnable,MediaRouter,NetworkTimeServiceQuerying,OptimizationHints,"
    "PaintHolding,PreconnectToSearch,ThirdPartyStoragePartitioning"
)
ARGUMENTS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--autoplay-policy=no-user-gesture-required", f"--disable-features={NO_FEATURES}"),
]
SCREENS = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
# What the browser logs when the page refuses a form (422), a file that is no audio or too large,
# and when a server ends before its page does.
REFUSED = ("422", "Waveform load error", "413", "Response", "ERR_INCOMPLETE_CHUNKED_ENCODING")
# A connection that a test breaks, and what a page asks a server that has ended.
REFUSED += ("ERR_CONNECTION_RESET", "ERR_CONNECTION_REFUSED")
REFUSED += ("AbortError", "errored out")  # streams that end with a page that is loaded anew

Used = defaultdict[tuple[Browser, str, str], list[BrowserContext]]


@pytest.fixture(scope="package")
def running_chromium() -> Iterator[Callable[[], Browser]]:
    """Gives the one Chromium; another after it crashed."""
    expect.set_options(timeout=20_000)  # a busy machine is slow, not wrong
    browsers: list[Browser] = []

    with sync_playwright() as playwright:

        def running() -> Browser:
            if not browsers or not browsers[-1].is_connected():
                browsers.append(
                    playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
                )
            return browsers[-1]

        yield running
        for browser in browsers:
            browser.close()


@pytest.fixture
def chromium(running_chromium: Callable[[], Browser]) -> Browser:
    return running_chromium()


@pytest.fixture(scope="package")
def served() -> Iterator[tuple[str, FakeBackend]]:
    engine = FakeBackend()
    with serving(engine) as url:
        yield url, engine


@pytest.fixture
def engine(served: tuple[str, FakeBackend]) -> Iterator[FakeBackend]:
    """The engine behind the page, back to its usual speed afterwards."""
    engine = served[1]
    engine.speed, engine.failure = 8.0, None
    return engine


@pytest.fixture(scope="package")
def used() -> Used:
    """Contexts that `open_page` may use again."""
    return defaultdict(list)


@pytest.fixture
def open_page(
    request: pytest.FixtureRequest,
    chromium: Browser,
    used: Used,
    served: tuple[str, FakeBackend],
    engine: FakeBackend,
) -> Iterator[Open]:
    """Opens the page in a context of its own; anything odd in the browser fails the test.

    Pages of the usual server have contexts of earlier tests, without what was stored there: they
    hold the page's scripts, and loading and compiling them is a third of what opening it costs.
    """
    if getattr(request.node, "execution_count", 1) > 1:  # a test that failed and is run again
        used.clear()
    taken: list[tuple[BrowserContext, list[BrowserContext] | None]] = []
    odd: list[str] = []

    def open_one(
        screen: str = "desk", scheme: str = "light", url: str = served[0], script: str = ""
    ) -> Page:
        idle = used[chromium, screen, scheme] if url == served[0] else None
        context = (
            idle.pop()
            if idle
            else chromium.new_context(
                viewport=SCREENS[screen], color_scheme=scheme, has_touch=screen == "phone"
            )
        )
        taken.append((context, idle))
        page = context.new_page()
        context.clear_cookies()
        stored = {"origin": url.rstrip("/"), "storageTypes": "all"}
        context.new_cdp_session(page).send("Storage.clearDataForOrigin", stored)
        page.add_init_script(script)  # before the page's own
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: odd.append(str(error)))
        page.on("console", lambda m: odd.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: odd.append(r.url) if outside(r.url, url) else None)
        page.goto(url)
        settled(page)
        return page

    yield open_one
    for context, idle in taken:
        if idle is None:
            context.close()
            continue
        for page in context.pages:
            page.close()
        idle.append(context)
    assert [what for what in odd if not any(known in what for known in REFUSED)] == []


def outside(address: str, url: str) -> bool:
    """Whether the page asks another server for something."""
    return not address.startswith((url, "data:", "blob:"))
