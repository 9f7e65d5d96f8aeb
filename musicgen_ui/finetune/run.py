"""A run from start to end: load, encode, estimate, train, save, sample.

The folder of a run holds `adapter/` (as it was last saved), `adapters/` (as it was at each sample),
`samples/`, `state.pt` to resume from, `run.json` (what it trains), `cache/` and `progress.jsonl`.
The same command goes on with a run that was paused or killed.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path

import torch

from musicgen_ui import files, heap, takes
from musicgen_ui.checkpoints import memory as checkpoint_memory
from musicgen_ui.checkpoints import registry
from musicgen_ui.checkpoints.registry import Source
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.protocol import Failed, Finished
from musicgen_ui.engine.transformer import LanguageModel
from musicgen_ui.errors import RequestError
from musicgen_ui.finetune import dataset, estimate
from musicgen_ui.finetune.adapter import Card
from musicgen_ui.finetune.estimate import Plan
from musicgen_ui.finetune.examples import Encoder, Examples, PausedError
from musicgen_ui.finetune.options import SAMPLE_S, Options
from musicgen_ui.finetune.progress import Event, Kind, ProgressFile, Report
from musicgen_ui.finetune.train import DivergedError, Schedule, Trainer
from musicgen_ui.request import GenerationRequest, completed

RUN_FILE = "run.json"


def run(options: Options, report: Report, pause: threading.Event, only_estimate: bool) -> bool:
    """Trains until the steps are done, or `pause` is set; True if they are done.

    Args:
        options: the run.
        report: is called with every event, which also goes into the run's progress file.
        pause: ends the run after the step under way; the same options go on with it.
        only_estimate: ends it before the first step.

    Raises:
        RequestError: the run cannot be made, or its loss became NaN; nothing saved is lost.
    """
    try:
        written = ProgressFile(options.folder)
    except OSError as error:
        raise RequestError(f"{options.folder} cannot be a folder: {error.strerror}.") from error

    def both(event: Event) -> None:
        written(event)
        report(event)

    try:
        return _Run(options, both, pause).make(only_estimate)
    except PausedError:
        both(Event(Kind.PAUSED, "Paused before the first step: the same command goes on."))
        return False
    except RequestError as error:
        written(Event(Kind.FAILED, str(error)))
        raise
    except OSError as error:
        raise RequestError(f"{options.folder} cannot be written to: {error.strerror}.") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        sentence = (
            "The memory ran out: choose a preset for less memory, shorter pieces or a smaller "
            "checkpoint. The same command goes on from what was saved."
        )
        written(Event(Kind.FAILED, sentence))
        raise RequestError(sentence) from error


class _Run:
    def __init__(self, options: Options, report: Report, pause: threading.Event) -> None:
        self.options, self.report, self.pause = options, report, pause
        self.place = devices.choose(options.device)
        self.device = torch.device(self.place.device)
        self.source = registry.resolve(options.checkpoint, device=self.device.type)
        self._step_s = 0.0  # of the steps so far, smoothed

    def make(self, only_estimate: bool) -> bool:
        options, preset = self.options, self.options.preset
        paths = dataset.find(options.sources)
        self._require_same_run()
        self._require_loadable()
        decoder, examples = self._prepared(paths)
        schedule = Schedule(preset.steps, preset.batch, options.learning_rate, options.seed)
        trainer = Trainer(decoder, examples, schedule, preset.rank)
        resumed = trainer.resume(options.folder)
        plan = self._plan(trainer)
        if only_estimate:
            return True
        if resumed:
            sentence = f"Going on from step {trainer.step}."
            self.report(Event(Kind.NOTE, sentence, trainer.step, preset.steps))
        return self._train(trainer, plan)

    def _require_same_run(self) -> None:
        """Requires that the folder's run trains the same adapter."""
        file = self.options.folder / RUN_FILE
        mine = {"checkpoint": self.source.name, "rank": self.options.preset.rank}
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            there = mine
        except (OSError, ValueError) as error:
            raise RequestError(f"{file} cannot be read: name another folder after -o.") from error
        if there != mine:
            raise RequestError(
                f"{self.options.folder} holds a run that trains {there.get('checkpoint')} with "
                f"rank {there.get('rank')}: name another folder after -o."
            )
        files.replace(file, json.dumps(mine).encode())

    def _require_loadable(self) -> None:
        config = registry.config_of(self.source)
        needed = 4 * checkpoint_memory.count_parameters(config)
        free = devices.free_bytes()
        if needed > free:
            words = map(checkpoint_memory.size_in_words, (needed, free))
            raise RequestError(
                f"Training {self.source.name} needs {next(words)} of main memory to load it, and "
                f"{next(words)} is free: choose a smaller checkpoint.",
                "checkpoint",
            )

    def _prepared(self, paths: list[Path]) -> tuple[LanguageModel, Examples]:
        """The decoder on its device, and the examples."""
        options = self.options

        def say(sentence: str) -> None:
            self.report(Event(Kind.PREPARING, sentence[:1].upper() + sentence[1:]))

        say(f"loading {self.source.name}")
        registry.fetch(self.source, say)
        heap.keep_large_blocks_out()
        loaded = registry.load(self.source, torch.float32, say)
        decoder = loaded.model.decoder
        encoder = Encoder(loaded, self.device, options.folder / "cache", self.place.codec_device)
        piece_s = min(options.preset.piece_s, loaded.window_s)
        examples = encoder.examples(
            paths, options.activation_word, piece_s, self.report, self.pause
        )
        half = self.device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        module: torch.nn.Module = decoder
        module.to(self.device, torch.bfloat16 if half else torch.float32)
        return decoder, examples

    def _plan(self, trainer: Trainer) -> Plan:
        """Fits a step to the memory and says what the run will take."""
        devices.give_memory_back()
        preset, examples = self.options.preset, trainer.examples
        available = estimate.available_bytes(self.device, preset.memory_gb)
        plan = estimate.plan(estimate.measure(trainer), preset.batch, available, self.source.name)
        trainer.rows = plan.rows
        if plan.checkpointing:
            trainer.use_checkpointing()
        self._step_s = estimate.step_s(trainer)
        left_s = (preset.steps - trainer.step) * self._step_s
        written = sum(not song.suggested for song in examples.songs)
        sentence = (
            f"{len(examples.songs)} songs in {len(examples.pieces)} pieces, {written} captions "
            f"written and {len(examples.songs) - written} suggested. "
            f"{preset.steps - trainer.step} steps of {self._step_s:.2g} s: about "
            f"{duration_in_words(left_s)}, samples aside; about "
            f"{checkpoint_memory.size_in_words(plan.memory_bytes)} of memory."
        )
        self.report(Event(Kind.ESTIMATE, sentence, trainer.step, preset.steps, left_s=left_s))
        return plan

    def _train(self, trainer: Trainer, plan: Plan) -> bool:
        steps, options = self.options.preset.steps, self.options
        saved = trainer.step
        while trainer.step < steps and not self.pause.is_set():
            started_s = time.monotonic()
            try:
                loss = trainer.update()
            except DivergedError as error:
                kept = f"the adapter of step {saved} is kept in {options.adapter}"
                raise DivergedError(
                    f"{error}: {kept if saved else 'nothing was saved yet'}. Run the same command "
                    "with a lower --learning-rate."
                ) from error
            self._step_s += 0.1 * (time.monotonic() - started_s - self._step_s)
            left_s = (steps - trainer.step) * self._step_s
            self.report(Event(Kind.STEP, "", trainer.step, steps, loss, left_s))
            is_sample = options.sample_every and trainer.step % options.sample_every == 0
            if is_sample or trainer.step % options.save_every == 0 or trainer.step == steps:
                self._save(trainer)
                saved = trainer.step
            if is_sample or trainer.step == steps:
                self._sample(trainer)
        if trainer.step < steps:
            if saved < trainer.step:
                self._save(trainer)
            sentence = f"Paused at step {trainer.step}: the same command goes on."
            self.report(Event(Kind.PAUSED, sentence, trainer.step, steps))
            return False
        sentence = f"Done: use it with --adapter {options.adapter}"
        self.report(Event(Kind.DONE, sentence, steps, steps, file=str(options.adapter)))
        return True

    def _card(self, trainer: Trainer) -> Card:
        count = len(trainer.examples.songs)
        word = self.options.activation_word
        return Card(self.source.name, self.options.preset.rank, count, word, trainer.step)

    def _save(self, trainer: Trainer) -> None:
        options = self.options
        trainer.adapter.save(options.adapter, self._card(trainer))
        trainer.save_state(options.folder)
        file = str(options.adapter)
        self.report(Event(Kind.SAVED, "", trainer.step, options.preset.steps, file=file))

    def _sample(self, trainer: Trainer) -> None:
        """Makes a take with the adapter as it is; one that fails does not end the run."""
        options = self.options
        folder = options.folder / "adapters" / f"{trainer.step:06d}"
        trainer.adapter.save(folder, self._card(trainer))
        prompt = options.sample_prompt or trainer.examples.songs[0].caption
        prompt = dataset.with_word(prompt, options.activation_word)
        try:
            file = sample(self.source, folder, prompt, options, f"step-{trainer.step:06d}")
        except RequestError as error:
            sentence = f"No sample was made at step {trainer.step}: {error}"
            self.report(Event(Kind.NOTE, sentence, trainer.step, options.preset.steps))
            return
        steps = options.preset.steps
        self.report(Event(Kind.SAMPLE, prompt, trainer.step, steps, file=str(file)))


def sample(source: Source, adapter: Path, prompt: str, options: Options, name: str) -> Path:
    """A take of the app's engine with an adapter; its WAV in the run's samples.

    Raises:
        RequestError: it cannot be made or saved.
    """
    from musicgen_ui.backends.local import LocalBackend

    folder = options.folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    values = {"prompt": prompt, "checkpoint": source.name, "adapter": str(adapter)}
    settings: dict[str, object] = {**values, "duration_s": SAMPLE_S, "seed": options.seed}
    with contextlib.closing(LocalBackend(device=options.device)) as backend:
        filled = completed(settings, lambda *names: backend.describe(*names).defaults)
        job = backend.submit(GenerationRequest.parse(filled))
        for event in job.follow():
            if isinstance(event, Failed):
                raise RequestError(str(event.error)) from event.error
            if isinstance(event, Finished):
                return takes.save(event, folder, name).wav
    raise RequestError("It ended without a take.")


def duration_in_words(seconds: float) -> str:
    """ "2 min", "1 h 5 min"."""
    minutes = max(1, round(seconds / 60))
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"
