"""What the form says of a clip whose melody is to be followed, and what choosing its use does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from musicgen_ui.ui import audio_panel
from musicgen_ui.ui.components import CONTINUE, FOLLOW

WINDOW = (10.0, 0.0, 12.0)  # length, context and overlap in s


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
    told = audio_panel.use(FOLLOW, scale, None, *WINDOW)
    assert told["melody"] == scale and told["audio_prompt"] is None
    assert told["melody_column"]["visible"] and not told["continue_column"]["visible"]
    assert "4.0 s" in told["melody_line"] and told["tune"]["clip_s"] == 4
    back = audio_panel.use(CONTINUE, None, scale, *WINDOW)
    assert "4.0 s" in back["clip_line"] and back["clip"]["clip_s"] == 4
    assert back["audio_prompt"] == scale and back["melody"] is None
    assert back["continue_column"]["visible"] and not back["melody_column"]["visible"]


def test_the_choice_is_offered_where_the_checkpoint_can_follow():
    assert audio_panel.clip_uses({"melody": True})["clip_use"]["visible"]
    for facts in ({"melody": False}, {}):
        told = audio_panel.clip_uses(facts)["clip_use"]
        assert not told["visible"] and told["value"] == CONTINUE
