"""The names of weights in files, without what training tools put around them.

torch.compile, FSDP, DDP and Lightning wrap a model, and its weights are saved under longer names.
A LoRA that was not merged is told by its names as well.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from musicgen_ui.checkpoints.unusable import Unusable

# Parts of a model's path that a wrapper adds; MusicGen and EnCodec have no module of these names.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)\."
)
_OUTER = "model."  # where a model is an attribute of another one
_LORA = re.compile(r"(?<![^.])(?:lora_\w+|base_layer|modules_to_save)(?![^.])")


def plain_names(names: Iterable[str], beginnings: tuple[str, ...]) -> dict[str, str]:
    """The plain name of each weight by its name in a file.

    Args:
        names: as they are stored.
        beginnings: how the plain names of the model begin, such as "decoder.".

    Raises:
        Unusable: two weights would have one name, or there is a LoRA that was not merged.
    """
    names = list(names)
    lora = next(filter(_LORA.search, names), None)
    if lora:
        raise Unusable(
            f"its weights hold a LoRA that is not merged into them ({lora[:120]})",
            "save the model again after peft's merge_and_unload(), or save the adapter alone and "
            "name it as the adapter",
        )
    plain = {name: _plain(name, beginnings) for name in names}
    if len(set(plain.values())) < len(plain):
        taken = sorted(plain.values())
        double = next(a for a, b in itertools.pairwise(taken) if a == b)
        raise Unusable(
            f"two of its weights are {double}, under different prefixes",
            "save the model without the wrapper of training around it",
        )
    return plain


def _plain(name: str, beginnings: tuple[str, ...]) -> str:
    inner = _WRAPPERS.sub("", name)
    while not inner.startswith(beginnings) and inner.startswith(_OUTER):
        inner = inner.removeprefix(_OUTER)
    return inner if inner.startswith(beginnings) else _WRAPPERS.sub("", name)
