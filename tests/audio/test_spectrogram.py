import io
import re
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from musicgen_ui.audio import chords, spectrogram
from musicgen_ui.audio.chords import Progression
from musicgen_ui.audio.clip import Chroma, Clip


def tone(hz, seconds=1.0, rate=32_000, level=0.5, channels=1):
    t = np.arange(round(seconds * rate)) / rate
    return Clip(np.repeat(level * np.sin(2 * np.pi * hz * t)[None], channels, 0), rate)


def picture(clip):
    content, _ = spectrogram.png(clip)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("rate", [16_000, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("hz", [110, 440, 3_000])
def test_a_tone_is_brightest_at_its_frequency_and_level(rate, hz):
    from librosa import mel_frequencies

    levels = spectrogram.mel_db(tone(hz, rate=rate))[0]  # [bands, frames]
    band = int(levels[:, levels.shape[1] // 2].argmax())
    centres = mel_frequencies(
        spectrogram.BANDS + 2, fmin=spectrogram.LOWEST_HZ, fmax=rate / 2, htk=True
    )
    assert centres[band] <= hz <= centres[band + 2]
    assert levels[band].max() == pytest.approx(-6, abs=3)


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 32_000, 44_100, 48_000])
def test_no_band_is_empty(rate):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise = np.random.default_rng(0).standard_normal((1, rate)).astype(np.float32)
        assert spectrogram.mel_db(Clip(noise, rate)).mean(axis=2).min() > -60


def test_a_click_is_where_it_sounds():
    clip = Clip(np.zeros((1, 32_000), np.float32), 32_000)
    clip.samples[0, 24_000] = 1
    loud = spectrogram.mel_db(clip)[0].sum(axis=0)
    assert loud.argmax() / len(loud) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("samples", [0, 1, 100, 16_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("level", [0, 0.5])
def test_silence_and_short_clips_are_drawn_and_said(samples, channels, level):
    clip = Clip(tone(440, channels=channels, level=level).samples[:, :samples], 32_000)
    assert picture(clip).shape[0] == channels * spectrogram.BANDS
    assert spectrogram.alt_text(clip).endswith(".")


def test_both_channels_are_drawn_left_above_right():
    clip = tone(440, channels=2)
    clip.samples[1] = 0
    left, right = np.split(picture(clip).max(axis=2), 2)
    assert left.max() > 200 and right.max() < 60


def test_pictures_drawn_by_several_threads_are_equal():
    clip, found = tone(440), []
    draw = lambda: found.append(picture(clip))  # noqa: E731
    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(each, found[0]) for each in found)


def test_a_melody_is_said_by_its_notes():
    melody = Chroma(np.repeat([0, 11], 8).astype(np.uint8), 0.125)  # C for 1 s, B for 1 s
    said = spectrogram.alt_text(tone(440, seconds=4), 2, melody)
    assert said.endswith("the melody that it follows: C, B.")


def test_the_alternative_text_says_what_the_picture_shows():
    text = spectrogram.alt_text(tone(440, seconds=12.3, channels=2), prompt_s=5)
    assert "12.3 s" in text and "stereo" in text and "first 5.0 s" in text and "LUFS" in text
    low, high = map(int, re.search(r"between (\d+) Hz and (\d+) Hz", text).groups())
    assert low <= 450 and high >= 430 and high - low < 60
    assert "mono" in spectrogram.alt_text(tone(440)) and "silent" in spectrogram.alt_text(
        tone(440, level=0)
    )


def test_alternative_text_names_the_first_chords():
    placed = Progression(chords.parse("C B:dim"), 1.0).placed(2.0)
    said = spectrogram.alt_text(tone(440, seconds=4), 2, Chroma(np.empty(0), 0.1, placed))
    assert said.endswith("the chords that it follows: C, B:dim.")
    longer = Progression(chords.parse("C D E F G A B C D E"), 1.0).placed(10.0)
    assert spectrogram.alt_text(tone(440), 0, Chroma(np.empty(0), 0.1, longer)).endswith("C, ….")
