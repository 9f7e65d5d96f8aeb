"""The library on the page: takes that are kept, as cards, and what can be done with them.

The cards are HTML that is made here; `assets/library.js` tells which button of which card was
pressed. It is there where the library is its user's alone: elsewhere a page shows the takes of its
session, see `take_panel`.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict, TypeVar
from urllib.parse import quote

import gradio as gr
import numpy as np

from musicgen_ui import takes
from musicgen_ui.audio.clip import ENDINGS
from musicgen_ui.coercion import float_of
from musicgen_ui.errors import RequestError
from musicgen_ui.files import ASSETS
from musicgen_ui.library import Branch, Library
from musicgen_ui.library_index import Card
from musicgen_ui.take_settings import Results, TakeSettings
from musicgen_ui.ui import audio_panel, take_panel
from musicgen_ui.ui.components import LibraryPanel, Updates, notice, sent_by
from musicgen_ui.ui.player import PLAY, clock
from musicgen_ui.ui.request_form import PageFacts, Restoring
from musicgen_ui.ui.take_panel import FORMATS, Group, ShownTake

T = TypeVar("T")

PAGE = 24  # cards
POINTS = 160  # of a card's waveform at most
COMPARED = 4  # takes at once
MADE = {
    takes.Operation.CONTINUE: "continued at",
    takes.Operation.EXTEND: "extended at",
    takes.Operation.RETAKE: "retaken at",
    takes.Operation.TRIM: "trimmed from",
}


class LibraryState(TypedDict):
    """Which cards are shown, and what was just deleted."""

    start: int  # number of the first card
    tree: str  # the take whose versions are shown; "" is the list
    trash: str  # what `Library.restore` wants; "" is nothing
    deleted: str  # in words


class Change(TypedDict, total=False):
    """What a button changes of it."""

    start: int
    tree: str
    trash: str
    deleted: str


NO_STATE: LibraryState = {"start": 0, "tree": "", "trash": "", "deleted": ""}


def panel() -> LibraryPanel:
    """The components, not placed yet."""
    return LibraryPanel(
        library_words=gr.Textbox(
            label="Search the library",
            show_label=False,
            placeholder="Search titles, prompts, models …",
            max_length=200,
            elem_id="library_words",
            render=False,
        ),
        library_starred=gr.Checkbox(label="Starred", elem_id="library_starred", render=False),
        library_model=gr.Dropdown(
            [("every model", "")],
            value="",
            label="Model",
            show_label=False,
            min_width=160,
            elem_id="library_model",
            render=False,
        ),
        library_cards=gr.HTML(
            "",
            js_on_load=(ASSETS / "library.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            elem_id="library_cards",
            render=False,
        ),
        library_state=gr.State(NO_STATE, render=False),
    )


class LibraryView:
    """Answers the library's events.

    Args:
        library: what is kept.
        restoring: fills the form with a take's settings.
        spare: a folder for sounds that the player needs as WAV.
    """

    def __init__(self, library: Library, restoring: Restoring, spare: Path) -> None:
        self._library, self._restoring, self._spare = library, restoring, spare

    def models(self) -> Updates:
        """A page was opened: the models to choose from."""
        models = [("every model", ""), *((name, name) for name in self._library.models())]
        return {"library_model": gr.update(choices=models)}

    def filter(self, words: str, starred: bool, model: str) -> Updates:
        """A page was opened, or another filter chosen: the newest takes that fit it."""
        first: Updates = {"library_state": NO_STATE}
        return first | self.show(words, starred, model, NO_STATE)

    def look_again(self, words: str, starred: bool, model: str, state: LibraryState) -> Updates:
        """The cards after a take was made or changed elsewhere on the page."""
        self._library.refresh()
        return self.show(words, starred, model, state)

    def show(self, words: str, starred: bool, model: str, state: LibraryState) -> Updates:
        """The cards, as they are now."""
        library, start = self._library, state["start"]
        if state["tree"]:
            try:
                branches = library.tree(state["tree"])
            except RequestError:  # it was deleted
                return self.show(words, starred, model, state | {"tree": ""})
            return {"library_cards": tree_html(branches, state)}
        page = library.page(
            words or "", starred=starred, model=model or "", start=start, count=PAGE
        )
        if not page.cards and start:
            return self.show(words, starred, model, state | {"start": max(start - PAGE, 0)})
        cards = "".join(card_html(card, related=self._is_related(card)) for card in page.cards)
        filtered = bool(words or starred or model)
        text = list_html(cards, page.total, start, state, filtered, library.folder)
        return {"library_cards": text}

    def _is_related(self, card: Card) -> bool:
        return bool(card.parent) or len(self._library.tree(card.name)) > 1

    def act(
        self,
        event: gr.EventData,
        words: str,
        starred: bool,
        model: str,
        state: LibraryState,
        history: list[Group],
        duration_s: float,
        context_s: float,
        overlap_s: float,
        facts: PageFacts,
        *before: object,
    ) -> Updates:
        """A button of a card, or of those that are selected.

        `before` are the form's values, of `SETTINGS`, to say what taking over a take's changes.
        """
        selected, value = sent_by(event, "names"), sent_by(event, "value")
        selected = selected if isinstance(selected, list) else []
        names = [name for name in selected if isinstance(name, str)]
        changing: dict[str, Callable[[], Change]] = {
            "star": lambda: self._edit(self._library.star, names, bool(value)),
            "rename": lambda: self._edit(self._library.rename, names, str(value or "")),
            "delete": lambda: self._delete(names),
            "undo": lambda: self._undo(state),
            "page": lambda: {"start": max(round(float_of(value or 0)), 0)},
            "tree": lambda: {"tree": names[0] if names else ""},
        }
        answering: dict[str, Callable[[], Updates]] = {
            "open": lambda: self._open(history, names[:1]),
            "compare": lambda: self._open(history, names[:COMPARED]),
            "continue": lambda: self._continue(names, duration_s, context_s, overlap_s, facts),
            "settings": lambda: self._settings(names, before),
        }
        act = str(sent_by(event, "act"))
        try:
            if answer := answering.get(act):
                return answer()
            if change := changing.get(act):
                state = {**state, "trash": "", "deleted": "", **change()}
                now: Updates = {"library_state": state}
                return now | self.show(words, starred, model, state)
        except RequestError as error:
            said: Updates = {"notice": notice(str(error), wrong=True)}
            return said | self.show(words, starred, model, state)
        return {}

    def _edit(self, edit: Callable[[str, T], Card], names: Sequence[str], value: T) -> Change:
        for name in names:
            edit(name, value)
        return {}

    def _delete(self, names: Sequence[str]) -> Change:
        if not names:
            return {}
        title = self._library.card(names[0]).title
        what = f"“{title}”" if len(names) == 1 else f"{len(names)} takes"
        return {"trash": self._library.delete(names), "deleted": what}

    def _undo(self, state: LibraryState) -> Change:
        if state["trash"]:
            self._library.restore(state["trash"])
        return {}

    def shown_take(self, name: str) -> ShownTake:
        """A take of the library as the player shows it.

        Raises:
            RequestError: it is not there, or there is no room for its WAV.
        """
        card = self._library.card(name)
        wav = card.sound
        if wav.suffix != ".wav":  # the player reads WAV
            wav = self._spare / f"{name}.wav"
            if not wav.exists():
                takes.export_to(wav, card.sound)
        flac = next((file for file in card.files if file.suffix == ".flac"), None)
        # Older files do not say all.
        missing: Results = {"made_s": card.duration_s, "prompt_s": 0.0}
        missing |= {"channels": 1, "speed_x": 0.0}
        settings: TakeSettings = {**missing, **card.settings}
        return ShownTake(wav, flac, settings, edited_title=card.title)

    def _open(self, history: list[Group], names: Sequence[str]) -> Updates:
        if not names:
            return {}
        group = [self.shown_take(name) for name in names]
        paths = [take.wav for take in group]
        others = [each for each in history if [take.wav for take in each] != paths]
        return take_panel.show([*others, group], -1, 0)

    def _continue(
        self,
        names: Sequence[str],
        duration_s: float,
        context_s: float,
        overlap_s: float,
        facts: PageFacts,
    ) -> Updates:
        if not names:
            return {}
        take = self.shown_take(names[0])
        return audio_panel.with_clip(str(take.wav), duration_s, context_s, overlap_s, facts)

    def _settings(self, names: Sequence[str], before: Sequence[object]) -> Updates:
        if not names:
            return {}
        return self._restoring.settings(self._library.card(names[0]).settings, *before)


def waveform_svg(overview: np.ndarray) -> str:
    """A take's waveform as a small picture; `overview` is int8 [points, 2]."""
    points = overview.astype(int)
    if not len(points):
        return '<svg class="card-wave" viewBox="0 0 100 40" aria-hidden="true"></svg>'
    starts = np.arange(0, len(points), -(-len(points) // POINTS))
    low = np.minimum.reduceat(points[:, 0], starts)
    high = np.maximum.reduceat(points[:, 1], starts)
    scale = 19 / max(int(np.abs(points).max()), 1)
    bars = "".join(
        f"M{i} {20 - max(top * scale, 0.4):.1f}V{20 - min(bottom * scale, -0.4):.1f}"
        for i, (bottom, top) in enumerate(zip(low, high, strict=True))
    )
    return (
        f'<svg class="card-wave" viewBox="-.5 0 {len(starts)} 40" preserveAspectRatio="none" '
        f'aria-hidden="true"><path d="{bars}"/></svg>'
    )


def card_html(card: Card, related: bool, depth: int = 0, in_tree: bool = False) -> str:
    """A take of the list."""
    title = html.escape(card.title, quote=True)
    made_at = time.localtime(card.made_at)
    year = "" if made_at.tm_year == time.localtime().tm_year else f" {made_at.tm_year}"
    made = (
        f"{made_at.tm_mday} {time.strftime('%b', made_at)}{year}, {time.strftime('%H:%M', made_at)}"
    )
    facts = [clock(card.duration_s), html.escape(card.model), made]
    if card.operation in MADE:
        at = clock(card.settings.get("parent_at_s", 0.0))
        facts.insert(0, f"{MADE[takes.Operation(card.operation)]} {at}")
    file = quote(card.name, safe="")
    links = "".join(
        f'<a href="takes/{file}{ending}" download>{FORMATS.get(ending, ending)}</a>'
        for ending in ENDINGS
    )
    tree = '<button type="button" data-act="tree">Versions</button>' if related else ""
    star = "true" if card.starred else "false"
    return f"""
<li class="card" data-name="{html.escape(card.name, quote=True)}" style="--depth:{min(depth, 6)}"
  {'data-depth="1"' if depth else ""}>
  <button type="button" class="card-play" data-act="open" aria-label="Play {title}">{PLAY}</button>
  <span class="card-grip" draggable="true" title="Drag into a folder or another program">
    {waveform_svg(card.overview)}</span>
  <div class="card-words">
    <input class="card-title" value="{title}" aria-label="Title" maxlength="200" dir="auto"
      data-act="rename" autocomplete="off">
    <p class="card-facts">{" · ".join(facts)}</p>
  </div>
  <button type="button" class="card-star" data-act="star" aria-pressed="{star}"
    aria-label="Star {title}">{"★" if card.starred else "☆"}</button>
  <details class="card-more">
    <summary aria-label="More for {title}">⋯</summary>
    <div class="card-menu">
      <button type="button" data-act="continue">Continue</button>
      <button type="button" data-act="settings">Use these settings</button>
      {"" if in_tree else tree}
      <p>Download {links}</p>
      <button type="button" data-act="delete">Delete</button>
    </div>
  </details>
  <label class="card-check"><input type="checkbox" aria-label="Select {title}"></label>
</li>"""


def _said(state: LibraryState) -> str:
    """What was just deleted, with the way back."""
    if not state["trash"]:
        return ""
    return (
        f'<p class="library-said" role="status">Deleted {html.escape(state["deleted"])}. '
        '<button type="button" data-act="undo">Undo</button></p>'
    )


def selection_html() -> str:
    """What can be done with several takes; shown while some are selected."""
    formats = "".join(f'<option value="{e}">{FORMATS.get(e, e)}</option>' for e in ENDINGS)
    return f"""
<div class="library-selection" hidden>
  <span class="library-count" role="status"></span>
  <button type="button" data-act="compare">Compare</button>
  <button type="button" data-act="zip">Download as ZIP</button>
  <select aria-label="Format of the archive">{formats}</select>
  <button type="button" data-act="delete">Delete</button>
</div>"""


def list_html(
    cards: str, total: int, start: int, state: LibraryState, filtered: bool, folder: Path
) -> str:
    """A page of cards."""
    if cards:
        body = f'<ul class="cards">{cards}</ul>'
    elif filtered:
        body = '<p class="library-empty">No take fits: try other words.</p>'
    else:
        body = '<p class="library-empty">What you make appears here and stays.</p>'
    pages = ""
    if total > PAGE:
        newer = f'<button type="button" data-act="page" data-value="{max(start - PAGE, 0)}" '
        older = f'<button type="button" data-act="page" data-value="{start + PAGE}" '
        newer += "disabled>" if start == 0 else ">"
        older += "disabled>" if start + PAGE >= total else ">"
        last = min(start + PAGE, total)
        pages = (
            f'<nav class="library-pages" aria-label="Pages of the library">{newer}Newer</button>'
            f"<span>{start + 1} to {last} of {total:,}</span>{older}Older</button></nav>"
        )
    where = f'<p class="clip-line">Takes are kept in <bdi>{html.escape(str(folder))}</bdi>.</p>'
    return _said(state) + selection_html() + body + pages + where


def tree_html(branches: Sequence[Branch], state: LibraryState) -> str:
    """Takes that were made from each other, each below what it was made from."""
    cards = "".join(card_html(b.card, False, b.depth, in_tree=True) for b in branches)
    back = '<button type="button" data-act="tree" data-back="yes">← All takes</button>'
    head = f'<p class="library-tree">{back} Versions, each below what it was made from</p>'
    return _said(state) + selection_html() + head + f'<ul class="cards is-tree">{cards}</ul>'
