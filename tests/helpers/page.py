"""The handlers of the page, driven as a browser drives them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from musicgen_ui.backends.admission import Admission
from musicgen_ui.request import FIELDS
from musicgen_ui.ui.handlers import Handlers
from tests.helpers.fakes import FakeBackend

TAB = SimpleNamespace(session_hash="a")


def values(**changes: Any) -> dict[str, Any]:
    form_values = {name: spec.default for name, spec in FIELDS.items()}
    return form_values | {"duration_s": 1.0, "seed": 7} | changes


@pytest.fixture
def handlers(tmp_path: Path) -> Handlers:
    return Handlers(Admission(FakeBackend(), tmp_path, queue_length=3))


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = tmp_path / "clip.wav"
    soundfile.write(path, 0.1 * np.sin(np.arange(80_000) / 20), 16_000)
    return str(path)


def compose(
    handlers: Handlers, history: Any = (), given: Any = None, **changes: Any
) -> list[dict[str, Any]]:
    """What a click on Generate shows, until its takes have landed in the history."""

    async def run() -> list[dict[str, Any]]:
        click = handlers.compose(given or {}, TAB, **values(**changes))
        updates = [update async for update in click]
        return updates + await land(handlers, updates, history)

    return asyncio.run(run())


async def land(
    handlers: Handlers,
    updates: list[dict[str, Any]],
    history: Any = (),
    page: Any = TAB,
    elsewhere: bool = False,
) -> list[dict[str, Any]]:
    """What the page shows of the jobs that have ended."""
    landed = state(updates).get("landed")
    if not landed:
        return []
    event = handlers.land(landed, list(history), [0, 0], elsewhere, page)
    return [update async for update in event]


def state(updates: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows after all updates."""
    return {name: value for update in updates for name, value in update.items()}
