import warnings

import numpy as np
import pyloudnorm
import pytest
import soundfile

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio import load
from musicgen_ui.audio.clip import Clip

RATE = 32_000


def noise(seconds=1.0, channels=1, level=0.1, rate=RATE, seed=0):
    draw = np.random.default_rng(seed)
    shape = (channels, round(seconds * rate))
    return Clip((draw.standard_normal(shape) * level).astype(np.float32), rate)


def tone(hz, seconds=1.0, rate=RATE, level=0.5):
    t = np.arange(round(seconds * rate)) / rate
    return Clip((level * np.sin(2 * np.pi * hz * t)).astype(np.float32)[None], rate)


# convert


@pytest.mark.parametrize("samples", [0, 1, 7, 100, 44_099, 44_100, 44_101])
@pytest.mark.parametrize(("old", "new"), [(44_100, 32_000), (8_000, 32_000), (48_000, 16_000)])
def test_a_converted_clip_has_exactly_the_rounded_length(samples, old, new):
    converted = audio.convert(Clip(np.zeros((2, samples), np.float32), old), new, 2)
    assert converted.samples.shape == (2, round(samples * new / old))
    assert converted.samples.dtype == np.float32
    assert converted.sampling_rate == new


def test_resampling_keeps_a_tone_in_pitch_time_and_level():
    converted = audio.convert(tone(1000, rate=44_100), RATE, 1).samples[0]
    expected = tone(1000).samples[0]
    inner = slice(1000, -1000)
    assert np.abs(converted[inner] - expected[inner]).max() < 1e-4


def test_resampling_lets_nothing_alias():
    assert np.abs(audio.convert(tone(20_000, rate=48_000), RATE, 1).samples[0, 500:-500]).max() < (
        1e-3
    )


def test_channels_are_copied_up_and_averaged_down():
    mono, stereo = noise(), noise(channels=2)
    up = audio.convert(mono, RATE, 2).samples
    assert np.array_equal(up[0], mono.samples[0]) and np.array_equal(up[1], mono.samples[0])
    down = audio.convert(stereo, RATE, 1).samples
    np.testing.assert_allclose(down[0], stereo.samples.mean(axis=0), atol=1e-7)
    assert np.array_equal(audio.convert(stereo, RATE, 2).samples, stereo.samples)


# join


def test_a_join_keeps_the_clip_before_its_last_20_ms_and_the_decoded_audio_after_it():
    clip, decoded, fade = noise(2, 2, seed=1), noise(3, 2, seed=2).samples, RATE // 50
    take = audio.join(clip, decoded, RATE).samples
    assert take.shape == (2, 2 * RATE + 2 * RATE)
    assert take.dtype == np.float32
    assert np.array_equal(take[:, : 2 * RATE - fade], clip.samples[:, :-fade])
    assert np.array_equal(take[:, 2 * RATE :], decoded[:, RATE:])
    assert np.array_equal(take[:, 2 * RATE - 1], decoded[:, RATE - 1])


def test_a_join_of_a_clip_with_its_own_rendering_changes_nothing():
    whole = noise(3)
    clip = Clip(whole.samples[:, : 2 * RATE], RATE)
    take = audio.join(clip, whole.samples[:, RATE:], RATE)
    np.testing.assert_allclose(take.samples, whole.samples, atol=1e-7)


def test_the_fade_is_of_equal_gain_and_rises_steadily():
    clip = Clip(np.zeros((1, RATE), np.float32), RATE)
    take = audio.join(clip, np.ones((1, RATE), np.float32), RATE // 2).samples[0]
    steps = np.diff(take[RATE - RATE // 50 - 1 : RATE])
    np.testing.assert_allclose(steps, 1 / (RATE // 50), atol=1e-6)


@pytest.mark.parametrize("context", [0, 1, 100])
def test_a_short_context_has_a_short_fade(context):
    clip, decoded = noise(1, seed=1), noise(1, seed=2).samples
    take = audio.join(clip, decoded, context).samples
    assert take.shape[1] == RATE + RATE - context
    assert np.array_equal(take[:, : RATE - context], clip.samples[:, : RATE - context])
    assert np.array_equal(take[:, RATE:], decoded[:, context:])


def test_channels_that_do_not_match_are_an_error():
    with pytest.raises(ValueError, match="channels"):
        audio.join(noise(channels=2), noise().samples, 100)


# loudness


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16_000, 32_000])
def test_a_normalised_clip_measures_minus_14_lufs(channels, rate):
    clip, gain_db = audio.normalize(noise(3, channels, 0.01, rate))
    measured = pyloudnorm.Meter(rate).integrated_loudness(clip.samples.T)
    assert measured == pytest.approx(-14, abs=0.05)
    assert gain_db > 0
    assert audio.normalize(clip)[1] == pytest.approx(0, abs=0.05)


def test_the_true_peak_stops_the_gain_before_the_loudness_is_reached():
    sparse = np.zeros((1, 3 * RATE), np.float32)
    sparse[0, ::4000] = 0.5
    clip, _ = audio.normalize(Clip(sparse, RATE))
    assert audio.true_peak_dbtp(clip) == pytest.approx(-1, abs=0.01)
    assert audio.loudness_lufs(clip) < -14


def test_the_true_peak_lies_between_the_samples():
    t = np.arange(RATE)
    clip = Clip(np.sin(np.pi / 2 * t + np.pi / 4).astype(np.float32)[None], RATE)  # samples: 0.707
    assert audio.true_peak_dbtp(clip) == pytest.approx(0, abs=0.3)


@pytest.mark.parametrize("samples", [0, 1, 100, 12_799, 12_800, 12_801, 14_000])
def test_clips_around_and_below_a_block_are_measured(samples):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = Clip(np.zeros((1, samples), np.float32), RATE)
        assert audio.normalize(silent) == (silent, 0.0)
        clip = Clip(noise(level=0.1).samples[:, :samples], RATE)
        if samples > 50:
            assert audio.loudness_lufs(clip) == pytest.approx(-17, abs=3)
            assert audio.true_peak_dbtp(audio.normalize(clip)[0]) <= -0.99


# write


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_16_bit_samples_come_back_bit_for_bit(tmp_path, ending):
    levels = np.random.default_rng(0).integers(-32768, 32768, (1000, 2), dtype=np.int16)
    levels[:2] = -32768, 32767
    path = tmp_path / f"a.{ending}"
    audio.write(Clip(levels.T.astype(np.float32) / 32768, RATE), path)
    assert soundfile.info(path).subtype == "PCM_16"
    assert np.array_equal(soundfile.read(path, dtype="int16")[0], levels)
    audio.write(load.read(path).clip, path)
    assert np.array_equal(soundfile.read(path, dtype="int16")[0], levels)


def test_full_scale_does_not_wrap_round(tmp_path):
    audio.write(Clip(np.array([[1.0, -1.0, 1.5]], np.float32), RATE), tmp_path / "a.wav")
    assert soundfile.read(tmp_path / "a.wav", dtype="int16")[0].tolist() == [32767, -32768, 32767]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="space"):
        audio.write(noise(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]
    assert path.read_bytes() == b"old"


def test_tags_can_be_read(tmp_path):
    for ending in ("wav", "flac"):
        path = tmp_path / f"a.{ending}"
        audio.write(noise(), path, {"title": "Café – 曲", "artist": "someone"})
        with soundfile.SoundFile(path) as file:
            assert (file.title, file.artist) == ("Café – 曲", "someone")
