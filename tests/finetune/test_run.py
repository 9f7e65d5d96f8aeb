"""A run on tiny checkpoints: it learns, pauses, resumes, and its adapter is peft's."""

from __future__ import annotations

import json
import re
import resource
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from musicgen_ui.checkpoints import registry
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.lora import CONFIG_FILE, WEIGHTS_FILE
from musicgen_ui.errors import RequestError
from musicgen_ui.finetune import estimate, progress, run
from musicgen_ui.finetune.examples import Encoder, Examples
from musicgen_ui.finetune.options import Options, Preset
from musicgen_ui.finetune.progress import Event, Kind
from musicgen_ui.finetune.train import STATE, DivergedError, Schedule, Trainer
from musicgen_ui.request import GenerationRequest
from tests.helpers import songs
from tests.helpers.engine import ROCK, make_batch, run_job
from tests.helpers.lora import load_model, merged

SIZES = Preset(0, 2, 2, 4, 6)


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return songs.write(tmp_path_factory.mktemp("music"), 3)


@pytest.fixture(autouse=True)
def without_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "sample", lambda *args: Path("sample.wav"))


def options(music: Path, folder: Path, base: Path, **changes) -> Options:
    made = Options((music,), folder, str(base), "zvara", SIZES, 1e-2, save_every=100, device="cpu")
    return replace(made, **changes)


def go(chosen: Options, pause_at: int = 0) -> tuple[bool, list[Event]]:
    """Whether it is done, and its events; paused after a step."""
    events: list[Event] = []
    pause = threading.Event()

    def report(event: Event) -> None:
        events.append(event)
        if event.kind is Kind.STEP and event.step == pause_at:
            pause.set()

    return run.run(chosen, report, pause, False), events


def weights(chosen: Options) -> bytes:
    return (chosen.adapter / WEIGHTS_FILE).read_bytes()


def examples(base: Path, music: Path, folder: Path) -> tuple[object, Examples]:
    loaded = registry.load(registry.resolve(str(base)), torch.float32, lambda note: None)
    encoder = Encoder(loaded, torch.device("cpu"), folder)
    paths = sorted(music.glob("*.wav"))
    made = encoder.examples(paths, "", 2.0, lambda event: None, threading.Event())
    return loaded.model.decoder, made


@pytest.mark.parametrize("kind", ["mono", "stereo", "melody", "style"])
def test_loss_falls_on_every_kind_of_checkpoint(request, music, tmp_path, kind):
    base = request.getfixturevalue(f"tiny_{kind}")
    decoder, made = examples(base, music, tmp_path)
    ways = 2 if kind in ("melody", "style") else 1  # with the piece's own, and without
    assert all(len(piece.states) == ways for piece in made.pieces)
    trainer = Trainer(decoder, made, Schedule(12, len(made.pieces), 2e-2), 8)
    losses = [trainer.update() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.3, losses


def test_resumed_run_equals_an_uninterrupted_one(tiny_mono, music, tmp_path):
    whole = options(music, tmp_path / "whole", tiny_mono)
    parts = options(music, tmp_path / "parts", tiny_mono)
    assert go(whole)[0]
    done, events = go(parts, pause_at=2)
    assert not done and events[-1].sentence == "Paused at step 2: the same command goes on."
    shutil.copy(parts.adapter / WEIGHTS_FILE, tmp_path / "paused")
    done, events = go(parts)
    assert done and events[-1].kind is Kind.DONE
    assert weights(whole) == weights(parts) != (tmp_path / "paused").read_bytes()
    logged, _ = progress.read(parts.folder)
    assert [step for step, _ in progress.curve(logged)] == [1, 2, 3, 4, 5, 6]


def test_second_run_computes_nothing_again(tiny_mono, music, tmp_path, monkeypatch):
    chosen = options(music, tmp_path / "run", tiny_mono)
    go(chosen, pause_at=1)

    def refuse(*args: object) -> None:
        raise AssertionError("encoded twice")

    monkeypatch.setattr(Encoder, "_encode", refuse)
    monkeypatch.setattr("musicgen_ui.engine.conditioning.Conditioner._encode", refuse)
    assert go(chosen)[0]


def test_state_that_finds_no_room_is_an_error_of_the_disk(tiny_mono, music, tmp_path):
    chosen = options(music, tmp_path / "run", tiny_mono)
    go(chosen, pause_at=1)
    decoder, made = examples(tiny_mono, music, tmp_path)
    trainer = Trainer(decoder, made, Schedule(6, 2, 1e-2), 4)
    trainer.resume(chosen.folder)
    before = (chosen.folder / STATE).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes
    try:
        with pytest.raises(OSError, match="File too large"):
            trainer.save_state(chosen.folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (chosen.folder / STATE).read_bytes() == before
    assert not [path for path in chosen.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["mono", "stereo", "melody"])
def test_adapter_is_pefts_and_the_apps(request, music, tmp_path, kind):
    """The trained decoder's logits equal peft's; the engine's greedy codes peft's merged ones."""
    base = request.getfixturevalue(f"tiny_{kind}")
    chosen = options(music, tmp_path / "run", base)
    go(chosen)
    decoder, made = examples(base, music, tmp_path)
    trainer = Trainer(decoder, made, Schedule(6, 2, 1e-2), 4)
    assert trainer.resume(chosen.folder)
    decoder.eval()
    by_peft = peft.PeftModel.from_pretrained(load_model(base), chosen.adapter).eval()
    columns = torch.randint(0, 64, (1, decoder.config.num_codebooks, 20))
    with torch.no_grad():
        own = trainer.logits(columns, [made.pieces[0].states[0]])
        trainer.decoder = by_peft.base_model.model.decoder
        theirs = trainer.logits(columns, [made.pieces[0].states[0]])
        trainer.decoder = load_model(base).decoder
        before = trainer.logits(columns, [made.pieces[0].states[0]])
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(own, before, atol=1e-2)
    if kind == "melody":
        return
    greedy = GenerationRequest(prompt=ROCK, duration_s=0.5, do_sample=False, guidance_scale=1)
    scheduler = make_batch(base)
    scheduler.adapters.add("trained", chosen.adapter)
    found = run_job(scheduler, replace(greedy, adapter="trained"))[1]
    folder = tmp_path / "merged"
    shutil.copytree(base, folder)
    merged(base, chosen.adapter).save_pretrained(folder)
    assert torch.equal(found, run_job(make_batch(folder), greedy)[1])


def test_adapter_says_what_it_is(tiny_mono, music, tmp_path):
    chosen = options(music, tmp_path / "run", tiny_mono)
    go(chosen)
    config = json.loads((chosen.adapter / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(tiny_mono)
    card = (chosen.adapter / "README.md").read_text()
    assert "rank 4" in card and "“zvara”" in card and "caption: 3" in card and "6 steps" in card


def test_nan_stops_and_keeps_the_last_good_adapter(tiny_mono, music, tmp_path, monkeypatch):
    chosen = options(music, tmp_path / "run", tiny_mono, save_every=2)
    summed = Trainer.summed_loss

    def poisoned(trainer: Trainer, *args):
        loss = summed(trainer, *args)
        return loss * float("nan") if trainer.step == 3 else loss

    monkeypatch.setattr(Trainer, "summed_loss", poisoned)
    with pytest.raises(DivergedError, match=r"NaN or infinite at step 4: .* of step 2 is kept"):
        go(chosen)
    monkeypatch.undo()
    last = progress.read(chosen.folder)[0][-1]
    assert last.kind is Kind.FAILED and "--learning-rate" in last.sentence
    scheduler = make_batch(tiny_mono)
    scheduler.adapters.add("kept", chosen.adapter)  # refuses NaN


def test_unreadable_songs_are_named_and_left_out(tiny_mono, tmp_path):
    folder = songs.write(tmp_path / "music", 2)
    (folder / "broken.wav").write_bytes(b"RIFF, or not")
    (folder / "empty.mp3").write_bytes(b"")
    done, events = go(options(folder, tmp_path / "run", tiny_mono))
    notes = [event.sentence for event in events if event.kind is Kind.NOTE]
    assert done and len(notes) == 2
    assert all(any(note.startswith(name) for note in notes) for name in ("broken", "empty"))
    for song in folder.glob("0*.wav"):
        song.unlink()
    with pytest.raises(RequestError, match="None of the audio files can be used"):
        go(options(folder, tmp_path / "other", tiny_mono))


def test_folder_of_another_run_is_refused(tiny_mono, tiny_stereo, music, tmp_path):
    go(options(music, tmp_path / "run", tiny_mono), pause_at=1)
    with pytest.raises(RequestError, match=r"trains .*tiny-mono with rank 4"):
        go(options(music, tmp_path / "run", tiny_stereo))


def test_too_little_memory_is_refused_before_training(tiny_mono, music, tmp_path):
    chosen = options(music, tmp_path / "run", tiny_mono, preset=replace(SIZES, memory_gb=0.01))
    with pytest.raises(RequestError, match=r"needs about .* and 10 MB may be used: choose shorter"):
        go(chosen)


def test_plan_takes_fewer_rows_then_checkpointing():
    memory = estimate.Memory(fixed_bytes=100, row_bytes=80, checkpointed_bytes=8)
    plans = {limit: estimate.plan(memory, 4, limit, "it") for limit in (500, 300, 200, 140, 110)}
    assert [(p.rows, p.checkpointing) for p in plans.values()] == [
        (4, False), (2, False), (1, False), (4, True), (1, True),
    ]  # fmt: skip


def test_rows_and_checkpointing_change_no_gradient(tiny_mono, music, tmp_path):
    decoder, made = examples(tiny_mono, music, tmp_path)
    trainer = Trainer(decoder, made, Schedule(4, 4, 1e-2), 4)
    decoder.config.dropout = 0.0
    for module in decoder.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    gradients = []
    for rows, checkpointing in ((4, False), (1, False), (2, True)):
        trainer.rows = rows
        if checkpointing:
            trainer.use_checkpointing()
        trainer.optimizer.zero_grad()
        trainer.accumulate(trainer.batch(0), 0)
        gradients.append([layer.b.grad.clone() for layer in trainer.adapter.layers.values()])
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=1e-3, atol=1e-6)


def test_every_example_is_seen_once_an_epoch(tiny_mono, music, tmp_path):
    decoder, made = examples(tiny_mono, music, tmp_path)
    trainer = Trainer(decoder, made, Schedule(10, 2, 1e-2), 2)
    count = len(made.pieces)
    seen = [id(example) for step in range(count) for example in trainer.batch(step)]
    for epoch in range(2):
        assert len(set(seen[epoch * count : (epoch + 1) * count])) == count


def test_loss_is_transformers_on_the_same_codes(tiny_mono, music, tmp_path):
    """Cross-entropy over the delay pattern, as its own forward pass computes it from labels."""
    decoder, made = examples(tiny_mono, music, tmp_path)
    example = made.pieces[0]
    trainer = Trainer(decoder, made, Schedule(4, 1, 1e-2), 2)
    decoder.eval()
    loss = trainer.summed_loss([example], [example.states[0]]) / example.codes.numel()
    books, frames = example.codes.shape
    start = decoder.config.pad_token_id
    pattern = torch.full((books, frames + books), start)
    for k in range(books):
        pattern[k, 1 + k : 1 + k + frames] = example.codes[k]
    labels = pattern[:, 1:].T[None]
    reference = load_model(tiny_mono).decoder
    inputs = pattern[:, :-1]
    found = reference(
        input_ids=inputs, encoder_hidden_states=example.states[0][None], labels=labels
    )
    torch.testing.assert_close(loss, found.loss, rtol=1e-4, atol=1e-4)


def test_sample_is_a_take_of_the_engine(tiny_mono, music, tmp_path, monkeypatch):
    chosen = options(music, tmp_path / "run", tiny_mono)
    go(chosen)
    monkeypatch.undo()
    monkeypatch.setattr(run, "SAMPLE_S", 0.5)
    source = registry.resolve(str(tiny_mono))
    file = run.sample(source, chosen.adapter, ROCK, chosen, "step-000006")
    assert file.parent == chosen.folder / "samples" and file.stat().st_size > 1000
    with pytest.raises(RequestError):
        run.sample(source, tmp_path / "nothing", ROCK, chosen, "x")


def test_estimate_says_time_and_memory_and_trains_nothing(tiny_mono, music, tmp_path):
    chosen = options(music, tmp_path / "run", tiny_mono)
    events: list[Event] = []
    assert run.run(chosen, events.append, threading.Event(), True)
    assert re.search(r"6 steps of .* s: about .* min, .* of memory", events[-1].sentence)
    assert events[-1].kind is Kind.ESTIMATE and not chosen.adapter.exists()
    assert devices.free_bytes() > 0


def test_progress_file_skips_a_half_written_line(tmp_path):
    report = progress.ProgressFile(tmp_path)
    report(Event(Kind.STEP, step=1, steps=3, loss=2.5))
    with (tmp_path / progress.FILE).open("a") as file:
        file.write('{"kind": "st')
    events, offset = progress.read(tmp_path)
    assert [event.step for event in events] == [1]
    with (tmp_path / progress.FILE).open("a") as file:
        file.write('ep", "step": 2, "loss": 2.0}\n')
    assert [event.step for event in progress.read(tmp_path, offset)[0]] == [2]
