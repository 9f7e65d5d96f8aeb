"""The library's cards, and what their buttons do."""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest

from musicgen_ui import files, sidecar, takes
from musicgen_ui.backends.admission import Admission
from musicgen_ui.errors import RequestError
from musicgen_ui.library import Library
from musicgen_ui.request import FIELDS
from musicgen_ui.ui import library_panel, take_panel
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.library_panel import NO_STATE, LibraryView
from musicgen_ui.ui.request_form import SETTINGS, Restoring
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import wait_for
from tests.helpers.page import TAB, compose, land, state
from tests.helpers.takes import finished, with_codes

NAME = re.compile(r'class="card" data-name="([^"]+)"')
WINDOW = (10.0, 0.0, 12.0)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    library = Library(tmp_path / "takes", tmp_path / "index.sqlite3")
    yield library
    library.close()


@pytest.fixture
def view(library: Library, tmp_path: Path) -> LibraryView:
    return LibraryView(library, Restoring(), tmp_path / "spare")


def save(library: Library, seconds: float = 0.5, **settings: Any) -> str:
    name = takes.save(with_codes(finished(seconds=seconds, **settings)), library.folder).wav.stem
    library.refresh()
    return name


def act(view: LibraryView, now: dict[str, Any], act: str, *names: str, value: Any = None) -> Any:
    event = gr.EventData(None, {"act": act, "names": list(names), "value": value})
    form = [FIELDS[name].default for name in SETTINGS]
    return view.act(event, "", False, "", now, [], *WINDOW, {}, *form)


def shown(updates: Any) -> list[str]:
    return NAME.findall(updates["library_cards"])


def test_cards_escape_what_was_typed(view: LibraryView, library: Library) -> None:
    save(library, prompt='<img src=x> "quoted" & more')
    text = view.filter("", False, "")["library_cards"]
    assert "<img" not in text and 'value="&lt;img src=x&gt; &quot;quoted&quot; &amp; more"' in text


def test_cards_come_in_pages(
    view: LibraryView, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_panel, "PAGE", 2)
    for seed in range(5):
        save(library, prompt=f"take {seed}", seed=seed)
    first = view.filter("", False, "")
    models = view.models()["library_model"]["choices"]
    assert models == [("every model", ""), ("bundled", "bundled")]
    assert len(shown(first)) == 2 and "1 to 2 of 5" in first["library_cards"]
    last = act(view, NO_STATE, "page", value="4")
    assert len(shown(last)) == 1 and last["library_state"]["start"] == 4
    # The page that a filter or a deletion has emptied is not the one that is shown.
    gone = act(view, last["library_state"], "delete", *shown(last))
    assert "3 to 4 of 4" in gone["library_cards"]
    assert "No take fits" in view.filter("no such words", False, "")["library_cards"]


def test_delete_is_undone(view: LibraryView, library: Library) -> None:
    names = {save(library, prompt="one"), save(library, prompt="two")}
    deleted = act(view, NO_STATE, "delete", *names)
    assert not shown(deleted) and "Deleted 2 takes" in deleted["library_cards"]
    again = act(view, deleted["library_state"], "undo")
    assert set(shown(again)) == names and "Undo" not in again["library_cards"]


def test_title_and_star_are_edited_in_place(view: LibraryView, library: Library) -> None:
    name = save(library, prompt="jazz")
    assert 'aria-pressed="true"' in act(view, NO_STATE, "star", name, value=True)["library_cards"]
    act(view, NO_STATE, "rename", name, value=" Closing  theme ")
    assert (library.card(name).title, library.card(name).starred) == ("Closing theme", True)


def test_a_take_that_is_gone_is_said(view: LibraryView) -> None:
    for what in ("open", "star", "delete", "settings", "continue", "compare"):
        assert "not there any more" in act(view, NO_STATE, what, "gone")["notice"]["text"]
    assert act(view, NO_STATE, "format the disk", "gone") == {}


def test_opened_take_is_on_show_with_its_title(view: LibraryView, library: Library) -> None:
    name = save(library, prompt="jazz")
    library.rename(name, "Closing theme")
    updates = act(view, NO_STATE, "open", name)
    assert updates["take_audio"]["id"] == name and updates["compare"] is None
    assert "Closing theme" in updates["take_title"]["value"]
    assert len(updates["history"]) == 1
    settings = act(view, NO_STATE, "settings", name)
    assert settings["prompt"] == "jazz" and settings["seed"] == 7
    assert settings["notice"]["undo"] == "settings"
    assert "Prompt: “jazz” instead of nothing." in settings["notice"]["items"]
    assert act(view, NO_STATE, "continue", name)["audio_prompt"].endswith(f"{name}.wav")


def test_flac_alone_is_played(view: LibraryView, library: Library) -> None:
    name = save(library, prompt="jazz")
    (library.folder / f"{name}.wav").unlink()
    library.refresh()
    take = view.shown_take(name)
    assert (
        take.wav is not None and takes.read_settings(take.wav) and take.wav.parent.name == "spare"
    )


def test_compared_takes_have_one_loudness(view: LibraryView, library: Library) -> None:
    loud, quiet = save(library, level=0.4, prompt="a"), save(library, level=0.1, prompt="b")
    strips = act(view, NO_STATE, "compare", loud, quiet)["compare"]["takes"]
    assert [strip["label"] for strip in strips] == ["a", "b"]
    assert strips[0]["gain_db"] == pytest.approx(-12, abs=0.5) and strips[1]["gain_db"] == 0
    levels = [strip["lufs"] + strip["gain_db"] for strip in strips]
    assert levels[0] == pytest.approx(levels[1], abs=0.11)


def test_waveform_is_small_and_whole() -> None:
    points = np.stack([-np.arange(1000) % 100, np.arange(1000) % 100], 1).astype(np.int8)
    drawn = library_panel.waveform_svg(points)
    assert drawn.count("M") <= library_panel.POINTS and len(drawn) < 4000
    assert "path" not in library_panel.waveform_svg(np.zeros((0, 2), np.int8))


@pytest.fixture
def handlers(library: Library) -> Handlers:
    return Handlers(Admission(FakeBackend(), library.folder))


def remade(handlers: Handlers, call: Any, history: Any) -> dict[str, Any]:
    async def run() -> list[Any]:
        updates = [update async for update in call]
        return updates + await land(handlers, updates, history)

    end = state(asyncio.run(run()))
    wait_for(lambda: not len(handlers.backend))
    return end


def test_retake_keeps_what_was_before_it(handlers: Handlers, library: Library) -> None:
    first = state(compose(handlers, prompt="calm", duration_s=4))
    request: Any = TAB
    end = remade(
        handlers, handlers.retake_from(first["history"], [0, 0], 0, 2.0, request), first["history"]
    )
    made = end["history"][-1][0].settings
    assert (made["operation"], made["parent_at_s"]) == ("retake", 2.0)
    assert made["parent"] == first["history"][0][0].settings["id"]
    assert made["prompt_s"] + made["made_s"] == pytest.approx(4, abs=0.1)
    longer = remade(
        handlers, handlers.extend(end["history"], [1, 0], None, request), end["history"]
    )
    made = longer["history"][-1][0].settings
    assert (made["operation"], made["made_s"]) == ("extend", take_panel.EXTEND_S)
    library.refresh()
    name = longer["history"][-1][0].wav.stem
    assert [branch.depth for branch in library.tree(name)] == [0, 1, 2]


def test_retake_refuses_what_cannot_be(handlers: Handlers) -> None:
    first = state(compose(handlers, prompt="calm", duration_s=2))
    request: Any = TAB

    async def refused(call: Any) -> None:
        with pytest.raises(gr.Error, match=r"cannot begin|at most"):
            await anext(call)

    asyncio.run(refused(handlers.retake_from(first["history"], [0, 0], 0, 1.99, request)))
    handlers.max_duration_s = 5
    asyncio.run(refused(handlers.extend(first["history"], [0, 0], 0, request)))
    assert not len(handlers.backend)


def test_export_shapes_the_take_on_show(handlers: Handlers, tmp_path: Path) -> None:
    handlers.backend.spare = tmp_path / "spare"
    first = state(compose(handlers, prompt="calm", duration_s=4, tempo_bpm=120))
    path = handlers.export(first["history"], [0, 0], 0, ".mp3", 1, 0)["exported"]["value"]
    settings = takes.read_settings(path)
    assert path.endswith("-loop-1-bars.mp3") and settings and settings["loop_bars"] == 1
    refused = handlers.export(first["history"], [0, 0], 0, ".wav", 99, 0)
    assert refused["notice"]["wrong"] and "99 bars" in refused["notice"]["text"]


def test_kept_take_has_a_star_and_stands_alone(handlers: Handlers, library: Library) -> None:
    first = state(compose(handlers, prompt="calm", variations=2))
    assert len(first["compare"]["takes"]) == 2 and first["keep_take"]["visible"]
    library.refresh()
    kept = take_panel.keep(first["history"], [0, 1], 1, library.star)
    (card,) = library.page(starred=True).cards
    assert card.settings["seed"] == first["history"][0][1].settings["seed"]
    assert kept["compare"] is None and sidecar.read(sidecar.beside(card.sound)).starred  # type: ignore[union-attr]


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_export_that_finds_no_room_says_so(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = state(compose(handlers))
    monkeypatch.setattr(files, "replace", refuse)
    answer = handlers.export(made["history"], [0, 0], 0, ".flac", 0, 0)
    assert "the disk is full" in answer["notice"]["text"]


def test_take_that_finds_no_room_for_its_wav_says_so(
    view: LibraryView, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = save(library)
    (library.folder / f"{name}.wav").unlink()
    library.refresh()
    monkeypatch.setattr(files, "replace", refuse)
    with pytest.raises(RequestError, match="the disk is full"):
        view.shown_take(name)
