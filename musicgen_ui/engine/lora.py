"""LoRA adapters of one checkpoint: read from peft's files, kept in memory, applied row by row.

An adapter (Hu et al. 2021, arXiv 2106.09685) adds a product of two narrow matrices to some of the
decoder's: `y = W x + strength · scale · B (A x)`. W stays packed as it is, so a checkpoint serves
jobs with different adapters, strengths or none in the same step: each product adds the low-rank
update to the rows of the jobs that have the adapter. Where several matrices are packed in one, as
query, key and value, an update adds to its slice of the outputs.

The files are `adapter_config.json` and `adapter_model.safetensors`, or `adapter_model.bin` of older
peft, for plain LoRA on the decoder's linear layers and embeddings and on the projections before it.
Anything else in an adapter would change the result, so it is refused rather than ignored.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from musicgen_ui.coercion import float_of
from musicgen_ui.engine.faults import EXITS
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest

if TYPE_CHECKING:
    from transformers import MusicgenDecoderConfig, MusicgenMelodyDecoderConfig

    DecoderConfig = MusicgenDecoderConfig | MusicgenMelodyDecoderConfig

NO_LAYER = -1  # the layer of heads, embeddings and projections
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"  # the weights as older peft wrote them
MAX_ADAPTERS = 8  # in memory for a checkpoint; others are read again
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>(?:decoder\.)?(?:model\.decoder\.)?"
    r"(?P<module>layers\.\d+\.\w+(?:\.\w+)?|(?:lm_heads|embed_tokens)\.\d+|"
    r"(?:audio_)?enc_to_dec_proj))\.lora_(?:embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?"
)
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|module)\.")  # of torch.compile and DDP
# Settings in adapter_config.json that change how the matrices are used.
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"),
    *("layer_replication", "alora_invocation_tokens", "target_parameters"),
)
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")  # the base keeps its weights
_MERGE = "merge it into its base with peft, and choose the folder with the result as checkpoint"


class Target(NamedTuple):
    """A matrix of the checkpoint that an adapter may change: its place in a packed product."""

    layer: int
    product: str
    start: int  # of its outputs in the product's; for embeddings the codebook
    outputs: int
    inputs: int


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """What an adapter adds to a slice of a product's outputs."""

    start: int
    a: Tensor  # [rank, inputs]
    b: Tensor  # scale · B, [outputs, rank]

    def add(self, x: Tensor, y: Tensor, strength: float) -> None:
        """Adds the update of inputs `x` [rows, inputs] to `y` [rows, outputs], in place."""
        y[:, self.start : self.start + len(self.b)] += (x @ self.a.T) @ (strength * self.b).T

    def add_embedded(self, columns: Tensor, x: Tensor, strength: float) -> None:
        """Adds one codebook's update to the embedded `columns`, in place.

        Args:
            columns: int64 [n, codebooks]; `start` is the codebook, `a` its table [rank, codes].
            x: [n, hidden].
            strength: of the adapter.
        """
        x += self.a[:, columns[:, self.start]].T @ (strength * self.b).T


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter in memory."""

    name: str
    base: str  # the checkpoint it was trained on, as its file says; may be empty
    updates: Mapping[tuple[int, str], list[LowRankUpdate]]  # by layer and product
    stamp: tuple[tuple[str, int, int], ...] = ()  # see `_stamp`

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(u.a.nbytes + u.b.nbytes for updates in self.updates.values() for u in updates)


@dataclass(frozen=True)
class AppliedAdapter:
    """An adapter with the strength that a job applies it with."""

    adapter: LoraAdapter
    strength: float

    def add(self, layer: int, product: str, x: Tensor, y: Tensor) -> None:
        """Adds the updates of a product's inputs `x` to its outputs `y`, in place."""
        for update in self.adapter.updates.get((layer, product), ()):
            update.add(x, y, self.strength)

    def add_embedded(self, columns: Tensor, x: Tensor) -> None:
        """Adds the updates of all codebooks to the embedded `columns`, in place."""
        for update in self.adapter.updates.get((NO_LAYER, "embed_tokens"), ()):
            update.add_embedded(columns, x, self.strength)


@dataclass(frozen=True)
class RowAdapters:
    """The adapters of the rows of a step; rows without one have the checkpoint as it is."""

    applied: list[tuple[slice, AppliedAdapter]] = field(default_factory=list)

    def product(
        self, layer: int, name: str, linear: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """[rows, inputs] through the packed weights and each row's adapter."""
        y = linear(x)
        for rows, adapter in self.applied:
            adapter.add(layer, name, x[rows], y[rows])
        return y

    def embedded(self, columns: Tensor, x: Tensor) -> Tensor:
        """The embedded columns, [rows, hidden], with each row's adapter added in place."""
        for rows, adapter in self.applied:
            adapter.add_embedded(columns[rows], x[rows])
        return x

    @staticmethod
    def of(jobs: list[tuple[AppliedAdapter | None, int]]) -> RowAdapters:
        """The rows of one job after the other: its adapter, and how many rows it has."""
        found: list[tuple[slice, AppliedAdapter]] = []
        end = 0
        for adapter, count in jobs:
            start, end = end, end + count
            if adapter is None:
                continue
            if found and found[-1][1] == adapter and found[-1][0].stop == start:
                start = found.pop()[0].start
            found.append((slice(start, end), adapter))
        return RowAdapters(found)


NO_ADAPTERS = RowAdapters()


class LoraStore:
    """The adapters of one checkpoint. `add` may be called from any thread.

    Args:
        checkpoint: its name, for sentences.
        config: transformers', of its decoder.
        dtype: of the decoder's activations.
        device: of the decoder.
        cross_attention: whether the decoder's layers have it.
    """

    def __init__(
        self,
        checkpoint: str,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
        cross_attention: bool,
    ) -> None:
        self.checkpoint = checkpoint
        self.targets = targets(config, cross_attention)
        self.dtypes = dict.fromkeys(self.targets, dtype)  # of the inputs of each product
        self.device = device
        self._lock = threading.Lock()
        self._folders: dict[str, Path] = {}
        self._adapters: OrderedDict[str, LoraAdapter] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters in memory."""
        return sum(adapter.nbytes for adapter in tuple(self._adapters.values()))

    def add_target(self, name: str, projection: nn.Module | None) -> None:
        """Lets adapters change a projection in front of the decoder, if there is one."""
        if isinstance(projection, nn.Linear):
            sizes = projection.out_features, projection.in_features
            self.targets[name] = Target(NO_LAYER, name, 0, *sizes)
            self.dtypes[name] = projection.weight.dtype  # float32 beside a decoder in bfloat16

    def add(self, name: str, folder: Path) -> None:
        """Reads the adapter in `folder`, unless it is in memory and unchanged.

        Raises:
            RequestError: it cannot be read, is of an unknown kind, or is for another base.
        """
        self._folders[name] = folder
        self._get(name)

    def applied(self, request: GenerationRequest) -> AppliedAdapter | None:
        """The adapter of a request's jobs; None for the checkpoint as it is.

        Raises:
            RequestError: the adapter was never added.
        """
        if not request.adapter or not request.adapter_strength:
            return None
        return AppliedAdapter(self._get(request.adapter), request.adapter_strength)

    def _get(self, name: str) -> LoraAdapter:
        folder = self._folders.get(name)
        if folder is None:
            raise RequestError(
                "LoRA adapters cannot be used here: leave the field empty.", "adapter"
            )
        with self._lock:
            adapter = self._adapters.get(name)
            if adapter is None or adapter.stamp != _stamp(folder):
                adapter = read(name, folder, self)
            self._adapters[name] = adapter
            self._adapters.move_to_end(name)
            while len(self._adapters) > MAX_ADAPTERS:
                self._adapters.popitem(last=False)
            return adapter


def targets(config: DecoderConfig, cross_attention: bool) -> dict[str, Target]:
    """Every matrix of a decoder that an adapter may change, by its name in transformers' model.

    Args:
        config: transformers', of the decoder.
        cross_attention: whether the layers have it.
    """
    hidden, inner = config.hidden_size, config.ffn_dim
    square = {"self_attn.out_proj": ("self_out", 0)}
    square |= {f"self_attn.{n}_proj": ("qkv", i * hidden) for i, n in enumerate("qkv")}
    if cross_attention:
        square |= {"encoder_attn.q_proj": ("text_q", 0), "encoder_attn.out_proj": ("text_out", 0)}
        square |= {f"encoder_attn.{n}_proj": ("text_kv", i * hidden) for i, n in enumerate("kv")}
    found: dict[str, Target] = {}
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}."
        found |= {name + n: Target(layer, *at, hidden, hidden) for n, at in square.items()}
        found[name + "fc1"] = Target(layer, "up", 0, inner, hidden)
        found[name + "fc2"] = Target(layer, "down", 0, hidden, inner)
    codes = config.vocab_size
    for k in range(config.num_codebooks):
        found[f"lm_heads.{k}"] = Target(NO_LAYER, "lm_heads", k * codes, codes, hidden)
        found[f"embed_tokens.{k}"] = Target(NO_LAYER, "embed_tokens", k, hidden, codes + 1)
    return found


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and modification times of an adapter's files: they tell when it changed."""
    names = (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE)
    found = [folder / name for name in names if (folder / name).is_file()]
    states = [(file.name, file.stat()) for file in found]
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in states)


def read_config(name: str, folder: Path) -> dict[str, object]:
    """The adapter's settings.

    Raises:
        RequestError: they cannot be read, or are not of plain LoRA.
    """
    try:
        config: dict[str, object] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"has no readable {CONFIG_FILE}: name a folder that peft saved"
        raise _refusal(name, why) from error
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    if kind != "LORA" or unsupported or config.get("init_lora_weights") not in _PLAIN_INIT:
        what = kind if kind != "LORA" else config["init_lora_weights"]
        what = unsupported[0] if unsupported else what
        raise _refusal(name, f"is no plain LoRA ({str(what)[:40]}): {_MERGE}")
    return config


def read(name: str, folder: Path, store: LoraStore) -> LoraAdapter:
    """The adapter in `folder`, checked against the checkpoint and on its device.

    Raises:
        RequestError: as `LoraStore.add`.
    """
    stamp, config = _stamp(folder), read_config(name, folder)
    base = str(config.get("base_model_name_or_path") or "")
    updates: dict[tuple[int, str], list[LowRankUpdate]] = {}
    try:
        with _opened(folder) as (shapes, get):
            for module, (a_key, b_key, path) in _pairs(name, shapes, store, base).items():
                # Copies: the file may be written anew while it is mapped.
                a = get(a_key).to(torch.float32, copy=True)
                b = get(b_key).to(torch.float32, copy=True)
                b = _scale(name, config, path, len(a)) * b
                target, dtype = store.targets[module], store.dtypes[module]
                for key, weight in ((a_key, a), (b_key, b)):
                    _require_finite(name, key, weight, dtype)
                a, b = (weight.to(store.device, dtype) for weight in (a, b))
                of_product = updates.setdefault((target.layer, target.product), [])
                of_product.append(LowRankUpdate(target.start, a, b))
    except (RequestError, *EXITS):
        raise
    except BaseException as error:  # a damaged file can raise anything, a panic in Rust too
        file = WEIGHTS_FILE if (folder / WEIGHTS_FILE).is_file() else PICKLE_FILE
        why = f"has no readable {file}: save it again with peft, or fetch it again"
        raise _refusal(name, why) from error
    return LoraAdapter(name, base, updates, stamp)


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[Shapes, Callable[[str], Tensor]]]:
    """The shapes of an adapter's weights, and a function that reads one of them."""
    from safetensors import safe_open

    if (folder / WEIGHTS_FILE).is_file():
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            names = file.keys()
            yield {name: tuple(file.get_slice(name).get_shape()) for name in names}, file.get_tensor
    else:
        weights = torch.load(folder / PICKLE_FILE, map_location="cpu", weights_only=True)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        yield shapes, weights.__getitem__


def _pairs(
    name: str, shapes: Shapes, store: LoraStore, base: str
) -> dict[str, tuple[str, str, str]]:
    """The keys of A and B and the module's path, by the module's name; all fit the checkpoint."""
    sides: dict[str, dict[str, str]] = {}
    paths: dict[str, str] = {}
    for key in shapes:
        found = _KEY.fullmatch(_WRAPPER.sub("", key))
        if not found:
            raise _refusal(name, f"changes {key[:80]}, which is not supported: {_MERGE}")
        sides.setdefault(found["module"], {})[found["side"]] = key
        paths[found["module"]] = found["path"]
    for module, keys in sides.items():
        target = store.targets.get(module)
        a, b = (shapes.get(keys.get(side, ""), (0, 0)) for side in "AB")
        if target is None or (a[1:], b[:1]) != ((target.inputs,), (target.outputs,)):
            trained = f"was trained on {base}" if base else "is for another base"
            why = f"{trained} and does not fit {store.checkpoint} ({module})"
            raise _refusal(name, f"{why}: choose its base as checkpoint")
        if len(b) != 2 or a[0] != b[1] or not 0 < a[0] <= target.inputs:
            raise ValueError(f"{module}: {a} and {b}")
    if not sides:
        raise ValueError("empty")
    return {module: (keys["A"], keys["B"], paths[module]) for module, keys in sides.items()}


def _scale(name: str, config: Mapping[str, object], path: str, rank: int) -> float:
    """peft's scaling: alpha over the rank, or over its root (rsLoRA)."""
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise TypeError(f"alpha_pattern {patterns}")
    for pattern, value in patterns.items():
        plain = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", plain):
            raise _refusal(name, f"has a pattern in its settings ({pattern[:40]}): {_MERGE}")
        if path == plain or (not pattern.startswith("^") and path.endswith("." + plain)):
            alpha = value
            break
    scale = float_of(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scale):
        raise ValueError(f"scale {scale}")
    return scale


def _require_finite(name: str, key: str, weight: Tensor, dtype: torch.dtype) -> None:
    if not weight.to(dtype).isfinite().all():
        why = f"holds NaN, infinity or more than {str(dtype).removeprefix('torch.')} can in {key}"
        raise _refusal(name, f"{why}: choose another, or an earlier state of its training")


def _refusal(name: str, why: str) -> RequestError:
    return RequestError(f"The adapter {name} {why}.", "adapter")
