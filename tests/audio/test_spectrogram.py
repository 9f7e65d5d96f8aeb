import gc
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


def picture(clip, path, prompt_s=0.0):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(Image.open(spectrogram.draw(clip, path, prompt_s)).convert("RGB"))


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


def test_the_picture_has_the_size_of_its_place_and_is_crisp(tmp_path):
    assert picture(tone(440), tmp_path / "a.png").shape == (720, 2200, 3)
    assert picture(tone(440, channels=2), tmp_path / "b.png").shape == (1120, 2200, 3)


def test_both_channels_are_drawn(tmp_path):
    clip = tone(440, channels=2)
    clip.samples[1] = 0
    image = picture(clip, tmp_path / "a.png").max(axis=2)
    assert image[60:500, 200:1900].max() > 200
    assert image[620:980, 200:1900].max() < 60


def test_the_prompt_is_marked_where_it_ends(tmp_path):
    clip = Clip(np.zeros((1, 320_000), np.float32), 32_000)
    plain, marked = (picture(clip, tmp_path / "a.png", s).astype(int) for s in (0, 5.0))
    columns = np.abs(marked - plain)[100:600].sum(axis=(0, 2))
    left, right = 98 * 2, 2200 - 98 * 2
    assert columns.argmax() == pytest.approx((left + right) / 2, abs=40)
    assert np.abs(marked - plain)[:50].any()  # its label


@pytest.mark.parametrize("samples", [0, 1, 100, 16_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("level", [0, 0.5])
def test_silence_and_short_clips_are_drawn_and_told_without_a_warning(
    tmp_path, samples, channels, level
):
    clip = Clip(tone(440, channels=channels, level=level).samples[:, :samples], 32_000)
    assert picture(clip, tmp_path / "a.png").any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spectrogram.alt_text(clip).endswith(".")


def test_any_thread_may_draw(tmp_path):
    clip = tone(440)
    expected = picture(clip, tmp_path / "a.png")
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    threads = [threading.Thread(target=spectrogram.draw, args=(clip, path)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for path in paths:
        assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), expected)


def test_pictures_leave_nothing_behind():
    """What a figure holds is large, and only cycles of references hold it."""
    from matplotlib.figure import Figure

    gc.collect()
    gc.disable()  # as where Python sees no reason to look
    try:
        for _ in range(3):
            spectrogram.png(tone(440, seconds=0.1))
        assert not [each for each in gc.get_objects() if type(each) is Figure]
    finally:
        gc.enable()


def test_low_ticks_do_not_touch():
    for channels in (1, 2):
        ticks = spectrogram._readable_ticks(tone(440, channels=channels))
        assert ticks[0] == 100 and 1_000 in ticks and 10_000 in ticks
    assert max(spectrogram._readable_ticks(tone(440, rate=16_000))) == 5_000


def test_the_alternative_text_says_what_the_picture_shows():
    text = spectrogram.alt_text(tone(440, seconds=12.3, channels=2), prompt_s=5)
    assert "12.3 s" in text and "stereo" in text and "first 5.0 s" in text and "LUFS" in text
    low, high = map(int, re.search(r"between (\d+) Hz and (\d+) Hz", text).groups())
    assert low <= 450 and high >= 430 and high - low < 60
    assert "mono" in spectrogram.alt_text(tone(440)) and "silent" in spectrogram.alt_text(
        tone(440, level=0)
    )


def test_a_melody_is_drawn_below_on_the_same_seconds(tmp_path):
    """Its notes lie where they sound, behind the clip that the take began with."""
    clip = tone(440, seconds=4)
    melody = Chroma(np.repeat([0, 11], 8).astype(np.uint8), 0.125)  # C for 1 s, B for 1 s
    plain = np.asarray(Image.open(spectrogram.draw(clip, tmp_path / "plain.png", 2)))
    drawn = np.asarray(Image.open(spectrogram.draw(clip, tmp_path / "melody.png", 2, melody)))
    assert drawn.shape[0] > plain.shape[0] and drawn.shape[1] == plain.shape[1]
    ink = tuple(bytes.fromhex(spectrogram.MELODY_INK[1:]))
    y, x = np.nonzero((drawn[..., :3] == ink).all(-1))
    left, right = 98 * 2, drawn.shape[1] - 98 * 2
    seconds = 4 * (x - left) / (right - left)
    assert 1.9 < seconds.min() < 2.1 and y.min() > plain.shape[0] - 150
    early, late = y[seconds < 2.9], y[seconds > 3.1]
    assert late.max() < early.min()  # B above C
    said = spectrogram.alt_text(clip, 2, melody)
    assert said.endswith("the melody that it follows: C, B.")


def test_alternative_text_names_the_first_chords():
    placed = Progression(chords.parse("C B:dim"), 1.0).placed(2.0)
    said = spectrogram.alt_text(tone(440, seconds=4), 2, Chroma(np.empty(0), 0.1, placed))
    assert said.endswith("the chords that it follows: C, B:dim.")
    longer = Progression(chords.parse("C D E F G A B C D E"), 1.0).placed(10.0)
    assert spectrogram.alt_text(tone(440), 0, Chroma(np.empty(0), 0.1, longer)).endswith("C, ….")
