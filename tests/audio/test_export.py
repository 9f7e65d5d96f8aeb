from __future__ import annotations

import io
import math
import struct

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio import export
from musicgen_ui.audio.clip import Clip
from musicgen_ui.audio.export import Shape
from musicgen_ui.errors import RequestError

RATE = 32_000


def chord(duration_s=2.0, level=1.0, channels=1):
    t = np.arange(round(duration_s * RATE)) / RATE
    voices = [(110, 0.5), (220.5, 0.4), (441, 0.3), (3000, 0.2), (9000, 0.1)]
    mono = sum(a * np.sin(2 * np.pi * f * t + f) for f, a in voices) * (1 + np.sin(3 * t)) / 2
    return Clip(np.stack([level * mono, level * mono[::-1]][:channels]).astype(np.float32), RATE)


def noise(duration_s=1.0, level=0.2, seed=0):
    samples = np.random.default_rng(seed).normal(0, level, (1, round(duration_s * RATE)))
    return Clip(samples.astype(np.float32), RATE)


def true_peak_dbtp(clip):
    """By a filter and a rate that the limiter does not use."""
    dense = resample_poly(clip.samples.astype(np.float64), 16, 1, axis=1, window=("kaiser", 9.0))
    return 20 * math.log10(np.abs(dense).max())


# the limiter


@pytest.mark.parametrize("channels", [1, 2])
def test_limiter_holds_the_true_peak_of_music_below_the_ceiling(channels):
    loud = chord(level=2.0, channels=channels)
    assert true_peak_dbtp(loud) > 3
    limited, reduced_db = export.limit(loud)
    assert -1.2 < true_peak_dbtp(limited) < -0.9
    assert reduced_db == pytest.approx(true_peak_dbtp(loud) + 1, abs=0.3)


def test_limiter_holds_peaks_between_samples():
    t = np.arange(RATE // 4)
    between = Clip(np.cos(np.pi / 2 * t + np.pi / 4)[None].astype(np.float32), RATE)
    assert np.abs(between.samples).max() < 0.71  # yet the waveform reaches 1
    assert true_peak_dbtp(export.limit(between)[0]) < -0.9


def test_limiter_holds_noise_within_full_scale():
    limited, _ = export.limit(noise(level=2.0))
    assert np.abs(limited.samples).max() < 1 and true_peak_dbtp(limited) < 0


def test_limiter_leaves_what_is_below_the_ceiling_bit_for_bit():
    quiet = chord(level=0.4)
    assert export.limit(quiet) == (quiet, 0.0)
    nothing = Clip(np.zeros((2, 0), np.float32), RATE)
    assert export.limit(nothing) == (nothing, 0.0)


def test_limiter_leaves_what_is_far_from_a_peak_bit_for_bit():
    music = noise(3.0, level=0.05)
    music.samples[0, RATE] = 1.5
    limited, reduced_db = export.limit(music)
    reach = 2 * round(export.LOOK_AHEAD_S * RATE) + 1
    back = round(reduced_db / export.RELEASE_DB_S * RATE) + reach
    changed = np.flatnonzero(limited.samples[0] != music.samples[0])
    assert RATE - reach <= changed.min() <= RATE <= changed.max() <= RATE + back
    assert limited.samples[0, RATE] < 0.9


def test_limiter_changes_nothing_the_second_time():
    limited, _ = export.limit(chord(level=2.0))
    as_in_a_file = Clip(audio.to_int16(limited.samples).astype(np.float32) / 32768, RATE)
    assert export.limit(as_in_a_file)[1] == 0


# loops


@pytest.mark.parametrize(("tempo", "bars"), [(120, 1), (93.7, 2), (140, 4)])
def test_loop_has_whole_bars_to_the_sample(tempo, bars):
    looped = export.loop(noise(10.0), tempo, bars, start_s=0.25)
    assert looped.samples.shape == (1, round(bars * 4 * 60 / tempo * RATE))
    waltz = Shape(loop_bars=bars).of(noise(10.0), tempo, 0.25, beats_a_bar=3)
    assert waltz.samples.shape == (1, round(bars * 3 * 60 / tempo * RATE))


@pytest.mark.parametrize(
    ("whole_s", "start_s"), [(5.0, 0.5), (4.0, 2.0), (2.0, 0.0), (2.02, 0.0), (3.0, 1.0)]
)
def test_loop_goes_on_at_its_seam_as_within(whole_s, start_s):
    """With music after it, before it, a little of it, or none."""
    looped = export.loop(chord(whole_s, 0.5), 120, 1, start_s).samples[0]
    twice = np.concatenate([looped, looped])
    seam = slice(len(looped) - 20, len(looped) + 20)
    bend = np.abs(np.diff(twice, 2))
    assert bend[seam].max() <= bend[: len(looped) - 2].max() * 1.01


def test_loop_seam_keeps_the_level_of_alike_and_of_unlike_music():
    for music in (noise(5.0), Clip(np.tile(noise(0.5).samples, 10), RATE)):
        looped = export.loop(music, 120, 2).samples[0]
        fade = round(export.SEAM_S * RATE)
        power = np.square(looped).mean()
        assert np.square(looped[:fade]).mean() == pytest.approx(power, rel=0.2)


def test_loop_of_a_repeating_piece_is_the_piece():
    beat = noise(2.0)
    looped = export.loop(Clip(np.tile(beat.samples, 3), RATE), 120, 1)
    np.testing.assert_allclose(looped.samples, beat.samples, atol=1e-6)


def test_loop_without_a_tempo_or_with_too_little_music_is_refused():
    with pytest.raises(RequestError, match="needs a tempo"):
        export.loop(noise(), 0, 1)
    with pytest.raises(RequestError, match=r"4 bars at 120 bpm take 8.0 s, but.*4.5 s.*choose 2"):
        export.loop(noise(5.0), 120, 4, start_s=0.5)
    with pytest.raises(RequestError, match="choose a greater length"):
        export.loop(noise(1.0), 120, 1)


def test_loop_points_are_where_samplers_look_for_them():
    music = noise(0.5)
    plain = audio.encode(music, ".wav", {"comment": "kept"})
    wav = export.with_loop_points(plain, music.samples.shape[1], RATE)
    assert int.from_bytes(wav[4:8], "little") == len(wav) - 8
    chunk = wav[wav.index(b"smpl") :]
    size, *fields = struct.unpack("<I9I6I", chunk[4:68])
    assert size == 60 and fields[2] == round(1e9 / RATE) and fields[7] == 1
    assert fields[9:] == [0, 0, 0, music.samples.shape[1] - 1, 0, 0]
    assert b"kept" in wav
    read, rate = soundfile.read(io.BytesIO(wav), dtype="int16")
    assert rate == RATE and np.array_equal(
        read, soundfile.read(io.BytesIO(plain), dtype="int16")[0]
    )


# fade-outs and shapes


def test_fade_out_ends_in_silence_and_keeps_the_rest():
    music = noise(2.0)
    faded = export.fade_out(music, 0.5).samples
    kept = round(1.5 * RATE)
    assert faded.shape == music.samples.shape
    assert np.array_equal(faded[:, :kept], music.samples[:, :kept]) and faded[0, -1] == 0
    quarters = np.square(faded[0, kept:]).reshape(4, -1).mean(axis=1)
    assert (np.diff(quarters) < 0).all()


def test_fade_out_of_more_than_all_is_one_of_all():
    assert export.fade_out(noise(0.5), 10).samples[0, -1] == 0


@pytest.mark.parametrize(
    "wrong", [{"loop_bars": -1}, {"loop_bars": 999}, {"fade_out_s": math.nan}, {"fade_out_s": 61}]
)
def test_shape_beyond_its_limits_is_refused(wrong):
    with pytest.raises(RequestError):
        Shape(**wrong)


def test_shape_of_a_loop_has_no_fade_out():
    with pytest.raises(RequestError, match="no end to fade out"):
        Shape(loop_bars=1, fade_out_s=1)


def test_shape_of_nothing_is_the_clip_itself():
    music = noise()
    assert not Shape() and Shape().of(music, 0) is music and Shape().settings() == {}


def test_a_loop_asks_for_the_music_it_needs():
    assert Shape(loop_bars=4).duration_s(120, None) == 8.1
    assert Shape(loop_bars=4).duration_s(120, 8.0) == 8
    assert Shape(loop_bars=4).duration_s(120, None, beats_a_bar=3) == 6.1
    assert Shape(fade_out_s=1).duration_s(0, None) is None
    with pytest.raises(RequestError, match=r"4 bars at 120 bpm take 8\.0 s: choose fewer"):
        Shape(loop_bars=4).duration_s(120, 7.9)
    with pytest.raises(RequestError, match="needs a tempo"):
        Shape(loop_bars=4).duration_s(0, None)


# kinds of files


@pytest.mark.parametrize("rate", [16_000, 32_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_opus_sounds_as_long_and_as_loud_as_the_take(rate, channels):
    tune = np.sin(np.arange(rate) * 2 * np.pi * 440 / rate).astype(np.float32) / 4
    content = audio.encode(Clip(np.stack([tune] * channels), rate), ".opus", {"title": "tune"})
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        assert (file.format, file.subtype, file.title) == ("OGG", "OPUS", "tune")
        assert file.frames == file.samplerate and file.channels == channels
        heard = file.read(dtype="float32", always_2d=True)[:, 0]
    t = np.arange(len(heard)) / len(heard)
    expected = np.sin(2 * np.pi * 440 * t) / 4
    assert np.abs(heard - expected)[1000:-1000].max() < 0.03
