"""The page: what is where. No logic.

Two columns on a desk, one on a phone, in the order of the work: words, a clip, length, Generate,
the take. Components carry the request's field names; `wire` connects them to the handlers, whose
answers are updates by component name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.api_component import Api

from musicgen_ui.backends.admission import Desk, Ledger
from musicgen_ui.engine.protocol import Engine
from musicgen_ui.request import CHECKPOINT_FIELDS, CLIP_FIELDS, FIELDS, KEYS, MAX_DURATION_S
from musicgen_ui.ui import audio_panel, notice, request_form, take_panel
from musicgen_ui.ui.components import about, in_words, number, slider, switch
from musicgen_ui.ui.events import Parts, connect
from musicgen_ui.ui.handlers import Handlers
from musicgen_ui.ui.live_player import live_player
from musicgen_ui.ui.restoring import section_rows

IDEAS = {
    "80s pop": ("80s pop with warm synth pads, gated drums and a catchy bass line", 10),
    "Lo-fi": ("lo-fi hip hop, mellow electric piano, vinyl crackle, slow relaxed beat", 10),
    "Techno": ("techno with a hard kick and synth bass, driving and dark", 10),
    "Jazz": ("swing jazz with saxophone and walking bass", 10),
    "Funk": ("funk with slap bass, clean guitar and a tight drum groove", 10),
    "Ambient": ("ambient, slow evolving pads, calm and spacious", 20),
}

EXAMPLE_CLIP = {"path": "clip.wav", "url": "clip.wav", "meta": {"_type": "gradio.FileData"}}
WAVEFORM = gr.WaveformOptions(
    waveform_color="#a8a29e", waveform_progress_color="#0d9488", show_recording_waveform=True
)


@dataclass(frozen=True)
class PageOptions:
    """What the host of a page sets."""

    checkpoint: str = "auto"  # chosen when the page opens
    any_checkpoint: bool = True  # whether visitors may name any Hub id or folder
    max_duration_s: float = MAX_DURATION_S  # of one take
    queue_length: int = 32  # takes being made or waiting
    visitor_jobs: int = 0  # takes of one visitor being made or waiting; 0 is any number
    visitor_seconds: float = 0.0  # seconds of music an hour for each visitor; 0 is any number


def build(
    engine: Engine,
    settings: PageOptions,
    folder: Path,
    spare: Path | None = None,
    journal: Any = None,
) -> gr.Blocks:
    """The page over an engine; takes are written to `folder`, or to `spare` when it is full.

    Loads no model and no torch.
    """
    desk = Desk(settings.queue_length, settings.visitor_jobs, Ledger(settings.visitor_seconds))
    handlers = Handlers(engine, folder, desk, settings.max_duration_s, spare, journal)
    with gr.Blocks(title="MusicGen UI", analytics_enabled=False) as page:
        parts = Parts()
        head(parts, engine)
        with gr.Row(elem_id="desk", equal_height=False):
            with gr.Column(elem_id="compose", min_width=340):
                compose(parts, settings)
            with gr.Column(elem_id="take", min_width=340):
                take(parts)
        api(parts)
        connect(parts, handlers, engine, page, adapters=settings.any_checkpoint)
    page.recall, page.desk, page.engine = handlers.recall, desk, engine
    return page


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


def head(parts: Parts, engine: Engine) -> None:
    """Name, what is loaded, unload; what is said of the whole page, and files dropped on it."""
    with gr.Row(elem_id="head"):
        gr.HTML("<h1>MusicGen UI</h1>", elem_id="name", apply_default_css=False)
        parts["engine"] = gr.HTML("", elem_id="engine", apply_default_css=False)
        parts["unload"] = gr.Button("Unload", elem_id="unload", size="sm", variant="secondary")
    parts["notice"] = notice.component()
    parts["dropped"] = gr.UploadButton("Dropped file", visible="hidden", elem_id="dropped")


def compose(parts: Parts, settings: PageOptions) -> None:
    """The form."""
    longest_s = settings.max_duration_s
    parts["prompt"] = gr.Textbox(
        lines=3,
        max_lines=6,
        max_length=FIELDS["prompt"].metadata["max"],
        placeholder="Style, instruments, mood, tempo. Leave it empty to be surprised.",
        **about("prompt", ""),
    )
    parts["ideas"] = gr.Dataset(
        label="Ideas",
        elem_id="ideas",
        components=[gr.Textbox(visible=False), gr.Number(visible=False)],
        samples=[[words, min(length_s, longest_s)] for words, length_s in IDEAS.values()],
        sample_labels=list(IDEAS),
        type="values",
        show_label=False,
    )
    with gr.Accordion("Start from audio", open=False, elem_id="audio_panel") as panel:
        parts["audio_panel"] = panel
        audio_panel.layout(parts)
    with gr.Row(elem_id="main_settings"):
        parts["duration_s"] = slider("duration_s", 0.5, highest=longest_s)
        parts["guidance_scale"] = slider("guidance_scale", 0.1, "to the words; 1 is off")
    parts["stereo"] = switch("stereo", request_form.STEREO_INFO["choice"])
    with gr.Accordion("Change over time", open=False, elem_id="over_time"):
        over_time(parts)
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        advanced(parts, settings)
    with gr.Row(elem_id="go"):
        parts["generate"] = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
        parts["stop"] = gr.Button("Stop", variant="stop", size="lg", elem_id="stop", visible=False)


def over_time(parts: Parts) -> None:
    """What joins the prompt from when on, and how windows hang together."""
    gr.HTML(
        '<p class="clip-line">From a time on (20 or 0:20), these words join your prompt, until the '
        "next row. The prompt itself goes for the whole piece.</p>"
    )
    parts["sections"] = gr.Dataframe(
        section_rows([]),
        headers=["From", "these words join"],
        datatype="str",
        type="array",
        column_count=2,
        column_widths=["32%", "68%"],
        interactive=True,
        wrap=True,
        buttons=[],
        label=FIELDS["sections"].metadata["label"],
        elem_id="sections",
    )
    parts["add_section"] = gr.Button("Add a row", size="sm", elem_id="add_section")
    parts["overlap_s"] = slider("overlap_s", 0.5)


def advanced(parts: Parts, settings: PageOptions) -> None:
    """What most takes do without."""
    parts["checkpoint"] = gr.Dropdown(
        [settings.checkpoint],
        value=settings.checkpoint,
        allow_custom_value=True,
        **about("checkpoint"),
    )
    parts["checkpoint_line"] = gr.HTML("", elem_id="checkpoint_line")
    with gr.Row(visible=settings.any_checkpoint):
        parts["adapter"] = gr.Textbox(
            lines=1,
            max_length=FIELDS["adapter"].metadata["max"],
            **about("adapter", "a LoRA by its Hub id or folder; empty is none"),
        )
        parts["adapter_strength"] = slider("adapter_strength", 0.05, "1 is as trained")
    parts["negative_prompt"] = gr.Textbox(
        lines=1,
        max_length=FIELDS["negative_prompt"].metadata["max"],
        **about("negative_prompt"),
    )
    with gr.Row():
        parts["variations"] = slider("variations", 1, "takes at once, each with its seed")
        parts["seed"] = number("seed", "same seed, same take; -1 draws one")
    with gr.Row():
        parts["tempo_bpm"] = number("tempo_bpm", "beats a minute; 0 is open")
        parts["key"] = gr.Dropdown(
            [("open", ""), *KEYS], value="", min_width=140, **about("key", "such as C minor")
        )
    parts["do_sample"] = switch("do_sample")
    with gr.Row():
        parts["temperature"] = slider("temperature", 0.01, "below 1 safer, above 1 wilder")
        parts["top_k"] = number("top_k", "draw from the likeliest k; 0 is all")
    with gr.Row():
        parts["top_p"] = slider("top_p", 0.01, "draw from this total share; 0 is off")
        parts["normalize"] = switch("normalize")
    parts["restore"] = gr.UploadButton(
        "Take the settings from a file …", size="sm", elem_id="restore", file_types=["audio"]
    )


def take(parts: Parts) -> None:
    """What was made, and at first an example of it."""
    opening = take_panel.example()
    parts["live"] = live_player()
    parts["take_title"] = gr.HTML(
        f'<p class="intro">{take_panel.INTRO}</p>{take_panel.title_html(opening)}',
        elem_id="take_title",
    )
    parts["take_variation"] = gr.Radio(
        [], label="Variations", show_label=False, visible=False, elem_id="take_variation"
    )
    parts["take_audio"] = gr.Audio(
        str(opening.wav),
        label="Take",
        show_label=False,
        interactive=False,
        elem_id="take_audio",
        buttons=[],
        waveform_options=WAVEFORM,
    )
    parts["spectrogram"] = gr.Image(
        str(opening.picture),
        label="Spectrogram",
        show_label=False,
        interactive=False,
        elem_id="spectrogram",
        alt_text=opening.alt,
        buttons=["fullscreen"],
    )
    small: dict[str, Any] = {"size": "sm", "min_width": 60}
    with gr.Row(elem_id="take_actions"):
        parts["wav"] = gr.DownloadButton("WAV", str(opening.wav), elem_id="wav", **small)
        parts["flac"] = gr.DownloadButton("FLAC", str(opening.flac), elem_id="flac", **small)
        parts["continue"] = gr.Button("Continue this", elem_id="continue", **small)
        parts["same_seed"] = gr.Button("Same seed", elem_id="same_seed", **small)
    parts["take_facts"] = gr.HTML(take_panel.facts_line(opening), elem_id="take_facts")
    parts["take_notes"] = gr.HTML("", visible=False, elem_id="take_notes")
    parts["take_history"] = gr.Radio(
        [], label="Takes of this session", visible=False, elem_id="take_history"
    )
    parts["history"] = gr.State([])
    parts["tab_key"] = gr.Textbox(visible=False)  # see `recall`
    parts["watch"] = gr.Timer(1, active=False)  # for a take that an earlier page began
    parts["chosen"] = gr.State([0, 0])
    parts["clip"] = gr.State({})
    parts["offered"] = gr.State({})
    parts["facts"] = gr.State({})  # of the chosen checkpoint
    # Not a State: the browser keeps it with the form.
    own = {name: parts[name].value for name in CHECKPOINT_FIELDS}
    parts["own"] = gr.JSON(own, visible=False)


def api(parts: Parts) -> None:
    """The API's parameters and answers: the request's fields, and what they are for."""
    words = {str: "string", bool: "boolean", int: "integer", float: "number"}
    kinds: dict[type, dict] = {kind: {"type": word} for kind, word in words.items()}
    kinds[tuple] = {"type": "array", "items": {}}
    with gr.Column(visible=False):
        for name, spec in FIELDS.items():
            if name in CLIP_FIELDS:
                component: Any = gr.Audio(type="filepath", label=name)
                # Gradio's is an address, which is not fetched here.
                component.example_payload = lambda: EXAMPLE_CLIP
            else:
                # None: what the checkpoint states, else the request's default.
                default = None if name in CHECKPOINT_FIELDS else spec.default
                component = Api(default, kinds[type(spec.default)], name)
            described(component, in_words(name))
            parts["api:" + name] = component
        parts["api"] = gr.Button("generate")
        files = gr.File(file_count="multiple", label="files")
        described(files, "a WAV and a FLAC of each variation in turn")
        told = gr.JSON(label="settings")
        described(told, "what the takes were made with, the seed that was drawn included")
        parts["api:files"], parts["api:settings"] = files, told


def described(component: Any, text: str) -> None:
    """Gives one of the API's parameters or answers its description."""
    schema = component.api_info()
    # Gradio shows the one name for parameters and the other for answers.
    about_it = {"description": text, "additional_description": text}
    component.api_info = lambda: {**schema, **about_it}
