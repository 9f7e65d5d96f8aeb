"""Songs and their captions: what is found, suggested and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from musicgen_ui.audio import clip as audio
from musicgen_ui.audio.clip import Clip
from musicgen_ui.errors import RequestError
from musicgen_ui.finetune import dataset, pieces
from musicgen_ui.finetune.pieces import Measures
from tests.helpers import songs


def test_find_takes_folders_and_files_in_order(tmp_path: Path):
    songs.write(tmp_path / "music" / "album", 2)
    (tmp_path / "music" / "notes.pdf").write_bytes(b"x")
    found = dataset.find([tmp_path / "music", tmp_path / "music" / "album" / "01_song.wav"])
    assert [path.name for path in found] == ["01_song.wav", "02_song.wav"]


def test_find_refuses_a_folder_without_audio(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RequestError, match="has no audio files: name a folder with WAV"):
        dataset.find([tmp_path])
    with pytest.raises(RequestError, match="There is no file or folder"):
        dataset.find([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("name", "text", "caption"),
    [
        ("song.txt", " slow\n piano ", "slow piano"),
        ("song.json", json.dumps({"description": "slow piano"}), "slow piano"),
        ("song.json", json.dumps({"genre": "jazz", "moods": ["calm", "late"], "bpm": 90}),
         "jazz, calm, late, 90 bpm"),
        ("other.txt", "slow piano", ""),
    ],
)  # fmt: skip
def test_written_caption_is_beside_the_file(tmp_path: Path, name, text, caption):
    (tmp_path / name).write_text(text)
    assert dataset.written_caption(tmp_path / "song.wav") == caption


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("song.txt", "a" * 5000, "song.txt has 5,000 characters: shorten it to at most 2,000"),
        ("song.json", "{", "song.json cannot be read: save it as a JSON object"),
        ("song.json", "[1]", "song.json cannot be read"),
    ],
)
def test_written_caption_refuses_bad_files(tmp_path: Path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=said):
        dataset.written_caption(tmp_path / "song.wav")


def test_suggested_caption_has_tags_tempo_and_key(tmp_path: Path):
    path = tmp_path / "03 - slow_piano.flac"
    audio.write(songs.tone(1.0), path, {"genre": "Jazz", "artist": "Ann"})
    measures = Measures(96, "C minor")
    caption = dataset.suggested_caption(path, measures)
    assert caption == "Jazz, slow piano, by Ann, 96 bpm, in C minor"


def test_write_captions_leaves_what_is_there(tmp_path: Path):
    folder = songs.write(tmp_path, 2)
    (folder / "02_song.txt").unlink()
    written = list(dataset.write_captions(dataset.find([folder])))
    assert [file.name for file, _ in written] == ["02_song.txt"]
    assert (folder / "01_song.txt").read_text() == "slow piano\n"
    assert "song" in (folder / "02_song.txt").read_text()


def test_the_activation_word_comes_once():
    assert dataset.with_word("slow piano", "zvara") == "zvara, slow piano"
    assert dataset.with_word("slow Zvara piano", "zvara") == "slow Zvara piano"
    assert dataset.with_word("", "zvara") == "zvara"


def test_measure_finds_tempo_and_key():
    scale = [0, 4, 7, 12, 7, 4, 0, 4, 7, 12, 7, 4, 0, 4, 7, 12]
    notes = [songs.tone(0.5, 261.63 * 2 ** (step / 12)).samples for step in scale]
    measures = pieces.measure(Clip(np.concatenate(notes, axis=1), songs.RATE_HZ))
    assert measures.key == "C major"
    assert measures.tempo_bpm in range(115, 126)


def test_measure_says_nothing_of_silence():
    assert pieces.measure(Clip(np.zeros((1, 80_000), np.float32), 16_000)) == Measures()


def test_cut_prefers_silences_then_bars_then_the_length():
    clip = songs.tone(20.0)
    assert pieces.cut(clip, 8.0, ()) == [(0.0, 8.0), (8.0, 16.0), (16.0, 20.0)]
    assert pieces.cut(clip, 8.0, (2.0, 4.0, 6.0, 7.5))[0] == (0.0, 7.5)
    clip.samples[:, round(5.9 * songs.RATE_HZ) : round(6.3 * songs.RATE_HZ)] = 0
    assert pieces.cut(clip, 8.0, (7.5,))[0][1] == pytest.approx(6.1, abs=0.3)


def test_cut_leaves_silence_and_scraps_out():
    samples = songs.tone(17.0).samples.copy()
    samples[:, 8 * songs.RATE_HZ : 16 * songs.RATE_HZ] = 0
    spans = pieces.cut(Clip(samples, songs.RATE_HZ), 8.0, ())
    assert spans[0] == (0.0, 8.0) and all(end <= 8.0 for _, end in spans[:1])
    assert all(samples[:, round(a * 16_000) : round(b * 16_000)].any() for a, b in spans)
