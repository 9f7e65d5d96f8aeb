"""Weights are numbers: each is checked when it is packed, where it still has its name.

A weight of which one number is NaN or infinite makes noise: in int8 at once, whose scales it
spoils, elsewhere from the first step that reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from musicgen_ui.errors import RequestError


@torch.no_grad()
def require_finite(module: nn.Module | None, name: str, dtype: torch.dtype = torch.float32) -> None:
    """Checks a module's parameters, and the weights that it computes of them.

    Args:
        module: of transformers' model, on the CPU.
        name: of the module in the model.
        dtype: that the weights will be converted to.

    Raises:
        RequestError: one holds NaN, infinity or more than `dtype` can; it is named.
    """
    if module is None:
        return
    for inner, weight in module.named_parameters():
        require_finite_weight(weight, f"{name}.{inner}", dtype)
    for inner, part in module.named_modules():
        if parametrize.is_parametrized(part, "weight"):  # weight norm divides by one of its own
            require_finite_weight(part.weight, f"{name}.{inner}.weight", dtype)


@torch.no_grad()
def require_finite_weight(weight: Tensor, name: str, dtype: torch.dtype = torch.float32) -> None:
    """Checks a single weight, see `require_finite`."""
    if not weight.numel():
        return
    # A third of the time of reading the weight, where `isfinite` takes ten times as long.
    least, most = (float(x) for x in torch.aminmax(weight.detach()))
    largest = max(abs(least), abs(most))
    if not largest < float("inf"):
        raise RequestError(
            f"The weight {name} of this checkpoint holds NaN or infinity, which makes noise: its "
            "training diverged, or its file is damaged. Choose another checkpoint, or an earlier "
            "state of this one.",
            "checkpoint",
        )
    if largest > torch.finfo(dtype).max:
        raise RequestError(
            f"The weight {name} of this checkpoint reaches {largest:.3g}, more than "
            f"{str(dtype).removeprefix('torch.')} can hold: choose another precision.",
            "checkpoint",
        )
