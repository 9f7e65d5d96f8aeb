"""Reading a checkpoint's model and tokenizer from files in transformers' format.

The decoder's layers are nearly all of a large model. Read at once they would fill the memory before
the first of them is packed, in float32 where the files hold half precision. So transformers builds
the rest of the model, and each layer gets its weights, in the type that they are stored in, when
its turn comes; the files mapped for it are closed before the next one.

Weights may have longer names than the model's: torch.compile, FSDP, DDP, Lightning and peft wrap a
model, and their prefixes are removed. A LoRA that was not merged is recognised by its names too.
"""

from __future__ import annotations

import itertools
import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from musicgen_ui.checkpoints import file_checks, hub
from musicgen_ui.checkpoints.config import GENERATION_FILE, PUBLISHED
from musicgen_ui.checkpoints.file_checks import AGAIN, UnusableError, check_files
from musicgen_ui.checkpoints.hub_errors import HubError
from musicgen_ui.engine.faults import out_of_memory
from musicgen_ui.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from musicgen_ui.engine.lora import DecoderConfig
    from musicgen_ui.engine.style import Style
    from musicgen_ui.engine.transformer import Model

LAYERS = "decoder.model.decoder.layers."
STYLE = "style."  # what transformers' model has no place for
Shapes = dict[str, tuple[int, ...]]
# How names begin in a whole model and in a decoder alone.
_WHOLE = (
    *("text_encoder.", "audio_encoder.", "decoder.", "enc_to_dec_proj.", "audio_enc_to_dec_"),
    "style.",
)
_ALONE = ("model.decoder.", "lm_heads.")
_SAVE = "save the whole model again with save_pretrained"
_PLAIN = ("F64", "F32", "F16", "BF16")  # safetensors' names of unquantised types
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TOKENIZER_AGAIN = "copy or save the tokenizer again"
T5_VOCABULARY = 32128  # of every T5, whose tokenizers are one and the same
_T5 = "google-t5/t5-base"
_SAME_TOKENIZER = (_T5, "t5-base", *PUBLISHED.values())
# Parts of a weight's path that a wrapper adds; MusicGen and EnCodec have no module of these names.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)\."
)
_OUTER = ("model.", "musicgen.", "base_model.")  # where a model is an attribute of another one
_LORA = re.compile(r"(?<![^.])(?:lora_\w+|base_layer|modules_to_save)(?![^.])")


def plain_names(names: Iterable[str], beginnings: tuple[str, ...]) -> dict[str, str]:
    """The name that each weight has in the model, by its name in a file.

    Args:
        names: as they are stored.
        beginnings: of the model's own names, such as "decoder.".

    Raises:
        UnusableError: two weights would have the same name, no name is one of the model's, or there
            is a LoRA that was not merged.
    """
    names = list(names)
    lora = next(filter(_LORA.search, names), None)
    if lora:
        raise UnusableError(
            f"its weights hold a LoRA that is not merged into them ({lora[:120]})",
            "save the model again after peft's merge_and_unload(), or save the adapter alone and "
            "name it as the adapter",
        )
    plain = {name: _plain(name, beginnings) for name in names}
    if names and not any(name.startswith(beginnings) for name in plain.values()):
        raise UnusableError(
            f"its weights have unknown names, such as {names[0][:120]} where {beginnings[0]}… is "
            "expected",
            _SAVE,
        )
    if len(set(plain.values())) < len(plain):
        taken = sorted(plain.values())
        double = next(a for a, b in itertools.pairwise(taken) if a == b)
        raise UnusableError(
            f"two of its weights are {double}, under different prefixes",
            "save the model without the wrapper of training around it",
        )
    return plain


def _plain(name: str, beginnings: tuple[str, ...]) -> str:
    unwrapped = inner = _WRAPPERS.sub("", name)
    while not inner.startswith(beginnings):
        outer = next((prefix for prefix in _OUTER if inner.startswith(prefix)), None)
        if outer is None:
            return unwrapped
        inner = inner.removeprefix(outer)
    return inner


class Stored:
    """Weights in safetensors files or pickles.

    Args:
        files: see `hub.weights_in`.
        prefix: comes before the names in the files, of a decoder alone.

    Raises:
        UnusableError: a file cannot be read, or its weights are not those of a model.
    """

    def __init__(self, files: Iterable[Path], prefix: str = "") -> None:
        self.shapes: Shapes = {}
        self._file: dict[str, tuple[Path, str]] = {}  # and the name in it
        self._mapped: dict[str, Tensor] = {}  # of pickles, which stay open
        self._quantized: list[str] = []
        for file in files:
            try:
                file_checks.require_weights(file)
                if file.suffix == ".safetensors":
                    self._look(file)
                else:
                    self._map(file)
            except Exception as error:
                if out_of_memory(error):
                    raise
                raise UnusableError(
                    f"{file.name} is damaged, cut short or holds more than weights", AGAIN
                ) from error
        if weights := [name for name in self._quantized if name.endswith((".weight", ".bias"))]:
            raise UnusableError(
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


class InMemory:
    """Weights that are in memory, or mapped, already; see `Stored`."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self.shapes: Shapes = {name: tuple(weight.shape) for name, weight in weights.items()}

    def get(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `Stored.get`."""
        return {name: self._weights[name] for name in names}


class Layers:
    """The decoder's layers, each built when its turn comes and dropped after it.

    Args:
        kind: transformers' class of a layer.
        config: of the decoder.
        stored: its weights, under their names in the whole model.

    Raises:
        UnusableError: one is missing or of another shape.
    """

    def __init__(
        self, kind: Callable[..., nn.Module], config: DecoderConfig, stored: Stored | InMemory
    ) -> None:
        self._kind, self._config, self._stored = kind, config, stored
        names = {name: tuple(w.shape) for name, w in self._empty().state_dict().items()}
        self._names = list(names)
        for index in range(config.num_hidden_layers):
            for name, shape in names.items():
                key = f"{LAYERS}{index}.{name}"
                if key not in stored.shapes:
                    raise UnusableError(f"its weights lack {key}", _SAVE)
                if stored.shapes[key] != shape:
                    raise _misshapen(key, stored.shapes[key], shape)

    def _empty(self) -> nn.Module:
        with torch.device("meta"):
            return self._kind(self._config)

    def __len__(self) -> int:
        return int(self._config.num_hidden_layers)

    def __iter__(self) -> Iterator[nn.Module]:
        for index in range(len(self)):
            start = f"{LAYERS}{index}."
            weights = self._stored.get([start + name for name in self._names])
            layer = self._empty()
            plain = {name.removeprefix(start): weight for name, weight in weights.items()}
            layer.load_state_dict(plain, assign=True)
            del weights, plain
            yield layer.eval()


def _misshapen(name: str, found: tuple[int, ...], described: tuple[int, ...]) -> UnusableError:
    return UnusableError(
        f"its config.json describes other weights: {name} is {list(found)} and not "
        f"{list(described)}",
        "copy the config.json that belongs to them",
    )


def read(folder: Path, rest: Path, dtype: torch.dtype, prefixed: bool, streamed: bool) -> Model:
    """The model whose decoder is in `folder` and whose other parts are in `rest`, usually the same
    folder.

    Raises:
        UnusableError: files are damaged, or their weights are not those of the model.
    """
    from transformers import GenerationConfig, MusicgenConfig, MusicgenMelodyConfig

    quieten()
    config: Any = (MusicgenMelodyConfig if prefixed else MusicgenConfig).from_pretrained(rest)
    stored = Stored(hub.weights_in(rest))
    if rest != folder:
        config.decoder = type(config.decoder).from_pretrained(folder)
        stored = stored.with_decoder(Stored(hub.weights_in(folder), "decoder."))
    loaded = model(prefixed, config, stored, dtype, streamed)
    if (rest / GENERATION_FILE).is_file():
        try:
            loaded.generation_config = GenerationConfig.from_pretrained(rest)
        except Exception as error:
            why = f"{GENERATION_FILE} cannot be read ({str(error).splitlines()[0][:160]})"
            remedy = "correct it, or rename it so that the app's defaults apply"
            raise UnusableError(why, remedy) from error
    return loaded


def model(
    prefixed: bool,
    config: Any,
    stored: Stored | InMemory,
    dtype: torch.dtype,
    streamed: bool,
) -> Model:
    """transformers' model with the weights in `stored`, as `dtype`.

    That of a style checkpoint has a `StyleEncoder` besides, as its attribute `style`.

    Args:
        prefixed: which of MusicGen's two kinds it is: the one whose states are a prefix.
        config: transformers', of the model, or its values.
        stored: all its weights.
        dtype: of what is read at once.
        streamed: whether the decoder's layers are `Layers`, read as they are asked for.

    Raises:
        UnusableError: a weight is missing or of another shape.
    """
    import transformers
    from transformers.models.musicgen.modeling_musicgen import MusicgenDecoderLayer
    from transformers.models.musicgen_melody.modeling_musicgen_melody import (
        MusicgenMelodyDecoderLayer,
    )

    name = f"Musicgen{'Melody' if prefixed else ''}ForConditionalGeneration"
    kind: Any = getattr(transformers, name)  # whose `from_pretrained` gives a pair here
    layer = MusicgenMelodyDecoderLayer if prefixed else MusicgenDecoderLayer
    if isinstance(config, dict):  # a copy: transformers 5.17 takes the parts' kinds out of it
        config = kind.config_class.from_dict(deepcopy(config))
    apart = (STYLE, LAYERS) if streamed else (STYLE,)
    names = [name for name in stored.shapes if not name.startswith(apart)]
    count = config.decoder.num_hidden_layers
    config.decoder.num_hidden_layers = 0 if streamed else count
    # None: no folder, the weights are given.
    made, found = kind.from_pretrained(
        None,
        config=config,
        state_dict=stored.get(names),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below
    )
    if found["mismatched_keys"]:
        key, shape, described = min(found["mismatched_keys"])
        raise _misshapen(key, tuple(shape), tuple(described))
    missing = sorted(key for key in found["missing_keys"] if not key.endswith(_REBUILT))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UnusableError(f"its weights lack {', '.join(missing[:3])}{more}", _SAVE)
    if streamed:
        made.decoder.config.num_hidden_layers = count
        del made.decoder.model.decoder.layers
        made.decoder.model.decoder.layers = Layers(layer, made.decoder.config, stored)
    if style := getattr(config, "style", None):
        made.style = _style(style, stored, dtype)
    whole: Model = made.eval()
    return whole


def _style(config: Style, stored: Stored | InMemory, dtype: torch.dtype) -> nn.Module:
    """The style encoder with its weights in `stored`.

    Raises:
        UnusableError: a weight is missing or of another shape.
    """
    from musicgen_ui.engine.style import StyleEncoder

    with torch.device("meta"):
        encoder = StyleEncoder(config)
    shapes = {STYLE + name: tuple(w.shape) for name, w in encoder.state_dict().items()}
    for name, shape in shapes.items():
        if name not in stored.shapes:
            raise UnusableError(f"its weights lack {name}", _SAVE)
        if stored.shapes[name] != shape:
            raise _misshapen(name, stored.shapes[name], shape)
    weights = stored.get(shapes)
    plain = {name.removeprefix(STYLE): weight.to(dtype) for name, weight in weights.items()}
    encoder.load_state_dict(plain, assign=True)
    return encoder


# What older checkpoints leave out and transformers fills in, or only training uses.
_REBUILT = ("embed_positions.weights", "embed_avg", "cluster_size", "inited")


def with_tokenizer(folder: Path, repo_id: str | None, vocabulary: int, report: hub.Report) -> Path:
    """The folder with a text encoder's tokenizer: `folder`, or the one of a replacement.

    A checkpoint on the Hub has its own downloaded. Where it has none, a text encoder with T5's
    vocabulary takes T5's, which all published checkpoints use.

    Args:
        folder: of the text encoder's weights.
        repo_id: the repository that `folder` is a snapshot of; None if it is not from the Hub.
        vocabulary: the size of the text encoder's vocabulary.
        report: is called with the progress of a download.

    Raises:
        RequestError: there is none, or it cannot be had now.
    """
    if hub.has_tokenizer(folder):
        return folder
    try:
        own = hub.tokenizer(repo_id, report) if repo_id else None
    except HubError:
        if repo_id not in _SAME_TOKENIZER:
            raise
        own = None
    if own:
        return own
    if vocabulary != T5_VOCABULARY:
        raise RequestError(
            f"{folder} has no tokenizer ({' or '.join(hub.VOCABULARIES)}), without which all "
            "prompts sound alike: copy that of the checkpoint it was trained from into it, or save "
            "it there with the processor's save_pretrained.",
            "checkpoint",
        )
    for name in _SAME_TOKENIZER:
        for file in hub.VOCABULARIES:
            found = hub.cached_with(name, file)
            if found:
                return found
    try:
        found = hub.tokenizer(_T5, report)
    except HubError as error:
        raise HubError(
            f"{folder} has no tokenizer, and {error.why[:1].lower()}{error.why[1:]}",
            f"{error.remedy}; or copy the {hub.VOCABULARIES[0]} of the checkpoint that it was "
            "trained from into it",
            "checkpoint",
        ) from error
    assert found, "t5-base on the Hub has a tokenizer"
    return found


def tokenizer(folder: Path, vocabulary: int) -> PreTrainedTokenizerBase:
    """transformers' tokenizer in `folder`, for a text encoder whose vocabulary has this size.

    Raises:
        UnusableError: it cannot be read, is empty or is another text encoder's.
    """
    from transformers import AutoTokenizer

    _check_tokenizer(folder)
    try:
        file_checks.require_small_tokenizer(folder)
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        file_checks.require_bounded_tokenizer(made)
    except Exception as error:
        why = f"its tokenizer cannot be read ({str(error)[:160]})"
        raise UnusableError(why, _TOKENIZER_AGAIN) from error
    ids = set(made.get_vocab().values())
    # transformers makes an empty tokenizer where it finds none.
    if len(ids - set(made.all_special_ids)) < 2:
        raise UnusableError("its tokenizer knows no words", _TOKENIZER_AGAIN)
    if max(ids) >= vocabulary:
        raise UnusableError(
            f"its tokenizer has {max(ids) + 1} tokens and its text encoder {vocabulary}",
            "copy the tokenizer that belongs to the text encoder",
        )
    return made


def _check_tokenizer(folder: Path) -> None:
    check_files(folder / name for name in (*hub.VOCABULARIES, "tokenizer_config.json"))
    pieces = folder / "spiece.model"
    if pieces.is_file() and not (folder / "tokenizer.json").is_file():
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2  # transformers reads it with these

        model: Any = sentencepiece_model_pb2
        try:
            model.ModelProto.FromString(pieces.read_bytes())
        except DecodeError as error:
            raise UnusableError("spiece.model is damaged or cut short") from error


def quieten() -> None:
    """Turns off transformers' progress bars and one harmless warning."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("transformers.configuration_utils").addFilter(_not_the_start_token)


def _not_the_start_token(record: logging.LogRecord) -> bool:
    """False for the warning that MusicGen's start token is one past the codes, as it must be."""
    return not re.search(r"(pad|bos)_token_id must be .* vocabulary", record.getMessage())
