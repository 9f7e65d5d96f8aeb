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

from musicgen_ui.audio import untrusted
from musicgen_ui.checkpoints import defaults, hub
from musicgen_ui.checkpoints.audiocraft import parts
from musicgen_ui.checkpoints.unusable import AGAIN, Unusable
from musicgen_ui.checkpoints.weight_names import plain_names
from musicgen_ui.engine.faults import out_of_memory

LAYERS = "decoder.model.decoder.layers."
Shapes = dict[str, tuple[int, ...]]
# How names begin, of a whole model and of a decoder alone.
_WHOLE = ("text_encoder.", "audio_encoder.", "decoder.", "enc_to_dec_proj.", "audio_enc_to_dec_")
_ALONE = ("model.decoder.", "lm_heads.")
_SAVE = "save the whole model again with save_pretrained"
_PLAIN = ("F64", "F32", "F16", "BF16")  # safetensors' words for numbers as they are
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Stored:
    """Weights in safetensors files or pickles.

    Args:
        files: see `hub.weights_in`.
        prefix: comes before the names in the files, of a decoder alone.

    Raises:
        Unusable: a file cannot be read, or its weights are not those of a model.
    """

    def __init__(self, files: Iterable[Path], prefix: str = "") -> None:
        self.shapes: Shapes = {}
        self._file: dict[str, tuple[Path, str]] = {}  # and the name in it
        self._mapped: dict[str, Tensor] = {}  # of pickles, which stay open
        self._quantized: list[str] = []
        for file in files:
            try:
                untrusted.require_weights(file)
                if file.suffix == ".safetensors":
                    self._look(file)
                else:
                    self._map(file)
            except Exception as error:
                if out_of_memory(error):
                    raise
                raise Unusable(
                    f"{file.name} is damaged, cut short or holds more than weights", AGAIN
                ) from error
        if weights := [name for name in self._quantized if name.endswith((".weight", ".bias"))]:
            raise Unusable(
                f"its weights are quantized ({weights[0][:120]})",
                "save the model in float32, float16 or bfloat16: int8 is made here",
            )
        plain = plain_names(self.shapes, _ALONE if prefix else _WHOLE)
        named = {name: prefix + new for name, new in plain.items()}
        self.shapes = {named[name]: shape for name, shape in self.shapes.items()}
        self._file = {named[name]: place for name, place in self._file.items()}
        self._mapped = {named[name]: weight for name, weight in self._mapped.items()}

    def _look(self, file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                self._file[name] = file, name
                held = opened.get_slice(name)
                self.shapes[name] = tuple(held.get_shape())
                if held.get_dtype() not in _PLAIN:
                    self._quantized.append(name)

    def _map(self, file: Path) -> None:
        mapped = zipfile.is_zipfile(file)  # not in the form before torch 1.6
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        for name, weight in held.items():
            self._mapped[name] = weight
            self.shapes[name] = tuple(weight.shape)
            if weight.dtype not in _PLAIN_DTYPES:
                self._quantized.append(name)

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
        Unusable: one is missing or of another shape.
    """

    def __init__(self, kind: Any, config: Any, stored: Stored | Held) -> None:
        self._kind, self._config, self._stored = kind, config, stored
        names = {name: tuple(w.shape) for name, w in self._empty().state_dict().items()}
        self._names = list(names)
        for index in range(config.num_hidden_layers):
            for name, shape in names.items():
                key = f"{LAYERS}{index}.{name}"
                if key not in stored.shapes:
                    raise Unusable(f"its weights lack {key}", _SAVE)
                if stored.shapes[key] != shape:
                    raise _misshapen(key, stored.shapes[key], shape)

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


def _misshapen(name: str, found: tuple[int, ...], described: tuple[int, ...]) -> Unusable:
    return Unusable(
        f"its config.json describes other weights: {name} is {list(found)} and not "
        f"{list(described)}",
        "copy the config.json that belongs to them",
    )


def read(folder: Path, rest: Path, dtype: torch.dtype, melody: bool, streamed: bool) -> Any:
    """The model whose decoder is in `folder` and whose other parts are in `rest`, most often the
    same.

    Raises:
        Unusable: files are damaged, or their weights are not those of the model.
    """
    from transformers import GenerationConfig, MusicgenConfig, MusicgenMelodyConfig

    parts.quieten()
    config: Any = (MusicgenMelodyConfig if melody else MusicgenConfig).from_pretrained(rest)
    stored = Stored(hub.weights_in(rest))
    if rest != folder:
        config.decoder = type(config.decoder).from_pretrained(folder)
        stored = stored.with_decoder(Stored(hub.weights_in(folder), "decoder."))
    made = model(melody, config, stored, dtype, streamed)
    if (rest / defaults.FILE).is_file():
        try:
            made.generation_config = GenerationConfig.from_pretrained(rest)
        except Exception as error:
            why = f"{defaults.FILE} cannot be read ({str(error).splitlines()[0][:160]})"
            remedy = "mend it, or give it another name and the usual settings count"
            raise Unusable(why, remedy) from error
    return made


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
        Unusable: a weight is missing or of another shape.
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
        None,
        config=config,
        state_dict=stored.get(names),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told here
    )
    if found["mismatched_keys"]:
        key, shape, described = min(found["mismatched_keys"])
        raise _misshapen(key, tuple(shape), tuple(described))
    missing = sorted(key for key in found["missing_keys"] if not key.endswith(_REBUILT))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise Unusable(f"its weights lack {', '.join(missing[:3])}{more}", _SAVE)
    if streamed:
        made.decoder.config.num_hidden_layers = count
        del made.decoder.model.decoder.layers
        made.decoder.model.decoder.layers = Layers(layer, made.decoder.config, stored)
    return made.eval()


# What older checkpoints leave out and transformers fills in, or only training uses.
_REBUILT = ("embed_positions.weights", "embed_avg", "cluster_size", "inited")
