"""Teach it your music: songs, captions and a preset become a LoRA adapter.

The training is `musicgen_ui finetune` in a process of its own; the page reads its progress file.
It is there where the computer is its user's alone. A run is a folder, so a page that is opened
later, or after a restart, shows where it stands and goes on with it.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import gradio as gr
from gradio.blocks import Block
from gradio.events import Dependency

from musicgen_ui.errors import RequestError
from musicgen_ui.finetune import progress
from musicgen_ui.finetune.options import PRESETS
from musicgen_ui.finetune.process import Runs
from musicgen_ui.finetune.progress import Event, Kind
from musicgen_ui.ui.components import QUIET

T = TypeVar("T")

TICK_S = 2.0
NAME = "my style"
WIDTH, HEIGHT = 600, 160  # of the curve, in its own units
NOTES = 5  # newest that are shown
PRESET_CHOICES = [
    ("by the device", "auto"),
    ("CPU", "cpu"),
    *((f"GPU of {name} GB", name) for name in PRESETS if name != "cpu"),
]


@dataclass(frozen=True)
class FinetunePanel:
    """The panel's components."""

    name: gr.Textbox
    files: gr.File
    captions: gr.Dataframe
    word: gr.Textbox
    preset: gr.Dropdown
    steps: gr.Number
    start: gr.Button
    pause: gr.Button
    status: gr.HTML
    curve: gr.HTML
    sample: gr.Audio
    use: gr.Button
    timer: gr.Timer

    @property
    def shown(self) -> list[Block]:
        """What `Panel.look` answers with, in its order."""
        return [self.status, self.curve, self.sample, self.start, self.pause, self.use, self.timer]


def build() -> FinetunePanel:
    """Makes and places the components."""
    with gr.Accordion("Teach it your music", open=False, elem_id="finetune"):
        gr.HTML(
            '<p class="clip-line">Ten to thirty songs of one style become an adapter for the '
            "chosen model. Vocals spoil it: leave such songs out. A caption that is empty is "
            "suggested from the file and its measured tempo and key.</p>"
        )
        with gr.Row():
            name = gr.Textbox(NAME, label="Name of the style", elem_id="finetune_name")
            word = gr.Textbox("", label="Activation word", elem_id="finetune_word")
        files = gr.File(
            label="Songs, and captions as .txt",
            file_count="multiple",
            file_types=["audio", ".txt", ".json"],
            elem_id="finetune_files",
        )
        captions = gr.Dataframe(
            headers=["Song", "Caption"],
            datatype="str",
            type="array",
            column_count=2,
            column_widths=["30%", "70%"],
            interactive=True,
            static_columns=[0],
            wrap=True,
            buttons=[],
            label="Captions",
            elem_id="finetune_captions",
        )
        with gr.Row():
            preset = gr.Dropdown(PRESET_CHOICES, value="auto", label="Memory")
            steps = gr.Number(0, label="Steps", info="0 is the preset's", precision=0, minimum=0)
        with gr.Row():
            start = gr.Button("Start training", variant="primary", elem_id="finetune_start")
            pause = gr.Button("Pause", visible=False, elem_id="finetune_pause")
        status = gr.HTML("", elem_id="finetune_status")
        curve = gr.HTML("", elem_id="finetune_curve")
        sample = gr.Audio(
            label="The newest sample", visible=False, interactive=False, elem_id="finetune_sample"
        )
        use = gr.Button("Use it for the next take", visible=False, elem_id="finetune_use")
        timer = gr.Timer(TICK_S, active=False)
    return FinetunePanel(
        name, files, captions, word, preset, steps, start, pause, status, curve, sample, use, timer
    )


class Panel:
    """Answers the panel's events."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    def receive(self, name: str, uploads: list[str] | None) -> tuple[list[list[str]], None]:
        """Songs were uploaded: kept in the run's folder, and listed with their captions.

        The field is emptied, so that more can follow.
        """
        if uploads:
            self.runs.add(name, uploads)
        return self.songs(name), None

    def songs(self, name: str) -> list[list[str]]:
        """The songs of a run, as rows of the table."""
        return [list(song) for song in self.runs.songs(name)]

    def start(
        self,
        name: str,
        rows: Sequence[Sequence[str]],
        word: str,
        preset: str,
        steps: float | None,
        checkpoint: str,
    ) -> list[object]:
        """Start training, or go on."""
        captions = {row[0]: row[1] or "" for row in rows if row and row[0]}
        self.runs.write_captions(name, captions)
        flags = ["--preset", preset, "--checkpoint", checkpoint or "auto"]
        flags += ["--activation-word", word] if word.strip() else []
        flags += ["--steps", str(int(steps))] if steps else []
        self.runs.start(name, flags)
        return self.look(name)

    def pause(self, name: str) -> list[object]:
        """Pause."""
        self.runs.pause()
        return self.look(name)

    def look(self, name: str) -> list[object]:
        """The state of a run: values for `FinetunePanel.shown`."""
        folder = self.runs.path(name)
        events, _ = progress.read(folder)
        running = self.runs.running
        here = bool(running) and self.runs.path(running) == folder
        paused = bool(events) and events[-1].kind in (Kind.PAUSED, Kind.STEP, Kind.SAVED)
        samples = [e.file for e in events if e.kind is Kind.SAMPLE and Path(e.file).is_file()]
        trained = (folder / "adapter" / "adapter_model.safetensors").is_file()
        return [
            status_html(events, here, self.runs.ended_badly(name)),
            curve_html(events),
            gr.update(value=samples[-1] if samples else None, visible=bool(samples)),
            gr.update(visible=not running, value="Go on" if paused else "Start training"),
            gr.update(visible=here),
            gr.update(visible=trained),
            gr.Timer(active=bool(running)),
        ]

    def use(self, name: str) -> tuple[str, str]:
        """The adapter and its checkpoint, for the form."""
        return str(self.runs.path(name) / "adapter"), "auto"


def connect(
    panel: FinetunePanel, runs: Runs, page: gr.Blocks, checkpoint: Block, adapter: Block
) -> None:
    """Connects the panel; `checkpoint` and `adapter` are the form's."""
    answers = Panel(runs)

    def on(
        event: Callable[..., Dependency],
        handler: Callable[..., object],
        inputs: Sequence[Block],
        outputs: Sequence[Block],
        api_name: str,
    ) -> Dependency:
        name = f"finetune_{api_name}"
        return event(_with_sentences(handler), inputs, outputs, api_name=name, **QUIET)

    shown, name = panel.shown, [panel.name]
    received = [panel.captions, panel.files]
    on(panel.files.upload, answers.receive, [*name, panel.files], received, "files")
    chosen = on(panel.name.submit, answers.songs, name, [panel.captions], "name")
    on(chosen.then, answers.look, name, shown, "name_look")
    fields = [*name, panel.captions, panel.word, panel.preset, panel.steps, checkpoint]
    on(panel.start.click, answers.start, fields, shown, "start")
    on(panel.pause.click, answers.pause, name, shown, "pause")
    on(panel.timer.tick, answers.look, name, shown, "tick")
    on(panel.use.click, answers.use, name, [adapter, checkpoint], "use")
    opened = on(page.load, answers.songs, name, [panel.captions], "load")
    on(opened.then, answers.look, name, shown, "load_look")


def _with_sentences(handler: Callable[..., T]) -> Callable[..., T]:
    """The handler; what it refuses is shown as a sentence."""

    def call(*values: object) -> T:
        try:
            return handler(*values)
        except RequestError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return call


def status_html(events: Sequence[Event], running: bool, failure: str) -> str:
    """Where a run stands: its step, time left, estimate and notes."""
    if not events:
        return f"<p>{html.escape(failure)}</p>" if failure else ""
    newest = events[-1]
    steps = [event for event in events if event.kind is Kind.STEP]
    lines = []
    if failure:
        lines.append(failure)
    elif newest.kind is Kind.DONE:
        lines.append(f"Done after {newest.steps} steps. The adapter is in {newest.file}")
    elif newest.kind is Kind.PAUSED:
        lines.append(f"Paused at step {newest.step}: Go on continues from there.")
    elif newest.kind is Kind.FAILED:
        lines.append(newest.sentence)
    elif not running:
        lines.append("It was interrupted: Go on continues from what was saved.")
    elif steps and newest.kind is not Kind.PREPARING:
        last = steps[-1]
        left = f"{max(1, round(last.left_s / 60))} min left"
        lines.append(f"Step {last.step} of {last.steps}, loss {last.loss:.2f}, {left}")
    else:
        lines.append(newest.sentence)
    estimates = [event.sentence for event in events if event.kind is Kind.ESTIMATE]
    notes = [event.sentence for event in events if event.kind is Kind.NOTE]
    lines += [*estimates[-1:], *notes[-NOTES:]]
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def curve_html(events: Sequence[Event]) -> str:
    """The loss over the steps as a picture; "" before there are two of them."""
    losses = progress.curve(list(events))
    if len(losses) < 2:
        return ""
    total = max((event.steps for event in events), default=0) or losses[-1][0]
    low, high = min(loss for _, loss in losses), max(loss for _, loss in losses)
    spread = max(high - low, 1e-6)
    points = " ".join(
        f"{WIDTH * step / total:.1f},{HEIGHT * (high - loss) / spread:.1f}" for step, loss in losses
    )
    words = f"Loss over {len(losses)} steps, from {losses[0][1]:.2f} to {losses[-1][1]:.2f}"
    return (
        f'<svg viewBox="-4 -4 {WIDTH + 8} {HEIGHT + 8}" width="100%" role="img" '
        f'aria-label="{words}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="2"/></svg>'
        f'<p class="clip-line">{words}</p>'
    )
