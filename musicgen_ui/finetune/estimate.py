"""How long a run takes and how much memory, measured with the model itself before the first step.

What a forward pass keeps for its backward pass is counted at two short lengths; it grows with the
length and, by attention, with its square, so it is known for the longest piece without taking that
memory. A plan then fits it to the memory there is: first fewer examples at once, whose gradients
are added, then activations that are computed twice.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from musicgen_ui.checkpoints.memory import size_in_words
from musicgen_ui.engine import device as devices
from musicgen_ui.errors import RequestError
from musicgen_ui.finetune.examples import Example
from musicgen_ui.finetune.train import Trainer

CONTEXT_BYTES = 600_000_000  # of CUDA itself, its libraries and fragmentation
MARGIN = 1.25  # times what is kept: what the backward pass needs for a moment
SHORT = (64, 128)  # frames that are measured
TIMED_STEPS = 2  # the first one warms up


@dataclass(frozen=True)
class Plan:
    """How a step is computed so that it fits."""

    rows: int  # examples at once
    checkpointing: bool  # activations are computed twice
    memory_bytes: int  # of the process on a CPU, of the GPU on CUDA


@dataclass(frozen=True)
class Memory:
    """What is needed beside activations, and what an example's activations need."""

    fixed_bytes: int  # weights, adapter, optimizer, and on a CPU what the process holds already
    row_bytes: int  # of the longest example
    checkpointed_bytes: int  # of it with activations that are computed twice

    def needed(self, rows: int, checkpointing: bool) -> int:
        """Bytes at the peak of a step."""
        row = self.checkpointed_bytes if checkpointing else self.row_bytes
        return round(self.fixed_bytes + MARGIN * rows * row)


def measure(trainer: Trainer) -> Memory:
    """Measures with the trainer's longest example; changes nothing."""
    longest = max(trainer.examples.pieces, key=lambda e: e.codes.shape[1])
    frames = longest.codes.shape[1]
    short = [min(length, frames) for length in SHORT]
    kept = [_kept_bytes(trainer, longest, length) for length in short]
    row = _extrapolated(short, kept, frames)
    config = trainer.decoder.config
    layers, width = config.num_hidden_layers, config.hidden_size
    positions = frames + config.num_codebooks
    positions += max(len(states) for states in longest.states) if trainer.examples.prefix else 0
    weight = trainer.decoder.lm_heads[0].get_parameter("weight")
    between = layers * positions * width * weight.element_size()
    logits = 3 * 4 * config.num_codebooks * positions * config.vocab_size  # float32, with gradients
    row += logits
    checkpointed = between + (row - logits) // max(1, layers) + logits
    trained = sum(matrix.numel() for matrix in trainer.adapter.parameters)
    fixed = 3 * 4 * trained  # gradients and AdamW's two moments
    if trainer.device.type == "cuda":
        fixed += torch.cuda.memory_allocated(trainer.device) + CONTEXT_BYTES
    else:
        fixed += psutil.Process().memory_info().rss
    return Memory(fixed, row, checkpointed)


def _kept_bytes(trainer: Trainer, example: Example, frames: int) -> int:
    """What a forward pass of so many frames keeps for the backward pass, weights aside."""
    weights = {each.untyped_storage().data_ptr() for each in trainer.decoder.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    short = dataclasses.replace(example, codes=example.codes[:, :frames])
    with (
        torch.random.fork_rng([trainer.device] if trainer.device.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        trainer.summed_loss([short], [example.states[0]])
    return sum(kept.values())


def _extrapolated(lengths: list[int], kept: list[int], frames: int) -> int:
    """a · frames + b · frames² through two points, or in proportion where there is one."""
    (x, y), (u, v) = zip(lengths, kept, strict=True)
    if x == u:
        return v * frames // u
    b = max(0.0, (v / u - y / x) / (u - x))
    return round((v / u - b * u) * frames + b * frames**2)


def plan(memory: Memory, batch: int, available_bytes: int, name: str) -> Plan:
    """The fastest way to compute a step within the memory.

    Raises:
        RequestError: there is none.
    """
    rows = [n for n in range(batch, 0, -1) if batch % n == 0]
    for checkpointing in (False, True):
        for count in rows:
            needed = memory.needed(count, checkpointing)
            if needed <= available_bytes:
                return Plan(count, checkpointing, needed)
    raise RequestError(
        f"Training {name} needs about {size_in_words(memory.needed(1, True))} of memory, and "
        f"{size_in_words(available_bytes)} may be used: choose shorter pieces (--piece), a smaller "
        "--rank or a smaller checkpoint."
    )


def available_bytes(device: torch.device, memory_gb: float) -> int:
    """The memory that a run may use in all; on a CPU with what the process holds already."""
    limit = round(memory_gb * 1e9) if memory_gb else None
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        there = free + torch.cuda.memory_reserved(device)
    else:
        there = devices.free_bytes() + psutil.Process().memory_info().rss
    return there if limit is None else min(limit, there)


def step_s(trainer: Trainer, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a step, measured; the weights stay as they are."""
    took_s = 0.0
    for _ in range(TIMED_STEPS):
        started_s = clock()
        trainer.accumulate(trainer.batch(trainer.step), trainer.step)
        devices.synchronize(trainer.device)
        took_s = clock() - started_s
    trainer.optimizer.zero_grad()
    return took_s
