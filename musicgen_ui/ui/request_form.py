"""The form's answers while it is filled in: the clip, the window, stereo, settings from a file.

Nothing here starts a job. A mistake is said beside the field that it belongs to, and nothing
that was typed is lost.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr
from anyio import to_thread

from musicgen_ui.audio import load
from musicgen_ui.engine.protocol import Engine
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CHECKPOINT_FIELDS, FIELDS, MAX_DURATION_S, WINDOW_S, context_used_s
from musicgen_ui.ui.notice import notice
from musicgen_ui.ui.restoring import section_rows, settings_of
from musicgen_ui.ui.take_panel import Group, chosen_take

CONTINUE, FOLLOW = "continue it", "follow its melody"  # what a clip is for
SOON_S, LATER_S = 3.0, 60.0  # until a tab asks again what is loaded, and where that is settled
STEREO_INFO = {
    "choice": "left and right channel, from the model's stereo sibling",
    "always": "this model always makes stereo",
    "never": "this model has no stereo sibling",
}


def read_clip(
    path: str | None, duration_s: float, context_s: float, overlap_s: float, clip: dict
) -> dict[str, Any]:
    """Checks a clip as soon as it is there: what it is, what of it will be heard, or what is wrong.

    `clip` is what is known of the last one; the answer's "clip" replaces it.
    """
    if not path:
        # A refused clip is taken out of its field, which brings us here again: keep the sentence.
        kept = clip if clip.get("refused") else {}
        line = clip_line(kept, duration_s, context_s, overlap_s)
        return {"clip": {}, "clip_line": line, **no_offer()}
    try:
        reading = load.read(Path(path))
    except RequestError as error:
        clip = {"refused": str(error)}
        line = clip_line(clip, duration_s, context_s, overlap_s)
        return {"clip": clip, "audio_prompt": None, "clip_line": line, **no_offer()}
    clip = {"full_s": reading.full_s, "clip_s": reading.clip.duration_s, "notes": reading.notes}
    line = clip_line(clip, duration_s, context_s, overlap_s)
    return {"clip": clip, "clip_line": line, **offer(Path(path))}


def clip_line(clip: dict, duration_s: float, context_s: float, overlap_s: float) -> str:
    """How much of the clip the model will hear beside the new music, as HTML."""
    if refused := clip.get("refused"):
        return f'<p class="clip-line wrong" role="alert">{html.escape(refused)}</p>'
    if not clip:
        return '<p class="clip-line">Your clip is carried on from its end.</p>'
    duration_s = duration_s or 0  # an emptied field
    used_s = context_used_s(clip["clip_s"], context_s, duration_s, overlap_s)
    parts = [f"last {used_s:.1f} s of {clip['full_s']:.1f} s", f"{duration_s:.1f} s new"]
    if used_s + duration_s > WINDOW_S + 0.05:
        parts.append(f"{WINDOW_S:g} s at a time")
    elif used_s + duration_s >= WINDOW_S - 0.05:
        parts.append(f"the {WINDOW_S:g} s window is full")
    text = ", ".join(parts)
    notes = "".join(f"<br>{html.escape(note)}" for note in clip.get("notes", ()))
    return f'<p class="clip-line">{text}{notes}</p>'


def offer(path: Path) -> dict[str, Any]:
    """Offers a take's own settings where the file holds them."""
    settings = settings_of(path)
    if not settings:
        return no_offer()
    label = f"This is a take with seed {settings.get('seed', '?')}: use its settings"
    return {"offer": gr.update(value=label, visible=True), "offered": settings}


def no_offer() -> dict[str, Any]:
    """Nothing to take settings from."""
    return {"offer": gr.update(visible=False), "offered": {}}


def add_section(rows: list[list[Any]]) -> dict[str, Any]:
    """Gives the table of sections another row."""
    return {"sections": section_rows(rows)}


def same_seed(
    history: list[Group], chosen: list[int], variation: int | None = None
) -> dict[str, Any]:
    """Takes over the seed of the chosen take, and says that it stays."""
    seed = chosen_take(history, chosen, variation).settings["seed"]
    text = f"Seed {seed} is set: every take from now on uses it. -1 under Seed draws a new one."
    return {"seed": seed, "notice": notice(text)}


def continue_take(
    history: list[Group],
    chosen: list[int],
    duration_s: float,
    context_s: float,
    overlap_s: float,
    variation: int | None = None,
) -> dict[str, Any]:
    """Makes the chosen take the clip to continue."""
    take = chosen_take(history, chosen, variation)
    if take.wav is None:
        return {}  # it could not be saved: its notes say so
    filled = with_clip(str(take.wav), duration_s, context_s, overlap_s)
    return {**filled, "clip_use": CONTINUE}


def with_clip(path: str, duration_s: float, context_s: float, overlap_s: float) -> dict[str, Any]:
    """Fills a clip in, checked, and opens its fold: a field in a closed one tells of no change."""
    filled = {"audio_prompt": path, "audio_panel": gr.update(open=True)}
    return filled | read_clip(path, duration_s, context_s, overlap_s, {})


def checkpoint_line(summary: str, kept: dict[str, Any] | None = None) -> str:
    """What a checkpoint is, and what it states that the form does not show, as HTML."""
    words = {True: "on", False: "off"}
    own = [
        f"{FIELDS[name].metadata['label'].lower()} {words[v] if v in (True, False) else f'{v:g}'}"
        for name, v in (kept or {}).items()
    ]
    parts = [summary, *([f"made for {', '.join(own)}; yours is kept"] if own else [])]
    return f'<p class="clip-line">{html.escape(" · ".join(parts))}</p>'


def follow(facts: dict[str, Any], own: dict[str, Any], *values: Any) -> dict[str, Any]:
    """The settings that the chosen checkpoint states, in place of those that the last one did.

    Args:
        facts: of the chosen checkpoint.
        own: what followed the last checkpoint; a value that isn't so any more is the user's, and
            stays.
        values: the form's, of `CHECKPOINT_FIELDS`.
    """
    if not facts:  # there is no such checkpoint
        return {}
    stated = facts["defaults"]
    now = {name: stated.get(name, FIELDS[name].default) for name in CHECKPOINT_FIELDS}
    now["duration_s"] = min(now["duration_s"], facts["longest_s"])
    shown = dict(zip(CHECKPOINT_FIELDS, values, strict=True))
    free = {name for name in own if shown[name] == own[name]}
    kept = {name: now[name] for name in stated if name not in free and shown[name] != now[name]}
    # Only what is new: while this answer is on its way the user may change the others.
    told = {"own": now, **{name: now[name] for name in free if now[name] != shown[name]}}
    # Said again only where there is more to say: the next choice may have been answered already.
    return told | ({"checkpoint_line": checkpoint_line(facts["summary"], kept)} if kept else {})


class CheckpointFacts:
    """What the page says about a checkpoint; asking may take a while, so it is done in a thread."""

    def __init__(self, engine: Engine, longest_s: float = MAX_DURATION_S) -> None:
        self.engine = engine
        self.longest_s = longest_s

    async def choose(self, checkpoint: str) -> dict[str, Any]:
        """The stereo toggle, the line under a chosen checkpoint, and what it states."""
        try:
            facts = await to_thread.run_sync(self.engine.describe, (checkpoint or "auto").strip())
        except RequestError as error:
            text = f'<p class="clip-line wrong" role="alert">{html.escape(str(error))}</p>'
            return {"checkpoint_line": text, "facts": {}}
        toggle: dict[str, Any] = {
            "info": STEREO_INFO[facts.stereo],
            "interactive": facts.stereo == "choice",
        }
        if facts.stereo != "choice":
            toggle["value"] = facts.stereo == "always"
        return {
            "checkpoint_line": checkpoint_line(facts.summary),
            "stereo": gr.update(**toggle),
            "facts": {
                "summary": facts.summary,
                "defaults": facts.defaults,
                "melody": facts.melody,
                "longest_s": self.longest_s,
            },
        }

    async def load(self) -> dict[str, Any]:
        """What only the engine knows when the page opens: the checkpoints, facts of the first."""
        names = await to_thread.run_sync(self.engine.checkpoints)
        return {"checkpoint": gr.update(choices=names)} | await self.choose(names[0])

    def status(self) -> str:
        """The line in the page's head."""
        return f'<span class="engine">{html.escape(self.engine.status())}</span>'

    def tick(self) -> dict[str, Any]:
        """The line, and when to look again: every tab asks, and few things change."""
        loads = not self.engine.health().models and "nothing loaded" not in self.engine.status()
        return {"engine": self.status(), "timer": gr.Timer(SOON_S if loads else LATER_S)}

    async def unload(self) -> str:
        """Gives memory back and says what is loaded now."""
        await to_thread.run_sync(self.engine.unload)
        return self.status()
