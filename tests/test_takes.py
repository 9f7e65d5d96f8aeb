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

from musicgen_ui import retake, sidecar, takes
from musicgen_ui.audio import clip, waveform
from musicgen_ui.audio.clip import Clip
from musicgen_ui.audio.export import Shape
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from musicgen_ui.take_settings import TakeSettings
from tests.helpers.takes import HOP, RATE, finished, with_codes


def save(folder, **settings):
    return takes.save(finished(**settings), folder)


def test_the_type_of_settings_names_the_fields_and_the_results():
    assert TakeSettings.__required_keys__ == set(GenerationRequest().settings())
    assert TakeSettings.__optional_keys__ == set(takes.RESULTS)


def test_a_take_is_two_16_bit_files_with_the_same_samples(tmp_path):
    take = save(tmp_path, prompt="warm lo-fi", channels=2)
    for path, kind in ((take.wav, "WAV"), (take.flac, "FLAC")):
        info = soundfile.info(path)
        assert (info.format, info.subtype) == (kind, "PCM_16")
        assert (info.samplerate, info.channels, info.frames) == (RATE, 2, RATE)
    wav, flac = (soundfile.read(path, dtype="int16")[0] for path in (take.wav, take.flac))
    assert np.array_equal(wav, flac)
    np.testing.assert_allclose(wav.T / 32768, take.clip.samples, atol=0.6 / 32768)
    assert {path.suffix for path in tmp_path.iterdir()} == {".wav", ".flac", ".safetensors"}
    assert {path.stem for path in tmp_path.iterdir()} == {take.wav.stem}


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


@pytest.mark.parametrize("ending", clip.ENDINGS)
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
    assert len(list(tmp_path.glob("cafe-*"))) == 3


def test_a_file_says_that_a_melody_was_followed(tmp_path):
    melody = Clip(np.full((1, 3 * RATE), 0.1, np.float32), RATE)
    take = save(tmp_path, melody=melody)
    assert takes.read_settings(take.wav)["melody_s"] == 3
    assert takes.read_settings(save(tmp_path).wav)["melody_s"] == 0


def test_a_file_says_which_excerpt_of_a_clip_gave_the_style(tmp_path):
    style = Clip(np.full((1, 6 * RATE), 0.1, np.float32), RATE)
    take = save(tmp_path, style=style, style_start_s=2.5, style_codebooks=1, text_guidance=4.0)
    read = takes.read_settings(take.wav)
    assert (read["style_s"], read["style_start_s"], read["style_length_s"]) == (6, 2.5, 3)
    assert (read["style_codebooks"], read["text_guidance"]) == (1, 4)
    assert takes.read_settings(save(tmp_path).wav)["style_s"] == 0


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
    assert max(len(file.name.encode()) for file in tmp_path.iterdir()) <= 255
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
    assert len(list(tmp_path.iterdir())) == 3 * 24


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


def test_peaks_beyond_the_ceiling_are_limited_and_said(tmp_path):
    take = save(tmp_path, level=2.0)
    assert take.notes[1].startswith("Peaks were limited by up to ")
    assert np.abs(take.clip.samples).max() <= 10 ** (-1 / 20) * 1.01
    assert save(tmp_path, level=0.5).notes == ("A note.",)


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "written to")]
)
@pytest.mark.parametrize("fails_at", [1, 2, 3])
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


# codes, and takes that are made from others


def made(folder, at=0, **settings):
    """A saved take with codes, and what is read back of it."""
    take = takes.save(with_codes(finished(**settings)), folder)
    return take, takes.load(take.wav)


@pytest.mark.parametrize("ending", ["wav", "flac"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_take_read_back_has_its_codes_at_their_level(tmp_path, ending, normalize):
    whole = with_codes(finished(level=0.05, normalize=normalize))
    take = takes.save(whole, tmp_path)
    kept = takes.load(getattr(take, ending))
    assert np.array_equal(kept.clip.codes, whole.codes)
    assert (kept.clip.codec, kept.frame_samples) == ("bundled/codec", HOP)
    np.testing.assert_allclose(kept.clip.samples, whole.clip.samples, atol=1 / 32768)
    assert kept.settings == take.settings


def test_a_take_that_goes_on_keeps_the_codes_of_what_it_goes_on_from(tmp_path):
    _, kept = made(tmp_path)
    request = GenerationRequest.parse(
        {"prompt": "more", "seed": 8, "checkpoint": "bundled", "audio_prompt": kept.clip}
    )
    longer = with_codes(finished(seconds=1.5, prompt_s=1.0, seed=8), context_frames=20)
    codes = np.concatenate([kept.clip.codes[:, -20:], longer.codes[:, 20:]], axis=1)
    after = dataclasses.replace(
        longer,
        clip=dataclasses.replace(longer.clip, codes=codes),
        codes=codes,
        request=dataclasses.replace(request, seed=8, checkpoint="bundled"),
    )
    both = takes.load(takes.save(after, tmp_path).wav)
    assert both.clip.codes.shape[1] == 50 + 25
    assert np.array_equal(both.clip.codes[:, :50], kept.clip.codes)
    assert both.settings["parent"] == kept.settings["id"]
    assert both.settings["operation"] == "continue" and both.settings["parent_at_s"] == 1.0
    assert both.settings["context_used_s"] == 0.4  # 20 frames of 50 a second


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b"no sidecar"),
    ],
)
def test_a_take_without_a_whole_sidecar_is_still_a_take(tmp_path, spoil):
    take, whole = made(tmp_path)
    spoil(sidecar.beside(take.wav))
    kept = takes.load(take.wav)
    assert kept.clip.codes is None and kept.settings == whole.settings
    assert np.array_equal(kept.clip.samples, whole.clip.samples)


def test_codes_of_another_sound_are_not_taken(tmp_path):
    take, _ = made(tmp_path)
    other = save(tmp_path, level=0.2)
    sidecar.beside(take.wav).replace(sidecar.beside(other.wav))
    assert takes.load(other.wav).clip.codes is None
    with pytest.raises(RequestError, match="not a take"):
        takes.load(sidecar.beside(other.wav))


def test_a_take_of_frames_that_do_not_fit_has_no_codes(tmp_path):
    odd = with_codes(finished(seconds=1.001))
    assert takes.load(takes.save(odd, tmp_path).wav).clip.codes is None


@pytest.mark.parametrize("at_s", [0.0, 0.333, 0.4])
def test_a_retake_begins_with_the_same_samples_and_codes(tmp_path, at_s):
    _, kept = made(tmp_path, prompt="jazz", sections=[[0.2, "drums"], [0.7, "bass"]], duration_s=1)
    derived = retake.retake(kept, at_s, seed=9)
    request, prompt = derived.request, derived.request.audio_prompt
    before = prompt.samples.shape[1]
    assert before % HOP == 0 and at_s * RATE + HOP <= before < at_s * RATE + 3 * HOP
    assert np.array_equal(prompt.samples, kept.clip.samples[:, :before])
    assert np.array_equal(prompt.codes, kept.clip.codes[:, : before // HOP])
    assert request.include_prompt and request.seed == 9 and request.prompt == "jazz"
    assert before + round(request.duration_s * RATE) == kept.clip.samples.shape[1]
    assert request.words(0.7 - before / RATE).endswith("bass")
    assert request.words(0.0).endswith("drums" if before / RATE >= 0.2 else "jazz")
    assert derived.origin == takes.Origin(kept.settings["id"], takes.Operation.RETAKE, at_s)


@pytest.mark.parametrize("at_s", [-0.1, 0.6, 5.0])
def test_a_retake_outside_the_take_is_refused(tmp_path, at_s):
    _, kept = made(tmp_path)
    with pytest.raises(RequestError, match=r"from the start to 0\.46 s"):
        retake.retake(kept, at_s)


def test_a_take_is_extended_by_its_settings(tmp_path):
    _, kept = made(tmp_path, prompt="jazz", temperature=0.7, seed=5, tempo_bpm=90)
    request = retake.extend(kept, 4.0).request
    assert (request.prompt, request.temperature, request.seed) == ("jazz", 0.7, 5)
    assert request.duration_s == 4 and request.audio_prompt is kept.clip


def test_a_trimmed_take_keeps_its_codes_and_settings(tmp_path):
    _, kept = made(tmp_path, prompt="jazz")
    cut = takes.load(retake.trim(kept, 0.2, 0.609, tmp_path).wav)
    assert np.array_equal(cut.clip.samples, kept.clip.samples[:, 10 * HOP : 30 * HOP])
    assert np.array_equal(cut.clip.codes, kept.clip.codes[:, 10:30])
    assert cut.settings["prompt"] == "jazz" and cut.settings["made_s"] == 0.4
    assert cut.settings["operation"] == "trim" and cut.settings["parent"] == kept.settings["id"]
    with pytest.raises(RequestError, match="no stretch"):
        retake.trim(kept, 0.5, 0.5, tmp_path)


def test_the_engine_keeps_a_retakes_beginning_to_the_sample(tiny_mono, tmp_path):
    from tests.helpers.engine import make_batch, run_job

    batch = make_batch(tiny_mono)
    request = GenerationRequest("80s rock", duration_s=1.2, seed=1)
    first = takes.save(run_job(batch, request)[2], tmp_path)
    kept, at_s = takes.load(first.wav), 0.4
    derived = retake.retake(kept, at_s, seed=2)
    again = takes.save(run_job(batch, derived.request)[2], tmp_path, origin=derived.origin)
    old, new = (soundfile.read(path, dtype="int16")[0] for path in (first.wav, again.wav))
    same = round(at_s * 32_000)
    assert len(old) == len(new) and np.array_equal(old[:same], new[:same])
    assert np.abs(old[same + 2000 :] - new[same + 2000 :].astype(int)).max() > 100
    assert again.settings["operation"] == "retake" and again.settings["seed"] == 2


# shapes, peaks and loudness


@pytest.mark.parametrize("ending", clip.ENDINGS)
def test_a_loop_is_written_in_every_kind_of_file(tmp_path, ending):
    take = finished(seconds=5, prompt_s=0.5, tempo_bpm=120, seed=3)
    takes.write(take, tmp_path / f"a{ending}", Shape(loop_bars=2))
    info = soundfile.info(tmp_path / f"a{ending}")
    assert info.frames == 4 * info.samplerate
    held = takes.read_settings(tmp_path / f"a{ending}")
    assert (held["loop_bars"], held["made_s"], held["prompt_s"], held["seed"]) == (2, 4, 0, 3)
    assert (b"smpl" in (tmp_path / f"a{ending}").read_bytes()) is (ending == ".wav")


def test_a_shaped_take_keeps_no_codes_and_one_that_is_too_short_all(tmp_path):
    faded = takes.save(with_codes(finished()), tmp_path, shape=Shape(fade_out_s=0.5))
    assert takes.load(faded.wav).clip.codes is None and faded.settings["fade_out_s"] == 0.5
    assert abs(soundfile.read(faded.flac)[0][-1]) == 0
    short = takes.save(with_codes(finished(tempo_bpm=120)), tmp_path, shape=Shape(loop_bars=1))
    assert short.notes[1].startswith("The take was kept whole. 1 bar at 120 bpm takes 2.0 s")
    assert short.settings["made_s"] == 1 and "loop_bars" not in short.settings
    assert takes.load(short.wav).clip.codes is not None


@pytest.mark.parametrize("ending", clip.ENDINGS)
def test_a_kept_take_is_exported_with_settings_and_title(tmp_path, ending):
    take = save(tmp_path, prompt="jazz", seconds=2.5, tempo_bpm=120, time_signature="3/4")
    for shape, length_s in ((Shape(), 2.5), (Shape(loop_bars=1), 1.5), (Shape(fade_out_s=1), 2.5)):
        path = tmp_path / f"out{ending}"
        path.write_bytes(takes.export_file(take.wav, ending, shape, "Café nights"))
        held = takes.read_settings(path)
        assert held["prompt"] == "jazz" and held["made_s"] == length_s
        with soundfile.SoundFile(path) as file:
            assert file.frames == length_s * file.samplerate
            assert file.title == ("Cafe nights" if ending == ".mp3" else "Café nights")


def test_a_waveform_has_the_extremes_of_every_stretch_at_every_zoom():
    stereo = finished(seconds=10, channels=2, level=0.9).clip
    levels = waveform.levels(stereo)
    assert list(levels) == [256, 1024, 4096]
    for size, points in levels.items():
        assert points.dtype == np.int8 and len(points) == -(-stereo.samples.shape[1] // size)
        for index in (0, len(points) // 2, len(points) - 1):
            stretch = stereo.samples[:, index * size : (index + 1) * size]
            expected = stretch.min() * 127, stretch.max() * 127
            np.testing.assert_allclose(points[index], expected, atol=0.51)


def test_a_take_keeps_its_waveform_and_loudness(tmp_path):
    take = save(tmp_path, seconds=2.0)
    data = sidecar.read(sidecar.beside(take.wav))
    assert data.lufs == pytest.approx(clip.loudness_lufs(take.clip), abs=0.01)
    expected = waveform.levels(take.clip)
    assert all(np.array_equal(data.waveform[size], expected[size]) for size in expected)
    glance = sidecar.read(sidecar.beside(take.wav), whole=False)
    assert list(glance.waveform) == [max(expected)] and glance.codes is None
