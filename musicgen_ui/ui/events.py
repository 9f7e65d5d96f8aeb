"""Which event calls which handler. Handlers answer with `Updates`, by the component's name."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

import gradio as gr
from gradio.blocks import Block
from gradio.events import Dependency

from musicgen_ui.library import Library
from musicgen_ui.request import CHECKPOINT_FIELDS, FIELDS
from musicgen_ui.ui import audio_panel, request_form, sessions, take_panel
from musicgen_ui.ui.components import QUIET, Changing, Components, Updates
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.library_panel import LibraryView
from musicgen_ui.ui.pages import Pages, back
from musicgen_ui.ui.request_form import SETTINGS, CheckpointFacts, Restoring
from musicgen_ui.ui.take_panel import Group

# In the browser: an answer of the server could come after the user has typed on.
TOGGLE_IDEA = """(index, prompt) => {
  const words = IDEAS[index], typed = prompt.trim();
  if (!typed.includes(words)) return typed ? typed.replace(/[,.;]+$/, '') + ', ' + words : words;
  return typed.replace(words, '').replace(/,\\s*,/g, ',').replace(/^[,\\s]+|[,\\s]+$/g, '');
}"""
COUNT_CHARACTERS = "(text) => text ? `${text.length.toLocaleString('en')} of MOST` : ''"
# What the user changed since the server was asked stays.
FOLLOW = """(following, ...values) => values.map((value, index) => {
  const [before, after] = following?.[NAMES[index]] ?? [];
  return value === before ? after : undefined;
})"""
MARK_LENGTH = "(length_s) => CHOICES.includes(length_s) ? length_s : null"
MARK_SEED = "(seed) => seed !== null && seed >= 0"

# The file's link is there a moment after its value.
SAVE_FILE = """async () => {
  const link = () => document.querySelector('#exported a, a#exported, a:has(> #exported)');
  for (let i = 0; i < 40 && (!link() || link().href === window.musicgenSaved); i++)
    await new Promise((done) => setTimeout(done, 50));
  window.musicgenSaved = link()?.href;
  (link() ?? document.querySelector('#exported'))?.click();
  return [];
}"""
HEAR_LOOP = "(bars) => { window.musicgenPlayer?.hear_loop(bars); return []; }"

Answer = Updates | Awaitable[Updates] | AsyncGenerator[Updates, None]


class Events:
    """Connects the page's components to their handlers."""

    def __init__(self, c: Components) -> None:
        self.c = c
        self.by_name = c.by_name()
        request, audio, take = c.request, c.audio, c.take
        self.settings: list[Block] = [self.by_name[name] for name in SETTINGS]
        self.shown_take: list[Block] = [
            *(take.history, take.chosen, take.take_title, take.take_audio, take.wav, take.flac),
            *(take.compare, take.keep_take),
            *(take.take_facts, take.take_notes, take.take_variation, take.take_history),
        ]
        # How the page's jobs stand.
        self.jobs: list[Block] = [take.live, take.jobs, take.landed, c.form.generate, c.form.stop]
        # What decides how much of a clip the model hears, and what a clip's answers change.
        self.window: list[Block] = [request.duration_s, request.context_s, request.overlap_s]
        self.window.append(c.form.checkpoint_facts)
        self.clip: list[Block] = [
            *(audio.clip, request.audio_prompt, audio.clip_line, audio.offer, audio.offered),
        ]
        self.melody: list[Block] = [audio.tune, request.melody, audio.melody_line]
        self.style: list[Block] = [request.style, audio.style_line]
        self.excerpt: list[Block] = [request.style_start_s, request.style_length_s]
        self.trim: list[Block] = [audio.trim_fold, audio.trim]

    def on(
        self,
        event: Callable[..., Dependency],
        handler: Callable[..., Answer],
        inputs: Sequence[Block],
        outputs: Sequence[Block],
        api_name: str,
    ) -> Dependency:
        """A private event outside the queue, without a progress bar."""
        call = self.named(handler)
        return event(call, list(inputs), list(outputs), api_name=api_name, **QUIET)

    def named(self, handler: Callable[..., Answer]) -> Callable[..., object]:
        """The handler with its `Updates` keyed by component, as Gradio takes them."""

        def placed(updates: Updates) -> object:
            # Gradio takes `value` out of the dict of an update that it has sent.
            copied = {n: dict(v) if isinstance(v, dict) else v for n, v in updates.items()}
            return {self.by_name[name]: value for name, value in copied.items()} or gr.skip()

        async def many(*args: object, **values: object) -> AsyncGenerator[object, None]:
            # The browser merges two answers that reach it in one frame, and what only the first
            # one held would be lost: so each repeats all before it. Only changes travel.
            all_so_far: Updates = {}
            found = handler(*args, **values)
            assert isinstance(found, AsyncGenerator)
            async with aclosing(found) as answers:
                async for updates in answers:
                    all_so_far.update(updates)
                    yield placed(all_so_far)

        async def later(*args: object, **values: object) -> object:
            found = handler(*args, **values)
            assert isinstance(found, Awaitable)
            return placed(await found)

        def once(*args: object, **values: object) -> object:
            found = handler(*args, **values)
            assert not isinstance(found, (Awaitable, AsyncGenerator))
            return placed(found)

        call: Callable[..., object] = once
        if inspect.isasyncgenfunction(handler):
            call = many
        elif inspect.iscoroutinefunction(handler):
            call = later
        functools.update_wrapper(call, handler)
        # A method's own signature, as `wraps` would copy it, still names `self`.
        call.__dict__["__signature__"] = inspect.signature(handler)
        return call


def connect(
    c: Components,
    handlers: Handlers,
    page: gr.Blocks,
    adapters: bool,
    library: Library | None,
    made: Sequence[Dependency],
) -> None:
    """Connects everything on the page but jobs and live mode.

    Args:
        c: its components.
        handlers: of the page and the API.
        page: all of it.
        adapters: whether it shows the adapter.
        library: of the takes that are kept.
        made: events after which there may be new takes.
    """
    events = Events(c)
    facts = CheckpointFacts(handlers.backend, handlers.max_duration_s)
    restoring = Restoring(handlers.max_duration_s, adapters)
    kept_form(events, page)
    typing(c)
    checkpoint(events, facts, page)
    audio(events)
    kept = take(events, restoring, handlers, library)
    if library:
        spare = handlers.backend.spare or library.folder
        keeping(events, LibraryView(library, restoring, spare), page, [kept, *made])
    status(events, facts, page, made)
    pages(events, handlers, page)


def kept_form(events: Events, page: gr.Blocks) -> None:
    """The form as the browser keeps it: first of all, so that nothing is typed before."""
    typed: list[Block] = [events.c.form.checkpoint_defaults, *events.settings]
    page.load(None, typed, typed, js=sessions.RESTORE)
    changes = [each.change for each in typed if isinstance(each, Changing)]
    gr.on(changes, None, typed, None, js=sessions.KEEP)


def typing(c: Components) -> None:
    """What the browser answers alone."""
    ideas = json.dumps([words for (words,) in c.form.ideas.raw_samples])
    prompt, length_s = c.request.prompt, c.request.duration_s
    c.form.ideas.click(None, [c.form.ideas, prompt], prompt, js=TOGGLE_IDEA.replace("IDEAS", ideas))
    most = f"{FIELDS['prompt'].metadata['max']:,}"
    prompt.change(None, prompt, c.form.prompt_count, js=COUNT_CHARACTERS.replace("MOST", most))
    choice = c.form.length_choice
    choices = json.dumps([value for _, value in choice.choices])
    choice.input(None, choice, length_s, js="(length_s) => length_s")
    length_s.change(None, length_s, choice, js=MARK_LENGTH.replace("CHOICES", choices))
    c.request.seed.change(None, c.request.seed, c.form.keep_seed, js=MARK_SEED)


def checkpoint(events: Events, facts: CheckpointFacts, page: gr.Blocks) -> None:
    """The chosen checkpoint, and what follows once its facts are known.

    Events of their own: while facts are asked for, the user goes on changing the form. Not those
    of the State, which only tells of changes that came by Gradio's queue. The first answer and
    later ones are of one event, one after the other, so that the last is that of the choice.
    """
    c = events.c
    chosen, line = c.request.checkpoint, c.form.checkpoint_line
    known = [line, c.request.stereo, c.form.checkpoint_facts]
    either = functools.partial(gr.on, [page.load, chosen.change], trigger_mode="always_last")
    changed = events.on(either, facts.choose, [chosen], known, "checkpoint")
    loaded = events.on(page.load, facts.names, [], [chosen], "load")
    events.on(loaded.then, facts.label, [], [chosen], "checkpoint_labels")
    after = functools.partial(changed.then, trigger_mode="always_last")
    values = [events.by_name[name] for name in CHECKPOINT_FIELDS]
    defaults, following = c.form.checkpoint_defaults, c.form.following
    follow = events.on(
        after,
        request_form.following,
        [c.form.checkpoint_facts, defaults, *values],
        [defaults, line, following],
        "follow",
    )
    names = json.dumps(CHECKPOINT_FIELDS)
    follow.then(None, [following, *values], values, js=FOLLOW.replace("NAMES", names))
    events.on(
        after,
        audio_panel.clip_uses,
        [c.form.checkpoint_facts, c.audio.clip_use],
        [c.audio.clip_use, c.audio.clip_needs],
        "clip_uses",
    )
    after(
        audio_panel.clip_line,
        [c.audio.clip, *events.window],
        c.audio.clip_line,
        api_name="window",
        **QUIET,
    )
    chords = c.request.chords
    for trigger, at in ((after, ""), (chords.change, "_typed")):
        events.on(
            trigger,
            audio_panel.offer_chords,
            [c.form.checkpoint_facts, chords],
            [c.form.chord_column],
            f"offer_chords{at}",
        )


def audio(events: Events) -> None:
    """A clip: what it is for, and how much of it is used."""
    c = events.c
    audio_prompt, melody, length_s = c.request.audio_prompt, c.request.melody, c.request.duration_s
    use, tune = c.audio.clip_use, c.audio.tune
    columns = (c.audio.continue_column, c.audio.melody_column, c.audio.style_column)
    events.on(
        audio_prompt.change,
        audio_panel.read_clip,
        [audio_prompt, *events.window, c.audio.clip],
        [*events.clip, *events.trim],
        "clip",
    )
    for setting in (c.request.duration_s, c.request.context_s, c.request.overlap_s):
        setting.change(
            audio_panel.clip_line,
            [c.audio.clip, *events.window],
            c.audio.clip_line,
            api_name="window_typed",
            trigger_mode="always_last",
            **QUIET,
        )
    events.on(
        use.change,
        audio_panel.use,
        [use, audio_prompt, melody, c.request.style, *events.window, *events.excerpt],
        [*columns, *events.clip, *events.melody, *events.style, *events.trim],
        "clip_use",
    )
    read, known = [melody, length_s, tune], [*events.melody, *events.trim]
    events.on(melody.change, audio_panel.read_melody, read, known, "melody")
    length_s.change(
        audio_panel.melody_line,
        [tune, length_s],
        c.audio.melody_line,
        api_name="melody_line",
        trigger_mode="always_last",
        **QUIET,
    )
    events.on(
        c.head.dropped_file.upload,
        audio_panel.dropped,
        [c.head.dropped_file, use, *events.window, *events.excerpt],
        [*events.clip, *events.melody, *events.style, *events.trim, c.audio.audio_panel],
        "dropped",
    )
    clip, start_s, excerpt_s = c.request.style, c.request.style_start_s, c.request.style_length_s
    changed = functools.partial(gr.on, [clip.change, start_s.change, excerpt_s.change])
    read = [clip, start_s, excerpt_s, tune]
    events.on(changed, audio_panel.read_style, read, [tune, *events.style], "style")


def keeping(events: Events, view: LibraryView, page: gr.Blocks, made: Sequence[Dependency]) -> None:
    """The library: its cards, filters, and what is new in it."""
    c, panel = events.c, events.c.library
    asked: list[Block] = [panel.library_words, panel.library_starred, panel.library_model]
    shown: list[Block] = [panel.library_cards, panel.library_state]
    with_state = [*asked, panel.library_state]
    events.on(page.load, view.models, [], [panel.library_model], "library_models")
    # The first answer and later ones are of one event, so that the last is that of the filter.
    filters = [
        page.load,
        panel.library_words.change,
        panel.library_starred.change,
        panel.library_model.change,
    ]
    gr.on(
        filters,
        events.named(view.filter),
        asked,
        shown,
        api_name="library_filter",
        trigger_mode="always_last",
        **QUIET,
    )
    for number, event in enumerate(made):
        after = event.then
        events.on(after, view.look_again, with_state, shown, f"library_{number}")
    acted = events.on(
        panel.library_cards.click,
        view.act,
        [*with_state, c.take.history, *events.window, *events.settings],
        [
            *(*shown, *events.shown_take, *events.settings, c.form.checkpoint_defaults),
            *(*events.clip, *events.trim, c.audio.audio_panel, c.head.notice),
        ],
        "library_act",
    )
    events.on(
        acted.then,
        take_panel.draw_shown,
        [c.take.history, c.take.chosen],
        [c.take.take_audio, c.take.take_notes],
        "draw",
    )


def take(
    events: Events, restoring: Restoring, handlers: Handlers, library: Library | None
) -> Dependency:
    """The lists of takes and what can be done with the one on show; the event of "Keep this"."""
    c, panel = events.c, events.c.take
    history, chosen, variation = panel.history, panel.chosen, panel.take_variation
    events.on(
        variation.input,
        take_panel.choose_variation,
        [history, chosen, variation],
        events.shown_take,
        "take_variation",
    )
    events.on(
        panel.take_history.input,
        take_panel.choose_earlier,
        [history, panel.take_history],
        events.shown_take,
        "take_history",
    )
    events.on(
        panel.continue_take.click,
        audio_panel.continue_take,
        [history, chosen, *events.window, variation],
        [*events.clip, *events.trim, c.audio.audio_panel, c.audio.clip_use],
        "continue",
    )
    events.on(
        panel.same_seed.click,
        request_form.same_seed,
        [history, chosen, variation],
        [c.request.seed, c.head.notice],
        "same_seed",
    )
    return deciding(events, restoring, handlers, library)


def deciding(
    events: Events, restoring: Restoring, handlers: Handlers, library: Library | None
) -> Dependency:
    """What becomes of the take on show: it is kept, exported, or its settings are used again.

    Returns the event of keeping it.
    """
    c, panel = events.c, events.c.take
    of_take: list[Block] = [panel.history, panel.chosen, panel.take_variation]
    filled = [*events.settings, c.form.checkpoint_defaults]
    filled += [c.audio.offer, c.audio.offered, c.head.notice]

    def use_settings(
        history: list[Group], chosen: list[int], variation: int | None, *before: object
    ) -> Updates:
        take = take_panel.chosen_take(history, chosen, variation)
        return restoring.settings(take.settings, *before)

    def keep(history: list[Group], chosen: list[int], variation: int | None) -> Updates:
        return take_panel.keep(history, chosen, variation, library.star if library else None)

    asked = [*of_take, *events.settings]
    events.on(panel.use_settings.click, use_settings, asked, filled, "take_settings")
    kept = [*events.shown_take, c.head.notice]
    decided = events.on(panel.keep_take.click, keep, of_take, kept, "keep_take")
    exported = events.on(
        panel.export.click,
        handlers.export,
        [*of_take, panel.export_ending, panel.loop_bars, panel.fade_out_s],
        [panel.exported, c.head.notice],
        "export",
    )
    exported.success(None, None, None, js=SAVE_FILE)
    panel.loop_bars.change(None, panel.loop_bars, None, js=HEAR_LOOP)
    return decided


def status(
    events: Events, facts: CheckpointFacts, page: gr.Blocks, made: Sequence[Dependency]
) -> None:
    """The line that says what is loaded."""
    head = events.c.head
    tick, shown = events.named(facts.tick), [head.status_line, head.timer]
    gr.on([page.load, head.timer.tick], tick, None, shown, api_name="status", **QUIET)
    for number, event in enumerate(made):  # the job may have loaded another checkpoint
        event.then(tick, None, shown, api_name=f"status_{number}", **QUIET)
    head.unload.click(facts.unload, None, head.status_line, api_name="unload", **QUIET)


def pages(events: Events, handlers: Handlers, page: gr.Blocks) -> None:
    """A page that is opened, opened again, or left."""
    c = events.c
    page.unload(handlers.closed)
    opened = Pages(handlers.sessions)
    shown = [c.take.live, c.take.job_id, *events.shown_take]
    entered = page.load(
        events.named(opened.enter),
        c.take.tab_key,
        shown,
        js=sessions.ENTER,
        api_name="enter",
        **QUIET,
    )
    live = c.take.live
    entered.then(None, live, live, js=back()).then(None, None, None, js=sessions.ENTERED)
