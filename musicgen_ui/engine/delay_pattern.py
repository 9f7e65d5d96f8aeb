"""The codebook delay pattern: frames to columns and back.

MusicGen writes the K codebooks of a frame in K successive steps: codebook k of frame f stands in
column 1 + f + k, after a first column of start tokens (Copet et al. 2023, "Simple and Controllable
Music Generation", section 2.3). In stereo both channels of a codebook share its delay and their
rows alternate: left, right, left, right. F frames therefore need F + K columns, the first given.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNWRITTEN = -1  # a code that the decoder has yet to write


def delays(codebooks: int, channels: int) -> list[int]:
    """The delay in frames of each row: [0, 1, 2, 3] in mono, [0, 0, 1, 1, …] in stereo."""
    return [row // channels for row in range(codebooks)]


def delayed(context: Tensor, frames: int, channels: int, start_token: int) -> Tensor:
    """The columns of a piece of `frames` frames that begins with the codes of `context`.

    Args:
        context: int64 [..., codebooks, context frames], may have no frames.
        frames: of the whole piece, context included.
        channels: 1 or 2.
        start_token: fills the places that hold no code.

    Returns:
        int64 [..., codebooks, 1 + frames + delay]; `UNWRITTEN` where the decoder will write.
    """
    *batch, codebooks, _ = context.shape
    shifts = delays(codebooks, channels)
    columns = context.new_full((*batch, codebooks, 1 + frames + shifts[-1]), start_token)
    for row, shift in enumerate(shifts):
        columns[..., row, 1 + shift : 1 + shift + frames] = UNWRITTEN
    write_codes(context, columns, 0, channels)
    return columns


def write_codes(codes: Tensor, columns: Tensor, start: int, channels: int) -> None:
    """Writes the codes of the frames from `start` on, [..., codebooks, frames], into `columns`."""
    frames = codes.shape[-1]
    for row, shift in enumerate(delays(columns.shape[-2], channels)):
        columns[..., row, 1 + shift + start : 1 + shift + start + frames] = codes[..., row, :]


def undelayed(columns: Tensor, start: int, end: int, channels: int) -> Tensor:
    """The codes of frames `start` to `end` (exclusive), int64 [codebooks, frames]."""
    shifts = delays(columns.shape[0], channels)
    return torch.stack(
        [columns[row, 1 + shift + start : 1 + shift + end] for row, shift in enumerate(shifts)]
    )
