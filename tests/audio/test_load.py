"""Files that nobody vouches for: what is refused, what is accepted with which note, and bounds."""

import functools
import io
import struct
import subprocess
import sys
import warnings

import av
import numpy as np
import pytest
import soundfile

from musicgen_ui.audio import decode
from musicgen_ui.audio.clip import convert
from musicgen_ui.audio.load import read
from musicgen_ui.errors import RequestError


def tone(seconds, rate, channels=1, hz=440, level=0.3):
    t = np.arange(round(seconds * rate)) / rate
    return np.repeat((level * np.sin(2 * np.pi * hz * t))[:, None], channels, 1).astype(np.float32)


def ramp(seconds, rate):
    """A sample's value tells its place, so that the end can be told from the rest."""
    return np.linspace(0, 0.9, round(seconds * rate), dtype=np.float32)


def encode(path, codec, seconds=6, rate=48_000, layout="stereo", **options):
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        channels = stream.codec_context.channels
        planes = tone(seconds, rate, channels).T
        for start in range(0, planes.shape[1], rate):
            part = np.ascontiguousarray(planes[:, start : start + rate])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.sample_rate = rate
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def write(path, samples, rate=44_100, **kind):
    soundfile.write(path, samples, rate, **kind)
    return path


def refusal(path):
    with pytest.raises(RequestError) as caught:
        read(path)
    return str(caught.value)


def note(path, **options):
    notes = read(path, **options).notes
    assert len(notes) == 1, notes
    return notes[0]


# what can be read


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("wav", {}),
        ("wav", {"subtype": "PCM_24"}),
        ("wav", {"subtype": "FLOAT"}),
        ("wav", {"subtype": "DOUBLE"}),
        ("flac", {}),
        ("aiff", {}),
        ("ogg", {}),
        ("mp3", {}),
    ],
)
def test_common_files_are_read_as_they_are(tmp_path, ending, kind):
    reading = read(write(tmp_path / f"a.{ending}", tone(3, 44_100, 2), **kind))
    assert reading.notes == ()
    assert reading.clip.sampling_rate == 44_100
    assert reading.clip.samples.dtype == np.float32
    assert reading.clip.samples.shape == (2, 3 * 44_100)
    assert reading.full_s == pytest.approx(3)
    assert np.abs(reading.clip.samples).max() == pytest.approx(0.3, abs=0.1)  # MP3 overshoots


@pytest.mark.parametrize(
    ("ending", "codec", "options"),
    [
        ("m4a", "aac", {}),
        ("m4a", "aac", {"rate": 44_100, "layout": "mono"}),
        ("m4a", "alac", {"layout": "mono"}),
        ("webm", "libopus", {}),
    ],
)
def test_phones_and_browsers_recordings_are_read(tmp_path, ending, codec, options):
    if codec == "alac":
        path = tmp_path / "a.m4a"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("alac", rate=48_000, layout="mono", format="s16p")
            samples = (tone(6, 48_000) * 32767).astype(np.int16).T
            frame = av.AudioFrame.from_ndarray(samples.copy(), format="s16p", layout="mono")
            frame.sample_rate = 48_000
            file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    else:
        path = encode(tmp_path / f"a.{ending}", codec, **options)
    reading = read(path)
    assert reading.notes == ()
    assert reading.clip.sampling_rate == options.get("rate", 48_000)
    assert reading.clip.channels == (1 if options.get("layout") == "mono" else 2)
    assert reading.clip.duration_s == pytest.approx(6, abs=0.05)
    spectrum = np.abs(np.fft.rfft(reading.clip.samples[0]))
    assert np.argmax(spectrum) / reading.clip.duration_s == pytest.approx(440, abs=1)


def test_high_rates_come_down_to_48_khz_at_the_same_length(tmp_path):
    reading = read(write(tmp_path / "a.wav", tone(1, 192_000), 192_000))
    assert reading.clip.sampling_rate == 48_000
    assert reading.clip.samples.shape == (1, 48_000)
    expected = tone(1, 48_000)[:, 0]
    assert np.abs(reading.clip.samples[0] - expected)[500:-500].max() < 1e-3


# what is accepted with a note


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_of_a_long_file_the_end_is_kept(tmp_path, ending):
    path = write(tmp_path / f"a.{ending}", tone(20, 44_100), 44_100)
    reading = read(path, keep_s=5)
    assert reading.notes == ("The file is 20.0 s long: its last 5 s were taken.",)
    assert reading.clip.samples.shape == (1, 5 * 44_100)
    assert reading.full_s == pytest.approx(20, abs=0.01)


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_the_end_is_the_end_to_the_sample(tmp_path, ending):
    whole = ramp(20, 8_000)
    path = write(tmp_path / f"a.{ending}", whole, 8_000, subtype="PCM_16")
    kept = read(path, keep_s=5).clip.samples[0]
    np.testing.assert_allclose(kept, whole[-5 * 8_000 :], atol=1e-4)


@pytest.mark.parametrize(("ending", "codec"), [("m4a", "aac"), ("webm", "libopus")])
def test_of_a_long_recording_the_end_is_kept(tmp_path, ending, codec):
    reading = read(encode(tmp_path / f"a.{ending}", codec, seconds=20), keep_s=5)
    assert reading.clip.duration_s == 5
    assert reading.full_s == pytest.approx(20, abs=0.1)


def test_an_hour_is_accepted(tmp_path):
    path = write(tmp_path / "a.flac", np.zeros(3600 * 8_000, np.int16), 8_000)
    reading = read(path)
    assert "1 h 0 min" in reading.notes[0]
    assert reading.clip.duration_s == 120


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "m4a", "webm"])
@pytest.mark.parametrize("keep_s", [120, 4])
def test_a_truncated_file_gives_what_is_there(tmp_path, ending, keep_s):
    path = tmp_path / f"a.{ending}"
    if ending in ("m4a", "webm"):
        encode(path, "aac" if ending == "m4a" else "libopus", 20, movflags="faststart")
    else:
        noise = np.random.default_rng(0).standard_normal(20 * 44_100) * 0.1
        write(path, noise.astype(np.float32))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reading = read(path, keep_s)
    assert "cut short" in reading.notes[-1] and "of 20.0 s" in reading.notes[-1]
    assert reading.full_s == pytest.approx(10, abs=0.6)
    assert reading.clip.duration_s == pytest.approx(min(keep_s, reading.full_s))


def test_a_wav_from_a_pipe_does_not_count_as_truncated(tmp_path):
    path = write(tmp_path / "a.wav", tone(2, 8_000), 8_000)
    content = bytearray(path.read_bytes())
    for chunk in (b"RIFF", b"data"):
        at = content.index(chunk) + 4
        content[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    reading = read(path)
    assert reading.notes == () and reading.clip.duration_s == 2


def test_silence_is_noted(tmp_path):
    assert "silent" in note(write(tmp_path / "a.wav", np.zeros(8_000), 8_000))


@pytest.mark.parametrize("channels", range(3, 9))
def test_several_channels_become_stereo(tmp_path, channels):
    samples = np.zeros((8_000, channels), np.float32)
    samples[:, 0] = 0.5
    path = write(tmp_path / "a.wav", samples, 8_000)
    assert f"{channels} channels" in note(path)
    left, right = read(path).clip.samples
    np.testing.assert_allclose(left, 0.5, atol=1e-3)
    assert not right.any()


def test_every_music_channel_is_heard_in_the_mix(tmp_path):
    for channel in range(8):
        samples = np.zeros((800, 8), np.float32)
        samples[:, channel] = 0.5
        mix = read(write(tmp_path / "a.wav", samples, 8_000)).clip.samples
        assert mix.any() == (channel != 3)  # all but the low effects


def test_a_wrong_extension_is_noted(tmp_path):
    path = write(tmp_path / "a.wav", tone(1, 8_000), 8_000, format="FLAC")
    assert note(path) == "The file is named .wav but holds FLAC; it was read as that."
    assert "MP4" in note(encode(tmp_path / "b.m4a", "aac").rename(tmp_path / "b.mp3"))
    write(tmp_path / "upload", tone(1, 8_000), 8_000, format="FLAC")
    assert read(tmp_path / "upload").notes == ()


def test_samples_beyond_full_scale_keep_their_shape(tmp_path):
    loud = tone(1, 8_000, level=4.0)
    path = write(tmp_path / "a.wav", loud, 8_000, subtype="FLOAT")
    assert "12.0 dB beyond full scale" in note(path)
    np.testing.assert_allclose(read(path).clip.samples[0], loud[:, 0] / 4, atol=1e-3)


# what is refused


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no file “a.wav”" in refusal(tmp_path / "a.wav")
    assert "no file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"<html><body>Not found</body></html>" * 50,
        b"hello world\n" * 1000,
        bytes(range(256)) * 100,
        b"RIFF\x00\x00",
        b"fLaC",
        b"OggS" + bytes(100),
        b"\x00\x00\x00\x18ftypM4A " + bytes(200),
        b"#EXTM3U\n#EXTINF:10,\n/etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
    ],
)
def test_what_is_not_audio_is_refused(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    assert "not audio" in refusal(tmp_path / "a.wav")


@pytest.mark.parametrize("name", ["a.au", "a.raw", "a.vox", "a.m3u8"])
def test_a_name_does_not_turn_a_text_into_audio(tmp_path, name):
    (tmp_path / name).write_text("hello world\n" * 1000)
    assert "not audio" in refusal(tmp_path / name)


def test_an_empty_file_and_one_without_frames_are_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    assert "empty" in refusal(tmp_path / "a.wav")
    assert "no audio" in refusal(write(tmp_path / "b.wav", np.zeros(0), 8_000))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_nan_and_infinite_samples_are_refused(tmp_path, value, subtype):
    samples = tone(1, 8_000)[:, 0]
    samples[4_000] = value
    assert "NaN" in refusal(write(tmp_path / "a.wav", samples, 8_000, subtype=subtype))


def test_numbers_too_large_for_float32_are_refused(tmp_path):
    samples = np.full(100, 1e300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "infinite" in refusal(write(tmp_path / "a.wav", samples, 8_000, subtype="DOUBLE"))


@pytest.mark.parametrize("rate", [0, 1, 3_999, 400_001, 4_000_000_000])
def test_absurd_sampling_rates_are_refused(tmp_path, rate):
    path = write(tmp_path / "a.wav", np.ones(1000) / 2, 8_000)
    content = bytearray(path.read_bytes())
    content[24:28] = struct.pack("<I", rate)
    path.write_bytes(content)
    assert "sampling rate" in refusal(path) or "not audio" in refusal(path)


@pytest.mark.parametrize("channels", [9, 255, 1024])
def test_more_than_8_channels_are_refused(tmp_path, channels):
    path = write(tmp_path / "a.wav", np.ones((10, channels)) / 2, 8_000)
    assert f"{channels} channels" in refusal(path)


def test_a_video_without_sound_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        file.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        file.mux(stream.encode(None))
    assert "no audio" in refusal(tmp_path / "a.mp4")


# bounds


def test_decoding_stops_at_the_bound_on_work(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    content = bytearray(write(path, tone(60, 8_000), 8_000).read_bytes())
    path.write_bytes(content)
    monkeypatch.setattr(decode, "MAX_WORK", 100_000)
    assert "too long" in refusal(path)
    assert read(path, keep_s=5).full_s == 60  # skipping ahead is no work


# A process's ru_maxrss begins with its parent's, so the own peak comes from the kernel's file.
MEASURE = """
import re, resource, sys
from pathlib import Path
from musicgen_ui.audio.clip import convert
from musicgen_ui.audio.load import read
from musicgen_ui.errors import RequestError

def peak_kb():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak_kb()
try:
    print(read(sys.argv[1]).clip.samples.shape)
except RequestError as error:
    print(error)
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print((max(peak_kb(), child) - before) / 1000)
"""


def growth_mb(path):
    """How much more than at its start the reading process, or its child, takes at its peak."""
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    print(child.stdout)  # what was read, should this fail
    return float(child.stdout.split()[-1])


def silent_flac(path, seconds, rate, channels):
    with soundfile.SoundFile(path, "w", rate, channels, "PCM_16") as file:
        block = np.zeros((rate * 10, channels), np.int16)
        for _ in range(seconds // 10):
            file.write(block)
    return path


@pytest.mark.parametrize(
    ("seconds", "rate", "channels"), [(1800, 44_100, 2), (130, 192_000, 8), (130, 384_000, 2)]
)
def test_a_small_file_of_much_silence_stays_small_in_memory(tmp_path, seconds, rate, channels):
    path = silent_flac(tmp_path / "a.flac", seconds, rate, channels)
    assert growth_mb(path) < 300


def test_an_mp4_whose_tables_claim_gigabytes_is_stopped(tmp_path):
    path = encode(tmp_path / "a.m4a", "aac", 20, movflags="faststart")
    content, many = bytearray(path.read_bytes()), 40_000_000
    size_at, chunk_at, time_at = (content.index(box) for box in (b"stsz", b"stsc", b"stts"))
    content[size_at + 8 : size_at + 16] = struct.pack(">II", 1, many)
    content[chunk_at + 8 : chunk_at + 24] = struct.pack(">IIII", 1, 1, many, 1)
    content[time_at + 12 : time_at + 16] = struct.pack(">I", many)
    path.write_bytes(content)
    assert growth_mb(path) < 300


def test_a_long_recording_stays_small_in_memory(tmp_path):
    path = encode(tmp_path / "a.mka", "pcm_s16le", seconds=150)
    assert growth_mb(path) < 300
    assert read(path).clip.duration_s == 120


# files that were joined, and headers that lie


def encoded(hz, seconds=3, kind="MP3", rate=44_100, channels=1):
    file = io.BytesIO()
    soundfile.write(file, tone(seconds, rate, channels, hz), rate, format=kind)
    return file.getvalue()


@pytest.fixture
def unfenced(monkeypatch):
    """FFmpeg in this process, since another one takes most of a second to start."""

    def read_end(path, keep_s, whole=False):
        reader = functools.partial(decode._with_av, whole=whole)
        return decode._read_end(reader, path, keep_s)

    monkeypatch.setattr(decode, "_read_end_fenced", read_end)


def pitch_at_the_end(clip):
    """The strongest frequency of the last half second, in Hz."""
    spectrum = np.abs(np.fft.rfft(clip.samples[0, -clip.sampling_rate // 2 :]))
    return np.argmax(spectrum) * 2


@pytest.mark.parametrize(
    ("kind", "second"),
    [("MP3", {}), ("MP3", {"rate": 48_000, "channels": 2}), ("OGG", {}), ("FLAC", {})],
    ids=["MP3", "MP3 in another format", "Ogg", "FLAC"],
)
def test_a_joined_file_is_read_to_its_end(tmp_path, kind, second, unfenced):
    """A continuation starts where the second one ends."""
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(440, 12, kind) + encoded(880, 3, kind, **second))
    reading = read(path, keep_s=5)
    assert reading.full_s == pytest.approx(15, abs=0.1)
    assert reading.clip.samples.shape == (1, 5 * 44_100)
    assert pitch_at_the_end(reading.clip) == 880
    assert np.abs(reading.clip.samples).max() < 0.5


@pytest.mark.parametrize("kind", ["MP3", "OGG", "FLAC"])
def test_a_file_that_was_joined_to_itself_is_read_to_its_end(tmp_path, kind, unfenced):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(440, 4, kind) * 3)
    reading = read(path, keep_s=5)
    assert reading.full_s == pytest.approx(12, abs=0.2) and not reading.notes[1:]


@pytest.mark.parametrize("ending", ["wav", "aiff", "ogg", "m4a"])
def test_what_follows_in_a_joined_file_and_cannot_be_read_is_told(tmp_path, ending, unfenced):
    path = tmp_path / f"a.{ending}"
    if ending == "m4a":
        both = encode(path, "aac").read_bytes() * 2
    else:
        both = encoded(440, 6, ending.upper()) + encoded(880, 3, ending.upper(), channels=2)
    path.write_bytes(both)
    reading = read(path)
    assert reading.full_s == pytest.approx(6, abs=0.1)
    assert len(reading.notes) == 1 and "6.0 s" in reading.notes[0]


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_wav_whose_header_says_too_little_is_read_to_its_end(tmp_path, share):
    """As of a recorder that lost its power."""
    content = bytearray(encoded(440, 3, "WAV"))
    at = content.index(b"data") + 4
    held = len(content) - at - 4
    content[at : at + 4] = struct.pack("<I", round(held * share))
    (tmp_path / "a.wav").write_bytes(content)
    reading = read(tmp_path / "a.wav")
    assert (reading.full_s, reading.notes) == (3, ())


@pytest.mark.parametrize(
    ("kind", "tag"),
    [
        ("MP3", b"TAG" + bytes(125)),
        ("MP3", b"APETAGEX" + bytes(range(256)) * 200),
        ("WAV", b"LIST" + struct.pack("<I", 40_000) + b"INFO" + bytes(39_996)),
    ],
)
def test_a_tag_after_the_music_is_no_music(tmp_path, kind, tag, unfenced):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(440, 3, kind) + tag)
    reading = read(path)
    assert (reading.full_s, reading.notes) == (3, ())


@pytest.mark.parametrize("size", [0x7FFF_FFFF, 0x7FFF_F000, 0xFFFF_FFF0])
def test_sizes_that_mean_unknown_are_no_cut(tmp_path, size):
    content = bytearray(encoded(440, 3, "WAV"))
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(content)
    assert read(tmp_path / "a.wav").notes == ()


def test_channels_of_opposite_phase_are_heard_in_mono(tmp_path):
    samples = tone(1, 16_000, 2) * [1, -0.98]
    reading = read(write(tmp_path / "a.wav", samples, 16_000))
    assert len(reading.notes) == 1 and "phase" in reading.notes[0]
    mono = convert(reading.clip, 16_000, 1).samples[0]
    np.testing.assert_allclose(mono, tone(1, 16_000)[:, 0], atol=1e-4)
