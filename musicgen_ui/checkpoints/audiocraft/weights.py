"""The weights of audiocraft's checkpoints: opened without running code, renamed to transformers'.

A checkpoint is a folder with `state_dict.bin` and `compression_state_dict.bin`, pickles that hold
the settings as text and the weights under `best_state`. They are read with `weights_only` and
memory-mapped. The second may name a codec on the Hub instead, or be missing where the settings name
one. The first may also be a training's own file: dora's `checkpoint.th`, or what Replicate's
fine-tuner keeps of it, with weights under `model`.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import pickletools
import reprlib
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeGuard

from musicgen_ui.checkpoints import file_checks, hub
from musicgen_ui.checkpoints.audiocraft import config
from musicgen_ui.checkpoints.file_checks import JsonObject, UnusableError, check_files
from musicgen_ui.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

LANGUAGE_MODEL, CODEC = hub.AUDIOCRAFT
TRAINED = "checkpoint.th"  # by dora, in place of the first
_PRETRAINED = "//pretrained/"  # how settings name a published codec
_NAMES_BEGIN = {
    False: ("condition_provider.", "emb.", "transformer.", "linears.", "out_norm."),
    True: ("encoder.", "decoder.", "quantizer."),  # of a codec
}
_NAMED = 5  # weights named in a sentence
_OUTLINE_BYTES = 2**24  # of a pickle without its weights

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ExportedFile:
    """One of a checkpoint's two files, opened."""

    settings: config.Settings
    weights: dict[str, Tensor]  # by audiocraft's names
    pointer: str | None = None  # a codec's id on the Hub, in place of settings and weights


def is_audiocraft(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of audiocraft's, and none of transformers'."""
    return language_model(folder).is_file() and not hub.weights_in(folder)


def language_model(folder: Path) -> Path:
    """The file with the language model: exported, or as it was trained."""
    trained = folder / TRAINED
    exported = folder / LANGUAGE_MODEL
    return trained if trained.is_file() and not exported.is_file() else exported


def read_both(folder: Path) -> tuple[ExportedFile, ExportedFile]:
    """The language model and the codec in `folder`, their weights mapped.

    Raises:
        RequestError: one is missing or damaged, or holds something else.
    """
    model, codec = read(language_model(folder)), None
    if not (folder / CODEC).is_file():
        codec = named_codec(folder, model)
    return model, codec or read(folder / CODEC)


def named_codec(folder: Path, model: ExportedFile) -> ExportedFile | None:
    """The codec that the settings of the model in `folder` name, if they name one."""
    name = model.settings.get("compression_model_checkpoint")
    if not isinstance(name, str) or _PRETRAINED not in name:
        return None
    return _pointer(folder / CODEC, name.partition(_PRETRAINED)[2])


def _pointer(file: Path, name: object) -> ExportedFile:
    if not isinstance(name, str) or not hub.ID.fullmatch(name):
        raise RequestError(
            f"{file} only names another codec, {reprlib.repr(name)}, which is no Hub id: "
            f"put that codec's own {CODEC} in its place.",
            "checkpoint",
        )
    return ExportedFile(config.Settings(str(file), "{}"), {}, name)


def read(file: Path) -> ExportedFile:
    """One of the two pickles, its weights mapped.

    Raises:
        RequestError: it is missing or damaged, or holds something else.
    """
    from musicgen_ui.checkpoints.loading import plain_names  # torch: seconds

    package = _unpickled(file)
    pointer = package.get("pretrained")
    if pointer is not None and file.name == CODEC:
        return _pointer(file, pointer)
    weights = _weights(package)
    if isinstance(weights, dict):
        weights = {k: w for k, w in weights.items() if not _of_training(k)}
    if not _plain(weights, file.stat().st_size):
        raise RequestError(
            f"{file} holds no plain weights under best_state: export the checkpoint with "
            "audiocraft's own export functions.",
            "checkpoint",
        )
    try:
        names = plain_names(weights, _NAMES_BEGIN[file.name == CODEC])
    except UnusableError as error:
        raise RequestError(f"{file} cannot be used: {error}.", "checkpoint") from error
    try:
        stated = _plain_settings(package.get("xp.cfg"))
    except RecursionError:
        stated = None  # refused below
    settings = config.Settings(str(file), stated)
    return ExportedFile(settings, {names[name]: weight for name, weight in weights.items()})


def _of_training(name: object) -> bool:
    """Whether a weight is one that only training uses, a count among them."""
    plain = name if isinstance(name, str) else ""
    return config.STYLE_TRAINING.search(plain) is not None


def _weights(package: Mapping[object, object]) -> object:
    """The weights of an exported file, or of a training's state: the best ones, else the last."""
    for state in ("fsdp_best_state", "best_state"):
        held = package.get(state)
        if isinstance(held, dict) and held:
            return held["model"] if isinstance(held.get("model"), dict) else held
    return package.get("best_state", package.get("model"))


class _OmegaConf:
    """Stands in for OmegaConf's classes, in which a training keeps its settings."""


_OMEGA = [
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.base.Node"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Integer", "Float", "Boolean", "String")),
]


_OMEGA_GLOBALS = {
    *(" ".join(name.rsplit(".", 1)) for name in (*_OMEGA, "typing.Any")),
    *("collections defaultdict", "__builtin__ dict", "__builtin__ list", "__builtin__ long"),
    *("__builtin__ int", "__builtin__ float", "__builtin__ bool", "__builtin__ unicode"),
    "__builtin__ str",
}


def _plain_settings(value: object) -> object:
    """A training's settings as plain values; whatever else as it is."""
    if isinstance(value, _OmegaConf):
        held = vars(value)
        return _plain_settings(held.get("_content", held.get("_val")))
    if isinstance(value, dict):
        return {key: _plain_settings(inner) for key, inner in value.items()}
    return [_plain_settings(inner) for inner in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _with_stand_ins() -> Iterator[None]:
    """Lets torch's restricted reader make `_OmegaConf` objects in place of OmegaConf's own."""
    import torch

    omega: list[tuple[Callable[..., object], str]] = [
        (_OmegaConf, name) for name in (*_OMEGA, "typing.Any")
    ]
    with torch.serialization.safe_globals([*omega, dict, list, int, float, bool, str, defaultdict]):
        yield


def _unpickled(file: Path) -> dict[object, object]:
    import torch

    try:
        check_files([file])
    except UnusableError as error:
        raise RequestError(f"{file.parent} cannot be used: {error}.", "checkpoint") from error
    mapped = zipfile.is_zipfile(file)  # not cut short, nor in the form before torch 1.6
    try:
        file_checks.require_weights(file, also=_OMEGA_GLOBALS)
        with _with_stand_ins():
            package = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise RequestError(
            f"{file} is missing: copy it beside {LANGUAGE_MODEL}; the one of any of Meta's "
            "checkpoints is the same.",
            "checkpoint",
        ) from error
    except Exception as error:  # a broken pickle may raise anything
        if "GLOBAL" in str(error) or (mapped and isinstance(error, pickle.UnpicklingError)):
            why = (
                "holds more than weights and settings, which is not read, since it could run code: "
                "export the checkpoint with audiocraft's own export functions"
            )
        else:
            why = "is damaged or cut short: fetch or copy it again"
        raise RequestError(f"{file} {why}.", "checkpoint") from error
    return package if isinstance(package, dict) else {}


def outline(name: str, file: IO[bytes]) -> ExportedFile:
    """The settings in one of the two files, without its weights; nothing in it is run.

    Args:
        name: of the file, for sentences.
        file: the file, or a way to read pieces of it.

    Raises:
        RequestError: it cannot be read so.
    """
    try:
        with zipfile.ZipFile(file) as packed:
            entry = next(e for e in packed.infolist() if e.filename.endswith("/data.pkl"))
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _OUTLINE_BYTES:
                raise ValueError("not as torch writes it")
            operations = pickletools.genops(packed.read(entry))
            texts = [text for kind, text, _ in operations if "UNICODE" in kind.name]
    except RequestError:
        raise
    except Exception as error:  # a broken file may raise anything
        if isinstance(error, OSError):  # the way to the Hub
            raise
        raise RequestError(
            f"{name} cannot be looked into before it is downloaded: download the repository and "
            "name the folder.",
            "checkpoint",
        ) from error
    values = dict(itertools.pairwise(texts))  # a key's text comes right before its value's
    if name.endswith(CODEC) and "pretrained" in values:
        return _pointer(Path(name), values["pretrained"])
    return ExportedFile(config.Settings(name, values.get("xp.cfg")), {})


def _plain(weights: object, size: int) -> TypeGuard[dict[str, Tensor]]:
    """Whether all are plain tensors that the file of `size` bytes has room for."""
    import torch

    if not isinstance(weights, dict):
        return False
    return (
        all(
            isinstance(name, str)
            and isinstance(weight, torch.Tensor)
            and weight.layout is torch.strided
            and weight.is_floating_point()
            for name, weight in weights.items()
        )
        and sum(weight.nbytes for weight in weights.values()) <= size
    )


def without_chroma(weights: dict[str, Tensor], melody: dict[str, int]) -> dict[str, Tensor]:
    """`weights` without those that compute chroma, which transformers' format has no place for.

    Args:
        weights: of a language model.
        melody: see `config.melody`. The window of a melody's spectrogram is left out if it is
            Hann's of `n_fft` samples; of a fine-tune on chords the network that recognises them.
    """
    import torch

    if melody.get("chords"):
        weights = {k: w for k, w in weights.items() if not k.startswith(config.CHORD_RECOGNITION)}
    n_fft = melody.get("n_fft", 0)
    window, usual = weights.get(config.CHROMA_WINDOW), torch.hann_window(n_fft)
    # Half a thousandth is float16's rounding.
    if window is None or window.shape != usual.shape or (window - usual).abs().max() > 5e-4:
        return weights
    return {name: w for name, w in weights.items() if name != config.CHROMA_WINDOW}


def renamed(
    file: Path, weights: dict[str, Tensor], shapes: Shapes, codec: JsonObject
) -> dict[str, Tensor]:
    """A file's weights under transformers' names, which `shapes` has with what they must be.

    Raises:
        RequestError: one is missing, unknown or of another shape; the sentence names them.
    """
    expected: Shapes = {}
    places = {key: config.name_of(key, codec) for key in shapes}
    for key, (name, third) in places.items():
        first, *rest = shapes[key]
        expected[name] = (first if third is None else 3 * first, *rest)
    _compare(file, expected, {name: tuple(weight.shape) for name, weight in weights.items()})
    return {
        # A copy, since files cannot hold two weights in the same memory.
        key: weights[name].contiguous() if third is None else weights[name].chunk(3)[third].clone()
        for key, (name, third) in places.items()
    }


def _compare(file: Path, expected: Shapes, found: Shapes) -> None:
    faults = {
        "missing": [name for name in expected if name not in found],
        "not known": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    differences = [f"{fault}: {_some(names)}" for fault, names in faults.items() if names]
    if differences:
        found_differences = "; ".join(differences)
        raise RequestError(
            f"{file} does not hold the weights that its settings describe ({found_differences}): "
            "fetch it again, or choose another checkpoint.",
            "checkpoint",
        )


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def codec_weights(folder: Path) -> dict[str, Tensor]:
    """EnCodec's weights in `folder`, by their names in transformers' MusicGen.

    Raises:
        RequestError: they cannot be read.
    """
    from transformers import EncodecModel

    return _weights_of("audio_encoder", EncodecModel, folder)


def mert_weights(folder: Path, style: JsonObject) -> dict[str, Tensor]:
    """MERT's weights in `folder`, by their names in a `StyleEncoder` of a model.

    Raises:
        RequestError: they cannot be read.
    """
    from transformers import HubertModel

    from musicgen_ui.engine.style import hubert_config

    stated = file_checks.read_object(folder / "config.json")
    masked = stated.get("mask_time_prob", 0.05) or stated.get("mask_feature_prob", 0.0)
    config = hubert_config(style["mert"], masked if isinstance(masked, (int, float)) else 0.0)
    weights = _weights_of("style.mert", HubertModel, folder, config=config)
    return {k: w for k, w in weights.items() if k != "style.mert.masked_spec_embed"}


def text_encoder_weights(folder: Path) -> dict[str, Tensor]:
    """T5's weights in `folder`, by their names in transformers' MusicGen.

    Raises:
        RequestError: they cannot be read.
    """
    from transformers import T5EncoderModel

    return _weights_of("text_encoder", T5EncoderModel, folder)


def _weights_of(
    part: str, kind: Any, folder: Path, config: PreTrainedConfig | None = None
) -> dict[str, Tensor]:
    """The weights of a model in transformers' format, by their names in MusicGen.

    Args:
        part: of MusicGen.
        kind: transformers' class, whose `from_pretrained` gives a pair here.
        folder: where they are.
        config: the model's, where it is not that of the folder.
    """
    try:
        check_files(hub.weights_in(folder))
        for file in hub.weights_in(folder):
            file_checks.require_weights(file)
        model, found = kind.from_pretrained(
            folder,
            local_files_only=True,
            weights_only=True,
            output_loading_info=True,
            config=config,
        )
        if found["missing_keys"]:
            raise ValueError(f"weights are missing: {sorted(found['missing_keys'])[:5]}")
    except UnusableError as error:
        raise RequestError(f"{folder} cannot be used: {error}.", "checkpoint") from error
    except Exception as error:
        raise RequestError(
            f"{folder} could not be read: it must hold {kind.__name__}'s weights in transformers' "
            "format. Name another folder, or fetch it again.",
            "checkpoint",
        ) from error
    tied = "encoder.embed_tokens.weight"  # T5's; `shared` has it
    return {f"{part}.{key}": w for key, w in model.state_dict().items() if key != tied}
