"""The real model on the first visit: offered, downloaded with progress, cancelled, chosen."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.engine.protocol import CheckpointInfo
from musicgen_ui.errors import RequestError
from musicgen_ui.ui.get_model import GetModelView, line
from musicgen_ui.ui.request_form import DEMO, REAL
from tests.helpers import hub
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import wait_for


class Note(str):
    share = 0.5


class Getting(FakeBackend):
    """The demo model is here; the real one is downloaded when it is asked for."""

    def __init__(self, fits: bool = True) -> None:
        super().__init__()
        self.fits = fits
        self.here = False
        self.go = threading.Event()
        self.error: Exception | None = None
        self.given_up = False

    def describe(self, checkpoint: str, adapter: str = "") -> CheckpointInfo:
        info = super().describe("auto")
        if checkpoint != REAL:
            return dataclasses.replace(info, checkpoint=DEMO)
        download = 0 if self.here else 2_400_000_000
        sizes = {"nbytes": 1_100_000_000, "download_bytes": download}
        return dataclasses.replace(info, checkpoint=REAL, fits=self.fits, **sizes)

    def preload(
        self, checkpoint: str = "auto", report: Callable[[str], object] | None = None
    ) -> None:
        assert checkpoint == REAL and report
        try:
            while not self.go.wait(0.01):
                report(Note("downloading: 1.20 of 2.40 GB (50%, about 4 min left)"))
        except Exception:
            self.given_up = True
            raise
        if self.error:
            raise self.error
        self.here = True


def view_of(backend: Getting) -> GetModelView:
    return GetModelView(backend, lambda: [("musicgen-small · 1.1 GB", REAL)])


def offer(view: GetModelView, put_off: bool = False) -> dict[str, Any]:
    return dict(asyncio.run(view.offer(put_off)))


@pytest.mark.parametrize(("fits", "said"), [(True, "this computer has"), (False, "more than")])
def test_offer_says_what_the_real_model_needs(fits: bool, said: str) -> None:
    told = offer(view_of(Getting(fits)))
    assert told["get_panel"]["visible"] and told["get_start"]["visible"] is fits
    assert told["get_start"]["value"] == "Get MusicGen small: 2.4 GB"
    for words in ("demo model", "2.4 GB to download", "1.1 GB of memory", said):
        assert words in told["get_line"]


def test_nothing_is_offered_once_it_is_here_or_put_off() -> None:
    backend = Getting()
    view = view_of(backend)
    assert view.put_off()["get_put_off"] is True
    assert offer(view, put_off=True) == {}
    backend.here = True
    assert offer(view) == {}


def test_download_shows_progress_and_the_model_is_chosen() -> None:
    backend = Getting()
    view = view_of(backend)
    assert view.start()["get_timer"].active
    wait_for(lambda: "50%" in view.tick()["get_line"])
    told = view.tick()
    assert 'aria-valuenow="50"' in told["get_line"] and told["get_cancel"]["visible"]
    again = offer(view)  # a page that is opened meanwhile
    assert "50%" in again["get_line"] and again["get_timer"].active
    backend.go.set()
    wait_for(lambda: "checkpoint" in view.tick())
    told = view.tick()
    assert told["checkpoint"]["value"] == REAL and not told["get_timer"].active
    assert not told["get_panel"]["visible"] and "chosen" in told["notice"]["text"]


def test_cancelled_download_is_given_up_and_offered_again() -> None:
    backend = Getting()
    view = view_of(backend)
    view.start()
    assert "Stopping" in view.cancel()["get_line"]
    wait_for(lambda: "Get MusicGen" in view.tick().get("get_start", {}).get("value", ""))
    assert backend.given_up and not view.tick()["get_timer"].active
    backend.go.set()
    view.start()
    wait_for(lambda: "checkpoint" in view.tick())


def test_failed_download_says_why_and_can_be_tried_again() -> None:
    backend = Getting()
    backend.error = RequestError("There is no network: connect and try again.")
    backend.go.set()
    view = view_of(backend)
    view.start()
    wait_for(lambda: "no network" in view.tick()["get_line"])
    told = view.tick()
    assert 'role="alert"' in told["get_line"] and told["get_start"]["visible"]


def test_real_model_comes_from_the_hub_and_is_loaded(
    tiny_mono: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.serve() as server:
        server.repositories[REAL] = tiny_mono
        hub.point_at(monkeypatch, server.url, tmp_path)
        backend = LocalBackend(device="cpu", precision="float32")
        view = GetModelView(backend, list)
        assert offer(view)["get_start"]["visible"]
        server.slow = threading.Event()  # half of the weights comes, and no more
        view.start()
        wait_for(lambda: "model.safetensors" in server.fetched())
        view.cancel()
        server.slow.set()
        wait_for(lambda: view.tick().get("get_timer") and not view.tick()["get_timer"].active)
        wait_for(lambda: not backend.status().loading)
        assert "checkpoint" not in view.tick()  # whether or not the rest came before it ended
        view.start()
        wait_for(lambda: "checkpoint" in view.tick(), 60)
        assert backend.status().loaded == (REAL,) and offer(view) == {}
        backend.close()


def test_line_is_text() -> None:
    assert "<script" not in line("<script>") and "progressbar" not in line("a")
