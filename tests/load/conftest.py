"""Crowds: a short one with every run of the tests, the long ones when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.visits import Server, server


@pytest.fixture(scope="session")
def few_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two places and six takes at most, so that a few clients are a crowd."""
    with server(tmp_path_factory.mktemp("few"), "--jobs", "2", "--queue-length", "6") as running:
        yield running


@pytest.fixture
def usual(tmp_path: Path) -> Iterator[Server]:
    """A server as it comes, for one test alone."""
    with server(tmp_path) as running:
        yield running
