"""The page: its components, and what is where. No logic.

Two columns on a desktop, one on a phone, in the order of a musician's work: words, a clip, length,
tempo and key, variations and seed, the model, Generate, the take. `events.connect` connects the
components to their handlers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.blocks import Block

from musicgen_ui.backends.admission import Admission
from musicgen_ui.coercion import KEYS
from musicgen_ui.files import ASSETS
from musicgen_ui.finetune.process import Runs
from musicgen_ui.library import Library
from musicgen_ui.remote_folder import RemoteFolder
from musicgen_ui.request import CHECKPOINT_FIELDS, MAX_DURATION_S
from musicgen_ui.ui import (
    audio_panel,
    finetune_panel,
    form_events,
    get_model,
    job_events,
    library_panel,
    live_events,
    live_panel,
    presets,
    request_form,
    sections,
    take_panel,
)
from musicgen_ui.ui.components import (
    Components,
    Form,
    Head,
    RequestFields,
    TakePanel,
    Undo,
    undo_button,
)
from musicgen_ui.ui.endpoint import api
from musicgen_ui.ui.events import connect
from musicgen_ui.ui.fields import about, clip, number, slider, switch, textbox
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.sessions import Sessions

PROMPT_IDEAS = {
    "80s pop": "80s pop with warm synth pads, gated drums and a catchy bass line",
    "Lo-fi": "lo-fi hip hop, mellow electric piano, vinyl crackle, slow relaxed beat",
    "Techno": "techno with a hard kick and synth bass, driving and dark",
    "Jazz": "swing jazz with saxophone and walking bass",
    "Funk": "funk with slap bass, clean guitar and a tight drum groove",
    "Ambient": "ambient, slow evolving pads, calm and spacious",
}
LENGTHS_S = {"5 s": 5, "10 s": 10, "20 s": 20, "30 s": 30, "1 min": 60, "2 min": 120, "5 min": 300}
# Never rendered again, so that the script may write into it: nothing here depends on the value.
NOTICE = """
<div class="notice" hidden>
  <div class="notice-words" role="status" aria-live="polite"></div>
  <button type="button" class="notice-undo" hidden>Undo</button>
  <button type="button" class="notice-close" aria-label="Close this message">✕</button>
</div>
"""


@dataclass(frozen=True)
class PageOptions:
    """What the host of a page sets."""

    checkpoint: str = "auto"  # chosen when the page opens
    any_checkpoint: bool = True  # whether visitors may name any Hub id or folder
    max_duration_s: float = MAX_DURATION_S  # of one take
    finetune_folder: Path | None = None  # of the runs of fine-tuning; None leaves it out
    offers_download: bool = False  # of the real model, by a button; for a user of their own


class Page(gr.Blocks):
    """Gradio's page, with what the server needs of it."""

    sessions: Sessions
    backend: Admission
    finetuning: Runs | None  # None: not on this page
    storage: RemoteFolder | None  # object storage where the takes are copied to


def build(backend: Admission, settings: PageOptions, library: Library | None = None) -> Page:
    """The page over a backend. Loads no model and no torch.

    Without a `library` the page shows the takes of its session alone.
    """
    handlers = Handlers(backend, settings.max_duration_s)
    page = Page(title="MusicGen UI", analytics_enabled=False)
    with page:
        c = create(settings)
        lay_out(c, settings, library is not None)
        made = [job_events.connect(c, handlers, api()), live_events.connect(c, handlers, page)]
        connect(c, handlers, page, settings.any_checkpoint, library, made)
        form_events.connect(c, handlers, page, settings.any_checkpoint, settings.offers_download)
        page.finetuning = finetuning(c, settings, page)
    page.sessions, page.backend = handlers.sessions, backend
    return page


def finetuning(c: Components, settings: PageOptions, page: gr.Blocks) -> Runs | None:
    """Fine-tuning, where the host has a folder for it."""
    if settings.finetune_folder is None:
        return None
    runs = Runs(settings.finetune_folder)
    panel = finetune_panel.build()
    finetune_panel.connect(panel, runs, page, c.request.checkpoint, c.request.adapter)
    return runs


def theme() -> gr.themes.Base:
    """Gradio's own, in teal and stone; the rest is in assets/style.css."""
    sans = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))
    return gr.themes.Default(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="stone",
        radius_size="lg",
        font=[sans, "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        block_border_width="0px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_padding="0px",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        block_label_text_size="*text_sm",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_title_text_weight="600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_border_width="1px",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
        form_gap_width="0px",
    )


def create(settings: PageOptions) -> Components:
    """The components, not placed yet."""
    request = request_fields(settings)
    return Components(
        request,
        head(),
        form(request, settings),
        audio_panel.panel(),
        take_panel.panel(),
        presets.panel(),
        get_model.panel(),
        library_panel.panel(),
        live_panel.panel(),
    )


def place(*blocks: Block) -> None:
    """Puts components here, below each other or into the row around them."""
    for block in blocks:
        render: Callable[[], object] = block.render
        render()


def lay_out(c: Components, settings: PageOptions, with_library: bool = False) -> None:
    """Places every component."""
    with gr.Row(elem_id="head"):
        gr.HTML("<h1>MusicGen UI</h1>", elem_id="name", apply_default_css=False)
        place(c.head.status_line, c.head.unload)
    place(c.head.notice, c.head.dropped_file, c.head.timer)
    get_model.lay_out(c.get_model, place)
    with gr.Row(elem_id="workspace", equal_height=False):
        with gr.Column(elem_id="compose", min_width=340):
            lay_out_form(c, settings)
        with gr.Column(elem_id="take", min_width=340):
            lay_out_take(c.take, not with_library)
    with gr.Column(elem_id="library", visible=with_library):
        with gr.Row(elem_id="library_head"):
            gr.HTML("<h2>Library</h2>", elem_id="library_name", apply_default_css=False)
            place(c.library.library_words, c.library.library_model, c.library.library_starred)
        place(c.library.library_cards, c.library.library_state)


def lay_out_form(c: Components, settings: PageOptions) -> None:
    """The settings of the next take."""
    request, form = c.request, c.form
    place(request.prompt, form.prompt_count, form.ideas)
    presets.lay_out(c.presets, place)
    lay_out_audio(c)
    with gr.Column(elem_id="length"):
        place(request.duration_s, form.length_choice)
    with gr.Row(elem_id="tonality"):
        place(request.tempo_bpm, request.key)
    with gr.Row(elem_id="drawn"):
        place(request.variations)
        with gr.Column(elem_id="seed_column", min_width=140):
            place(request.seed, form.keep_seed)
    with gr.Row(elem_id="sound"):
        place(request.guidance_scale, request.stereo)
    place(request.checkpoint, form.checkpoint_line)
    with gr.Accordion("Change over time", open=False, elem_id="over_time"):
        gr.HTML(
            '<p class="clip-line">From a time on (20 or 0:20), these words join your prompt, until '
            "the next row. The prompt itself goes for the whole piece.</p>"
        )
        place(request.sections, request.overlap_s)
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        place(request.do_sample)
        with gr.Row():
            place(request.temperature, request.top_k)
        with gr.Row():
            place(request.top_p)
        place(form.reset_sampling)
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        place(request.negative_prompt)
        with gr.Row(elem_id="best"):
            place(request.keep, request.rank_by_prompt)
        place(form.chord_column)
        with form.chord_column:
            place(request.chords)
            place(request.chord_strength)
        place(request.time_signature)
        with gr.Row(visible=settings.any_checkpoint):
            place(request.adapter, request.adapter_strength)
        place(request.normalize, request.automation, request.skip_s, form.restore)
    place(form.checkpoint_facts, form.checkpoint_defaults, form.following, form.undo_settings)
    live_panel.lay_out(c.live, place)
    with gr.Row(elem_id="go"):
        place(form.generate, form.stop)


def lay_out_audio(c: Components) -> None:
    """Start from audio: each use of a clip has a field of its own, and one of them is on show."""
    place(c.audio.audio_panel)
    with c.audio.audio_panel:
        place(c.audio.clip_use, c.audio.clip_needs)
        # On show where the browser says so, see `assets/page.js`.
        text = f'<p class="clip-line">{audio_panel.UNRECORDED}</p>'
        gr.HTML(text, apply_default_css=False, elem_id="unrecorded")
        place(c.audio.continue_column, c.audio.melody_column, c.audio.style_column)
        with c.audio.continue_column:
            place(c.request.audio_prompt, c.audio.clip_line, c.audio.offer)
            with gr.Row():
                place(c.request.include_prompt, c.request.context_s)
        with c.audio.melody_column:
            place(c.request.melody, c.audio.melody_line)
        with c.audio.style_column:
            place(c.request.style, c.audio.style_line)
            with gr.Row():
                place(c.request.style_start_s, c.request.style_length_s)
            with gr.Row():
                place(c.request.style_codebooks, c.request.text_guidance)
        place(c.audio.trim_fold)
        with c.audio.trim_fold:
            place(c.audio.trim)
    place(c.audio.undo_trim, c.audio.untrimmed, c.audio.clip, c.audio.offered, c.audio.tune)


def lay_out_take(take: TakePanel, session_alone: bool) -> None:
    """What was made; the earlier takes of the session where there is no library."""
    place(take.live, take.jobs, take.compare, take.keep_take, take.take_title, take.take_variation)
    place(take.take_audio)
    with gr.Row(elem_id="take_actions"):
        place(take.retake, take.extend, take.continue_take, take.use_settings, take.same_seed)
        place(take.wav, take.flac)
    with gr.Accordion("Export", open=False, elem_id="export_fold"):
        place(take.export_ending)
        with gr.Row():
            place(take.loop_bars, take.fade_out_s)
        place(take.export)
    place(take.exported, take.playhead_s, take.take_facts, take.take_notes)
    with gr.Column(visible=session_alone):
        place(take.take_history)
        gr.HTML(f'<p class="clip-line">{take_panel.TEMPORARY}</p>', apply_default_css=False)
    place(take.history, take.chosen, take.tab_key, take.job_id, take.landed, take.elsewhere)


def request_fields(settings: PageOptions) -> RequestFields:
    """The settings of a take."""
    return RequestFields(
        prompt=textbox(
            "prompt",
            "",
            lines=3,
            max_lines=6,
            placeholder="Style, instruments, mood, tempo. Leave it empty to be surprised.",
        ),
        negative_prompt=textbox("negative_prompt"),
        sections=sections.rows(),
        tempo_bpm=number("tempo_bpm", "beats a minute; 0 is open"),
        key=gr.Dropdown(
            [("open", ""), *KEYS], value="", min_width=140, **about("key", "such as C minor")
        ),
        time_signature=textbox(
            "time_signature", "of chords and loops; a bar has so many beats", value="4/4"
        ),
        audio_prompt=clip("audio_prompt"),
        context_s=slider("context_s", 0.5, "seconds of its end; 0 is all that fits"),
        include_prompt=switch("include_prompt", "off gives the continuation alone"),
        melody=clip("melody"),
        chords=textbox(
            "chords",
            "a bar each, followed approximately; commas divide a bar; Tempo counts",
            placeholder="C G A:min F,G:7",
        ),
        chord_strength=slider("chord_strength", 0.1, "1 is as a melody"),
        style=clip("style"),
        style_start_s=number("style_start_s", "where in the clip it begins, in s"),
        style_length_s=slider("style_length_s", 0.1, "seconds of the clip that are used"),
        style_codebooks=slider("style_codebooks", 1, "1 is the outline, 6 the most detail"),
        text_guidance=slider("text_guidance", 0.1, "more: closer to the words than to the clip"),
        checkpoint=gr.Dropdown(
            [settings.checkpoint],
            value=settings.checkpoint,
            allow_custom_value=True,
            **about("checkpoint"),
        ),
        adapter=textbox("adapter", "a LoRA by its Hub id or folder; empty is none"),
        adapter_strength=slider("adapter_strength", 0.05, "1 is as trained"),
        stereo=switch("stereo", request_form.STEREO_INFO["choice"]),
        duration_s=slider("duration_s", 0.5, highest=settings.max_duration_s),
        overlap_s=slider("overlap_s", 0.5),
        guidance_scale=slider("guidance_scale", 0.1),
        do_sample=switch("do_sample"),
        temperature=slider("temperature", 0.01, "below 1 safer, above 1 wilder"),
        top_k=number("top_k", "draw from the likeliest k; 0 is all"),
        top_p=slider("top_p", 0.01, "draw from this total share; 0 is off"),
        automation=gr.Textbox(
            "", lines=1, **about("automation", "what changed while a live piece played, as JSON")
        ),
        skip_s=number("skip_s", "seconds that are made and left out at the start"),
        seed=number("seed", "-1 draws one for each take"),
        variations=slider("variations", 1, "takes at once"),
        keep=slider("keep", 1, "the best of the variations; 0 is all"),
        rank_by_prompt=switch("rank_by_prompt", "the best by the words, not by faults alone"),
        normalize=switch("normalize"),
    )


def head() -> Head:
    """The page's head, its notice, and a file dropped on it."""
    return Head(
        status_line=gr.HTML("", elem_id="engine", apply_default_css=False, render=False),
        unload=gr.Button("Unload", elem_id="unload", size="sm", variant="secondary", render=False),
        notice=gr.HTML(
            value=None,
            html_template=NOTICE,
            js_on_load=(ASSETS / "page.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            elem_id="notice",
            render=False,
        ),
        dropped_file=gr.UploadButton(
            "Dropped file", visible="hidden", elem_id="dropped", render=False
        ),
        timer=gr.Timer(request_form.SOON_S, render=False),
    )


def form(request: RequestFields, settings: PageOptions) -> Form:
    """What belongs to the form and is no setting."""
    lengths = [(label, s) for label, s in LENGTHS_S.items() if s <= settings.max_duration_s]
    length_s = request.duration_s.value
    return Form(
        ideas=gr.Dataset(
            label="Ideas",
            elem_id="ideas",
            components=[gr.Textbox(render=False)],
            samples=[[words] for words in PROMPT_IDEAS.values()],
            sample_labels=list(PROMPT_IDEAS),
            type="values",
            show_label=False,
            render=False,
        ),
        prompt_count=gr.HTML("", elem_id="prompt_count", apply_default_css=False, render=False),
        length_choice=gr.Radio(
            lengths,
            value=length_s if length_s in dict(lengths).values() else None,
            label="Usual lengths",
            show_label=False,
            elem_id="length_choice",
            render=False,
        ),
        keep_seed=gr.Checkbox(
            label="Keep this seed",
            elem_id="keep_seed",
            render=False,
        ),
        reset_sampling=gr.Button(
            "Back to the model's defaults", size="sm", elem_id="reset_sampling", render=False
        ),
        undo_settings=undo_button(Undo.SETTINGS),
        checkpoint_line=gr.HTML("", elem_id="checkpoint_line", render=False),
        restore=gr.UploadButton(
            "Take the settings from a file …",
            size="sm",
            elem_id="restore",
            file_types=["audio"],
            render=False,
        ),
        chord_column=gr.Column(visible=False, elem_id="chord_column", render=False),
        generate=gr.Button(
            "Generate", variant="primary", size="lg", elem_id="generate", render=False
        ),
        stop=gr.Button(
            "Stop", variant="stop", size="lg", elem_id="stop", visible=False, render=False
        ),
        checkpoint_facts=gr.State({}, render=False),
        checkpoint_defaults=gr.JSON(
            {name: getattr(request, name).value for name in CHECKPOINT_FIELDS},
            visible=False,
            render=False,
        ),
        following=gr.JSON({}, visible=False, render=False),
    )
