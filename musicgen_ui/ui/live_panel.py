"""Live mode: an endless piece whose prompts, guidance and sampling change while it plays.

The browser reports what it played (`server.played`), and the engine makes little more than
that, so a change is heard about `engine.live.LOOK_AHEAD_S` later. A recording becomes a take like
any other: its file holds the changes, and its settings make it again.
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import gradio as gr
import numpy as np
from anyio import to_thread

from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.admission import AdmittedJob, Client, Saved
from musicgen_ui.backends.job_log import Outcome
from musicgen_ui.coercion import PROMPT_CHARACTERS, float_of
from musicgen_ui.engine.protocol import NO_LIVE_MODE, Chunk, Failed, Progress, Recorded, Stage
from musicgen_ui.errors import RequestError
from musicgen_ui.files import ASSETS
from musicgen_ui.request import FIELDS, steering
from musicgen_ui.steering import MEMORY_SLOTS, Steering
from musicgen_ui.ui import live_pad, take_panel
from musicgen_ui.ui.components import LivePanel, Updates, notice
from musicgen_ui.ui.handlers import Handlers, name_parameters
from musicgen_ui.ui.page_jobs import STATUS_EVERY_S
from musicgen_ui.ui.player import JobState
from musicgen_ui.ui.request_builder import without_unchanged
from musicgen_ui.ui.wording import error_text, progress_text

MEASURED_S = 2.0  # of music, until the speed is believed
QUIET = 10 ** (-50 / 20)  # root mean square of what is nearly silent: -50 dBFS
QUIET_S = 3.0  # of it, until it is said
NEARLY_SILENT = "The music is nearly silent: give one prompt more weight, or raise the temperature."
CONTROLS = (
    *("live_prompt_1", "live_prompt_2", "live_prompt_3", "live_prompt_4", "live_fader"),
    *("live_pad", "live_guidance", "live_temperature", "live_top_k"),
)
MOST_TOP_K = 500  # on the slider


def _prompt(n: int) -> gr.Textbox:
    return gr.Textbox(
        label=f"Prompt {n}",
        placeholder="" if n > 1 else "Empty: the prompt of the form",
        elem_id=f"live_prompt_{n}",
        max_length=PROMPT_CHARACTERS,
        render=False,
    )


def _slider(
    name: str, label: str, low: float, high: float, value: float, step: float = 0.01
) -> gr.Slider:
    return gr.Slider(
        low, high, value, step=step, label=label, elem_id=name, min_width=155, render=False
    )


def _store(slot: int) -> gr.Button:
    return _memory("store", "Keep in", slot)


def _recall(slot: int) -> gr.Button:
    return _memory("recall", "Go back to", slot)


def _memory(what: str, words: str, slot: int) -> gr.Button:
    return gr.Button(
        f"{words} {slot}",
        interactive=False,
        elem_id=f"live_{what}_{slot}",
        size="sm",
        min_width=60,
        render=False,
    )


def panel() -> LivePanel:
    """The components, not placed yet."""
    return LivePanel(
        live_mode=gr.Checkbox(
            label="Live mode",
            info="an endless piece that you change while it plays",
            elem_id="live_mode",
            render=False,
        ),
        live_column=gr.Column(visible=False, elem_id="live_column", render=False),
        live_fader=_slider("live_fader", "From the first prompt to the second", 0, 1, 0),
        live_pad=live_pad.pad(),
        live_guidance=_slider("live_guidance", "Guidance", 1, 10, 3, 0.1),
        live_temperature=_slider("live_temperature", "Temperature", 0.1, 2, 1),
        live_top_k=_slider("live_top_k", "Top-k", 1, MOST_TOP_K, 250, 1),
        live_start=gr.Button("Play live", variant="primary", elem_id="live_start", render=False),
        live_stop=gr.Button(
            "Stop", variant="stop", elem_id="live_stop", visible=False, render=False
        ),
        live_record=gr.Button("Record", elem_id="live_record", interactive=False, render=False),
        live_line=gr.HTML("", elem_id="live_line", apply_default_css=False, render=False),
        live_listener=gr.HTML(
            value=None,
            html_template="<span></span>",
            js_on_load=(ASSETS / "live_mode.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            elem_id="live_listener",
            render=False,
        ),
        live_prompt_1=_prompt(1),
        live_prompt_2=_prompt(2),
        live_prompt_3=_prompt(3),
        live_prompt_4=_prompt(4),
        live_store_1=_store(1),
        live_store_2=_store(2),
        live_store_3=_store(3),
        live_recall_1=_recall(1),
        live_recall_2=_recall(2),
        live_recall_3=_recall(3),
    )


def lay_out(live: LivePanel, place: Callable[..., None]) -> None:
    """Places the panel; `place` renders components where they are."""
    if os.environ.get("SPACES_ZERO_GPU"):
        gr.HTML(f'<p class="clip-line">{NO_LIVE_MODE}</p>', elem_id="no_live_mode")
        return
    place(live.live_mode, live.live_column)
    with live.live_column:
        place(live.live_prompt_1, live.live_prompt_2, live.live_fader)
        with gr.Accordion("More prompts", open=False, elem_id="live_more"):
            place(live.live_prompt_3, live.live_prompt_4)
        place(live.live_pad)
        with gr.Row():
            place(live.live_guidance, live.live_temperature, live.live_top_k)
        with gr.Row():
            place(live.live_start, live.live_stop, live.live_record)
        for what in ("store", "recall"):
            with gr.Row():
                place(*(getattr(live, f"live_{what}_{n}") for n in range(1, MEMORY_SLOTS + 1)))
        place(live.live_line, live.live_listener)


def steering_of(values: Mapping[str, object], words: str) -> Steering:
    """All that the controls say; without any prompt the form's `words` count.

    Raises:
        RequestError: a value is wrong.
    """
    texts = [str(values[f"live_prompt_{n}"] or "").strip() for n in range(1, 5)]
    weights = live_pad.weights_of(values["live_pad"])
    if not any(texts[2:]):
        fader = float_of(values["live_fader"] or 0)
        weights = [1 - fader, fader]
    pairs: list[tuple[str, object]] = [
        (text, weight) for text, weight in zip(texts, weights, strict=False) if text
    ]
    if len(pairs) == 1:  # nothing to mix it with
        pairs = [(pairs[0][0], 1.0)]
    return steering(
        {
            "prompts": pairs or [(words, 1.0)],
            "guidance_scale": values["live_guidance"],
            "temperature": values["live_temperature"],
            "top_k": values["live_top_k"],
        }
    )


def difference(after: Steering, before: Steering) -> Steering | None:
    """What changed; None for nothing."""
    names = ("prompts", "guidance_scale", "temperature", "top_k")
    changed = {n: getattr(after, n) for n in names if getattr(after, n) != getattr(before, n)}
    return Steering(**changed) if changed else None


@dataclass(eq=False)
class Piece:
    """A live piece that a page plays."""

    job: AdmittedJob
    words: str  # the form's prompt
    controls: Steering  # as they are
    sampling_rate: int = 0  # Hz, from the first sound on
    recording_from_s: float | None = None
    recordings: list[take_panel.Group] = field(default_factory=list)
    stored: set[int] = field(default_factory=set)  # memory slots that hold something
    said: str = ""  # of the last recording
    quiet_s: float = 0.0  # that the music has been nearly silent

    @property
    def remark(self) -> str:
        """What there is to say of it."""
        return NEARLY_SILENT if self.quiet_s >= QUIET_S else self.said

    def measure(self, clip: Clip) -> None:
        """Its next music."""
        self.sampling_rate = clip.sampling_rate
        level = float(np.sqrt(np.square(clip.samples).mean())) if clip.samples.size else 0.0
        self.quiet_s = self.quiet_s + clip.duration_s if level < QUIET else 0.0

    @property
    def heard_s(self) -> float:
        """What the listener has heard, in seconds; 0 before the first sound."""
        return self.job.listener.heard_s(self.sampling_rate) if self.sampling_rate else 0.0

    @property
    def buttons(self) -> Updates:
        """The buttons while it plays; a page gets all of them with every message."""
        slots = range(1, MEMORY_SLOTS + 1)
        memory = {f"live_recall_{n}": gr.update(interactive=n in self.stored) for n in slots}
        recording = self.recording_from_s is not None
        record = gr.update(
            value="End recording" if recording else "Record",
            variant="stop" if recording else "secondary",
            interactive=True,
        )
        return cast(Updates, {"live_record": record, **memory})

    def end_recording(self) -> None:
        """Makes a take of what was heard since Record.

        Raises:
            RequestError: it is too short or too long.
        """
        start_s, self.recording_from_s = self.recording_from_s, None
        if start_s is not None:
            self.job.record_stretch(start_s, self.heard_s)


class LiveMode:
    """The panel's handlers.

    Args:
        handlers: of the page, whose backend and sessions these are.
    """

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._pieces: dict[str, Piece] = {}  # under way, by session

    def switch(
        self, on: bool, prompt: str, guidance: float, temperature: float, top_k: float | None
    ) -> Updates:
        """Shows the panel, with the form's settings to begin with."""
        if not on:
            return {"live_column": gr.update(visible=False)}
        return {
            "live_column": gr.update(visible=True),
            "live_prompt_1": prompt,
            "live_guidance": guidance,
            "live_temperature": temperature,
            # 0 is no limit, which the slider has no place for.
            "live_top_k": top_k if top_k and top_k <= MOST_TOP_K else gr.update(),
        }

    def weights(self, third: str, fourth: str) -> Updates:
        """A pad in place of the fader where there are more than two prompts."""
        more = bool(third.strip() or fourth.strip())
        return {"live_fader": gr.update(visible=not more), "live_pad": gr.update(visible=more)}

    async def start(
        self,
        history: list[take_panel.Group],
        given: dict[str, object],
        request: gr.Request,
        **values: object,
    ) -> AsyncGenerator[Updates, None]:
        """Plays a piece until Stop; `given` is as in `Handlers.compose`."""
        client = Client.of(request)
        state = JobState(session=client.session, endless=True)
        if client.session in self._pieces:
            return
        try:
            words = str(values.get("prompt") or "")
            controls = steering_of({name: values.pop(name) for name in CONTROLS}, words)
            # An audio prompt is for takes, and so are the length and the number of takes.
            without = ("audio_prompt", "automation", "skip_s", "variations", "normalize")
            settings = without_unchanged({**values, **dict.fromkeys(without)}, given)
            job = self._submit(settings, controls, client)
        except RequestError as error:
            yield {"notice": notice(str(error), wrong=True)}
            return
        piece = self._pieces[client.session] = Piece(job, words, controls)
        self._handlers.unfollow(client.session)
        state.job = job.id
        yield playing(True) | {
            "live": state.message(Stage.WAITING, "Getting ready …"),
            "live_listener": {"job": job.id, "session": client.session},
        }
        try:
            async with aclosing(self._updates(piece, state, history)) as updates:
                async for update in updates:
                    yield update
        finally:
            job.stop()
            self._pieces.pop(client.session, None)

    def _submit(self, values: dict[str, object], controls: Steering, client: Client) -> AdmittedJob:
        builder, backend = self._handlers.builder, self._handlers.backend
        try:
            request = builder.check(values)
        except RequestError as error:
            backend.refuse(error)
            raise
        request = replace(request, live=True, automation=((0.0, controls),))
        return backend.submit(request, client, partial(builder.complete, values=values))

    async def _updates(
        self, piece: Piece, state: JobState, history: list[take_panel.Group]
    ) -> AsyncGenerator[Updates, None]:
        shown_s, error = 0.0, ""
        async with aclosing(piece.job.events()) as events:
            async for event in events:
                if isinstance(event, Failed):
                    error = error_text(event.error)
                elif isinstance(event, Saved) and event.fault:
                    error = event.fault
                elif isinstance(event, Chunk):
                    piece.measure(event.clip)
                elif isinstance(event, Recorded):
                    self._keep(piece, event)
                elif isinstance(event, Progress):
                    now_s = time.monotonic()
                    if event.stage is Stage.COMPOSING and now_s - shown_s < STATUS_EVERY_S:
                        continue
                    shown_s = now_s
                    yield self._now(event, state, piece) | piece.buttons
        stage = Outcome.FAILED if error else Outcome.STOPPED
        text = error or f"The live piece has ended; {_recordings(len(piece.recordings))}"
        end = playing(False) | {"live": state.message(stage, text), "live_line": ""}
        if error:
            end |= {"notice": notice(error, wrong=True)}
        if not piece.recordings:
            yield end
            return
        history = [*history, *piece.recordings]
        yield end | take_panel.show(history, -1, 0)
        for (take,) in piece.recordings:
            await to_thread.run_sync(take_panel.draw, take)
        yield take_panel.picture(piece.recordings[-1][0])

    def _now(self, progress: Progress, state: JobState, piece: Piece) -> Updates:
        if progress.stage is not Stage.COMPOSING:
            return {"live": state.message(progress.stage, progress_text(progress))}
        state.total_s = max(progress.done_s, 1.0)
        # The engine keeps ahead by itself: the player need not wait until it could play to the end.
        message = state.message(progress.stage, "Playing live", progress.done_s, speed=1.0)
        return {"live": message, "live_line": line(progress, piece.remark)}

    def _keep(self, piece: Piece, event: Recorded) -> None:
        assert isinstance(event.take, Saved)
        if group := take_panel.group([event.take]):
            piece.recordings.append(group)
            piece.said = f"{event.take.clip.duration_s:.1f} s are kept as a take."

    def steer(self, request: gr.Request, **values: object) -> Updates:
        """The controls were moved."""
        piece = self._pieces.get(Client.of(request).session)
        if piece is None:
            return {}
        try:
            controls = steering_of(values, piece.words)
            if change := difference(controls, piece.controls):
                piece.job.steer(change)
                piece.controls = controls
        except RequestError as error:
            return {"notice": notice(str(error), wrong=True)}
        return {}

    def store(self, slot: int) -> Callable[[gr.Request], Updates]:
        """The handler of a memory slot's button that keeps the music."""

        def keep(request: gr.Request) -> Updates:
            def store(piece: Piece) -> None:
                piece.job.steer(Steering(store=slot))
                piece.stored.add(slot)

            return self._with_piece(request, store)

        return keep

    def recall(self, slot: int) -> Callable[[gr.Request], Updates]:
        """The handler of a memory slot's button that brings the music back."""

        def bring_back(request: gr.Request) -> Updates:
            return self._with_piece(request, lambda piece: piece.job.steer(Steering(recall=slot)))

        return bring_back

    def record(self, request: gr.Request) -> Updates:
        """Begins a recording at what is heard now, or ends it there."""

        def toggle(piece: Piece) -> None:
            if piece.recording_from_s is None:
                piece.recording_from_s = piece.heard_s
            else:
                piece.end_recording()

        return self._with_piece(request, toggle)

    def stop(self, request: gr.Request) -> Updates:
        """Ends the piece; a recording under way ends with it."""

        def end(piece: Piece) -> None:
            try:
                piece.end_recording()
            finally:
                piece.job.stop()

        return self._with_piece(request, end)

    def closed(self, request: gr.Request) -> None:
        """The page is gone, and with it the listener."""
        if piece := self._pieces.get(Client.of(request).session):
            piece.job.stop()

    def _with_piece(self, request: gr.Request, act: Callable[[Piece], None]) -> Updates:
        piece = self._pieces.get(Client.of(request).session)
        if piece is None:
            return {"notice": notice("Press “Play live” first.", wrong=True)}
        try:
            act(piece)
        except RequestError as error:
            return {**piece.buttons, "notice": notice(str(error), wrong=True)}
        return piece.buttons


def playing(on: bool) -> Updates:
    """The buttons while a piece plays, or while none does."""
    stores = {f"live_store_{n}": gr.update(interactive=on) for n in range(1, MEMORY_SLOTS + 1)}
    recalls = {f"live_recall_{n}": gr.update(interactive=False) for n in range(1, MEMORY_SLOTS + 1)}
    updates = {
        "live_start": gr.update(visible=not on),
        "live_stop": gr.update(visible=on),
        "live_record": gr.update(value="Record", variant="secondary", interactive=on),
        "generate": gr.update(interactive=not on),
    }
    return cast(Updates, updates | stores | recalls)


def line(progress: Progress, said: str = "") -> str:
    """What the engine has in hand, what it takes, and whether the model is too slow."""
    text = f"{progress.ahead_s:.1f} s ahead · {progress.work_ms:.0f} ms of work a second of music"
    text += f" · {progress.underruns} underrun" + "s" * (progress.underruns != 1)
    if said or progress.note:
        text += f"<br>{html.escape(progress.note or said)}"
    slow = ""
    if 0 < progress.speed < 1 and progress.done_s > MEASURED_S:
        slow = (
            f'<strong role="alert">This model makes {progress.speed:.1f} s of music a second here, '
            "too little to play live. Choose a smaller model.</strong>"
        )
    return f'<p class="clip-line">{text}</p>{slow}'


def _recordings(count: int) -> str:
    if not count:
        return "nothing was recorded"
    return "the recording is a take" if count == 1 else f"the {count} recordings are takes"


name_parameters(LiveMode.start, (*CONTROLS, *FIELDS))
name_parameters(LiveMode.steer, CONTROLS)
