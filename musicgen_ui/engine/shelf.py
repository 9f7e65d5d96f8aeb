"""The adapters of one checkpoint, read from peft's files and kept in memory.

The files are `adapter_config.json` and `adapter_model.safetensors`, or `adapter_model.bin` of older
peft, for plain LoRA on the decoder's linear layers and embeddings and on the projections before it.
What else an adapter may hold changes what is computed, so it is refused rather than left out.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musicgen_ui.engine.faults import EXITS
from musicgen_ui.engine.lora import OUTSIDE, Adapter, Patch, Place, Worn
from musicgen_ui.engine.transformer import Decoder
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # by older peft, in place of the second
KEPT = 8  # adapters in memory for a checkpoint; others are read again
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>(?:decoder\.)?(?:model\.decoder\.)?"
    r"(?P<module>layers\.\d+\.\w+(?:\.\w+)?|(?:lm_heads|embed_tokens)\.\d+|"
    r"(?:audio_)?enc_to_dec_proj))\.lora_(?:embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?"
)
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|module)\.")  # of torch.compile and DDP
Shapes = Mapping[str, tuple[int, ...]]
# Of adapter_config.json: what makes another computation of the same matrices.
_OFF = (
    *("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"),
    *("layer_replication", "alora_invocation_tokens", "target_parameters"),
)
_PLAIN_START = (True, False, None, "gaussian", "eva", "orthogonal")  # the base stays as it is


class Shelf:
    """The adapters of one checkpoint. `add` may be called from any thread.

    Args:
        checkpoint: its name, for sentences.
        config: transformers', of its decoder.
        decoder: packed.
    """

    def __init__(self, checkpoint: str, config: Any, decoder: Decoder) -> None:
        self.checkpoint = checkpoint
        self.places = places(config, cross=not decoder.prefixed)
        self.dtypes = dict.fromkeys(self.places, decoder.dtype)  # of what each is multiplied with
        self.device = decoder.device
        self._lock = threading.Lock()
        self._folders: dict[str, Path] = {}
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters in memory."""
        return sum(adapter.nbytes for adapter in tuple(self._adapters.values()))

    def allow(self, name: str, projection: nn.Module | None) -> None:
        """Lets adapters change a projection in front of the decoder, if there is one."""
        if isinstance(projection, nn.Linear):
            sizes = projection.out_features, projection.in_features
            self.places[name] = Place(OUTSIDE, name, 0, *sizes)
            self.dtypes[name] = projection.weight.dtype  # float32 beside a decoder in bfloat16

    def add(self, name: str, folder: Path) -> None:
        """Reads the adapter in `folder`, if it is not here as it is there.

        Raises:
            RequestError: it cannot be read, is of a kind not known, or is for another base.
        """
        self._folders[name] = folder
        self._get(name)

    def worn(self, request: GenerationRequest) -> Worn | None:
        """What the jobs of a request wear; None for the checkpoint as it is.

        Raises:
            RequestError: its adapter was never added.
        """
        if not request.adapter or not request.adapter_strength:
            return None
        return Worn(self._get(request.adapter), request.adapter_strength)

    def _get(self, name: str) -> Adapter:
        folder = self._folders.get(name)
        if folder is None:
            raise RequestError("Adapters cannot be put on here: leave the field empty.", "adapter")
        with self._lock:
            held = self._adapters.get(name)
            if held is None or held.stamp != _stamp(folder):
                held = read(name, folder, self)
            self._adapters[name] = held
            self._adapters.move_to_end(name)
            while len(self._adapters) > KEPT:
                self._adapters.popitem(last=False)
            return held


def places(config: Any, cross: bool) -> dict[str, Place]:
    """Every matrix of a decoder that an adapter may change, by its name in transformers' model.

    Args:
        config: transformers', of the decoder.
        cross: whether the layers have cross-attention.
    """
    hidden, inner = config.hidden_size, config.ffn_dim
    square = {"self_attn.out_proj": ("self_out", 0)}
    square |= {f"self_attn.{n}_proj": ("qkv", i * hidden) for i, n in enumerate("qkv")}
    if cross:
        square |= {"encoder_attn.q_proj": ("text_q", 0), "encoder_attn.out_proj": ("text_out", 0)}
        square |= {f"encoder_attn.{n}_proj": ("text_kv", i * hidden) for i, n in enumerate("kv")}
    found: dict[str, Place] = {}
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}."
        found |= {name + n: Place(layer, *at, hidden, hidden) for n, at in square.items()}
        found[name + "fc1"] = Place(layer, "up", 0, inner, hidden)
        found[name + "fc2"] = Place(layer, "down", 0, hidden, inner)
    codes = config.vocab_size
    for k in range(config.num_codebooks):
        found[f"lm_heads.{k}"] = Place(OUTSIDE, "lm_heads", k * codes, codes, hidden)
        found[f"embed_tokens.{k}"] = Place(OUTSIDE, "embed_tokens", k, hidden, codes + 1)
    return found


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """By which a change of an adapter's files is noticed: names, sizes and times of change."""
    found = [folder / name for name in (CONFIG, WEIGHTS, PICKLED) if (folder / name).is_file()]
    states = [(file.name, file.stat()) for file in found]
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in states)


def read_config(name: str, folder: Path) -> dict[str, Any]:
    """The adapter's settings.

    Raises:
        RequestError: they cannot be read, or are of a kind that is not known.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refused(name, f"has no readable {CONFIG}: name a folder that peft saved") from error
    other = [key for key in _OFF if config.get(key)]
    if kind != "LORA" or other or config.get("init_lora_weights") not in _PLAIN_START:
        what = other[0] if other else kind if kind != "LORA" else config["init_lora_weights"]
        raise _refused(name, f"is no plain LoRA ({str(what)[:40]}): {_MERGE}")
    return config


_MERGE = "merge it into its base with peft, and choose the folder with the result as checkpoint"


def read(name: str, folder: Path, shelf: Shelf) -> Adapter:
    """The adapter in `folder`, checked against the checkpoint and on its device.

    Raises:
        RequestError: as `Shelf.add`.
    """
    stamp, config = _stamp(folder), read_config(name, folder)
    base = str(config.get("base_model_name_or_path") or "")
    try:
        with _opened(folder) as (shapes, get):
            pairs = _pairs(name, shapes, shelf, base)
            patches: dict[tuple[int, str], list[Patch]] = {}
            for module, (down_key, up_key, path) in pairs.items():
                # Copies: a file may be written anew while it is mapped.
                down = get(down_key).to(torch.float32, copy=True)
                up = get(up_key).to(torch.float32, copy=True)
                place, scale = shelf.places[module], _scale(name, config, path, len(down))
                there = shelf.device, shelf.dtypes[module]
                for key, weight in ((down_key, down), (up_key, scale * up)):
                    _require_finite(name, key, weight, there[1])
                patches.setdefault((place.layer, place.product), []).append(
                    Patch(place.start, *(w.to(*there) for w in (down, scale * up)))
                )
    except (RequestError, *EXITS):
        raise
    except BaseException as error:  # whatever a broken file brings about, a panic in Rust too
        held = WEIGHTS if (folder / WEIGHTS).is_file() else PICKLED
        why = f"has no readable {held}: save it again with peft, or fetch it again"
        raise _refused(name, why) from error
    return Adapter(name, base, patches, stamp)


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[Shapes, Callable[[str], Tensor]]]:
    """The shapes of an adapter's weights, and how to get one of them."""
    from safetensors import safe_open

    if (folder / WEIGHTS).is_file():
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = file.keys()
            yield {name: tuple(file.get_slice(name).get_shape()) for name in names}, file.get_tensor
    else:
        held = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
        yield {name: tuple(weight.shape) for name, weight in held.items()}, held.__getitem__


def _pairs(name: str, shapes: Shapes, shelf: Shelf, base: str) -> dict[str, tuple[str, str, str]]:
    """A module's two keys and its path, by the module's name; all fit the checkpoint."""
    sides: dict[str, dict[str, str]] = {}
    paths: dict[str, str] = {}
    for key in shapes:
        found = _KEY.fullmatch(_WRAPPER.sub("", key))
        if not found:
            raise _refused(name, f"changes {key[:80]}, which cannot be put on: {_MERGE}")
        sides.setdefault(found["module"], {})[found["side"]] = key
        paths[found["module"]] = found["path"]
    for module, keys in sides.items():
        place = shelf.places.get(module)
        down, up = (shapes.get(keys.get(side, ""), (0, 0)) for side in "AB")
        if place is None or (down[1:], up[:1]) != ((place.inputs,), (place.outputs,)):
            meant = f"was trained on {base}" if base else "is for another base"
            raise _refused(name, f"{meant} and does not fit {shelf.checkpoint} ({module}): choose its base as checkpoint")  # fmt: skip  # noqa: E501
        if len(up) != 2 or down[0] != up[1] or not 0 < down[0] <= place.inputs:
            raise ValueError(f"{module}: {down} and {up}")
    if not sides:
        raise ValueError("empty")
    return {module: (keys["A"], keys["B"], paths[module]) for module, keys in sides.items()}


def _scale(name: str, config: Mapping[str, Any], path: str, rank: int) -> float:
    """peft's scaling: alpha over the rank, or over its root (rsLoRA)."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        plain = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", plain):
            raise _refused(name, f"has a pattern in its settings ({pattern[:40]}): {_MERGE}")
        if path == plain or (not pattern.startswith("^") and path.endswith("." + plain)):
            alpha = value
            break
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scale):
        raise ValueError(f"scale {scale}")
    return scale


def _require_finite(name: str, key: str, weight: Tensor, dtype: torch.dtype) -> None:
    if not weight.to(dtype).isfinite().all():
        why = f"holds NaN, infinity or more than {str(dtype).removeprefix('torch.')} can in {key}"
        raise _refused(name, f"{why}: choose another, or an earlier state of its training")


def _refused(name: str, why: str) -> RequestError:
    return RequestError(f"The adapter {name} {why}.", "adapter")
