"""Which event calls which handler. Handlers answer with updates by name; here names are parts."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from musicgen_ui.engine.protocol import Engine
from musicgen_ui.request import CHECKPOINT_FIELDS, FIELDS
from musicgen_ui.ui import audio_panel, request_form, restoring, sessions, take_panel
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.pages import Pages, back
from musicgen_ui.ui.restoring import Restoring


class Parts(dict[str, Any]):
    """The page's components by name, each name given once."""

    def __setitem__(self, name: str, component: Any) -> None:
        if name in self:
            raise KeyError(f"two components would be called {name!r}: one would never be read")
        super().__setitem__(name, component)


TAKE = [
    *("history", "chosen", "take_title", "take_audio", "wav", "flac", "spectrogram"),
    *("take_facts", "take_notes", "take_variation", "take_history"),
]
# What the answers about a clip and about a melody read, and what they show.
WINDOW = ["duration_s", "context_s", "overlap_s"]
CLIP = (
    ["audio_prompt", *WINDOW, "clip"],
    ["clip", "audio_prompt", "clip_line", "offer", "offered"],
)
MELODY = (["melody", "duration_s", "tune"], ["tune", "melody", "melody_line"])
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def connect(
    parts: Parts, handlers: Handlers, engine: Engine, page: gr.Blocks, adapters: bool
) -> None:
    """Connects everything on the page; `adapters` is whether it shows the adapter."""
    done = jobs(parts, handlers)
    facts = request_form.CheckpointFacts(engine, handlers.max_duration_s)
    filling_in(parts, facts)
    restored = Restoring(handlers.max_duration_s, adapters)
    bringing_back(parts, restored)
    the_take(parts)
    timer = parts["timer"] = gr.Timer(request_form.SOON_S)
    told = ["checkpoint", "checkpoint_line", "stereo", "facts"]
    loaded = on(parts, page.load, facts.load, [], told, "load")
    the_checkpoint(parts, loaded, "_at_load")
    tick, line = named(facts.tick, parts), [parts["engine"], timer]
    gr.on([page.load, timer.tick], tick, None, line, api_name="status", **QUIET)
    # The job may have loaded another checkpoint.
    done.then(tick, None, line, api_name="status_then", **QUIET)
    parts["unload"].click(facts.unload, None, parts["engine"], api_name="unload", **QUIET)
    page.unload(handlers.closed)
    pages = Pages(handlers.recall, restored)
    told = [*restoring.SETTINGS, "own", "live", "generate", "stop", "watch", *TAKE]
    entered = page.load(
        named(pages.enter, parts), parts["tab_key"], [parts[n] for n in told], js=sessions.ENTER,
        api_name="enter", **QUIET,
    )  # fmt: skip
    in_the_browser(parts, entered)
    on(parts, parts["watch"].tick, pages.news, [], told, "news")


def in_the_browser(parts: Parts, entered: Any) -> None:
    """Keeps the form there, and fills it in again once a page has `entered`."""
    form_of = [parts[name] for name in ("own", *restoring.SETTINGS)]
    entered.then(None, [parts["live"], *form_of], [parts["live"], *form_of], js=back())
    gr.on([each.change for each in form_of], None, form_of, None, js=sessions.KEEP)


def jobs(parts: Parts, handlers: Handlers) -> Any:
    """Generate, Stop and the API. The engine itself queues; Gradio's queue only carries.

    Gives the event of Generate.
    """
    done = gr.on(
        [parts["generate"].click],
        named(handlers.compose, parts),
        inputs=[parts["history"], parts["own"]],
        inputs_kwargs={name: parts[name] for name in FIELDS},
        outputs=[parts[n] for n in ("live", "generate", "stop", *TAKE)],
        validator=handlers.validate,
        concurrency_limit=None,
        show_progress="hidden",
        api_name="compose",
        api_visibility="private",
    )
    on(parts, parts["stop"].click, handlers.stop, [], ["generate", "stop"], "stop")
    parts["api"].click(
        handlers.generate,
        inputs_kwargs={name: parts["api:" + name] for name in FIELDS},
        outputs=[parts["api:files"], parts["api:settings"]],
        concurrency_limit=None,
        api_name="generate",
    )
    return done


def filling_in(parts: Parts, facts: request_form.CheckpointFacts) -> None:
    """The form's own answers."""
    ideas = json.dumps(parts["ideas"].raw_samples)
    # In the browser: an answer from afar could come after the user has typed on.
    parts["ideas"].click(
        None, parts["ideas"], [parts["prompt"], parts["duration_s"]], js=f"(i) => ({ideas})[i]"
    )
    on(
        parts,
        parts["add_section"].click,
        request_form.add_section,
        ["sections"],
        ["sections"],
        "add_row",
    )
    on(parts, parts["audio_prompt"].change, request_form.read_clip, *CLIP, "clip")
    for name in WINDOW:
        parts[name].change(
            request_form.clip_line, [parts[n] for n in ("clip", *WINDOW)], parts["clip_line"],
            api_name="window", trigger_mode="always_last", **QUIET,
        )  # fmt: skip
    line = ["checkpoint_line", "stereo", "facts"]
    chosen = on(parts, parts["checkpoint"].change, facts.choose, ["checkpoint"], line, "checkpoint")
    the_checkpoint(parts, chosen)
    the_melody(parts)


def bringing_back(parts: Parts, back: Restoring) -> None:
    """Settings from a file, and a file that was dropped anywhere."""
    filled = restoring.FILLED
    on(parts, parts["offer"].click, back.settings, ["offered"], filled, "use_settings")
    on(parts, parts["restore"].upload, back.file, ["restore"], filled, "restore")
    given = ["dropped", "clip_use", *WINDOW]
    told = [*CLIP[1], *MELODY[1], "audio_panel"]
    on(parts, parts["dropped"].upload, audio_panel.dropped, given, told, "dropped")


def the_checkpoint(parts: Parts, known: Any, at: str = "") -> None:
    """What follows once a checkpoint's facts are known.

    Events of their own: while facts are asked for, the user goes on changing the form. Not those
    of the State, which only tells of changes that came by Gradio's queue.
    """
    follow = ["facts", "own", *CHECKPOINT_FIELDS]
    told = ["own", "checkpoint_line", *CHECKPOINT_FIELDS]
    on(parts, known.then, request_form.follow, follow, told, "follow" + at)
    on(parts, known.then, audio_panel.allow, ["facts"], ["clip_use"], "clip_uses" + at)


def the_melody(parts: Parts) -> None:
    """What a clip is for, and a melody's own answers."""
    given = ["clip_use", "audio_prompt", "melody", *WINDOW]
    shown = ["continued", "followed", *CLIP[1], *MELODY[1]]
    on(parts, parts["clip_use"].change, audio_panel.use, given, shown, "clip_use")
    on(parts, parts["melody"].change, audio_panel.read_melody, *MELODY, "melody")
    parts["duration_s"].change(
        audio_panel.melody_line, [parts["tune"], parts["duration_s"]], parts["melody_line"],
        api_name="melody_line", trigger_mode="always_last", **QUIET,
    )  # fmt: skip


def the_take(parts: Parts) -> None:
    """The lists of takes and what can be done with the one on show."""
    chosen = ["history", "chosen"]
    for name, answer, given in (
        ("take_variation", take_panel.choose_variation, [*chosen, "take_variation"]),
        ("take_history", take_panel.choose_earlier, ["history", "take_history"]),
    ):
        on(parts, parts[name].input, answer, given, TAKE, name)
    told = [*CLIP[1], "audio_panel", "clip_use"]
    given = [*chosen, *WINDOW, "take_variation"]
    on(parts, parts["continue"].click, request_form.continue_take, given, told, "continue")
    told = ["seed", "notice"]
    given = [*chosen, "take_variation"]
    on(parts, parts["same_seed"].click, request_form.same_seed, given, told, "same_seed")


def on(
    parts: Parts,
    event: Callable,
    handler: Callable,
    given: Sequence[str],
    told: Sequence[str],
    api_name: str,
) -> Any:
    """One quiet, private event whose handler answers with updates by name."""
    inputs, outputs = [parts[n] for n in given], [parts[n] for n in told]
    return event(named(handler, parts), inputs, outputs, api_name=api_name, **QUIET)


def named(handler: Callable, parts: Parts) -> Callable:
    """The handler with its answers keyed by component, as Gradio takes them."""

    def placed(updates: dict[str, Any]) -> dict[Any, Any]:
        return {parts[name]: value for name, value in updates.items()} or gr.skip()

    async def many(*args: Any, **values: Any) -> Any:
        # Two answers that reach the browser in one frame become one there: what only the first
        # one said would be lost, so each says all that was said before. Only changes travel.
        told: dict[str, Any] = {}
        async with aclosing(handler(*args, **values)) as answers:
            async for updates in answers:
                told |= updates
                yield placed(told)

    async def later(*args: Any, **values: Any) -> Any:
        return placed(await handler(*args, **values))

    def once(*args: Any, **values: Any) -> Any:
        return placed(handler(*args, **values))

    call: Any = once
    if inspect.isasyncgenfunction(handler):
        call = many
    elif inspect.iscoroutinefunction(handler):
        call = later
    functools.update_wrapper(call, handler)
    # A method's own signature, as `wraps` would copy it, still names `self`.
    call.__signature__ = inspect.signature(handler)
    return call
