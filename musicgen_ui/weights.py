"""A checkpoint's weights by name, read from their files layer by layer as they are packed.

The decoder's layers are nearly all of a large model. Read at once they would fill the memory before
the first of them is packed, in float32 where the files hold half precision. So transformers builds
the rest of the model, and each layer gets its weights, in the type that they are stored in, when
its turn comes; what was mapped for it is let go before the next one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musicgen_ui import bounded, defaults, hub, parts

LAYERS = "decoder.model.decoder.layers."
Shapes = dict[str, tuple[int, ...]]


class Stored:
    """Weights in safetensors files or pickles.

    Args:
        files: see `hub.weights_in`.
        prefix: comes before the names in the files.
    """

    def __init__(self, files: Iterable[Path], prefix: str = "") -> None:
        self.shapes: Shapes = {}
        self._file: dict[str, tuple[Path, str]] = {}  # and the name in it
        self._mapped: dict[str, Tensor] = {}  # of pickles, which stay open
        for file in files:
            bounded.require_weights(file)
            if file.suffix == ".safetensors":
                self._look(file, prefix)
            else:
                self._map(file, prefix)

    def _look(self, file: Path, prefix: str) -> None:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                self._file[prefix + name] = file, name
                self.shapes[prefix + name] = tuple(opened.get_slice(name).get_shape())

    def _map(self, file: Path, prefix: str) -> None:
        mapped = zipfile.is_zipfile(file)  # not in the form before torch 1.6
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        for name, weight in held.items():
            self._mapped[prefix + name] = weight
            self.shapes[prefix + name] = tuple(weight.shape)

    def get(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights as they are stored, mapped for as long as they are held."""
        from safetensors import safe_open

        names = list(names)
        found = {name: self._mapped[name] for name in names if name in self._mapped}
        missing = [name for name in names if name not in found]
        for file in dict.fromkeys(self._file[name][0] for name in missing):
            with safe_open(file, framework="pt") as opened:
                mine = [name for name in missing if self._file[name][0] == file]
                found |= {name: opened.get_tensor(self._file[name][1]) for name in mine}
        return found

    def with_decoder(self, other: Stored) -> Stored:
        """These weights with the decoder of others in place of their own."""
        joined = Stored(())
        for of, decoder in ((self, False), (other, True)):
            for name, shape in of.shapes.items():
                if name.startswith("decoder.") != decoder:
                    continue
                joined.shapes[name] = shape
                if name in of._file:
                    joined._file[name] = of._file[name]
                else:
                    joined._mapped[name] = of._mapped[name]
        return joined


class Held:
    """Weights that are in memory, or mapped, already."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self.shapes: Shapes = {name: tuple(weight.shape) for name, weight in weights.items()}

    def get(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `Stored.get`."""
        return {name: self._weights[name] for name in names}


class Layers:
    """The decoder's layers, each made when its turn comes and forgotten after it.

    Args:
        kind: transformers' class of a layer.
        config: of the decoder.
        stored: its weights, under their names in the whole model.

    Raises:
        ValueError: one is missing or of another shape.
    """

    def __init__(self, kind: Any, config: Any, stored: Stored | Held) -> None:
        self._kind, self._config, self._stored = kind, config, stored
        names = {name: tuple(w.shape) for name, w in self._empty().state_dict().items()}
        self._names = list(names)
        for index in range(config.num_hidden_layers):
            for name, shape in names.items():
                key = f"{LAYERS}{index}.{name}"
                if stored.shapes.get(key) != shape:
                    raise ValueError(f"{key} is {stored.shapes.get(key)} and not {shape}")

    def _empty(self) -> nn.Module:
        with torch.device("meta"):
            return self._kind(self._config)

    def __len__(self) -> int:
        return self._config.num_hidden_layers

    def __iter__(self) -> Iterator[nn.Module]:
        for index in range(len(self)):
            start = f"{LAYERS}{index}."
            weights = self._stored.get([start + name for name in self._names])
            layer = self._empty()
            plain = {name.removeprefix(start): weight for name, weight in weights.items()}
            layer.load_state_dict(plain, assign=True)
            del weights, plain
            yield layer.eval()


def read(
    folder: Path, rest: Path, dtype: torch.dtype, melody: bool, streamed: bool
) -> tuple[Any, Any]:
    """The model whose decoder is in `folder` and whose other parts are in `rest`, most often the
    same, and its tokenizer."""
    from transformers import (
        AutoTokenizer,
        GenerationConfig,
        MusicgenConfig,
        MusicgenMelodyConfig,
    )

    parts.quieten()
    bounded.require_small_tokenizer(rest)
    # The tokenizer alone: the processor of melody checkpoints needs torchaudio.
    tokenizer = AutoTokenizer.from_pretrained(rest, local_files_only=True)
    bounded.require_calm_tokenizer(tokenizer)
    config: Any = (MusicgenMelodyConfig if melody else MusicgenConfig).from_pretrained(rest)
    stored = Stored(hub.weights_in(rest))
    if rest != folder:
        config.decoder = type(config.decoder).from_pretrained(folder)
        stored = stored.with_decoder(Stored(hub.weights_in(folder), "decoder."))
    made = model(melody, config, stored, dtype, streamed)
    if (rest / defaults.FILE).is_file():
        made.generation_config = GenerationConfig.from_pretrained(rest)
    return made, tokenizer


def model(
    melody: bool, config: Any, stored: Stored | Held, dtype: torch.dtype, streamed: bool
) -> Any:
    """transformers' model with the weights in `stored`, as `dtype`.

    Args:
        melody: which of MusicGen's two kinds it is.
        config: transformers', of the model, or its values.
        stored: all its weights.
        dtype: of what is read at once.
        streamed: whether the decoder's layers are `Layers`, read as they are asked for.

    Raises:
        ValueError: a weight is missing or of another shape.
    """
    import transformers
    from transformers.models.musicgen.modeling_musicgen import MusicgenDecoderLayer
    from transformers.models.musicgen_melody.modeling_musicgen_melody import (
        MusicgenMelodyDecoderLayer,
    )

    name = f"Musicgen{'Melody' if melody else ''}ForConditionalGeneration"
    kind: Any = getattr(transformers, name)
    layer = MusicgenMelodyDecoderLayer if melody else MusicgenDecoderLayer
    if isinstance(config, dict):  # a copy: transformers 5.17 takes the parts' kinds out of it
        config = kind.config_class.from_dict(deepcopy(config))
    names = [name for name in stored.shapes if not (streamed and name.startswith(LAYERS))]
    count = config.decoder.num_hidden_layers
    config.decoder.num_hidden_layers = 0 if streamed else count
    # None: no folder, all that there is to read is at hand.
    made, found = kind.from_pretrained(
        None, config=config, state_dict=stored.get(names), dtype=dtype, output_loading_info=True
    )
    missing = [key for key in found["missing_keys"] if not key.endswith(_REBUILT)]
    if missing:
        raise ValueError(f"weights are missing: {', '.join(sorted(missing)[:5])} …")
    if streamed:
        made.decoder.config.num_hidden_layers = count
        del made.decoder.model.decoder.layers
        made.decoder.model.decoder.layers = Layers(layer, made.decoder.config, stored)
    return made.eval()


# What older checkpoints leave out and transformers fills in, or only training uses.
_REBUILT = ("embed_positions.weights", "embed_avg", "cluster_size", "inited")
