"""What the form says of a clip for its melody or style, and what choosing its use does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from musicgen_ui.ui import audio_panel
from musicgen_ui.ui.components import CONTINUE, FOLLOW, TAKE_STYLE

WINDOW = (10.0, 0.0, 12.0)  # length, context and overlap in s
EXCERPT = (1.0, 3.0)  # start and length in s


@pytest.fixture
def scale(tmp_path: Path) -> str:
    path = tmp_path / "scale.wav"
    soundfile.write(path, 0.2 * np.sin(np.arange(64_000) / 9), 16_000)
    return str(path)


@pytest.mark.parametrize(
    ("duration_s", "said"),
    [(10.0, "of 4.0 s is repeated for 10.0 s"), (3.0, "first 3.0 s of 4.0 s"), (4.0, "all 4.0 s")],
)
def test_how_much_of_the_melody_is_followed(scale, duration_s, said):
    told = audio_panel.read_melody(scale, duration_s, {})
    assert said in told["melody_line"] and "melody" not in told
    assert audio_panel.melody_line(told["tune"], duration_s) == told["melody_line"]
    assert "4.0 s" in audio_panel.melody_line(told["tune"], None)  # an emptied field


@pytest.mark.parametrize(
    ("samples", "said"),
    [(np.zeros(32_000), "silent"), (np.ones(4_000) / 2, "0.25 s short"), (None, "")],
)
def test_a_clip_without_a_melody_is_refused_and_the_sentence_stays(tmp_path, samples, said):
    path = tmp_path / "clip.wav"
    if samples is None:
        path.write_text("<html>")
    else:
        soundfile.write(path, samples, 16_000)
    told = audio_panel.read_melody(str(path), 10, {})
    assert told["melody"] is None
    assert 'role="alert"' in told["melody_line"] and said in told["melody_line"]
    # Its field is emptied, which asks again.
    emptied = audio_panel.read_melody(None, 10, told["tune"])
    assert emptied["melody_line"] == told["melody_line"] and emptied["tune"] == {}
    assert 'role="alert"' not in audio_panel.read_melody(None, 10, {})["melody_line"]


def test_a_melody_is_heard_from_its_beginning(tmp_path):
    """A continued clip is heard at its end; of a tune of minutes nothing is lost."""
    path = tmp_path / "long.flac"
    soundfile.write(path, 0.2 * np.sin(np.arange(16_000 * 150) / 9), 16_000)
    told = audio_panel.read_melody(str(path), 10, {})
    assert told["tune"]["clip_s"] == 150 and not told["tune"]["notes"]


def test_the_choice_takes_the_clip_along(scale):
    told = audio_panel.use(FOLLOW, scale, None, None, *WINDOW, {}, *EXCERPT)
    assert told["melody"] == scale and told["audio_prompt"] is None
    assert told["melody_column"]["visible"] and not told["continue_column"]["visible"]
    assert "4.0 s" in told["melody_line"] and told["tune"]["clip_s"] == 4
    back = audio_panel.use(CONTINUE, None, scale, None, *WINDOW, {}, *EXCERPT)
    assert "4.0 s" in back["clip_line"] and back["clip"]["clip_s"] == 4
    assert back["audio_prompt"] == scale and back["melody"] is None
    assert back["continue_column"]["visible"] and not back["melody_column"]["visible"]


def test_the_choice_takes_a_style_clip_along(scale):
    shown = audio_panel.use(TAKE_STYLE, scale, None, None, *WINDOW, {}, *EXCERPT)
    assert shown["style"] == scale and shown["audio_prompt"] is None and shown["melody"] is None
    assert shown["style_column"]["visible"] and not shown["continue_column"]["visible"]
    assert "From 1 to 4 s of 4.0 s" in shown["style_line"]
    back = audio_panel.use(CONTINUE, None, None, scale, *WINDOW, {}, *EXCERPT)
    assert back["audio_prompt"] == scale and back["style"] is None
    dropped = audio_panel.dropped(scale, TAKE_STYLE, *WINDOW, {}, *EXCERPT)
    assert dropped["style"] == scale and "From 1 to 4 s" in dropped["style_line"]


@pytest.mark.parametrize(
    ("start_s", "length_s", "said"),
    [
        (1.5, 3.0, "ends at 4.00 s: let it start at 1 s or earlier"),
        (0.0, 4.5, "4.5 s long and the style clip only 4.00 s"),
        (None, None, "From 0 to 3 s"),  # emptied fields
        (-1.0, 3.0, "must be between 0 and"),
        (0.0, 9.0, "must be between 1.5 and 4.5 s"),
    ],
)
def test_a_style_clip_stays_where_its_excerpt_is_wrong(scale, start_s, length_s, said):
    shown = audio_panel.read_style(scale, start_s, length_s, {})
    assert said in shown["style_line"] and "style" not in shown


def test_a_file_that_is_no_style_clip_is_refused(tmp_path):
    path = tmp_path / "clip.wav"
    path.write_text("<html>")
    shown = audio_panel.read_style(str(path), *EXCERPT, {})
    assert shown["style"] is None and 'role="alert"' in shown["style_line"]
    emptied = audio_panel.read_style(None, *EXCERPT, shown["tune"])
    assert emptied["style_line"] == shown["style_line"] and emptied["tune"] == {}


@pytest.mark.parametrize(("able", "choice"), [("melody", FOLLOW), ("style", TAKE_STYLE)])
def test_the_choice_is_offered_where_the_checkpoint_can_follow(able, choice):
    answer = audio_panel.clip_uses({able: True}, choice)
    offered = answer["clip_use"]
    assert not answer["clip_needs"]["visible"]
    assert offered["visible"] and offered["choices"] == [CONTINUE, choice]
    for facts in ({"melody": False, "style": False}, {}):
        answer = audio_panel.clip_uses(facts, choice)
        shown = answer["clip_use"]
        assert answer["clip_needs"]["visible"]  # it says what following needs
        assert not shown["visible"] and shown["value"] == CONTINUE
    other = {"melody": able == "style", "style": able == "melody"}
    assert audio_panel.clip_uses(other, choice)["clip_use"]["value"] == CONTINUE
