"""Changes to a piece while it is made: what a listener turns in live mode, and what a take records.

A row of automation is a time in the new music, in seconds, and the `Steering` that acts from that
frame on. In JSON: `[[0, {"prompts": [["rock", 0.7], ["piano", 0.3]]}], [4.2, {"top_k": 50}]]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from musicgen_ui.errors import RequestError

MAX_PROMPTS = 4  # of a mix: each is a row of every step
MEMORY_SLOTS = 3


@dataclass(frozen=True)
class Steering:
    """A change to a piece that is being made. None leaves a value as it is.

    Prompts are mixed by their weights: conditional logits of each, weighted, before guidance.
    """

    prompts: tuple[tuple[str, float], ...] | None = None  # text and weight, `MAX_PROMPTS` at most
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    store: int | None = None  # keep the last codes in this memory slot, 1 to `MEMORY_SLOTS`
    recall: int | None = None  # go on from the codes of this slot

    def values(self) -> dict[str, object]:
        """What it changes, as JSON has it."""
        held = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.prompts is not None:
            held["prompts"] = [list(prompt) for prompt in self.prompts]
        return {name: value for name, value in held.items() if value is not None}


Automation = tuple[tuple[float, Steering], ...]


def normalised(prompts: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Prompts with weights that sum to 1, in their order.

    Equal prompts are joined, and those of weight 0 left out: they would cost a row for nothing.

    Raises:
        RequestError: a weight is negative or no number, none is above 0, or there are more than
            `MAX_PROMPTS`.
    """
    weights: dict[str, float] = {}
    for prompt, weight in prompts:
        if not 0 <= weight < math.inf:
            raise RequestError(f"The weight of a prompt must be 0 or more, not {weight}.", "prompt")
        if weight:
            weights[prompt] = weights.get(prompt, 0.0) + weight
    if not weights:
        raise RequestError("Give at least one prompt a weight above 0.", "prompt")
    if len(weights) > MAX_PROMPTS:
        raise RequestError(
            f"{len(weights)} prompts cannot be mixed: use at most {MAX_PROMPTS}.", "prompt"
        )
    total = sum(weights.values())
    return tuple((prompt, weight / total) for prompt, weight in weights.items())
