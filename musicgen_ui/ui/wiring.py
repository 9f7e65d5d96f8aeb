"""Which event calls which handler. Handlers answer with updates by name; here names are parts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from musicgen_ui.engine.events import Engine
from musicgen_ui.request import CHECKPOINT_FIELDS, FIELDS
from musicgen_ui.ui import clip_panel, form, recall, take_panel
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.limits import ClosedPages
from musicgen_ui.ui.pages import Pages, back

Parts = dict[str, Any]  # components by name

TAKE = [
    *("history", "chosen", "take_title", "take_audio", "wav", "flac", "spectrogram"),
    *("take_facts", "take_notes", "take_variation", "take_history"),
]
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def connect(parts: Parts, handlers: Handlers, engine: Engine, page: gr.Blocks) -> None:
    """Connects everything on the page."""
    done = jobs(parts, handlers)
    filling_in(parts, engine)
    the_take(parts)
    facts = form.CheckpointFacts(engine)
    timer = parts["timer"] = gr.Timer(form.SOON_S)
    told = ["checkpoint", "checkpoint_line", "stereo", "facts"]
    loaded = on(parts, page.load, facts.load, [], told, "load")
    the_checkpoint(parts, loaded, "_at_load")
    tick, line = named(facts.tick, parts), [parts["engine"], timer]
    gr.on([page.load, timer.tick], tick, None, line, api_name="status", **QUIET)
    # The job may have loaded another checkpoint.
    done.then(tick, None, line, api_name="status_then", **QUIET)
    parts["unload"].click(facts.unload, None, parts["engine"], api_name="unload", **QUIET)
    closed = ClosedPages(page)

    def left(request: gr.Request) -> None:
        handlers.closed(request)
        closed.add(request.session_hash or "")

    page.unload(left)
    pages = Pages(handlers.recall)
    told = [*form.SETTINGS, "own", "offer", "offered"]
    told += ["live", "generate", "stop", "watch", *TAKE]
    entered = page.load(
        named(pages.enter, parts), parts["key"], [parts[n] for n in told], js=recall.ENTER,
        api_name="enter", **QUIET,
    )  # fmt: skip
    in_the_browser(parts, entered)
    on(parts, parts["watch"].tick, pages.news, [], told, "news")


def in_the_browser(parts: Parts, entered: Any) -> None:
    """Keeps the form there, and fills it in again once a page has `entered`."""
    form_of = [parts[name] for name in ("own", *form.SETTINGS)]
    entered.then(None, [parts["live"], *form_of], [parts["live"], *form_of], js=back())
    gr.on([each.change for each in form_of], None, form_of, None, js=recall.KEEP)


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


def filling_in(parts: Parts, engine: Engine) -> None:
    """The form's own answers."""
    window = ["clip", "duration_s", "context_s", "overlap_s"]
    clip = ["audio_prompt", "duration_s", "context_s", "overlap_s", "clip"]
    told = ["clip", "audio_prompt", "clip_line", "offer", "offered"]
    filled = [*form.SETTINGS, "own", "offer", "offered"]
    parts["ideas"].click(
        lambda idea: idea, parts["ideas"], [parts["prompt"], parts["duration_s"]],
        api_name="idea", **QUIET,
    )  # fmt: skip
    on(parts, parts["add_section"].click, form.add_section, ["sections"], ["sections"], "add_row")
    on(parts, parts["audio_prompt"].change, form.read_clip, clip, told, "clip")
    for name in ("duration_s", "context_s", "overlap_s"):
        parts[name].change(
            form.clip_line, [parts[n] for n in window], parts["clip_line"],
            api_name="window", trigger_mode="always_last", **QUIET,
        )  # fmt: skip
    choose = form.CheckpointFacts(engine).choose
    line = ["checkpoint_line", "stereo", "facts"]
    chosen = on(parts, parts["checkpoint"].change, choose, ["checkpoint"], line, "checkpoint")
    the_checkpoint(parts, chosen)
    the_melody(parts)
    on(parts, parts["offer"].click, form.restore, ["offered"], filled, "use_settings")
    on(parts, parts["restore"].upload, form.restore_file, ["restore"], filled, "restore")


def the_checkpoint(parts: Parts, known: Any, at: str = "") -> None:
    """What follows once a checkpoint's facts are known.

    Events of their own: while facts are asked for, the user goes on changing the form. Not those
    of the State, which only tells of changes that came by Gradio's queue.
    """
    follow = ["facts", "own", "limits", *CHECKPOINT_FIELDS]
    told = ["own", "checkpoint_line", *CHECKPOINT_FIELDS]
    on(parts, known.then, form.follow, follow, told, "follow" + at)
    on(parts, known.then, clip_panel.allow, ["facts"], ["clip_use"], "clip_uses" + at)


def the_melody(parts: Parts) -> None:
    """What a clip is for, and a melody's own answers."""
    fields = ["audio_prompt", "melody"]
    shown = ["continued", "followed", *fields]
    on(parts, parts["clip_use"].change, clip_panel.use, ["clip_use", *fields], shown, "clip_use")
    heard = ["melody", "duration_s", "tune"]
    told = ["tune", "melody", "melody_line"]
    on(parts, parts["melody"].change, clip_panel.read_melody, heard, told, "melody")
    parts["duration_s"].change(
        clip_panel.melody_line, [parts["tune"], parts["duration_s"]], parts["melody_line"],
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
    clip = ["audio_prompt", "audio_panel", "clip_use"]
    on(parts, parts["continue"].click, form.continue_take, chosen, clip, "continue")
    on(parts, parts["same_seed"].click, form.same_seed, chosen, ["seed"], "same_seed")


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
