"""The take: player, downloads, spectrogram and settings of what was made, and earlier takes.

A tab's history is a list of groups, one a click, each a list of takes, one a variation. Only
paths and words are kept, never samples. Functions return updates by component name.
"""

from __future__ import annotations

import html
import json
import logging
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import gradio as gr

from musicgen_ui import files, sidecar, takes
from musicgen_ui.audio import load, spectrogram, waveform
from musicgen_ui.audio.clip import Chroma
from musicgen_ui.audio.export import Shape
from musicgen_ui.backends.admission import Saved
from musicgen_ui.errors import RequestError
from musicgen_ui.files import ASSETS
from musicgen_ui.request import section_pairs
from musicgen_ui.take_settings import TakeSettings
from musicgen_ui.ui import player
from musicgen_ui.ui.components import TakePanel, Updates, notice

log = logging.getLogger(__name__)

INTRO = (
    "Describe music in words, or hand over a clip to carry on, and hear it while it is made. "
    "Here is one to begin with:"
)
EXAMPLE = ASSETS / "example.flac"  # beside it the same as WAV, its picture and `Drawn` as JSON
EXAMPLE_SHOWN = [EXAMPLE.with_suffix(ending) for ending in (".wav", ".png")]
KEPT_GROUPS = 20
THE_EXAMPLE = -1  # in place of a number in the history
EXTEND_S = 10.0
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".mp3": "MP3", ".ogg": "Ogg Vorbis", ".opus": "Opus"}
TEMPORARY = "Takes are kept here for a day at most: download what you want to keep."


class SmallButton(TypedDict):
    """Options of a button below the take."""

    size: Literal["sm"]
    min_width: int
    render: Literal[False]


class ExportFields(TypedDict):
    """What is chosen of an export, by the component's name."""

    export_ending: gr.Radio
    loop_bars: gr.Number
    fade_out_s: gr.Number
    export: gr.Button
    playhead_s: gr.Number
    exported: gr.DownloadButton


def panel() -> TakePanel:
    """What was made, and at first an example of it."""
    opening = example()
    intro = f'<p class="intro">{INTRO}</p>{title_html(opening)}'
    small: SmallButton = {"size": "sm", "min_width": 60, "render": False}
    return TakePanel(
        live=player.player(),
        jobs=player.jobs(),
        # Mounted, so that their changes are told and their values are what an event's script says.
        landed=gr.Textbox(visible="hidden", render=False),
        elsewhere=gr.Checkbox(visible="hidden", render=False),
        take_title=gr.HTML(intro, elem_id="take_title", render=False),
        take_variation=gr.Radio(
            label="Variations",
            show_label=False,
            visible="hidden",
            elem_id="take_variation",
            render=False,
        ),
        compare=player.compared(),
        keep_take=gr.Button("Keep this", visible=False, elem_id="keep_take", **small),
        take_audio=player.take_on_show(in_player(opening)),
        wav=gr.DownloadButton("WAV", str(opening.wav), elem_id="wav", **small),
        flac=gr.DownloadButton("FLAC", str(opening.flac), elem_id="flac", **small),
        continue_take=gr.Button("Continue this", elem_id="continue", **small),
        retake=gr.Button("Retake from here", elem_id="retake", **small),
        extend=gr.Button(f"Extend by {EXTEND_S:g} s", elem_id="extend", **small),
        use_settings=gr.Button("Use these settings", elem_id="use_settings", **small),
        same_seed=gr.Button("Same seed", elem_id="same_seed", **small),
        **export_fields(),
        take_facts=gr.HTML(facts_line(opening), elem_id="take_facts", render=False),
        take_notes=gr.HTML("", visible=False, elem_id="take_notes", render=False),
        take_history=gr.Radio(
            label="Takes of this session", visible=False, elem_id="take_history", render=False
        ),
        history=gr.State([], render=False),
        chosen=gr.State([0, 0], render=False),
        tab_key=gr.Textbox(visible=False, render=False),
        # Mounted: a component that is not mounted tells of no change.
        job_id=gr.Textbox(visible="hidden", render=False),
    )


def export_fields() -> ExportFields:
    """What is chosen of an export, by the component's name."""

    def amount(label: str, info: str, name: str) -> gr.Number:
        return gr.Number(0, label=label, info=info, min_width=140, elem_id=name, render=False)

    return {
        "export_ending": gr.Radio(
            [(name, ending) for ending, name in FORMATS.items()],
            value=".wav",
            label="Format",
            elem_id="export_ending",
            render=False,
        ),
        "loop_bars": amount(
            "Loop of bars", "at the take's tempo; 0 is the whole take", "loop_bars"
        ),
        "fade_out_s": amount("Fade-out", "seconds at the end; 0 is none", "fade_out_s"),
        "export": gr.Button("Export this take", elem_id="export", size="sm", render=False),
        # Mounted, so that its value is what an event's script says.
        "playhead_s": gr.Number(0.0, visible="hidden", render=False),
        "exported": gr.DownloadButton("File", visible="hidden", elem_id="exported", render=False),
    }


class Compared(TypedDict):
    """Takes under one playhead."""

    selected: int
    takes: list[player.StripState]


@dataclass
class ShownTake:
    """A take as the page shows it."""

    wav: Path | None  # None: it could not be saved
    flac: Path | None
    settings: TakeSettings  # the request's and what came of it, as the files carry them
    notes: list[str] = field(default_factory=list)
    melody: Chroma | None = None
    job: str = ""  # whose stream it was
    drawn: player.PictureState | None = None  # `player.picture_state`, a moment after it is shown
    edited_title: str = ""  # where the library has another than the prompt

    @property
    def title(self) -> str:
        """What it is called in lists."""
        return short_title(self.edited_title or self.settings["prompt"])


Group = list[ShownTake]


def short_title(text: str) -> str:
    """A prompt or a title in one line of at most 60 characters."""
    text = " ".join(text.split()) or "Without words"
    return text if len(text) <= 60 else text[:59].rstrip() + "…"


def shown(take: takes.Take, job: str = "") -> ShownTake:
    """A saved take as the page shows it, for now without its picture.

    `job` is the one whose stream the player has.
    """
    return ShownTake(take.wav, take.flac, take.settings, list(take.notes), take.melody, job)


def unsaved(error: takes.UnsavedError) -> ShownTake:
    """What is left of a take that could not be saved: how to make it again."""
    again = "It plays above as it was made; Same seed and Generate make it again."
    return ShownTake(None, None, error.settings, [str(error), again])


def group(saved: Iterable[Saved], job: str = "") -> Group:
    """The takes of a job as the page shows them, those without new music left out.

    `job` is the id of the one whose first variation the player streams.
    """
    found: Group = []
    for each in saved:
        if each.take:
            streamed = each.variation == 0 and not each.redrawn
            found.append(shown(each.take, job if streamed else ""))
        elif each.error:
            found.append(unsaved(each.error))
    return found


def draw(take: ShownTake) -> None:
    """Draws a take's spectrogram beside its files, once."""
    if take.drawn or take.wav is None:
        return
    try:
        length_s = take.settings["prompt_s"] + take.settings["made_s"]
        clip = load.read(take.wav, keep_s=length_s + 1).clip
        alt = spectrogram.alt_text(clip, take.settings["prompt_s"], take.melody)
        content, edges = spectrogram.png(clip)
        picture = take.wav.with_suffix(".png")
        files.replace(picture, content)
        take.drawn = player.picture_state(picture, edges, *waveform.peaks(clip), alt)
    except Exception:  # the music is what matters: it is never lost for its picture
        if not take.wav.exists():  # the server is being stopped, and deletes what was temporary
            return
        log.exception("The spectrogram of %s could not be drawn", take.wav.name)
        take.notes.append("The spectrogram could not be drawn.")


def example() -> ShownTake:
    """The ready-made take that the page opens with."""
    settings = takes.read_settings(EXAMPLE)
    assert settings, "assets/example.flac carries its settings"
    drawn = json.loads(EXAMPLE.with_suffix(".json").read_text())
    drawn["picture"] = player.file(EXAMPLE.with_suffix(".png"))
    return ShownTake(EXAMPLE.with_suffix(".wav"), EXAMPLE, settings, drawn=drawn)


def show(history: list[Group], which: int, variation: int) -> Updates:
    """The updates that show one take of the history, and the lists around it."""
    history = history[-KEPT_GROUPS:]
    which %= len(history)
    group = history[which]
    take = group[variation]
    chips = [(f"{i + 1} · seed {t.settings['seed']}", i) for i, t in enumerate(group)]
    return {
        **listed(history, which, variation),
        "take_title": gr.update(value=title_html(take)),
        "compare": compared(group, variation),
        "keep_take": gr.update(visible=len(group) > 1),
        "wav": gr.update(value=take.wav and str(take.wav), interactive=take.wav is not None),
        "flac": gr.update(value=take.flac and str(take.flac), interactive=take.flac is not None),
        "take_facts": facts_line(take),
        "take_variation": gr.update(choices=chips, value=variation),
        **picture(take),
    }


def listed(history: list[Group], which: int, variation: int) -> Updates:
    """The updates that list the history, around the take that is on show."""
    value = None if which == THE_EXAMPLE else which
    several = len(history) > (value is not None)
    return {
        "history": history,
        "chosen": [which, variation],
        "take_history": gr.update(choices=history_choices(history), value=value, visible=several),
    }


def group_on_show(history: list[Group], chosen: list[int]) -> Group:
    """The takes around the one on show; none for the example."""
    return history[chosen[0]] if history and chosen[0] != THE_EXAMPLE else []


def place_of(history: list[Group], group: Group) -> int:
    """Which one of the history a group is; `THE_EXAMPLE` where it is not in it."""
    paths = [take.wav for take in group]
    places = (i for i, each in enumerate(history) if [take.wav for take in each] == paths)
    return next(places, THE_EXAMPLE)


def compared(group: Group, variation: int) -> Compared | None:
    """The takes of a group as strips under one playhead; None for a single one."""
    if len(group) < 2:
        return None
    strips = []
    for take in group:
        data = sidecar.read(sidecar.beside(take.wav), whole=False) if take.wav else None
        alike = len({each.title for each in group}) == 1
        label = f"seed {take.settings['seed']}" if alike else take.title
        strips.append(player.strip_state(take.wav, label, take.settings, take.job, data))
    return {"selected": variation, "takes": player.matched(strips)}


def in_player(take: ShownTake) -> player.TakeState:
    """The take as the player shows it."""
    state = player.take_state(take.wav, take.settings, take.title, take.job, take.melody)
    return {**state, **take.drawn} if take.drawn else state


def picture(take: ShownTake) -> Updates:
    """The updates for what comes a moment after the music."""
    return {
        "take_audio": in_player(take),
        "take_notes": gr.update(value=notes_html(take.notes), visible=bool(take.notes)),
    }


def title_html(take: ShownTake) -> str:
    """The take's name, above its player."""
    return f'<h2 class="take-name" dir="auto">{html.escape(take.title)}</h2>'


def history_choices(history: list[Group]) -> list[tuple[str, int]]:
    """Earlier clicks, the newest first."""
    labels = [
        f"{i + 1} · {isolated(g[0].title)} · {g[0].settings['made_s']:.1f} s · "
        f"seed {g[0].settings['seed']}"
        for i, g in enumerate(history)
    ]
    return [(label, i) for i, label in reversed(list(enumerate(labels)))]


def isolated(text: str) -> str:
    """Text for the middle of a line: if it runs from right to left, the rest of the line does not.

    By Unicode's isolates, since the line is plain text.
    """
    if any(unicodedata.bidirectional(character) in ("R", "AL") for character in text):
        return f"\N{FIRST STRONG ISOLATE}{text}\N{POP DIRECTIONAL ISOLATE}"
    return text


def facts_line(take: ShownTake) -> str:
    """The settings that made a take, those of interest first, as small labelled facts."""
    s = take.settings
    facts: list[tuple[str, object]] = [("seed", s["seed"]), ("length", f"{s['made_s']:.1f} s")]
    if s["prompt_s"]:
        facts.append(("after your clip of", f"{s['prompt_s']:.1f} s"))
    if s.get("melody_s"):
        facts.append(("follows a melody of", f"{s['melody_s']:.1f} s"))
    if s.get("style_s"):
        begin_s, codebooks = s["style_start_s"], s["style_codebooks"]
        end_s = begin_s + s["style_length_s"]
        facts.append(("in the style of your clip from", f"{begin_s:g} to {end_s:g} s"))
        facts.append(("style codebooks", codebooks))
        facts += [("text guidance", f"{s['text_guidance']:g}")] if s["prompt"] else []
    facts += [("chords", s["chords"])] if s["chords"] else []
    facts.append(("guidance", f"{s['guidance_scale']:g}"))
    if s["do_sample"]:
        facts += [("temperature", f"{s['temperature']:g}"), ("top-k", s["top_k"])]
        facts += [("top-p", f"{s['top_p']:g}")] if s["top_p"] else []
    else:
        facts.append(("sampling", "off (greedy)"))
    if s["negative_prompt"]:
        facts.append(("without", s["negative_prompt"]))
    facts += [(f"from {start_s:g} s", words or "the prompt") for start_s, words in section_pairs(s)]
    facts += [("tempo", f"{s['tempo_bpm']:g} bpm")] if s["tempo_bpm"] else []
    facts += [("key", s["key"])] if s["key"] else []
    facts += [("score", f"{s['score']:.2f}")] if "score" in s else []
    facts.append(("sound", "stereo" if s["channels"] == 2 else "mono"))
    if s["normalize"]:
        facts.append(("loudness", "even"))
    facts += [("model", s["checkpoint"]), ("speed", f"{s['speed_x']:.1f}× real time")]
    cells = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in facts
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def notes_html(notes: list[str]) -> str:
    """What the visitor should know about a take."""
    return '<ul class="notes">' + "".join(f"<li>{html.escape(n)}</li>" for n in notes) + "</ul>"


def choose_variation(history: list[Group], chosen: list[int], variation: int) -> Updates:
    """Shows another variation of the same click."""
    draw(history[chosen[0]][variation])
    return show(history, chosen[0], variation)


def draw_shown(history: list[Group], chosen: list[int]) -> Updates:
    """Draws the take on show where that has not been done."""
    take = chosen_take(history, chosen)
    if take.drawn or take.wav is None:
        return {}
    draw(take)
    return picture(take)


def export(
    history: list[Group],
    chosen: list[int],
    variation: int | None,
    ending: str,
    loop_bars: float | None,
    fade_out_s: float | None,
    folder: Path,
) -> Path:
    """Writes the take on show as a file of some kind and shape to `folder`.

    Raises:
        RequestError: the take has no file or cannot have the shape, or there is no room.
    """
    take = chosen_take(history, chosen, variation)
    sound = take.wav if take.wav else take.flac
    if sound is None:
        raise RequestError("This take could not be saved, so there is no file of it.")
    shape = Shape(round(loop_bars or 0), float(fade_out_s or 0))
    kind = f"-loop-{shape.loop_bars}-bars" if shape.loop_bars else ""
    path = folder / f"{sound.stem}{kind}{ending}"
    takes.export_to(path, sound, shape, take.edited_title)
    return path


def keep(
    history: list[Group],
    chosen: list[int],
    variation: int | None = None,
    star: Callable[[str], object] | None = None,
) -> Updates:
    """Decides for the take on show: it stands alone, and the library has it with a star."""
    take = chosen_take(history, chosen, variation)
    said: Updates = {}
    if star and take.wav:
        try:
            star(take.wav.stem)
            said["notice"] = notice("Kept with a star. The others stay in the library.")
        except RequestError as error:
            said["notice"] = notice(str(error), wrong=True)
    return show([*history, [take]], -1, 0) | said


def choose_earlier(history: list[Group], which: int) -> Updates:
    """Shows the takes of an earlier click."""
    return show(history, which, 0)


def chosen_take(history: list[Group], chosen: list[int], variation: int | None = None) -> ShownTake:
    """The take on show: the example before the first one is made.

    Args:
        variation: the one that is marked on the page, where the answer that shows it may still be
            on its way.
    """
    group = group_on_show(history, chosen)
    if not group:
        return example()
    if variation is None or variation >= len(group):
        variation = chosen[1]
    return group[variation]
