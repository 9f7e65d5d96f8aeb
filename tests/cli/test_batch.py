"""Many requests from a file: what rows may say, names, going on after a stop, and one sound."""

from __future__ import annotations

import asyncio
import errno
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from musicgen_ui import __main__ as cli
from musicgen_ui import takes
from musicgen_ui.cli import batch as batches
from musicgen_ui.cli import rows
from musicgen_ui.cli.generate import Interruption
from musicgen_ui.request import CLIP_FIELDS, FIELDS
from tests.helpers.fakes import FakeBackend
from tests.helpers.local import wait_for

ROOT = Path(__file__).parents[2]


class FakeManager(FakeBackend):
    """Tones; a prompt with "broken" fails, one with "slow" takes its time."""

    made: FakeManager
    interrupt_at: int | None = None  # the request with which Ctrl+C is pressed

    def __init__(self, device, precision, max_jobs):
        super().__init__(max_jobs=max_jobs)
        FakeManager.made = self
        self.most = 0

    def submit(self, request, client=""):
        if len(self.clients) == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return super().submit(request, client)

    def _compose(self, job):
        if "broken" in job.request.prompt:
            raise RuntimeError("a fault")
        self.speed = 5.0 if "slow" in job.request.prompt else 0.0
        for event in super()._compose(job):
            self.most = max(self.most, self.running)
            yield event

    def describe(self, checkpoint, adapter=""):
        return super().describe("auto")

    def close(self):
        pass


@pytest.fixture
def manager(monkeypatch):
    import musicgen_ui.backends.local

    monkeypatch.setattr(musicgen_ui.backends.local, "LocalBackend", FakeManager)
    monkeypatch.setattr(FakeManager, "interrupt_at", None)
    return FakeManager


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The present folder, with a clip of half a second beside the batches."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    noise = np.random.default_rng(0).normal(0, 0.1, 8000)
    soundfile.write(tmp_path / "sub" / "clip.wav", noise, 16_000)
    soundfile.write(tmp_path / "sub" / "silence.wav", np.zeros(16_000), 16_000)
    return tmp_path


def batch(name: str, text: str, *arguments: str) -> int:
    Path(name).write_text(text, encoding="utf-8")
    return cli.main(["generate", "--batch", name, "-o", "out", *arguments])


def made(folder: Path) -> list[str]:
    """The takes' names without their digests, in order."""
    found = sorted((folder / "out").glob("*.flac"))
    assert all(file.with_suffix(".wav").is_file() for file in found)
    return [file.stem.rpartition("-")[0] for file in found]


# what a file may say


def test_a_text_is_a_prompt_a_line_and_flags_are_the_rest(manager, folder):
    text = "\ufeffslow piano\r\n\n  rock with “drums”, fast  \n"
    assert batch("prompts.txt", text, "--duration", "0.5", "--seed", "3") == 0
    asked = manager.made.requests
    assert [r.prompt for r in asked] == ["slow piano", "rock with “drums”, fast"]
    assert {(r.duration_s, r.seed) for r in asked} == {(0.5, 3)}
    assert made(folder) == ["0001-slow-piano", "0003-rock-with-drums-fast"]


def test_json_rows_may_hold_any_setting(manager, folder):
    row = {name: spec.default for name, spec in FIELDS.items() if name not in CLIP_FIELDS}
    row |= {"prompt": "waltz", "sections": [[0, "piano"], [1, "drums"]], "duration_s": 2, "seed": 4}
    row |= {"top_k": 7, "do_sample": False, "checkpoint": "bundled", "audio_prompt": "clip.wav"}
    lines = [json.dumps(row), '{"seed": null, "prompt": "tango"}']
    assert batch("sub/rows.jsonl", "\n".join(lines), "--temperature", "2", "--duration", "1") == 0
    waltz, tango = sorted(manager.made.requests, key=lambda r: r.prompt, reverse=True)
    del row["audio_prompt"]
    assert waltz.settings() == row | {"automation": []}
    assert (waltz.top_k, waltz.do_sample, waltz.temperature) == (7, False, 1.0)
    assert waltz.audio_prompt.duration_s == 0.5 and tango.audio_prompt is None
    assert waltz.sections == ((0.0, "piano"), (1.0, "drums"))
    assert (tango.temperature, tango.duration_s) == (2.0, 1.0) and tango.seed >= 0


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_csvs_empty_cells_are_the_commands_flags(manager, folder, mark):
    text = "prompt,seed,stereo,audio_prompt\nwaltz,1,yes,clip.wav\ntango,,,\n".replace(",", mark)
    assert batch("sub/rows.csv", text, "--seed", "9", "--duration", "0.5") == 0
    waltz, tango = sorted(manager.made.requests, key=lambda r: r.seed)
    assert (waltz.prompt, waltz.stereo, waltz.audio_prompt.duration_s) == ("waltz", True, 0.5)
    assert (tango.prompt, tango.stereo, tango.audio_prompt) == ("tango", False, None)
    assert made(folder) == ["0002-waltz", "0003-tango"]


def test_a_flags_clip_is_for_every_row_and_starts_at_the_present_folder(manager, folder):
    arguments = ("--audio-prompt", "sub/clip.wav", "--duration", "0.5")
    assert batch("sub/rows.jsonl", '{"prompt": "a"}\n{"audio_prompt": ""}', *arguments) == 0
    assert sorted(bool(r.audio_prompt) for r in manager.made.requests) == [False, True]


def test_a_melody_is_followed_as_far_as_a_single_run_follows_it(manager, folder):
    soundfile.write("sub/tune.wav", np.sin(np.arange(200 * 4_000) / 9) / 5, 4_000)
    row = '{"melody": "tune.wav", "audio_prompt": "tune.wav", "duration_s": 0.5}'
    assert batch("sub/rows.jsonl", row) == 0
    (asked,) = manager.made.requests
    assert (asked.melody.duration_s, asked.audio_prompt.duration_s) == (200, 120)


def test_sections_may_be_a_file_beside_the_batch(manager, folder):
    Path("sub/parts.json").write_text('[[0, "piano"]]')
    assert batch("sub/rows.jsonl", '{"sections": "parts.json", "duration_s": 1}') == 0
    assert manager.made.requests[0].sections == ((0.0, "piano"),)


BAD_ROWS = {
    "no object": "[1, 2]",
    "no JSON": "{prompt: rock}",
    "endless brackets": "[" * 100_000,
    "an unknown setting": '{"lenght_s": 3}',
    "out of range": '{"duration_s": 1e9}',
    "no text": '{"prompt": 5}',
    "no such clip": '{"audio_prompt": "nowhere.wav"}',
    "a clip that is no audio": '{"audio_prompt": "rows.jsonl"}',
    "a clip that is no path": '{"audio_prompt": {"path": "clip.wav"}}',
    "a silent melody": '{"melody": "silence.wav"}',
    "a melody that is not followed": '{"melody": "clip.wav", "checkpoint": "bundled"}',
    "an excerpt that is too long": '{"style": "clip.wav", "style_length_s": 4.6}',
    "a style that is not taken on": '{"style": "clip.wav", "checkpoint": "bundled"}',
    "a null byte": '{"audio_prompt": "clip\\u0000.wav"}',
    "an unknown checkpoint": '{"checkpoint": "nonesuch"}',
    "what fails on the way": '{"prompt": "broken"}',
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_told_with_its_line_and_the_others_run(row, manager, folder, capsys):
    text = f'{{"prompt": "first"}}\n{row}\n{{"prompt": "last"}}'
    assert batch("sub/rows.jsonl", text, "--duration", "0.5", "--quiet") == 1
    assert made(folder) == ["0001-first", "0003-last"]
    told = capsys.readouterr().err
    assert told.startswith("Line 2: ") and told.count("\n") == 1 and "Traceback" not in told


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", b"slow piano\nrock\n"),  # no line of names
        ("rows.csv", b"prompt\n" + b'"' + b"x" * 200_000),
        ("rows.txt", b"\xff\xfe\x00piano"),
        ("rows.txt", b"\n \n"),
        ("rows.jsonl", b""),
        ("none.txt", None),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused_as_a_whole(
    name, content, manager, folder, capsys
):
    if content is not None:
        Path(name).write_bytes(content)
    assert cli.main(["generate", "--batch", name, "-o", "out"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["-o", "a.wav"], ["-o", "-"], ["--jobs", "0"], ["--jobs", "many"]]
)
def test_wrong_arguments_are_refused_before_anything_is_made(arguments, manager, folder):
    assert batch("a.txt", "rock", *arguments) == 2


# names, and going on


def test_variations_and_equal_rows_are_takes_of_their_own(manager, folder):
    assert batch("a.txt", "rock\nrock", "--variations", "2", "--seed", "5") == 0
    files = sorted((folder / "out").glob("*.wav"))
    assert len(files) == 4 and len({file.stem.split("-")[2] for file in files}) == 2
    assert [file.stem[-2:] for file in files] == ["-1", "-2"] * 2
    assert [takes.read_settings(file)["seed"] for file in files] == [5, 6] * 2


def test_finished_rows_are_not_made_again_wherever_they_stand_now(manager, folder, capsys):
    lines = '{"prompt": "first"}\n{"prompt": "second", "audio_prompt": "clip.wav"}\n'
    assert batch("sub/rows.jsonl", lines, "--duration", "1") == 0
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "out").iterdir()}
    more = '{"prompt": "zeroth"}\n' + lines + '{"prompt": "first", "seed": 3}'
    assert batch("sub/rows.jsonl", more, "--duration", "1") == 0
    assert {r.prompt for r in manager.made.requests} == {"zeroth", "first"}
    after = {file.name: file.stat().st_mtime_ns for file in (folder / "out").iterdir()}
    assert before.items() <= after.items() and len(after) == len(before) + 2 * 3
    assert "2 takes made" in (told := capsys.readouterr().err) and "2 takes there already" in told


def test_another_clip_under_the_same_name_is_another_row(manager, folder):
    row = '{"audio_prompt": "clip.wav", "seed": 1, "duration_s": 0.5}'
    assert batch("sub/rows.jsonl", row) == 0
    rows._content.cache_clear()  # as in the next process
    soundfile.write("sub/clip.wav", np.full(8000, 0.1), 16_000)
    assert batch("sub/rows.jsonl", row) == 0
    assert len(made(folder)) == 2


def test_a_take_without_its_flac_is_half_written_and_made_again(manager, folder):
    assert batch("a.txt", "rock", "--duration", "0.5") == 0
    next((folder / "out").glob("*.flac")).unlink()
    (wav,) = (folder / "out").glob("*.wav")
    wav.write_bytes(b"half")
    assert batch("a.txt", "rock", "--duration", "0.5") == 0
    assert soundfile.info(wav).duration == 0.5 and made(folder) == ["0001-rock"]


def test_interrupted_it_keeps_whole_takes_alone_and_the_next_run_makes_the_rest(
    manager, folder, monkeypatch, capsys
):
    text = "one\ntwo\nslow three\nslow four\nfive"
    monkeypatch.setattr(manager, "interrupt_at", 3)
    assert batch("a.txt", text, "--duration", "2", "--jobs", "1") == 130
    assert made(folder) == ["0001-one", "0002-two", "0003-slow-three"]
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(manager, "interrupt_at", None)
    assert batch("a.txt", text, "--duration", "2") == 0
    assert [r.prompt for r in manager.made.requests] == ["slow four", "five"]
    assert {soundfile.info(file).duration for file in (folder / "out").glob("*.wav")} == {2.0}


def test_a_full_disk_ends_the_batch(manager, folder, monkeypatch, capsys):
    def full(*_):
        message = "The take could not be saved because the disk is full."
        raise takes.UnsavedError(message, {}) from OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(takes, "save", full)
    assert batch("a.txt", "\n".join(["rock"] * 50), "--jobs", "2") == 1
    assert len(manager.made.requests) <= 4 and "disk is full" in capsys.readouterr().err


def test_a_take_that_fails_to_be_saved_is_that_rows_alone(manager, folder, monkeypatch, capsys):
    def save(finished, *rest, keep=takes.save):
        if finished.request.prompt == "second":
            raise RuntimeError("an encoder's fault")
        return keep(finished, *rest)

    monkeypatch.setattr(takes, "save", save)
    assert batch("a.txt", "first\nsecond\nthird\nfourth", "--jobs", "1", "--quiet") == 1
    assert made(folder) == ["0001-first", "0003-third", "0004-fourth"]
    assert capsys.readouterr().err.startswith("Line 2: ")


def test_a_clip_that_may_not_be_read_is_that_rows_fault(manager, folder, monkeypatch, capsys):
    def open_(path, *rest, keep=Path.open, **named):
        if path.name == "clip.wav":
            raise PermissionError(errno.EACCES, "Permission denied")
        return keep(path, *rest, **named)

    monkeypatch.setattr(Path, "open", open_)
    rows._content.cache_clear()
    text = '{"audio_prompt": "clip.wav"}\n{"prompt": "second"}'
    assert batch("sub/rows.jsonl", text, "--quiet") == 1
    assert made(folder) == ["0002-second"]
    assert capsys.readouterr().err.startswith("Line 1: ")


def test_jobs_run_beside_each_other_up_to_the_limit(manager, folder, capsys):
    assert batch("a.txt", "slow\n" * 7, "--jobs", "3", "--duration", "0.5") == 0
    assert manager.made.most == 3 == manager.made.max_jobs
    told = capsys.readouterr()
    assert "7 takes made, 3.5 s of music" in told.err and "100%" in told.err
    files = [line.split()[0] for line in told.out.splitlines()]
    assert len(files) == 7 and all(Path(file).is_file() for file in files)


def test_the_docs_lines_run(manager, folder):
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    write, make = text.split("## A file of prompts\n\n```bash\n")[1].split("\n```")[0].split("\n")
    subprocess.run(write, shell=True, check=True)
    assert cli.main(shlex.split(make)[3:]) == 0
    assert sorted(r.duration_s for r in manager.made.requests) == [4.0, 8.0]
    assert len(list((folder / "batch").glob("*.wav"))) == 2


# one sound


@pytest.mark.parametrize("stereo", [False, True])
def test_rows_sound_as_single_runs_do(stereo, tiny_mono, tiny_stereo, folder):
    """Prompts, lengths, clips and ways to choose of all kinds, packed, against one at a time."""
    checkpoint = str(tiny_stereo if stereo else tiny_mono)
    asked = [
        {"prompt": "slow piano", "duration_s": 1.0, "do_sample": False},
        {"prompt": "80s rock with drums and bass, the bright fast techno", "duration_s": 0.5},
        {"prompt": "", "duration_s": 0.8, "audio_prompt": "clip.wav", "do_sample": False},
        {"prompt": "a", "duration_s": 0.6, "audio_prompt": "long.wav", "top_k": 5},
        {"prompt": "drums", "duration_s": 1.2, "guidance_scale": 1, "negative_prompt": "bass"},
    ]
    if stereo:  # what its clips add
        asked = asked[2:4]
    noise = np.random.default_rng(1).normal(0, 0.1, (70_000, 2))
    soundfile.write("sub/long.wav", noise, 48_000)
    text = "\n".join(json.dumps({**row, "seed": 7}) for row in asked)
    common = ["--checkpoint", checkpoint, "--device", "cpu", "--precision", "float32", "--quiet"]
    assert batch("sub/rows.jsonl", text, *common) == 0
    for line, file in enumerate(sorted((folder / "out").glob("*.wav"))):
        row = dict(asked[line])
        arguments = [row.pop("prompt"), "--seed", "7", "-o", "one.wav", *common]
        if not row.pop("do_sample", True):
            arguments.append("--no-do-sample")
        for name, value in row.items():
            flag = "--" + name.removesuffix("_s").replace("_", "-")
            arguments += [flag, f"sub/{value}" if name == "audio_prompt" else str(value)]
        assert cli.main(["generate", *arguments]) == 0
        alone, beside = soundfile.read("one.wav")[0], soundfile.read(file)[0]
        assert alone.shape == beside.shape and alone.any()
        assert np.abs(alone - beside).max() <= 2 / 32768, line  # the last bit's rounding


def test_reading_rows_loads_no_torch(folder):
    """A wrong batch is refused at once."""
    code = (
        "import sys; from musicgen_ui.__main__ import main; from pathlib import Path\n"
        "assert main(['generate', '--batch', 'none.txt']) == 2\n"
        "assert not {'torch', 'transformers', 'gradio'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_batch_that_fails_to_save_leaves_no_stream_open(folder, manager):
    """Each stream is closed where the batch ends early, so that no model works on for nobody."""
    tally = batches.Tally(quiet=True)
    engine = FakeManager("cpu", "auto", 2)
    pieces = rows.Pieces({"duration_s": 1}, Path()).of(rows.Row(1, {"prompt": "slow"}))
    maker = batches.Batch(folder / "sub" / "clip.wav", Interruption(), tally)
    asyncio.run(maker.make(engine, pieces * 4, 2))
    wait_for(lambda: engine.running == 0)
    assert len(engine.requests) <= 3 and tally.failed
