"""Fine-tune a checkpoint's decoder on a folder of recordings and captions.

Every audio file `name.wav` (or .flac, .mp3, .ogg) has its caption in `name.txt` beside it. Codec
and text encoder stay as they are: the audio becomes codes once, the captions states once, and the
decoder alone learns, as MusicGen itself was trained. Works on any MusicGen checkpoint, stereo too.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from transformers import AutoProcessor, MusicgenForConditionalGeneration

from training.codec import to_codes
from training.dataset import CUT_FRAMES, Dataset
from training.presets import DecoderSize
from training.train_lm import Run, Trainer

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")


def read_pairs(folder: Path) -> list[tuple[Path, str]]:
    """(audio file, caption) in the order of the names; ValueError says what is missing."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder} has no audio files ({', '.join(SUFFIXES)}).")
    lacking = [path.name for path in files if not path.with_suffix(".txt").exists()]
    if lacking:
        raise ValueError(f"Captions are missing: {lacking[0]} needs a .txt of the same name.")
    return [(path, path.with_suffix(".txt").read_text().strip()) for path in files]


def encode_file(model: MusicgenForConditionalGeneration, path: Path) -> np.ndarray:
    """int16 [rows, frames]: resampled, mixed to mono or spread to stereo, in the codec's codes."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    wanted, channels = model.config.audio_encoder.sampling_rate, model.config.decoder.audio_channels
    shared = gcd(rate, wanted)
    sound = resample_poly(samples.T, wanted // shared, rate // shared, axis=1).astype(np.float32)
    sound = sound.mean(0, keepdims=True) if channels == 1 else sound[[0, -1]]
    codes = to_codes(model.audio_encoder, torch.from_numpy(sound).to(model.device))
    return codes.transpose(0, 1).flatten(0, 1).cpu().numpy().astype(np.int16)


def recordings(model: MusicgenForConditionalGeneration, folder: Path, window: int) -> Dataset:
    """The folder as training material; one clip in ten is held out."""
    pairs = read_pairs(folder)
    coded = [(encode_file(model, path), text) for path, text in pairs]
    usable = [(c, text) for c, text in coded if c.shape[1] - CUT_FRAMES >= window]
    if len(usable) < 2:
        seconds = (window + CUT_FRAMES) / 50
        raise ValueError(f"Two files at least must last {seconds:.1f} s; or give --window less.")
    codes, captions = zip(*usable, strict=True)
    held_out = max(1, len(codes) // 10)
    none = [0] * len(codes)
    return Dataset(list(codes), lambda clip, _: captions[clip], none, none, held_out)


def finetune(
    checkpoint: str,
    folder: Path,
    out: Path,
    *,
    steps: int,
    learning_rate: float = 2e-5,
    batch: int = 2,
    window: int = 500,
    device: str = "cpu",
) -> Path:
    """Write `out`/checkpoint with the decoder of the lowest held-out loss; resumes from `out`."""
    model = MusicgenForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model.to(device).eval()
    material = recordings(model, folder, window)
    size = replace(_SIZE, batch=batch, window=window, learning_rate=learning_rate)
    run = Run(out, steps, train_text=False, noise=0.0, openings=0.0, device=device)
    trainer = Trainer(model, processor.tokenizer, material, size, run)
    trainer.train()
    best = torch.load(out / "best.pt", map_location=device, weights_only=True)["model"]
    model.load_state_dict(best, strict=False)
    model.eval().save_pretrained(out / "checkpoint")
    processor.save_pretrained(out / "checkpoint")
    return out / "checkpoint"


# Only batch, window and learning rate count: the checkpoint brings its own sizes.
_SIZE = DecoderSize(0, 0, 1, 0, 0, 0, 2, 500, (), 2e-5, 1000)
