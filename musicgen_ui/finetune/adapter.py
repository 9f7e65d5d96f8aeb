"""A LoRA adapter that is trained: its matrices beside the decoder's, and its files as peft's.

`y = W x + alpha / rank · B (A x)` with W frozen (Hu et al. 2021, arXiv 2106.09685). peft itself is
not needed for that: `engine.lora` reads the same files, and tests compare both with peft.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from musicgen_ui import files
from musicgen_ui.engine.lora import CONFIG_FILE, WEIGHTS_FILE

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # of every layer
CARD = "README.md"


class LowRankLinear(nn.Module):
    """A frozen linear layer with a trained low-rank update; matrices in float32."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale = base, scale
        outputs, inputs = base.weight.shape
        a = torch.empty(rank, inputs)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # as peft begins
        self.a = nn.Parameter(a.to(base.weight.device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] to […, outputs]."""
        narrow = F.linear(x, self.a.to(x.dtype))
        y: Tensor = self.base(x) + self.scale * F.linear(narrow, self.b.to(x.dtype))
        return y


@dataclass(frozen=True)
class Card:
    """What an adapter says of itself."""

    base: str  # the checkpoint, as the app names it
    rank: int
    captions: int
    activation_word: str
    steps: int


class Adapter:
    """The trained matrices of a decoder, by the decoder's names of its linear layers.

    Args:
        decoder: transformers', whose weights are frozen here and whose layers get the updates.
        rank: of the updates; alpha is twice as much.
        seed: of the first A; B begins as zeros, so nothing changes before the first step.
    """

    def __init__(self, decoder: nn.Module, rank: int, seed: int = 0) -> None:
        self.rank, self.alpha = rank, 2 * rank
        self.layers: dict[str, LowRankLinear] = {}
        decoder.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name, module in list(decoder.named_modules()):
            parent, _, last = name.rpartition(".")
            if last not in TARGETS or not isinstance(module, nn.Linear):
                continue
            low_rank = LowRankLinear(module, rank, self.alpha / rank, generator)
            setattr(decoder.get_submodule(parent), last, low_rank)
            self.layers[name] = low_rank

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [matrix for layer in self.layers.values() for matrix in (layer.a, layer.b)]

    def state(self) -> dict[str, Tensor]:
        """The matrices under peft's names, on the CPU."""
        return {name: matrix.detach().cpu().contiguous() for name, matrix in self._named()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over matrices as `state` gives them."""
        for name, matrix in self._named():
            matrix.copy_(state[name])

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.layers.items():
            start = f"base_model.model.decoder.{name}.lora_"
            yield f"{start}A.weight", layer.a
            yield f"{start}B.weight", layer.b

    def save(self, folder: Path, card: Card) -> None:
        """Writes the adapter as peft does, with a card; each file whole or not at all.

        Raises:
            OSError: the folder cannot be written to, or the disk is full.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, object] = {
            "peft_type": "LORA",
            "base_model_name_or_path": card.base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(TARGETS),
            "inference_mode": True,
        }
        files.replace(folder / CONFIG_FILE, json.dumps(config, indent=2).encode())
        files.replace(folder / CARD, _card(card).encode())
        files.replace(folder / WEIGHTS_FILE, save(self.state(), {"format": "pt"}))


def _card(card: Card) -> str:
    front = {"base_model": card.base, "library_name": "peft"}
    lines = [f"{name}: {json.dumps(value)}" for name, value in front.items()]
    word = card.activation_word
    use = f"Begin prompts with “{word}”." if word else "It has no activation word."
    return "\n".join(
        [
            *("---", *lines, "tags:", "- musicgen", "- lora", "---", ""),
            f"A LoRA adapter of rank {card.rank} for {card.base}, trained for {card.steps} steps. "
            f"Songs with a caption: {card.captions}. {use}",
            "",
            "Its use is bound by the licences of its base and of the music.",
            "",
        ]
    )
