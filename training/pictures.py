"""What a checkpoint makes, for its card: spectrograms of a take a style on one sheet.

They are takes of the first held-out prompt of each style, the first that the seed gives: nothing is
chosen but the styles.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoProcessor, MusicgenForConditionalGeneration

from musicgen_ui.audio.clip import Clip
from musicgen_ui.audio.spectrogram import mel_db
from training.prompts import PROMPTS

SECONDS = 8.0
COLOURS = 96  # of the file: a third of its size, no difference to the eye


@torch.no_grad()
def takes(checkpoint: Path, styles: list[str], seed: int = 0) -> list[Clip]:
    """A take a style, sampled as the checkpoint says."""
    model = MusicgenForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    steps = round(SECONDS * 50) + model.config.audio_encoder.num_quantizers - 1
    made = []
    for style in styles:
        torch.manual_seed(seed)
        inputs = processor(text=[PROMPTS[style][0]], return_tensors="pt")
        audio = model.generate(**inputs, max_new_tokens=steps)[0].float().numpy()
        made.append(Clip(audio, model.config.audio_encoder.sampling_rate))
    return made


def sheet(checkpoint: Path, styles: list[str], path: Path) -> Path:
    """Writes the spectrograms of `styles`, two in a row, and returns the file's path."""
    rows = -(-len(styles) // 2)
    figure = Figure(figsize=(10, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes, style, clip in zip(grid.flat, styles, takes(checkpoint, styles), strict=False):
        level = mel_db(clip).max(0)  # of both sides
        extent = (0, clip.duration_s, 0, len(level))
        axes.imshow(
            level,
            origin="lower",
            aspect="auto",
            extent=extent,
            cmap="magma",
            vmin=level.max() - 70,
            vmax=level.max(),
        )
        axes.set_title(f"“{PROMPTS[style][0]}”", fontsize=11)
        axes.set_yticks([])
        axes.set_xlabel("seconds", fontsize=9)
    for axes in grid.flat[len(styles) :]:
        axes.axis("off")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    return path
