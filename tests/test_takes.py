import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile

from musicgen_ui import takes
from musicgen_ui.audio import clip
from musicgen_ui.audio.clip import Clip
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers.takes import RATE, finished


def save(folder, **settings):
    return takes.save(finished(**settings), folder)


def test_a_take_is_two_16_bit_files_with_the_same_samples(tmp_path):
    take = save(tmp_path, prompt="warm lo-fi", channels=2)
    for path, kind in ((take.wav, "WAV"), (take.flac, "FLAC")):
        info = soundfile.info(path)
        assert (info.format, info.subtype) == (kind, "PCM_16")
        assert (info.samplerate, info.channels, info.frames) == (RATE, 2, RATE)
    wav, flac = (soundfile.read(path, dtype="int16")[0] for path in (take.wav, take.flac))
    assert np.array_equal(wav, flac)
    np.testing.assert_allclose(wav.T / 32768, take.clip.samples, atol=0.6 / 32768)
    assert {path.name for path in tmp_path.iterdir()} == {take.wav.name, take.flac.name}


def test_both_files_give_the_settings_back(tmp_path):
    prompt = 'Café “曲”\n\t\\ " ' + "ü" * 1900
    take = save(tmp_path, prompt=prompt, negative_prompt="曲" * 2000, prompt_s=0.25, stereo=True)
    assert take.settings["prompt"] == prompt
    for path in (take.wav, take.flac):
        assert takes.read_settings(path) == take.settings
    assert GenerationRequest.parse({k: take.settings[k] for k in finished().request.settings()})
    assert json.loads(json.dumps(take.settings)) == take.settings
    assert take.settings["made_s"] == 0.75
    assert take.settings["speed_x"] == 1.23


@pytest.mark.parametrize("ending", [".wav", ".flac", ".mp3", ".ogg"])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_kind_of_file_gives_the_settings_back(ending, channels, tmp_path):
    words = {"prompt": "Café 曲 🎹" + "ü" * 1900, "negative_prompt": "曲" * 2000}
    sections = [[start, "ж" * 1000] for start in range(6)]
    take = finished(channels=channels, duration_s=10, sections=sections, **words)
    notes = takes.write(take, tmp_path / f"take{ending}")
    (file,) = tmp_path.iterdir()
    assert notes == ("A note.",)
    held = takes.read_settings(file)
    assert GenerationRequest.parse({k: held[k] for k in take.request.settings()}) == take.request
    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    assert rate == RATE and samples.shape == (RATE, channels)


def test_minutes_of_music_fit_into_an_ogg_file():
    """libsndfile's Vorbis crashes where it is handed them at once."""
    silence = Clip(np.zeros((1, 200 * RATE), np.float32), RATE)
    content = clip.encode(silence, ".ogg")
    assert soundfile.info(io.BytesIO(content)).duration == 200


def test_a_lossy_file_sounds_as_the_take(tmp_path):
    tune = np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE)[None].astype(np.float32) / 4
    for name in ("a.mp3", "a.ogg"):
        clip.write(Clip(tune, RATE), tmp_path / name)
        heard = soundfile.read(tmp_path / name, dtype="float32")[0]
        assert np.abs(heard - tune[0])[800:-800].max() < 0.02


def test_a_rate_that_a_kind_of_file_lacks_is_said(tmp_path):
    strange = dataclasses.replace(finished(), clip=Clip(np.zeros((1, 9000), np.float32), 9_001))
    with pytest.raises(RequestError, match="MP3"):
        takes.write(strange, tmp_path / "a.mp3")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_umask_leaves(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        take = save(tmp_path / "takes")
        takes.write(finished(), tmp_path / "one.wav")
    finally:
        os.umask(before)
    files = (take.wav, take.flac, tmp_path / "one.wav")
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


LOCALE = r"""
import sys
from pathlib import Path
from tests.helpers.takes import finished
from musicgen_ui import files, takes
from musicgen_ui.audio import load
from musicgen_ui.cli import generate
assert sys.getfilesystemencoding() == "ascii"
prompt = generate._as_typed(sys.argv[1])
assert prompt == "caf\u00e9 \u66f2", ascii(prompt)
take = takes.save(finished(prompt=prompt), Path(sys.argv[2]))
assert takes.read_settings(take.wav)["prompt"] == takes.read_settings(take.flac)["prompt"] == prompt
assert load.read(files.expanded(sys.argv[2] + "/caf\u00e9.wav")).full_s == 1
"""


@pytest.mark.skipif(os.name == "nt", reason="names on Windows are Unicode everywhere")
def test_no_take_is_lost_where_the_locale_is_not_utf_8(tmp_path):
    """Names keep what can be written of them, the settings keep all."""
    takes.write(finished(), tmp_path / "café.wav")
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", LOCALE, "café 曲", str(tmp_path)]
    environment = os.environ | locale
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("cafe-*"))) == 2


def test_a_file_says_that_a_melody_was_followed(tmp_path):
    melody = Clip(np.full((1, 3 * RATE), 0.1, np.float32), RATE)
    take = save(tmp_path, melody=melody)
    assert takes.read_settings(take.wav)["melody_s"] == 3
    assert takes.read_settings(save(tmp_path).wav)["melody_s"] == 0


def test_settings_are_read_whatever_the_file_is_called(tmp_path):
    take = save(tmp_path)
    assert takes.read_settings(take.flac.rename(tmp_path / "upload")) == take.settings


def test_players_see_title_and_software(tmp_path):
    take = save(tmp_path, prompt="80s pop\nwith drums")
    for path in (take.wav, take.flac):
        with soundfile.SoundFile(path) as file:
            assert file.title == "80s pop with drums"
            assert file.software.startswith("MusicGen UI")


GOOD = {"seed": 7, "duration_s": 4.0}


@pytest.mark.parametrize(
    "comment",
    [
        "",
        "a comment",
        "[" * 100_000,
        "null",
        "[]",
        '"MusicGen UI settings"',
        '{"MusicGen UI settings": null}',
        '{"MusicGen UI settings": [1]}',
        '{"another program": {"seed": 7}}',
        json.dumps({takes.MARK: {"seed": -5}}),
        json.dumps({takes.MARK: {"seed": "x"}}),
        json.dumps({takes.MARK: {"prompt": 3}}),
        json.dumps({takes.MARK: {"duration_s": float("nan")}}),
    ],
)
def test_nonsense_gives_no_settings(tmp_path, comment):
    path = tmp_path / "a.flac"
    clip.write(finished().clip, path, {"comment": comment})
    assert takes.read_settings(path) is None


def test_what_is_no_take_gives_no_settings(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    for name in ("a.txt", "missing.wav", "."):
        assert takes.read_settings(tmp_path / name) is None


def test_unknown_keys_and_wrong_results_are_dropped(tmp_path):
    found = GOOD | {"evil": 1, "audio_prompt": "x", "speed_x": "fast", "stopped": 1, "made_s": True}
    path = tmp_path / "a.flac"
    clip.write(finished().clip, path, {"comment": json.dumps({takes.MARK: found})})
    assert takes.read_settings(path) == GenerationRequest.parse(GOOD).settings()


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("80s pop, with Bassy drums!", "80s-pop-with-bassy-drums-bundled-seed-7"),
        ("", "untitled-bundled-seed-7"),
        ("../../etc/passwd", "etc-passwd-bundled-seed-7"),
        ("C:\\con\\..\\nul", "c-con-nul-bundled-seed-7"),
        ("a\tb\nc\x00\x1b[31md", "a-b-c-31md-bundled-seed-7"),
        (".hidden", "hidden-bundled-seed-7"),
        ("--help", "help-bundled-seed-7"),
        ("café", "café-bundled-seed-7"),
        ("cafe\u0301", "café-bundled-seed-7"),
        ("ﬁne ２０", "fine-20-bundled-seed-7"),
        ("静かなピアノ", "静かなピアノ-bundled-seed-7"),
        ("🎸🔥", "untitled-bundled-seed-7"),
    ],
)
def test_names_come_from_the_prompt_and_are_safe(tmp_path, prompt, name):
    take = save(tmp_path, prompt=prompt)
    assert (take.wav.name, take.flac.name) == (f"{name}.wav", f"{name}.flac")
    assert take.wav.parent == tmp_path


@pytest.mark.parametrize("prompt", ["word " * 400, "x" * 2000, "曲" * 2000])
def test_names_stay_short(tmp_path, prompt):
    take = save(tmp_path, prompt=prompt, checkpoint="/a/b\\" + "曲" * 400)
    assert len(take.wav.name.encode()) <= 255
    assert len(take.wav.name) < 110
    assert take.wav.name.endswith("-seed-7.wav")


def test_a_hub_id_or_folder_is_named_by_its_last_part(tmp_path):
    assert "-musicgen-small-seed" in save(tmp_path, checkpoint="facebook/musicgen-small").wav.name
    assert "-mine-seed" in save(tmp_path, checkpoint="/home/me/mine/").wav.name


def test_the_same_request_never_overwrites_even_at_once(tmp_path):
    made = []

    def work():
        made.extend(save(tmp_path, seconds=0.1) for _ in range(4))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({take.wav for take in made}) == len({take.flac for take in made}) == 24
    assert all(take.wav.stem == take.flac.stem for take in made)
    assert len(list(tmp_path.iterdir())) == 48


def test_loudness_is_kept_unless_asked_for(tmp_path):
    quiet = save(tmp_path, level=0.01)
    assert np.abs(soundfile.read(quiet.wav)[0]).max() == pytest.approx(0.01, abs=1e-4)
    assert quiet.notes == ("A note.",)
    even = save(tmp_path, level=0.01, normalize=True, seconds=3)
    for path in (even.wav, even.flac):
        samples, rate = soundfile.read(path)
        assert pyloudnorm.Meter(rate).integrated_loudness(samples) == pytest.approx(-14, abs=0.1)
    assert "-14.0 LUFS" in even.notes[1]


def test_loudness_that_peaks_forbid_is_said(tmp_path):
    made = finished(normalize=True, seconds=3)
    made.clip.samples[:] = 0
    made.clip.samples[0, ::4000] = 0.5
    take = takes.save(made, tmp_path)
    assert "peaks" in take.notes[1]
    made.clip.samples[:] = 0
    assert "silent" in takes.save(made, tmp_path).notes[1]


def test_clipped_samples_are_said(tmp_path):
    take = save(tmp_path, level=2.0)
    beyond = int((np.abs(finished(level=2.0).clip.samples) > 1).sum())
    assert take.notes[1] == f"{beyond:,} samples were beyond full scale and clipped."
    assert np.abs(take.clip.samples).max() == 1


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "written to")]
)
@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch, code, words, fails_at):
    calls = []
    to_the_disk = os.fsync

    def fsync(handle):
        calls.append(handle)
        if len(calls) == fails_at:
            raise OSError(code, "no")
        to_the_disk(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RequestError, match=words) as caught:
        save(tmp_path)
    assert isinstance(caught.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_refused_and_a_missing_one_is_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="could not be saved"):
        save(tmp_path / "file")
    assert save(tmp_path / "new" / "folder").wav.exists()


def test_a_comment_of_megabytes_and_a_file_of_empty_chunks_are_passed_over(tmp_path):
    whole = save(tmp_path).wav.read_bytes()
    path = tmp_path / "hostile.wav"
    comment = b"ICMT" + (8_000_000).to_bytes(4, "little") + b"[" * 8_000_000
    info = b"LIST" + (len(comment) + 4).to_bytes(4, "little") + b"INFO" + comment
    for hostile in (whole[:12] + info, whole[:12] + bytes(20_000_000), whole[:12] + b"LIST"):
        path.write_bytes(hostile)
        assert takes.read_settings(path) is None
    path.write_bytes(whole[:12] + b"junk\x03\0\0\0abc\0" + whole[12:])  # odd sizes are padded
    assert takes.read_settings(path) is not None
