"""Rendered audio → codes, once, so that the decoder trains on codes alone.

`codes_<part>.npy` holds uint16 [clips, codebooks, frames] of the mono mix,
`stereo_codes_<part>.npy` [clips, 2 · codebooks, frames] with left and right interleaved as
MusicGen does (rows 0, 2, 4, … are left). Parts that exist are kept.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import EncodecModel

from training.codec import to_codes
from training.render import load_audio


def encode(
    data: Path,
    codec: EncodecModel,
    *,
    stereo: bool = False,
    device: str = "cpu",
    batch: int = 6,
    parts: range | None = None,
) -> None:
    """Encode the parts that have no codes yet; in float32, bfloat16 changes 1 to 3 % of codes."""
    codec = codec.to(device)
    clips = load_audio(data)
    for part in parts or range(len(clips)):
        path = data / f"{'stereo_' * stereo}codes_{part}.npy"
        if path.exists():
            continue
        codes = [
            _encode_clips(codec, clips[part][i : i + batch], stereo, device)
            for i in range(0, len(clips[part]), batch)
        ]
        partial = path.with_suffix(".tmp.npy")
        np.save(partial, np.concatenate(codes))
        partial.rename(path)
        print(f"encoded {path.name}", flush=True)


def _encode_clips(codec: EncodecModel, clips: np.ndarray, stereo: bool, device: str) -> np.ndarray:
    """int16 [clips, 2, samples] → uint16 [clips, rows, frames]."""
    audio = torch.from_numpy(clips.astype(np.float32) / 32767).to(device)
    if not stereo:
        return to_codes(codec, audio.mean(1)).cpu().numpy().astype(np.uint16)
    sides = to_codes(codec, audio.flatten(0, 1)).unflatten(0, (-1, 2))  # [clips, 2, books, frames]
    return sides.transpose(1, 2).flatten(1, 2).cpu().numpy().astype(np.uint16)


def load_codes(data: Path, *, stereo: bool = False) -> np.ndarray:
    """All encoded parts from the first on, int16 [clips, rows, frames]."""
    paths = (data / f"{'stereo_' * stereo}codes_{part}.npy" for part in range(10_000))
    found = []
    for path in paths:
        if not path.exists():
            break
        found.append(np.load(path).astype(np.int16))
    if not found:
        raise FileNotFoundError(f"No codes in {data}: run `python -m training encode` first.")
    return np.concatenate(found)
