"""One server with the bundled checkpoint for all, and one browser at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import webdriver
from tests.helpers.browser import serving
from tests.helpers.webdriver import Tab


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browsers)


@pytest.fixture(scope="session")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the server keeps takes."""
    return tmp_path_factory.mktemp("music")


@pytest.fixture(scope="session")
def url(music: Path) -> Iterator[str]:
    with serving(checkpoint="bundled", device="cpu", output_folder=str(music)) as url:
        yield url


@pytest.fixture(scope="session", params=["firefox", "webkit"])
def browser(request: pytest.FixtureRequest) -> Iterator[Tab]:
    if what := webdriver.missing(request.param):
        pytest.skip(f"needs {what}: docs/contributing.md says what to install")
    with webdriver.started(request.param) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab, url: str) -> Iterator[Tab]:
    """The page, as on a first visit; errors of its scripts fail the test."""
    browser.driver.get(url)
    browser.driver.execute_script("localStorage.clear(); sessionStorage.clear()")
    browser.open(url)
    yield browser
    errors = browser.js("errors")
    browser.driver.get("about:blank")
    assert errors == []
