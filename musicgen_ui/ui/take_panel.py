"""The take: player, downloads, spectrogram and settings of what was made, and earlier takes.

A tab's history is a list of groups, one a click, each a list of takes, one a variation. Only
paths and words are kept, never samples. Functions return updates by component name.
"""

from __future__ import annotations

import html
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from musicgen_ui import spectrogram, takes
from musicgen_ui.engine.events import Finished
from musicgen_ui.request import FIELDS
from musicgen_ui.ui.live_player import ASSETS

log = logging.getLogger(__name__)

INTRO = (
    "Describe music in words, or hand over a clip to carry on, and hear it while it is made. "
    "Here is one to begin with:"
)
EXAMPLE = ASSETS / "example.json"  # beside it the FLAC, the WAV and the picture
KEPT_GROUPS = 20


@dataclass
class ShownTake:
    """A take as the page shows it."""

    wav: Path
    flac: Path
    settings: dict[str, Any]
    duration_s: float
    prompt_s: float
    speed: float
    stopped: bool = False
    notes: list[str] = field(default_factory=list)
    picture: Path | None = None  # drawn a moment after the take is shown
    alt: str = ""
    finished: takes.Take | None = None  # until the picture is drawn

    @property
    def new_s(self) -> float:
        """Seconds of new music in it."""
        return self.duration_s - self.prompt_s

    @property
    def title(self) -> str:
        """What it is called in lists."""
        prompt = self.settings.get("prompt") or "free improvisation"
        return prompt if len(prompt) <= 48 else prompt[:47].rstrip() + "…"


Group = list[ShownTake]


def shown(finished: Finished, take: takes.Take) -> ShownTake:
    """A finished variation as the page shows it, for now without its picture."""
    return ShownTake(
        wav=take.wav,
        flac=take.flac,
        settings=finished.request.settings(),
        duration_s=take.clip.duration_s,
        prompt_s=take.prompt_s,
        speed=finished.speed,
        stopped=finished.stopped,
        notes=list(take.notes),
        finished=take,
    )


def draw(take: ShownTake) -> None:
    """Draws the take's spectrogram beside its files, and lets go of the samples."""
    if take.finished is None:
        return
    finished, take.finished = take.finished, None
    try:
        picture = take.wav.with_suffix(".png")
        take.picture = spectrogram.draw(finished.clip, picture, finished.prompt_s)
        take.alt = spectrogram.alt_text(finished.clip, finished.prompt_s)
    except Exception:  # the music is what matters: it is never lost for its picture
        log.exception("The spectrogram of %s could not be drawn", take.wav.name)
        take.notes.append("The spectrogram could not be drawn.")


def example() -> ShownTake:
    """The ready-made take that the page opens with."""
    facts = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    return ShownTake(
        wav=EXAMPLE.with_suffix(".wav"),
        flac=EXAMPLE.with_suffix(".flac"),
        picture=EXAMPLE.with_suffix(".png"),
        **facts,
    )


def show(history: list[Group], which: int, variation: int) -> dict[str, Any]:
    """The updates that show one take of the history, and the lists around it."""
    group = history[which]
    take = group[variation]
    chips = [(f"{i + 1} · seed {t.settings['seed']}", i) for i, t in enumerate(group)]
    return {
        "history": history[-KEPT_GROUPS:],
        "take_title": f"### {html.escape(take.title)}",
        "take_audio": str(take.wav),
        "wav": gr.update(value=str(take.wav), interactive=True),
        "flac": gr.update(value=str(take.flac), interactive=True),
        "spectrogram": gr.update(value=take.picture and str(take.picture), alt_text=take.alt),
        "take_facts": facts_line(take),
        "take_notes": gr.update(value=notes_html(take.notes), visible=bool(take.notes)),
        "take_variation": gr.update(choices=chips, value=variation, visible=len(group) > 1),
        "take_history": gr.update(
            choices=history_choices(history),
            value=which % len(history),
            visible=len(history) > 1,
        ),
        "chosen": [which % len(history), variation],
    }


def history_choices(history: list[Group]) -> list[tuple[str, int]]:
    """Earlier clicks, the newest first."""
    labels = [
        f"{i + 1} · {g[0].title} · {g[0].duration_s:.1f} s · seed {g[0].settings['seed']}"
        for i, g in enumerate(history)
    ]
    return [(label, i) for i, label in reversed(list(enumerate(labels)))]


def facts_line(take: ShownTake) -> str:
    """The settings that made a take, those of interest first, as small labelled facts."""
    s = take.settings
    facts = [("seed", s["seed"]), ("length", f"{take.new_s:.1f} s")]
    if take.prompt_s:
        facts.append(("after your clip of", f"{take.prompt_s:.1f} s"))
    facts.append(("guidance", f"{s['guidance_scale']:g}"))
    if s["do_sample"]:
        facts += [("temperature", f"{s['temperature']:g}"), ("top-k", s["top_k"])]
        facts += [("top-p", f"{s['top_p']:g}")] if s["top_p"] else []
    else:
        facts.append(("sampling", "greedy"))
    names = ("negative_prompt", "stereo", "normalize")
    facts += [(n.replace("_", " "), s[n]) for n in names if s[n] != FIELDS[n].default]
    facts += [("model", s["checkpoint"]), ("speed", f"{take.speed:.1f}× real time")]
    cells = (
        f"<div><dt>{html.escape(n)}</dt><dd>{html.escape(str(v) if v is not True else 'on')}</dd></div>"
        for n, v in facts
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def notes_html(notes: list[str]) -> str:
    """What the visitor should know about a take."""
    return '<ul class="notes">' + "".join(f"<li>{html.escape(n)}</li>" for n in notes) + "</ul>"


def choose_variation(history: list[Group], chosen: list[int], variation: int) -> dict[str, Any]:
    """Shows another variation of the same click."""
    return show(history, chosen[0], variation) if history else {}


def choose_earlier(history: list[Group], which: int) -> dict[str, Any]:
    """Shows the takes of an earlier click."""
    return show(history, which, 0) if history else {}


def chosen_take(history: list[Group], chosen: list[int]) -> ShownTake:
    """The take on show: the example before the first one is made."""
    return history[chosen[0]][chosen[1]] if history else example()
