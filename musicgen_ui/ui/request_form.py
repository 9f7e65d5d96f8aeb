"""The form's answers: seed, sections, the chosen checkpoint, settings that come back.

Nothing here starts a job, and nothing that was typed is lost.

Settings come back from a file or to a page that is opened again. A file may come from another
server or from the command line, so it may hold what this server does not take. Such a value is
brought to the nearest that it does, and the user is told which: what the form shows is what the
next take is made with.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import TypedDict, cast

import gradio as gr
from anyio import to_thread

from musicgen_ui import takes
from musicgen_ui.checkpoints.memory import size_in_words
from musicgen_ui.engine.protocol import Backend, CheckpointInfo
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CHECKPOINT_FIELDS, CLIP_FIELDS, FIELDS, MAX_DURATION_S, coerce
from musicgen_ui.take_settings import TakeSettings
from musicgen_ui.ui.components import DEFAULTS, Undo, Updates, notice
from musicgen_ui.ui.take_panel import Group, chosen_take
from musicgen_ui.ui.wording import status_text

SETTINGS = [name for name in FIELDS if name not in CLIP_FIELDS]
DEMO, REAL = "bundled", "facebook/musicgen-small"  # what comes with the app, and what to get
SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
MOST_CHANGES = 6  # that are said one by one
SOON_S, LATER_S = 3.0, 60.0  # until a tab asks again what is loaded, and once that is settled
CLIPS = {
    "prompt_s": "It continued an audio prompt, which its file does not hold",
    "melody_s": "It followed a melody, which its file does not hold",
    "style_s": "It took on the style of a clip, which its file does not hold",
}
STEREO_INFO = {
    "choice": "left and right channel, from the model's stereo sibling",
    "always": "this model always makes stereo",
    "never": "this model has no stereo sibling",
}


class PageFacts(TypedDict, total=False):
    """What the page knows of the chosen checkpoint; nothing where there is no such checkpoint."""

    summary: str
    defaults: dict[str, object]  # as `CheckpointInfo.defaults`
    melody: bool
    style: bool
    window_s: float
    longest_s: float


class Toggle(TypedDict, total=False):
    """What changes of the stereo switch."""

    info: str
    interactive: bool
    value: bool


def same_seed(history: list[Group], chosen: list[int], variation: int | None = None) -> Updates:
    """Takes over the seed of the chosen take, and says that it stays."""
    seed = chosen_take(history, chosen, variation).settings["seed"]
    text = f"Seed {seed} is kept: every take uses it until you unlock it."
    return {"seed": seed, "notice": notice(text)}


def keep_seed(
    keep: bool,
    seed: float | None,
    history: list[Group],
    chosen: list[int],
    variation: int | None = None,
) -> Updates:
    """Keeps the seed of the form, or else of the take on show; or draws one for every take."""
    if not keep:
        return {"seed": DEFAULTS["seed"]}
    return {} if seed is not None and seed >= 0 else same_seed(history, chosen, variation)


def reset_sampling(facts: PageFacts, defaults: dict[str, object]) -> Updates:
    """The sampling that the chosen checkpoint states, else ours."""
    values = {name: facts.get("defaults", {}).get(name, DEFAULTS[name]) for name in SAMPLING}
    updates = _updates(values)
    updates["checkpoint_defaults"] = {**defaults, **values}
    return updates


def _updates(values: Mapping[str, object]) -> Updates:
    """Values of settings, by name, as updates."""
    updates: Updates = {}
    for name in SETTINGS:
        if name in values:
            updates[name] = values[name]  # type: ignore[literal-required]
    return updates


def _in_words(values: Mapping[str, object]) -> str:
    """Settings as part of a sentence: "temperature 0.7, top-k 50"."""
    switch = {True: "on", False: "off"}
    return ", ".join(
        f"{FIELDS[name].metadata['label'].lower()} "
        + (switch[value] if isinstance(value, bool) else f"{value:g}")
        for name, value in values.items()
    )


def checkpoint_line(
    summary: str,
    changed: Mapping[str, object] | None = None,
    kept: Mapping[str, object] | None = None,
) -> str:
    """What a checkpoint is, and what its defaults did to the form, as HTML."""
    sentences = [summary]
    sentences += [f"sets {_in_words(changed)}"] if changed else []
    sentences += [f"made for {_in_words(kept)}; yours is kept"] if kept else []
    return f'<p class="clip-line">{html.escape(" · ".join(sentences))}</p>'


def follow_checkpoint(facts: PageFacts, defaults: dict[str, object], *values: object) -> Updates:
    """Sets what the chosen checkpoint states in place of what the last one did, and says so.

    Args:
        facts: of the chosen checkpoint; empty where there is no such checkpoint.
        defaults: of the last checkpoint; a value that differs from them is the user's, and stays.
        values: the form's, of `CHECKPOINT_FIELDS`.
    """
    if not facts:
        return {}
    stated = facts["defaults"]
    now = {name: stated.get(name, FIELDS[name].default) for name in CHECKPOINT_FIELDS}
    now["duration_s"] = min(coerce("duration_s", now["duration_s"]), facts["longest_s"])
    shown = dict(zip(CHECKPOINT_FIELDS, values, strict=True))
    free = [name for name in defaults if shown[name] == defaults[name]]
    kept = {name: now[name] for name in stated if name not in free and shown[name] != now[name]}
    changed = {name: now[name] for name in free if now[name] != shown[name]}
    # Only what is new: while this answer is on its way the user may change the others.
    updates: Updates = _updates(changed) | {"checkpoint_defaults": now}
    # Only where there is more to say: the next choice may have been answered already.
    if changed or kept:
        updates["checkpoint_line"] = checkpoint_line(facts["summary"], changed, kept)
    return updates


def following(facts: PageFacts, defaults: dict[str, object], *values: object) -> Updates:
    """As `follow_checkpoint`, for the browser, which sets only values that have not changed since.

    "following" has a pair for each setting that changes: its value before, and after.
    """
    updates = dict(follow_checkpoint(facts, defaults, *values))
    shown = zip(CHECKPOINT_FIELDS, values, strict=True)
    pairs = {name: [value, updates.pop(name)] for name, value in shown if name in updates}
    return cast(Updates, updates | {"following": pairs})


class CheckpointFacts:
    """What the page says about a checkpoint; asking may take a while, so it is done in a thread."""

    def __init__(self, backend: Backend, longest_s: float = MAX_DURATION_S) -> None:
        self.backend = backend
        self.longest_s = longest_s

    async def choose(self, checkpoint: str) -> Updates:
        """The stereo toggle, the line under a chosen checkpoint, and what it states."""
        try:
            facts = await to_thread.run_sync(self.backend.describe, (checkpoint or "auto").strip())
        except RequestError as error:
            text = f'<p class="clip-line wrong" role="alert">{html.escape(str(error))}</p>'
            return {"checkpoint_line": text, "checkpoint_facts": {}}
        toggle: Toggle = {
            "info": STEREO_INFO[facts.stereo],
            "interactive": facts.stereo == "choice",
        }
        summary = facts.summary + await self._better(facts)
        if facts.stereo != "choice":
            toggle["value"] = facts.stereo == "always"
        return {
            "checkpoint_line": checkpoint_line(summary),
            "stereo": gr.update(**toggle),
            "checkpoint_facts": {
                "summary": summary,
                "defaults": facts.defaults,
                "melody": facts.melody,
                "style": facts.style,
                "window_s": facts.window_s,
                "longest_s": self.longest_s,
            },
        }

    async def _better(self, facts: CheckpointInfo) -> str:
        """Beside the small checkpoint that comes along: what makes real music here."""
        if facts.checkpoint != DEMO:
            return ""
        try:
            real = await to_thread.run_sync(self.backend.describe, REAL)
        except RequestError:  # not on offer here
            return ""
        if not real.fits or real.checkpoint == DEMO:
            return ""
        size = (
            size_in_words(real.download_bytes) + " to download once, "
            if real.download_bytes
            else ""
        )
        memory = size_in_words(real.nbytes)
        return (
            " · This is a small demo model. For real music choose musicgen-small above: "
            f"{size}about {memory} of memory"
        )

    async def names(self) -> Updates:
        """The checkpoints, which only the engine knows."""
        names = await to_thread.run_sync(self.backend.checkpoints)
        return {"checkpoint": gr.update(choices=names)}

    async def label(self) -> Updates:
        """The checkpoints with their sizes and what they need; names were on offer before."""
        return {"checkpoint": gr.update(choices=await to_thread.run_sync(self.choices))}

    def choices(self) -> list[tuple[str, str]]:
        """The checkpoints by label and name; may ask the Hub."""
        return [(self._label(name), name) for name in self.backend.checkpoints()]

    def _label(self, name: str) -> str:
        try:
            return checkpoint_label(name, self.backend.describe(name))
        except (
            Exception
        ):  # a folder that is gone, a Hub that is not reached: said when it is chosen
            return name

    def status(self) -> str:
        """The line in the page's head."""
        return f'<span class="engine">{html.escape(status_text(self.backend.status()))}</span>'

    def tick(self) -> Updates:
        """The line, and when to look again: every tab asks, and few things change."""
        status = self.backend.status()
        loads = status.starting or status.loading
        return {"status_line": self.status(), "timer": gr.Timer(SOON_S if loads else LATER_S)}

    async def unload(self) -> str:
        """Gives memory back and says what is loaded now."""
        await to_thread.run_sync(self.backend.unload)
        return self.status()


def checkpoint_label(name: str, info: CheckpointInfo) -> str:
    """A checkpoint in the list: name, memory, sound, and what it takes to use it here."""
    facts = [name.removeprefix("facebook/")]
    if name == "auto":
        facts.append(info.checkpoint.removeprefix("facebook/"))
    facts += [size_in_words(info.nbytes)] if info.nbytes else []
    sound = {"choice": "mono or stereo", "always": "stereo", "never": "mono"}
    facts.append(sound[info.stereo])
    facts += ["follows melodies"] if info.melody else []
    facts += ["takes on a style"] if info.style else []
    if not info.fits:
        facts.append("too large for this computer")
    elif info.download_bytes:
        facts.append(f"{size_in_words(info.download_bytes)} to download")
    return " · ".join(facts)


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """A sentence for each setting that is another one than before."""
    found = []
    for name, value in after.items():
        if name not in SETTINGS:
            continue
        old, new = (_as_request(name, each) for each in (before.get(name), value))
        if old != new:
            label = FIELDS[name].metadata["label"]
            found.append(f"{label}: {_value(name, new)} instead of {_value(name, old)}.")
    more = len(found) - MOST_CHANGES
    return found if more <= 1 else [*found[:MOST_CHANGES], f"{more} more settings."]


def _as_request(name: str, value: object) -> object:
    """A form's value as a request has it; one that no request can have as it is."""
    try:
        return coerce(name, value)
    except RequestError:
        return value


def _value(name: str, value: object) -> str:
    """A setting's value in a sentence."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (int, float)):
        return f"{value:.10g} {FIELDS[name].metadata['unit']}".rstrip()
    if isinstance(value, str):
        text = value if len(value) <= 60 else f"{value[:59].rstrip()}…"
        return f"“{text}”" if text else "nothing"
    rows = len(value) if isinstance(value, Sequence) else 0
    return "1 row" if rows == 1 else f"{rows} rows"


def _missing(settings: TakeSettings) -> list[str]:
    """What was used beside the settings, and is in no file."""
    return [f"{text}: choose it again." for name, text in CLIPS.items() if settings.get(name)]


class Restoring:
    """Fills the form with settings.

    Args:
        longest_s: the greatest length of a take on this server.
        adapters: whether the form shows the adapter. What it does not show is not restored: it
            would count for every take from then on, and nobody could see or change it.
    """

    def __init__(self, longest_s: float = MAX_DURATION_S, adapters: bool = True) -> None:
        self._longest_s = longest_s
        self._adapters = adapters

    def file(self, path: str | None, *before: object) -> Updates:
        """Fills the form from a take file, or says that it holds no settings.

        `before` are the form's values, of `SETTINGS`, to say what changes.
        """
        settings = takes.read_settings(path) if path else None
        if not settings:
            text = "This file holds no settings: choose a WAV or FLAC that was made here."
            return {"notice": notice(text, wrong=True)}
        return self.settings(settings, *before)

    def settings(self, settings: TakeSettings, *before: object) -> Updates:
        """Fills the form with a take's settings; says what changes and what its file lacks."""
        if not settings:
            return {}
        one_take = settings.copy()
        one_take["variations"] = 1
        filled = self._filled("The settings are filled in.", one_take, before, _missing(settings))
        offer: Updates = {"offer": gr.update(visible=False), "offered": {}}
        return filled | offer

    def preset(self, name: str, settings: TakeSettings, *before: object) -> Updates:
        """Fills the form with the settings of a preset; says what changes."""
        return self._filled(f"The settings of “{name}” are filled in.", settings, before)

    def _filled(
        self,
        said: str,
        settings: TakeSettings,
        before: Sequence[object],
        missing: Sequence[str] = (),
    ) -> Updates:
        shown, left_out = self.form(settings)
        changed = changes(dict(zip(SETTINGS, before, strict=True)), shown) if before else []
        if before and not changed:
            said = f"{said} Nothing changed."
        items = [*left_out, *missing, *changed]
        filled: Updates = {"notice": notice(said, items, undo=Undo.SETTINGS)}
        return shown | filled

    def form(self, settings: TakeSettings) -> tuple[Updates, list[str]]:
        """The form with settings as this server takes them, and a sentence for each change."""
        values = {name: value for name, value in settings.items() if name in SETTINGS}
        changes = []
        if not self._adapters:
            if values.get("adapter"):
                changes.append(f"Adapter {values['adapter']} is left out: this server takes none.")
            values |= {name: FIELDS[name].default for name in ("adapter", "adapter_strength")}
        length_s = settings.get("duration_s", 0.0)
        if length_s > self._longest_s:
            values["duration_s"] = self._longest_s
            changes.append(
                f"Length is {self._longest_s:g} s instead of {length_s:g} s: this server makes no "
                "more at once."
            )
        sections = settings.get("sections", [])
        kept = [row for row in sections if float(row[0]) < self._longest_s]
        if len(kept) < len(sections):
            changes.append(f"Sections from {self._longest_s:g} s on are left out.")
        # Nothing follows the checkpoint any more: the file's settings are the user's.
        values["sections"] = [list(row) for row in kept]
        if "automation" in values:
            rows = settings["automation"]
            values["automation"] = json.dumps(rows, ensure_ascii=False) if rows else ""
        return _updates(values) | {"checkpoint_defaults": {}}, changes
