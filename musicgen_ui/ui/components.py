"""The page's components by name. `page` makes and places them, `events` connects them.

`RequestFields` holds one component for each setting of a request, under the field's name, with
the label, help and limits of the field. A request refuses a value beyond its limits in a sentence
at the field: see `gradio_patches.leave_limits_to_the_request`.

Handlers answer with `Updates`: what components show from now on, by the component's name. The
dataclasses and `Updates` name the same components; a test holds them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal, Protocol, TypedDict, runtime_checkable

import gradio as gr
from gradio.blocks import Block
from gradio.events import Dependency

from musicgen_ui.request import FIELDS

DEFAULTS: dict[str, object] = {name: spec.default for name, spec in FIELDS.items()}
# What a clip is for.
CONTINUE, FOLLOW, TAKE_STYLE = "continue it", "follow its melody", "take on its style"


class Undo(StrEnum):
    """What a notice can take back; see `undo_button`."""

    SETTINGS = "settings"
    PRESET = "preset"
    TRIM = "trim"


class Private(TypedDict):
    """Options of an event of the page alone, without a progress bar."""

    show_progress: Literal["hidden"]
    api_visibility: Literal["private"]


class Quiet(Private):
    """The same outside Gradio's queue."""

    queue: Literal[False]


PRIVATE: Private = {"show_progress": "hidden", "api_visibility": "private"}
QUIET: Quiet = {"queue": False, **PRIVATE}


@runtime_checkable
class Changing(Protocol):
    """A component that tells of changes: Gradio's base class does not say so."""

    @property
    def change(self) -> Callable[..., Dependency]:
        """Connects a handler."""
        ...


class Updates(TypedDict, total=False):
    """What components show from now on, by name: a value or `gr.update`."""

    prompt: object
    negative_prompt: object
    sections: object
    tempo_bpm: object
    key: object
    time_signature: object
    audio_prompt: object
    context_s: object
    include_prompt: object
    melody: object
    chords: object
    chord_strength: object
    style: object
    style_start_s: object
    style_length_s: object
    style_codebooks: object
    text_guidance: object
    checkpoint: object
    adapter: object
    adapter_strength: object
    stereo: object
    duration_s: object
    overlap_s: object
    guidance_scale: object
    do_sample: object
    temperature: object
    top_k: object
    top_p: object
    automation: object
    skip_s: object
    seed: object
    variations: object
    keep: object
    rank_by_prompt: object
    normalize: object
    status_line: object
    unload: object
    notice: object
    dropped_file: object
    timer: object
    ideas: object
    prompt_count: object
    length_choice: object
    keep_seed: object
    reset_sampling: object
    undo_settings: object
    checkpoint_line: object
    restore: object
    chord_column: object
    generate: object
    stop: object
    checkpoint_facts: object
    checkpoint_defaults: object
    following: object
    audio_panel: object
    clip_use: object
    clip_needs: object
    continue_column: object
    clip_line: object
    offer: object
    melody_column: object
    melody_line: object
    style_column: object
    style_line: object
    trim_fold: object
    trim: object
    undo_trim: object
    untrimmed: object
    clip: object
    offered: object
    tune: object
    live: object
    jobs: object
    landed: object
    elsewhere: object
    take_title: object
    take_variation: object
    compare: object
    keep_take: object
    take_audio: object
    wav: object
    flac: object
    continue_take: object
    retake: object
    extend: object
    use_settings: object
    same_seed: object
    export_ending: object
    loop_bars: object
    fade_out_s: object
    export: object
    playhead_s: object
    exported: object
    take_facts: object
    take_notes: object
    take_history: object
    history: object
    chosen: object
    tab_key: object
    job_id: object
    recent: object
    recent_clear: object
    preset: object
    preset_use: object
    preset_delete: object
    preset_name: object
    preset_save: object
    preset_rename: object
    presets: object
    prompts: object
    deleted: object
    undo_preset: object
    get_panel: object
    get_line: object
    get_start: object
    get_cancel: object
    get_later: object
    get_timer: object
    get_put_off: object
    library_words: object
    library_starred: object
    library_model: object
    library_cards: object
    library_state: object
    live_mode: object
    live_column: object
    live_prompt_1: object
    live_prompt_2: object
    live_prompt_3: object
    live_prompt_4: object
    live_fader: object
    live_pad: object
    live_guidance: object
    live_temperature: object
    live_top_k: object
    live_start: object
    live_stop: object
    live_record: object
    live_store_1: object
    live_store_2: object
    live_store_3: object
    live_recall_1: object
    live_recall_2: object
    live_recall_3: object
    live_line: object
    live_listener: object


@dataclass(frozen=True)
class RequestFields:
    """A component for each field of `GenerationRequest`, in its order and by its name."""

    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    sections: gr.HTML  # rows of a time and words; see assets/player/sections.js
    tempo_bpm: gr.Number
    key: gr.Dropdown
    time_signature: gr.Textbox
    audio_prompt: gr.Audio
    context_s: gr.Slider
    include_prompt: gr.Checkbox
    melody: gr.Audio
    chords: gr.Textbox
    chord_strength: gr.Slider
    style: gr.Audio
    style_start_s: gr.Number
    style_length_s: gr.Slider
    style_codebooks: gr.Slider
    text_guidance: gr.Slider
    checkpoint: gr.Dropdown
    adapter: gr.Textbox
    adapter_strength: gr.Slider
    stereo: gr.Checkbox
    duration_s: gr.Slider
    overlap_s: gr.Slider
    guidance_scale: gr.Slider
    do_sample: gr.Checkbox
    temperature: gr.Slider
    top_k: gr.Number
    top_p: gr.Slider
    automation: gr.Textbox
    skip_s: gr.Number
    seed: gr.Number
    variations: gr.Slider
    keep: gr.Slider
    rank_by_prompt: gr.Checkbox
    normalize: gr.Checkbox


@dataclass(frozen=True)
class Head:
    """What concerns the whole page."""

    status_line: gr.HTML  # what is loaded, where
    unload: gr.Button
    notice: gr.HTML
    dropped_file: gr.UploadButton  # a file dropped anywhere; see assets/page.js
    timer: gr.Timer  # asks for the status line


@dataclass(frozen=True)
class Form:
    """The form beside the request's fields."""

    ideas: gr.Dataset
    prompt_count: gr.HTML
    length_choice: gr.Radio
    keep_seed: gr.Checkbox
    reset_sampling: gr.Button
    undo_settings: gr.Button  # out of sight, as each "undo_": the notice presses it
    checkpoint_line: gr.HTML
    restore: gr.UploadButton
    chord_column: gr.Column  # on show where the checkpoint follows melodies
    generate: gr.Button
    stop: gr.Button
    checkpoint_facts: gr.State  # of the chosen checkpoint
    checkpoint_defaults: gr.JSON  # as the form was last given them; kept in the browser with it
    following: gr.JSON  # what it sets in the form, see `request_form.following`


@dataclass(frozen=True)
class AudioPanel:
    """Start from audio: a clip to continue, or one whose melody or style the music has."""

    audio_panel: gr.Accordion
    clip_use: gr.Radio
    clip_needs: gr.HTML  # what following a melody needs, where the checkpoint cannot
    continue_column: gr.Column
    clip_line: gr.HTML
    offer: gr.Button  # of the settings that a take's file holds
    melody_column: gr.Column
    melody_line: gr.HTML
    style_column: gr.Column
    style_line: gr.HTML
    trim_fold: gr.Accordion  # on show while there is a clip
    trim: gr.HTML  # the clip as a whole; see assets/player/trim.js
    undo_trim: gr.Button
    untrimmed: gr.State  # the file that a clip was trimmed from
    clip: gr.State  # what is known of the clip
    offered: gr.State  # the settings on offer
    tune: gr.State  # what is known of the melody, or of the style clip


@dataclass(frozen=True)
class TakePanel:
    """The player, the take on show and the earlier ones."""

    live: gr.HTML
    jobs: gr.HTML  # a row for each take under way, see `page_jobs`
    landed: gr.Textbox  # changes when jobs have ended
    elsewhere: gr.Checkbox  # whether the player plays something else, when an event asks
    take_title: gr.HTML
    take_variation: gr.Radio  # out of sight: the strips mark it
    compare: gr.HTML
    keep_take: gr.Button
    take_audio: gr.HTML
    wav: gr.DownloadButton
    flac: gr.DownloadButton
    continue_take: gr.Button
    retake: gr.Button
    extend: gr.Button
    use_settings: gr.Button
    same_seed: gr.Button
    export_ending: gr.Radio
    loop_bars: gr.Number
    fade_out_s: gr.Number
    export: gr.Button
    playhead_s: gr.Number  # where the player is, when an event asks
    exported: gr.DownloadButton  # out of sight: the file that was asked for
    take_facts: gr.HTML
    take_notes: gr.HTML
    take_history: gr.Radio
    history: gr.State
    chosen: gr.State  # which take of the history is on show
    tab_key: gr.Textbox  # see `sessions`
    job_id: gr.Textbox  # of a job that an earlier page began


@dataclass(frozen=True)
class PresetPanel:
    """Settings under a name, and the prompts that were used last."""

    recent: gr.Dropdown
    recent_clear: gr.Button
    preset: gr.Dropdown
    preset_use: gr.Button
    preset_delete: gr.Button
    preset_name: gr.Textbox
    preset_save: gr.Button
    preset_rename: gr.Button
    presets: gr.BrowserState  # see `presets.Preset`
    prompts: gr.BrowserState  # the newest first
    deleted: gr.State  # the preset that was deleted last
    undo_preset: gr.Button


@dataclass(frozen=True)
class GetModel:
    """What the real model needs, and the button that gets it."""

    get_panel: gr.Row
    get_line: gr.HTML
    get_start: gr.Button
    get_cancel: gr.Button
    get_later: gr.Button
    get_timer: gr.Timer  # runs while it is downloaded and loaded
    get_put_off: gr.BrowserState  # whether the user said "Not now"


@dataclass(frozen=True)
class LibraryPanel:
    """The takes that are kept."""

    library_words: gr.Textbox
    library_starred: gr.Checkbox
    library_model: gr.Dropdown
    library_cards: gr.HTML
    library_state: gr.State  # which page of it, and what was just deleted


@dataclass(frozen=True)
class LivePanel:
    """Live mode: an endless piece that is steered while it plays."""

    live_mode: gr.Checkbox
    live_column: gr.Column  # what the switch shows
    live_prompt_1: gr.Textbox
    live_prompt_2: gr.Textbox
    live_prompt_3: gr.Textbox
    live_prompt_4: gr.Textbox
    live_fader: gr.Slider  # from the first prompt to the second, where there are no others
    live_pad: gr.HTML  # takes its place; the weights of all four prompts
    live_guidance: gr.Slider
    live_temperature: gr.Slider
    live_top_k: gr.Slider
    live_start: gr.Button
    live_stop: gr.Button
    live_record: gr.Button
    live_store_1: gr.Button
    live_store_2: gr.Button
    live_store_3: gr.Button
    live_recall_1: gr.Button
    live_recall_2: gr.Button
    live_recall_3: gr.Button
    live_line: gr.HTML  # look-ahead, work and underruns
    live_listener: gr.HTML  # tells the server what was heard; see assets/live_mode.js


@dataclass(frozen=True)
class Components:
    """All of the page that events read or change."""

    request: RequestFields
    head: Head
    form: Form
    audio: AudioPanel
    take: TakePanel
    presets: PresetPanel
    get_model: GetModel
    library: LibraryPanel
    live: LivePanel

    def by_name(self) -> dict[str, Block]:
        """Every component by the name that `Updates` has for it."""
        groups = (getattr(self, group.name) for group in fields(self))
        return {each.name: getattr(group, each.name) for group in groups for each in fields(group)}


@dataclass(frozen=True)
class Endpoint:
    """The API's `generate`."""

    trigger: gr.Button
    parameters: dict[str, Block]  # by the request's field
    files: gr.File
    settings: gr.JSON


def notice(
    text: str, items: Sequence[str] = (), wrong: bool = False, undo: Undo | None = None
) -> dict[str, object]:
    """A message of the page's notice.

    Args:
        text: a sentence.
        items: further ones, below it.
        wrong: whether it failed.
        undo: what a button beside it takes back.
    """
    return {"text": text, "items": list(items), "wrong": wrong, "undo": undo and undo.value}


def sent_by(event: gr.EventData, name: str) -> object:
    """A value that a script on the page sent with an event; None where it did not."""
    try:
        found: object = getattr(event, name, None)
    except TypeError:  # an event without any value, as a program may send it
        return None
    return found


def undo_button(what: Undo) -> gr.Button:
    """The button that the notice presses: out of sight."""
    return gr.Button("Undo", visible="hidden", elem_id=f"undo_{what}", render=False)
