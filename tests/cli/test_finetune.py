"""The command line's `finetune`: flags, refusals, exit codes, signals."""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from musicgen_ui import __main__ as cli
from musicgen_ui.checkpoints.file_checks import read_object
from musicgen_ui.cli import finetune as commands
from musicgen_ui.finetune import progress, run
from musicgen_ui.finetune.options import PRESETS, Options, preset_for
from musicgen_ui.finetune.progress import Event, Kind
from musicgen_ui.finetune.train import DivergedError
from tests.helpers import songs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options of every run, none of which is made."""
    found: list[Options] = []

    def kept(options: Options, *_: object) -> bool:
        found.append(options)
        return True

    monkeypatch.setattr(run, "run", kept)
    return found


def test_flags_become_the_options(asked, tmp_path):
    flags = (
        "--checkpoint bundled --activation-word zvara --preset 8 --steps 7 --rank 4 --piece 5 "
        "--learning-rate 0.001 --save-every 3 --sample-every 0 --seed 5 --device cpu"
    )
    assert cli.main(["finetune", str(tmp_path), "-o", str(tmp_path / "run"), *flags.split()]) == 0
    (made,) = asked
    assert made.folder == tmp_path / "run" and made.sources == (tmp_path,)
    assert (made.preset.steps, made.preset.rank, made.preset.piece_s) == (7, 4, 5)
    assert made.preset.batch == PRESETS["8"].batch and made.preset.memory_gb == 8
    assert (made.save_every, made.sample_every, made.seed) == (3, 0, 5)
    assert (made.activation_word, made.learning_rate, made.checkpoint) == ("zvara", 1e-3, "bundled")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "0"], "--steps: must be 1 to"),
        (["--rank", "many"], "--rank: must be 1 to 512, not “many”"),
        (["--piece", "nan"], "--piece: must be 2 to 30"),
        (["--learning-rate", "1"], "--learning-rate: must be 1e-07 to 0.1"),
        (["--preset", "9"], "--preset"),
        (["--activation-word", "a" * 51], "has 51 characters: use at most 50"),
        (["--device", "abacus"], "There is no device"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(asked, tmp_path, capsys, flags, said):
    assert cli.main(["finetune", str(tmp_path), *flags]) == 2
    assert said in capsys.readouterr().err and not asked


def test_folder_without_audio_is_refused(tmp_path, capsys):
    arguments = ["finetune", str(tmp_path), "-o", str(tmp_path / "run"), "--checkpoint", "bundled"]
    assert cli.main(arguments) == 2
    assert "has no audio files" in capsys.readouterr().err
    assert progress.read(tmp_path / "run")[0][-1].kind is Kind.FAILED


def test_diverged_run_fails(monkeypatch, tmp_path, capsys):
    def diverge(*_: object) -> bool:
        raise DivergedError("The loss became NaN")

    monkeypatch.setattr(run, "run", diverge)
    assert cli.main(["finetune", str(tmp_path)]) == 1
    assert "The loss became NaN" in capsys.readouterr().err


def test_paused_run_exits_as_interrupted(monkeypatch, tmp_path, capsys):
    def paused(options: Options, report: progress.Report, *_: object) -> bool:
        report(Event(Kind.STEP, step=1, steps=3, loss=2.0, left_s=60))
        report(Event(Kind.PAUSED, "Paused at step 1: the same command goes on."))
        return False

    monkeypatch.setattr(run, "run", paused)
    assert cli.main(["finetune", str(tmp_path)]) == 130
    assert "Paused at step 1" in capsys.readouterr().err


def test_write_captions_prints_them(tmp_path, capsys):
    folder = songs.write(tmp_path, 1, 1.0, captions=False)
    assert cli.main(["finetune", str(folder), "--write-captions"]) == 0
    assert "01_song.txt" in capsys.readouterr().out
    assert (folder / "01_song.txt").read_text().startswith("song")


def test_largest_preset_that_fits_is_chosen():
    sizes = (4, 8, 11.5, 15.8, 24, 80)
    assert [preset_for(round(gb * 1e9)) for gb in sizes] == ["8", "8", "12", "16", "24", "24"]


@pytest.fixture
def sigterm_after_two_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Signals this process after every other step; the numbers of the steps."""
    steps: list[int] = []
    show = commands.Display.show

    def showing(display: commands.Display, event: Event) -> None:
        show(display, event)
        if event.kind is Kind.STEP:
            steps.append(event.step)
            if len(steps) % 2 == 0:
                signal.raise_signal(signal.SIGTERM)

    def unheeded(*_: object) -> None:
        raise AssertionError("the command has no handler")

    monkeypatch.setattr(commands.Display, "show", showing)
    before = signal.signal(signal.SIGTERM, unheeded)
    yield steps
    signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM")
def test_sigterm_pauses_and_the_same_command_goes_on(
    sigterm_after_two_steps, tiny_mono, tmp_path, capsys
):
    folder = songs.write(tmp_path / "music", 2)
    flags = "--steps 50 --piece 2 --batch 2 --rank 2 --sample-every 0 --quiet --device cpu"
    command = ["finetune", str(folder), *flags.split()]
    command += ["-o", str(tmp_path / "run"), "--checkpoint", str(tiny_mono)]
    for _ in range(2):
        assert cli.main(command) == 130
        assert "the same command goes on" in capsys.readouterr().err
    assert sigterm_after_two_steps == [1, 2, 3, 4]
    events, _ = progress.read(tmp_path / "run")
    assert any("Going on from step 2" in event.sentence for event in events)
    assert read_object(tmp_path / "run" / "adapter" / "adapter_config.json")["r"] == 2


def test_docs_name_every_flag_and_preset():
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser()
    commands.add_flags(parser)
    flags = [flag for action in parser._actions for flag in action.option_strings[-1:]]
    named = {flag for flag in flags if f"{flag}`" in text or f"{flag} " in text}
    assert set(flags) - named == {"--help"}
    for name, preset in PRESETS.items():
        sizes = f"{preset.batch} | {preset.piece_s:g} s | {preset.rank} | {preset.steps} |"
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(sizes)}$", text, re.MULTILINE), name
