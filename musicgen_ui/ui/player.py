"""The player: one place for the sound of a job while it is being made, and for its take.

The scripts in `assets/player/` fetch the sound from the server (`server.audio_stream`, a take's
WAV) and play it; components carry state only. `live` says how far a job is, `take_audio` which take
is on show: its file, its picture and what is marked on it.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import gradio as gr
import numpy as np
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from musicgen_ui.audio.chords import beats_a_bar
from musicgen_ui.audio.clip import Chroma
from musicgen_ui.audio.spectrogram import Edges
from musicgen_ui.backends.job_log import Outcome
from musicgen_ui.engine.protocol import Stage
from musicgen_ui.files import ASSETS
from musicgen_ui.request import context_used_s, section_pairs
from musicgen_ui.sidecar import Sidecar
from musicgen_ui.take_settings import TakeSettings

SCRIPTS = ASSETS / "player"
IDLE = "Press Generate: the music plays here while it is being made."


def _version() -> str:
    """The scripts' version: a browser keeps them until they change."""
    content = b"".join(path.read_bytes() for path in sorted(SCRIPTS.glob("*.js")))
    return hashlib.sha256(content).hexdigest()[:12]


VERSION = _version()
MOST_GAIN_DB = 20.0


def address(script: str) -> str:
    """The address of one of the scripts, as an expression of JavaScript."""
    return f"new URL('player/{VERSION}/{script}', document.baseURI).href"


VIEW = address("view.js")
ON_LOAD = f"""
import({VIEW}).then(({{ mount, mounted }}) => {{
  mount(element.querySelector('.player'));
  const show = () => mounted.then((view) => view.show_state(props.value));
  watch('value', show);
  show();
}});
"""
TAKE_ON_LOAD = f"""
const show = () => import({VIEW}).then(({{ mounted }}) =>
  mounted.then((view) => view.show_take(props.value)));
watch('value', show);
show();
"""
COMPARE_ON_LOAD = f"""
const script = {VIEW}.replace('view.js', 'compare.js');
Promise.all([import({VIEW}), import(script)]).then(([{{ mounted }}, {{ Compare }}]) =>
  mounted.then((view) => {{
    const compare = new Compare(view, () => element.querySelector('.compare'));
    const show = () => compare.show(props.value);
    watch('value', show);
    show();
  }}));
"""

JOBS_ON_LOAD = f"""
const script = {VIEW}.replace('view.js', 'jobs.js');
Promise.all([import({VIEW}), import(script)]).then(([{{ mounted }}, {{ JobList }}]) =>
  mounted.then((view) => {{
    const act = (act, job) => trigger('click', {{ act, job }});
    const list = new JobList(view, element.querySelector('.jobs'), act);
    const show = () => list.show(props.value);
    watch('value', show);
    show();
  }}));
"""
JOBS = """
<section class="jobs" aria-label="Takes under way" hidden><ol class="job-list"></ol>
  <span class="sr-only job-said" role="status"></span></section>
"""


def _icon(name: str, shape: str) -> str:
    return f'<svg class="{name}" viewBox="0 0 24 24" aria-hidden="true">{shape}</svg>'


def _button(name: str, label: str, icon: str, rest: str = "") -> str:
    return (
        f'<button type="button" class="player-{name}" aria-label="{label}" title="{label}" {rest}>'
        f"{icon}</button>"
    )


PLAY = _icon("icon-play", '<path d="M8 5v14l11-7z"/>') + _icon(
    "icon-pause", '<path d="M7 5h4v14H7zM13 5h4v14h-4z"/>'
)
_STOP = _icon("icon", '<path d="M6 6h12v12H6z"/>')
_LOOP = _icon("icon-drawn", '<path d="M17 3l4 4-4 4M3 11a4 4 0 0 1 4-4h14M7 21l-4-4 4-4'
              'M21 13a4 4 0 0 1-4 4H3"/>')  # fmt: skip
_GLASS = '<circle cx="10.5" cy="10.5" r="6.5"/><path d="M20 20l-4.8-4.8M7.5 10.5h6{}"/>'
_WIDER, _CLOSER = (_icon("icon-drawn", _GLASS.format(bar)) for bar in ("", "M10.5 7.5v6"))
_MUTE = _icon(
    "icon-drawn",
    '<path d="M4 9v6h4l5 4V5L8 9z"/><path class="waves" d="M16 8.5a5 5 0 0 1 0 7'
    'M18.5 6a8.5 8.5 0 0 1 0 12"/>',
)
# Never re-rendered, so the script may write into it: nothing here depends on the value.
SKELETON = f"""
<section class="player" data-stage="idle" aria-label="Player">
  <div class="player-head"><span class="player-dot" aria-hidden="true"></span>
    <span class="player-text" dir="auto">{IDLE}</span></div>
  <div class="player-picture" role="slider" tabindex="0" aria-label="Position"
    aria-valuemin="0" aria-valuemax="0" aria-valuenow="0" aria-valuetext="0:00 of 0:00"
    aria-describedby="player-alt">
    <canvas></canvas>
    <i class="player-region" hidden></i><i class="player-playhead" hidden></i>
    <span class="player-pointer" hidden></span>
  </div>
  <p id="player-alt" class="player-alt sr-only"></p>
  <div class="player-bar" role="progressbar" aria-label="Composed"
    aria-valuemin="0" aria-valuemax="100" aria-valuenow="0"><i></i></div>
  <div class="player-foot">
    {_button("play", "Play", PLAY)}
    {_button("stop", "Stop", _STOP)}
    {_button("loop", "Loop", _LOOP, 'aria-pressed="false"')}
    <span class="player-clock"></span>
    <span class="player-zoom">{_button("wider", "Zoom out", _WIDER)}
      {_button("closer", "Zoom in", _CLOSER)}</span>
    <span class="player-sound">{_button("mute", "Mute", _MUTE, 'aria-pressed="false"')}
      <input type="range" class="player-volume" min="0" max="1" step="0.01" value="0.9"
        aria-label="Volume"></span>
  </div>
  {_button("float", "Play", PLAY)}
  <p class="player-hint" role="alert" hidden></p>
  <span class="sr-only player-said" role="status" aria-live="polite"></span>
</section>
"""


class JobMessage(TypedDict):
    """What the player shows of a job."""

    job: str
    session: str
    stage: Stage | Outcome
    text: str
    done_s: float
    total_s: float
    speed: float
    endless: bool
    last: bool


class RowState(TypedDict):
    """A job as a row of the page."""

    job: str
    take: str  # the id of what was made, once it is in the history
    title: str
    text: str
    share: float  # of its length, 0 to 1
    stage: Stage | Outcome
    under_way: bool


class JobsState(TypedDict):
    """The jobs of a page."""

    followed: str  # the job that the player shows
    rows: list[RowState]


class FileState(TypedDict):
    """A file as Gradio serves it."""

    path: str
    meta: dict[str, str]


class PictureState(TypedDict):
    """A take's picture as the player shows it."""

    picture: FileState | None
    edges: dict[str, object] | None
    peaks: str  # base64 of int8 [2, columns]
    peak_s: float
    alt: str


class TakeState(PictureState):
    """A take as the player shows it."""

    id: str
    job: str
    as_streamed: bool
    title: str
    wav: FileState | None
    duration_s: float
    prompt_s: float
    context_s: float
    chords: list[list[object]]
    sections: list[list[object]]
    melody: str  # base64
    melody_s: float
    tempo_bpm: float
    beats_a_bar: int


class StripState(TypedDict):
    """A take as a strip shows it."""

    id: str
    job: str
    wav: FileState | None
    label: str
    duration_s: float
    lufs: float | None
    gain_db: float
    peaks: str  # base64 of int8 [2, points]


@dataclass
class JobState:
    """How far a job is, as the player shows it."""

    total_s: float = 1.0  # seconds of new music that will come
    session: str = ""  # Gradio's name of the page
    job: str = ""  # whose sound the player fetches; "" is none
    endless: bool = False  # a live piece

    def message(
        self, stage: Stage | Outcome, text: str, done_s: float = 0.0, speed: float = 0.0
    ) -> JobMessage:
        """What the player should show now; an `Outcome` is the last message of a job."""
        return {
            "job": self.job,
            "session": self.session,
            "stage": stage,
            "text": text,
            "done_s": round(done_s, 2),
            "total_s": self.total_s,
            "speed": round(speed, 3),
            "endless": self.endless,
            "last": isinstance(stage, Outcome),
        }


def player() -> gr.HTML:
    """The player. Its value is a message of `JobState`; None leaves it idle."""
    return gr.HTML(
        value=None,
        html_template=SKELETON,
        js_on_load=ON_LOAD,
        apply_default_css=False,
        elem_id="live",
        render=False,
    )


def take_on_show(state: TakeState) -> gr.HTML:
    """What of a take is in the player, see `take_state`; nothing of it is seen by itself."""
    return gr.HTML(
        value=state,
        html_template="<span></span>",
        js_on_load=TAKE_ON_LOAD,
        apply_default_css=False,
        elem_id="take_audio",
        render=False,
    )


def compared() -> gr.HTML:
    """Variations, or takes that are compared: strips under one playhead. None shows nothing."""
    return gr.HTML(
        value=None,
        html_template='<div class="compare" role="radiogroup" aria-label="Compare" hidden></div>',
        js_on_load=COMPARE_ON_LOAD,
        apply_default_css=False,
        elem_id="compare",
        render=False,
    )


def jobs() -> gr.HTML:
    """A row for each job of the page, see `page_jobs.PageJobs.state`. None shows nothing."""
    return gr.HTML(
        value=None,
        html_template=JOBS,
        js_on_load=JOBS_ON_LOAD,
        apply_default_css=False,
        elem_id="jobs",
        render=False,
    )


def strip_state(
    wav: Path | None, label: str, settings: TakeSettings, job: str, data: Sidecar | None
) -> StripState:
    """A take as a strip shows it, for now without its gain.

    Args:
        wav: its file; None where it could not be saved.
        label: what tells it from the others.
        settings: as its files carry them.
        job: whose stream it was.
        data: its loudness and waveform, where they are known.
    """
    points = data.overview if data else np.zeros((0, 2), np.int8)
    known = data is not None and np.isfinite(data.lufs)
    return {
        "id": wav.stem if wav else job,
        "job": job if not settings["prompt_s"] and not settings["normalize"] else "",
        "wav": file(wav),
        "label": label,
        "duration_s": settings["prompt_s"] + settings["made_s"],
        "lufs": round(data.lufs, 1) if data and known else None,
        "gain_db": 0.0,
        "peaks": base64.b64encode(np.ascontiguousarray(points.T).tobytes()).decode(),
    }


def matched(strips: list[StripState]) -> list[StripState]:
    """The strips at one loudness: that of the quietest, since a gain above 0 dB could clip."""
    quietest = min((s["lufs"] for s in strips if s["lufs"] is not None), default=0.0)
    for strip in strips:
        if strip["lufs"] is not None:
            strip["gain_db"] = round(max(quietest - strip["lufs"], -MOST_GAIN_DB), 1)
    return strips


def clock(seconds: float) -> str:
    """A length or a place: "1:05"."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02}"


def scripts() -> Route:
    """The route of the player's scripts. Their address changes with their content."""
    served = {path.name: path for path in SCRIPTS.glob("*.js")}

    async def script(request: Request) -> Response:
        path = served.get(request.path_params["name"])
        if path is None:
            return Response("Not found.\n", 404)
        headers = {"cache-control": "private, max-age=31536000, immutable"}
        return FileResponse(path, headers=headers, media_type="text/javascript")

    # Not a Mount: it finds nothing where a proxy takes the server's root path off.
    return Route(f"/player/{VERSION}/{{name}}", script)


def file(path: Path | None) -> FileState | None:
    """A file as Gradio serves it: the page finds its address as `url`."""
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}} if path else None


def take_state(
    wav: Path | None,
    settings: TakeSettings,
    title: str,
    streamed_as: str = "",
    melody: Chroma | None = None,
) -> TakeState:
    """A take as the player shows it, for now without its picture.

    Args:
        wav: its file; None where it could not be saved.
        settings: as its files carry them.
        title: what it is called.
        streamed_as: the job whose stream was, or began as, this take.
        melody: what the new music follows, chords included.
    """
    prompt_s, made_s = settings["prompt_s"], settings["made_s"]
    window = (settings["context_s"], settings["duration_s"], settings["overlap_s"])
    # Older files do not say it: then the window is taken to be MusicGen's.
    used_s = settings.get("context_used_s", context_used_s(prompt_s, *window))
    return {
        "id": wav.stem if wav else streamed_as,
        "job": streamed_as,
        # To the last bit: then the player goes on with what it has.
        "as_streamed": not prompt_s and not settings["normalize"],
        "title": title,
        "wav": file(wav),
        "duration_s": prompt_s + made_s,
        "prompt_s": prompt_s,
        "context_s": min(used_s, prompt_s),
        "chords": [
            [prompt_s + each.start_s, prompt_s + each.end_s, each.chord.name, each.chord.classes]
            for each in (melody.chords if melody else ())
        ],
        "sections": [[prompt_s + start_s, words] for start_s, words in section_pairs(settings)],
        "melody": base64.b64encode(melody.classes.tobytes()).decode() if melody else "",
        "melody_s": melody.column_s if melody else 0.0,
        "tempo_bpm": settings.get("tempo_bpm", 0.0),
        "beats_a_bar": beats_a_bar(settings.get("time_signature", "4/4")),
        "picture": None,
        "edges": None,
        "peaks": "",
        "peak_s": 0.0,
        "alt": "",
    }


def picture_state(
    picture: Path | None, edges: Edges, peaks: np.ndarray, peak_s: float, alt: str
) -> PictureState:
    """What `take_state` holds once the take is drawn; `peaks` is int8 [2, columns]."""
    return {
        "picture": file(picture),
        "edges": asdict(edges),
        "peaks": base64.b64encode(peaks.tobytes()).decode(),
        "peak_s": peak_s,
        "alt": alt,
    }
