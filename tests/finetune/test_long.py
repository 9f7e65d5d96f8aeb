"""What takes minutes: a style that the bundled model lacks is learned; memory is as estimated."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from musicgen_ui.audio import clip as audio
from musicgen_ui.backends.local import LocalBackend
from musicgen_ui.benchmark.runners import write_random
from musicgen_ui.engine.protocol import Finished
from musicgen_ui.finetune import progress, run
from musicgen_ui.finetune.options import Options, Preset
from musicgen_ui.finetune.progress import Kind
from musicgen_ui.request import GenerationRequest
from tests.helpers import songs
from training.composer import compose
from training.render import SINES, SoundfontRenderer, find_soundfont, to_clip
from training.style_classifier import RATE_HZ, features, fit_judge
from training.styles import STYLES

ROOT = Path(__file__).parents[2]
STYLE, PROMPT = "chiptune", "chiptune, major, fast"
SONGS, TAKES, JUDGE_CLIPS = 30, 12, 16
SONG_S, TAKE_S = 10.5, 8.0
JUDGE_SEED = 900_000_000

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]


def rendered(style: str, seeds: range, seconds: float) -> Iterator[np.ndarray]:
    """int16 [2, samples] at 16 kHz of songs of a style."""
    renderer = SoundfontRenderer(find_soundfont())
    for seed in seeds:
        song = compose(seed, style, seconds)
        yield to_clip(renderer(song, seconds), song.gain, RATE_HZ)


def decoded(styles: Iterable[str], seeds: range) -> Iterator[tuple[str, np.ndarray]]:
    """Songs of styles as the bundled codec gives them back, mono float32 at 16 kHz.

    It colours what it was not trained on, such as `STYLE`: a judge of what was rendered hears
    another style in the same songs from the codec, and so in any take.
    """
    with closing(LocalBackend(device="cpu")) as backend, backend.use("bundled") as scheduler:
        codec = scheduler.codec
        for style in styles:
            for clip in rendered(style, seeds, TAKE_S):
                mono = torch.from_numpy(clip.mean(0, keepdims=True).astype(np.float32) / 32767)
                yield style, np.asarray(codec.decode(codec.encode(mono)))[0]


def takes(adapter: str, prompt: str) -> list[np.ndarray]:
    """Mono float32 at 16 kHz, a seed each."""
    found = []
    with closing(LocalBackend(device="cpu")) as backend:
        defaults = backend.describe("bundled").defaults
        for seed in range(TAKES):
            request = GenerationRequest.parse(
                {**defaults, "prompt": prompt, "checkpoint": "bundled", "adapter": adapter,
                 "duration_s": TAKE_S, "seed": seed}
            )  # fmt: skip
            (take,) = [e for e in backend.submit(request).follow() if isinstance(e, Finished)]
            found.append(audio.convert(take.clip, RATE_HZ, 1).samples[0])
    return found


@pytest.mark.skipif(find_soundfont() == SINES, reason="needs a soundfont")
def test_bundled_model_learns_a_style_that_it_lacks(tmp_path: Path):
    """Share of takes that the classifier hears as the style, before and after."""
    music = tmp_path / "music"
    music.mkdir()
    for i, clip in enumerate(rendered(STYLE, range(5000, 5000 + SONGS), SONG_S)):
        soundfile.write(music / f"{i:02d}.wav", clip.T, RATE_HZ)
        (music / f"{i:02d}.txt").write_text("major, fast")
    seeds = range(JUDGE_SEED, JUDGE_SEED + JUDGE_CLIPS)
    styles, clips = zip(*decoded([*STYLES, STYLE], seeds), strict=True)
    judge = fit_judge(list(clips), list(styles))

    def share(adapter: str) -> float:
        heard = judge.predict(np.stack([features(take) for take in takes(adapter, PROMPT)]))
        return float(np.mean(heard == STYLE))

    sizes = Preset(memory_gb=0, batch=4, piece_s=6, rank=16, steps=200)
    options = Options(
        (music,), tmp_path / "run", "bundled", STYLE, sizes, 1e-3, sample_every=0, device="cpu"
    )
    assert run.run(options, lambda event: None, threading.Event(), False)
    before, after = share(""), share(str(options.adapter))
    losses = [loss for _, loss in progress.curve(progress.read(options.folder)[0])]
    print(f"{STYLE}: {before:.2f} of takes before, {after:.2f} after; loss {losses[0]:.2f} to "
          f"{np.mean(losses[-10:]):.2f}")  # fmt: skip
    assert before <= 0.2 and after >= 0.5


def test_peak_memory_is_as_estimated(tmp_path: Path):
    """musicgen-small's size with random weights, two steps, in a process of its own."""
    write_random(tmp_path / "small", "small")
    songs.write(tmp_path / "music", 2, 10.0)
    flags = "--steps 2 --batch 2 --piece 10 --sample-every 0 --device cpu --quiet"
    command = [sys.executable, "-m", "musicgen_ui", "finetune", str(tmp_path / "music")]
    command += ["--checkpoint", str(tmp_path / "small"), "-o", str(tmp_path / "run")]
    code = "import resource, runpy, sys; sys.argv = sys.argv[1:];"
    code += "from musicgen_ui.finetune import run; run.sample = lambda *a: '';"
    code += "from musicgen_ui.__main__ import main; main(sys.argv[1:]);"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    done = subprocess.run(
        [sys.executable, "-c", code, *command[2:], *flags.split()],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (estimate,) = [e for e in progress.read(tmp_path / "run")[0] if e.kind is Kind.ESTIMATE]
    number, unit = re.search(r"about ([\d.]+) (GB|MB) of memory", estimate.sentence).groups()
    estimated = float(number) * {"GB": 1e9, "MB": 1e6}[unit]
    peak = int(done.stdout.split()[-1])
    print(f"estimated {estimated / 1e9:.2f} GB, at most {peak / 1e9:.2f} GB")
    assert peak <= estimated <= 1.4 * peak
