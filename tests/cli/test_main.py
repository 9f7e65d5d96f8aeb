"""The command line: flags made from the request, exit codes, files, Ctrl+C."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from musicgen_ui import __main__ as cli
from musicgen_ui import takes
from musicgen_ui.cli import generate
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CLIP_FIELDS, FIELDS, GenerationRequest
from musicgen_ui.steering import Steering
from tests.helpers.fakes import FakeBackend
from tests.helpers.jobs import made
from tests.helpers.takes import finished, with_codes

ROOT = Path(__file__).parents[2]


class FakeManager:
    """A `LocalBackend` for the command line that plays tones and keeps what it was asked."""

    asked: list[GenerationRequest]
    interrupt_after: int | None = None
    failure: Exception | None = None

    def __init__(self, **options):
        FakeManager.options = options

    def submit(self, request, client=""):
        FakeManager.asked.append(request)
        interrupted = FakeManager.interrupt_after is not None
        backend = FakeBackend(failure=FakeManager.failure, speed=20.0 if interrupted else 0.0)
        job = backend.submit(dataclasses.replace(request, checkpoint="auto"))
        follow = job.follow

        def interrupting():
            for count, event in enumerate(follow()):
                if count == FakeManager.interrupt_after:
                    signal.raise_signal(signal.SIGINT)
                yield event

        job.follow = interrupting
        FakeManager.job = job
        return job

    def describe(self, checkpoint, adapter=""):
        return FakeBackend().describe("auto")

    def close(self):
        FakeManager.options["closed"] = True


@pytest.fixture
def manager(monkeypatch):
    import musicgen_ui.backends.local

    monkeypatch.setattr(musicgen_ui.backends.local, "LocalBackend", FakeManager)
    monkeypatch.setattr(FakeManager, "asked", [], raising=False)
    return FakeManager


def example(name: str) -> tuple[list[str], object]:
    """Another value than the default for a field: as arguments and as the request holds it."""
    spec = FIELDS[name]
    if isinstance(spec.default, bool):
        return [
            generate.flag(name).replace("--", "--no-" if spec.default else "--")
        ], not spec.default
    if name == "checkpoint":
        return ["--checkpoint", "bundled"], "bundled"
    if name == "key":
        return ["--key", "c minor"], "C minor"
    if name == "sections":
        return ["--sections", '[[0, "piano"], [0.5, "drums"]]'], ((0.0, "piano"), (0.5, "drums"))
    if name == "automation":
        return ["--automation", '[[1, {"top_k": 5}]]'], ((1.0, Steering(top_k=5)),)
    if name in ("chords", "time_signature"):
        value = {"chords": "C G", "time_signature": "3/4"}[name]
        return [generate.flag(name), value], value
    if isinstance(spec.default, str):
        return [generate.flag(name), "slow piano"], "slow piano"
    value = spec.metadata["max"] if name == "top_p" else spec.metadata["min"] + 2
    return [generate.flag(name), str(value)], value


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in (*CLIP_FIELDS, "prompt", "keep")])
def test_every_field_is_a_flag_of_its_name_without_the_unit(name, manager, monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "check_checkpoint", lambda request: None)
    arguments, value = example(name)
    short = ["--duration", "1"] if name != "duration_s" else []
    assert cli.main(["generate", *short, *arguments, "-o", str(tmp_path / "out.wav")]) == 0
    assert getattr(manager.asked[0], name) == value
    assert "_s" not in generate.flag("duration_s") and generate.flag("top_k") == "--top-k"


def test_the_prompt_and_a_clip_reach_the_engine_and_notes_the_file(manager, tmp_path, capsys):
    clip = tmp_path / "clip.flac"  # named wrongly, which is said
    soundfile.write(clip, np.zeros((8000, 1)), 16_000, format="WAV")
    out = tmp_path / "out.wav"
    assert cli.main(["generate", "rock", "--audio-prompt", str(clip), "-o", str(out)]) == 0
    request = manager.asked[0]
    assert request.prompt == "rock" and request.audio_prompt.duration_s == 0.5
    told = capsys.readouterr()
    assert "named .flac but holds WAV" in told.err and str(out) in told.out
    assert "real time" in told.out


def test_the_ending_chooses_the_format_and_variations_are_numbered(manager, tmp_path):
    out = tmp_path / "deep" / "out.flac"
    arguments = ["generate", "--variations", "3", "--seed", "5", "--duration", "1"]
    assert cli.main([*arguments, "-o", str(out)]) == 0
    files = sorted(out.parent.iterdir())
    assert [file.name for file in files] == ["out-1.flac", "out-2.flac", "out-3.flac"]
    assert [takes.read_settings(file)["seed"] for file in files] == [5, 6, 7]
    assert {soundfile.info(file).format for file in files} == {"FLAC"}
    assert soundfile.info(files[0]).duration == 1.0


@pytest.mark.parametrize("kind", ["wav", "opus"])
def test_loop_bars_makes_a_loop_of_whole_bars(kind, manager, tmp_path):
    out = tmp_path / f"out.{kind}"
    arguments = ["generate", "--tempo", "120", "--loop-bars", "2", "-o", str(out)]
    assert cli.main(arguments) == 0
    assert manager.asked[0].duration_s == 4.1
    assert soundfile.info(out).duration == 4 and takes.read_settings(out)["loop_bars"] == 2
    assert (b"smpl" in out.read_bytes()) is (kind == "wav")
    assert cli.main([*arguments, "--duration", "3"]) == 2
    assert cli.main([*arguments, "--fade-out", "1"]) == 2
    assert len(manager.asked) == 1


def test_fade_out_ends_a_take_in_silence(manager, tmp_path):
    arguments = ["generate", "--duration", "2", "--fade-out", "1", "-o", str(tmp_path)]
    assert cli.main(arguments) == 0
    (wav,) = tmp_path.glob("*.wav")
    samples = soundfile.read(wav)[0]
    assert abs(samples[-1]) == 0 and np.abs(samples[-200:]).max() < np.abs(samples).max() / 50


def test_a_kept_take_goes_on_with_its_codes(manager, tmp_path):
    take = takes.save(with_codes(finished()), tmp_path)
    assert cli.main(["generate", "--audio-prompt", str(take.wav), "-o", str(tmp_path)]) == 0
    assert manager.asked[0].audio_prompt.codes.shape == (4, 50)


def test_a_folder_gets_named_takes_as_wav_and_flac(manager, tmp_path, capsys):
    assert cli.main(["generate", "warm bass", "--seed", "3", "-o", str(tmp_path / "new")]) == 0
    names = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert names == [f"warm-bass-fake-seed-3.{kind}" for kind in ("flac", "safetensors", "wav")]
    told = capsys.readouterr().out
    assert all(str(tmp_path / "new" / name) in told for name in names[::2])


WRONG = {
    "a value out of range": ["--duration", "999"],
    "no number": ["--top-k", "many"],
    "an unknown flag": ["--loudness", "3"],
    "an abbreviated flag": ["--dur", "3"],
    "an unknown checkpoint": ["--checkpoint", "nonesuch"],
    "a folder that is no checkpoint": ["--checkpoint", "/"],
    "stereo without a sibling": ["--checkpoint", "{mono}", "--stereo"],
    "no such clip": ["--audio-prompt", "nowhere.wav"],
    "a clip that is no audio": ["--audio-prompt", __file__],
    "another format": ["-o", "out.aac"],
    "several takes to standard output": ["-o", "-", "--variations", "2"],
    "a folder under a file": ["-o", f"{__file__}/out.wav"],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_one_sentence_and_code_2(
    arguments, manager, tiny_mono, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(mono=tiny_mono) for argument in arguments]
    assert cli.main(["generate", "rock", *arguments]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and told.err.rstrip().endswith((".", ")."))
    assert not told.out and not manager.asked


def test_a_wrong_request_is_refused_before_torch_is_imported():
    """In a process of its own, since this one has torch."""
    code = (
        "import sys; from musicgen_ui.__main__ import main\n"
        "codes = [main(['generate', *a]) for a in (['--duration', '999'], "
        "['--checkpoint', 'nonesuch'], ['--audio-prompt', 'none.wav'], ['-o', 'a.aac'])]\n"
        "assert codes == [2] * 4, codes\n"
        "heavy = {'torch', 'transformers', 'gradio'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["sing"], ["serve", "--port", "x"]])
def test_wrong_commands_and_settings_are_one_sentence_too(arguments, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_interrupted_it_keeps_what_was_made(manager, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(manager, "interrupt_after", 10)
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "out.wav"
    assert cli.main(["generate", "--duration", "20", "-o", str(out)]) == 130
    assert 0 < soundfile.info(out).duration < 20
    assert takes.read_settings(out)["stopped"] is True
    assert "what was made so far is kept" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before and manager.options["closed"]


def test_interrupted_before_the_first_sound_it_leaves_no_file(
    manager, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(manager, "interrupt_after", 0)
    assert cli.main(["generate", "-o", str(tmp_path / "out.wav")]) == 130
    assert not list(tmp_path.iterdir())
    assert "nothing to keep" in capsys.readouterr().err


def test_a_second_interrupt_ends_it_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt), generate.stop_on_interrupt() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.pressed
        signal.raise_signal(signal.SIGINT)


def test_what_fails_on_the_way_is_a_sentence_and_code_1(manager, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(manager, "failure", RequestError("The memory of this machine is full."))
    assert cli.main(["generate", "-o", str(tmp_path / "out.wav")]) == 1
    assert capsys.readouterr().err.endswith("The memory of this machine is full.\n")
    monkeypatch.setattr(manager, "failure", RequestError("No such thing.", "checkpoint"))
    assert cli.main(["generate", "-o", str(tmp_path / "out.wav")]) == 2


def test_quiet_prints_the_files_alone(manager, tmp_path, capsys):
    arguments = ["generate", "cut here", "-o", str(tmp_path / "out.wav")]
    assert cli.main(arguments) == 0
    loud = capsys.readouterr()
    assert "100%" in loud.err and "The prompt was cut after “cut”." in loud.err
    assert cli.main([*arguments, "--quiet"]) == 0
    told = capsys.readouterr()
    assert told.err == "" and told.out.startswith(str(tmp_path / "out.wav"))


def test_a_seed_gives_the_same_take_as_on_the_page(tiny_mono, tmp_path):
    from musicgen_ui.backends.local import LocalBackend

    out = tmp_path / "out.wav"
    arguments = ["rock", "--duration", "0.5", "--seed", "7", "--checkpoint", str(tiny_mono)]
    assert cli.main(["generate", *arguments, "--device", "cpu", "-o", str(out)]) == 0
    manager = LocalBackend(device="cpu")
    request = GenerationRequest("rock", duration_s=0.5, seed=7, checkpoint=str(tiny_mono))
    *_, finished = made(manager, request)
    manager.close()
    take = takes.save(finished, tmp_path / "page")
    written, shown = soundfile.read(out)[0], soundfile.read(take.wav)[0]
    assert np.array_equal(written, shown) and written.any()


def test_ray_address_without_ray_or_with_a_device_is_refused(monkeypatch, capsys, tmp_path):
    arguments = ["generate", "rock", "--ray-address", "auto", "-o", str(tmp_path)]
    assert cli.main([*arguments, "--device", "cpu"]) == 2
    monkeypatch.setattr(generate, "find_spec", lambda _: None)
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "requirements-ray.txt" in told[1]


def test_serve_takes_the_settings_from_its_flags(monkeypatch):
    from musicgen_ui.server import app

    served = []
    monkeypatch.setattr(app, "run", lambda chosen: served.append(chosen) or 0)
    assert cli.main(["serve", "--port", "18401", "--no-any-checkpoint"]) == 0
    assert served[0].port == 18401 and served[0].any_checkpoint is False


def test_bench_reaches_the_bench(monkeypatch, tmp_path):
    from musicgen_ui.benchmark import run

    ran = []
    monkeypatch.setattr(run, "run", ran.append)
    assert cli.main(["bench", "--checkpoint", "random:tiny", "--jobs", "1,4"]) == 0
    assert ran[0].checkpoint == "random:tiny" and ran[0].jobs == [1, 4]


def test_the_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "musicgen_ui", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and all(name in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0 and f"python -m musicgen_ui {command}" in capsys.readouterr().out


def test_sections_and_automation_come_from_files_too(manager, tmp_path, capsys):
    file, changes = tmp_path / "sections.json", tmp_path / "changes.json"
    file.write_text('[[0, "quiet"], [5, "loud"]]', encoding="utf-8")
    changes.write_text('[[0, {"prompts": [["a", 1], ["b", 3]]}], [2, {"recall": 1}]]')
    out = ["-o", str(tmp_path / "out.wav")]
    tables = ["--sections", str(file), "--automation", str(changes)]
    assert cli.main(["generate", *tables, *out]) == 0
    assert manager.asked[0].sections == ((0.0, "quiet"), (5.0, "loud"))
    mix = Steering(prompts=(("a", 0.25), ("b", 0.75)))
    assert manager.asked[0].automation == ((0.0, mix), (2.0, Steering(recall=1)))
    capsys.readouterr()
    assert cli.main(["generate", "--sections", str(tmp_path / "none.json"), *out]) == 2
    assert "none.json cannot be read as sections" in capsys.readouterr().err


# standard output, and what may be wrong with it


class BrokenFile(io.RawIOBase):
    """A pipe whose reader has gone, or a full disk."""

    def __init__(self, number):
        self.number = number

    def writable(self):
        return True

    def write(self, content):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 141), (errno.ENOSPC, 1)])
@pytest.mark.parametrize("output", ["{}/out.wav", "-"])
@pytest.mark.parametrize("buffered", [True, False])
def test_an_output_that_takes_nothing_ends_with_its_code_and_costs_no_take(
    number, code, output, buffered, manager, tmp_path, monkeypatch
):
    broken = io.BufferedWriter(BrokenFile(number), 1_000_000 if buffered else 1)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(broken, write_through=not buffered))
    monkeypatch.setattr(sys, "stderr", errors := io.StringIO())
    count = "1" if output == "-" else "2"
    arguments = ["--duration", "1", "--variations", count, "-o", output.format(tmp_path)]
    assert cli.main(["generate", *arguments, "--quiet"]) == code
    assert len(list(tmp_path.iterdir())) == (0 if output == "-" else 2)
    assert errors.getvalue().count("\n") == (number != errno.EPIPE)
    with contextlib.suppress(OSError):  # else it raises when it is collected, in another test
        broken.close()


def test_an_output_that_was_closed_before_the_start(manager, tmp_path, monkeypatch):
    """Nobody misses the files' names there, but a WAV that was to go there is lost."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["generate", "--duration", "1", "-o", str(tmp_path / "out.wav")]) == 0
    assert cli.main(["generate", "--duration", "1", "-o", "-"]) == 1
    assert (tmp_path / "out.wav").is_file()


def test_progress_that_nobody_can_read_costs_no_take(manager, tmp_path, monkeypatch):
    broken = io.TextIOWrapper(io.BufferedWriter(BrokenFile(errno.ENOSPC), 1), write_through=True)
    monkeypatch.setattr(sys, "stderr", broken)
    assert cli.main(["generate", "cut here", "-o", str(tmp_path / "out.wav")]) == 0
    assert (tmp_path / "out.wav").is_file()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_terminal_need_not_know_the_prompts_letters(encoding, manager, tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert cli.main(["generate", "静かなピアノ", "-o", str(tmp_path)]) == 0
    told = out.buffer.getvalue().decode(encoding)
    assert told.count("\n") == 2 and (encoding != "utf-8" or "静かなピアノ" in told)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_wav_goes_to_standard_output_alone(manager, capsysbinary):
    assert cli.main(["generate", "rock", "--duration", "1", "--seed", "3", "-o", "-"]) == 0
    told = capsysbinary.readouterr()
    assert soundfile.info(io.BytesIO(told.out)).duration == 1 and b"100%" in told.err


@pytest.mark.parametrize("ending", ["mp3", "ogg"])
def test_lossy_files_are_written_by_their_endings(ending, manager, tmp_path):
    out = tmp_path / f"out.{ending}"
    assert cli.main(["generate", "rock", "--duration", "1", "--seed", "3", "-o", str(out)]) == 0
    assert soundfile.info(out).format == ending.upper()
    assert takes.read_settings(out)["seed"] == 3


def test_generate_stops_its_job_and_closes_when_it_fails(manager, tmp_path, monkeypatch):
    def write(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(takes, "write", write)
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", "-o", str(tmp_path / "out.wav")])
    assert manager.job.ended or manager.job.stopping.is_set()
    assert manager.options["closed"]


def test_a_variation_that_cannot_be_saved_leaves_the_others_alone(
    manager, tmp_path, monkeypatch, capsys
):
    def write(finished, path, shape, keep=takes.write):
        if finished.variation == 0:
            raise takes.UnsavedError("Not this one.", {})
        return keep(finished, path, shape)

    monkeypatch.setattr(takes, "write", write)
    arguments = ["--variations", "3", "--seed", "40", "--quiet"]
    assert cli.main(["generate", *arguments, "-o", str(tmp_path / "out.wav")]) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out-2.wav", "out-3.wav"]
    assert "40" in capsys.readouterr().err  # its seed makes it again


def test_a_user_without_home_and_name_may_name_a_folder(manager, tiny_mono, tmp_path, monkeypatch):
    def nobody(number):
        raise KeyError(number)

    asked = (
        ["generate", "--checkpoint", str(tiny_mono), "-o", str(tmp_path / "out.wav")],
        ["generate", "--checkpoint", "~/none", "-o", str(tmp_path / "a.wav")],
        ["generate", "--audio-prompt", "~nobody/a.wav"],
        ["convert", "~nobody/a", str(tmp_path / "b")],
    )
    with monkeypatch.context() as patch:  # undone before pytest, which needs a home, says anything
        patch.chdir(tmp_path)
        patch.setattr(os, "environ", os.environ.copy())  # where caches are is put into it
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.delenv("HOME")
        patch.setattr(pwd, "getpwuid", nobody)
        codes = [cli.main(arguments) for arguments in asked]
    assert codes == [0, 2, 2, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["out.wav"]


def test_python_without_docstrings_is_refused_in_a_sentence():
    command = [sys.executable, "-OO", "-m", "musicgen_ui", "generate", "rock"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
