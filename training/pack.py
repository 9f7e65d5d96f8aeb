"""Weights in little space: int8 matrices with a scale a row, float16 for the rest, in small files.

A training on a rented machine brings back what is written here, and goes on from it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LARGEST_FILE = 15 << 20  # bytes
SCALE = ".row_scale"
SMALLEST_MATRIX = 4096  # numbers; smaller ones stay in float16


def packed(state: dict[str, Tensor], *, int8: bool = True) -> dict[str, Tensor]:
    """On the CPU: matrices as int8 and `name.row_scale`, other floats as float16."""
    out = {}
    for name, tensor in state.items():
        value = tensor.detach().float()
        if int8 and value.dim() == 2 and value.numel() >= SMALLEST_MATRIX:
            scale = value.abs().amax(1).clamp(min=1e-8) / 127
            out[name] = (value / scale[:, None]).round().to(torch.int8)
            out[name + SCALE] = scale
        else:
            out[name] = value.half()
    return {name: tensor.contiguous().cpu() for name, tensor in out.items()}


def unpacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in float32."""
    return {
        name: tensor.float() * state[name + SCALE][:, None]
        if name + SCALE in state
        else tensor.float()
        for name, tensor in state.items()
        if not name.endswith(SCALE)
    }


def write(
    state: dict[str, Tensor], folder: Path, name: str, work: Path, *, int8: bool = True
) -> int:
    """`folder`/name-0.safetensors, …, each whole at any moment; returns the bytes.

    `work` is a folder for unfinished files. Older files of the name are replaced.
    """
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in packed(state, int8=int8).items():
        if size + tensor.nbytes > LARGEST_FILE:
            parts.append({})
            size = 0
        parts[-1][key] = tensor
        size += tensor.nbytes
    total = 0
    for i, part in enumerate(parts):
        partial = work / f"{name}-{i}.safetensors"
        save_file(part, partial)
        total += partial.stat().st_size
        shutil.move(partial, folder / partial.name)
    return total


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """All files of a name, in float32; an empty dict where there are none."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        state |= load_file(path)
    return unpacked(state)
