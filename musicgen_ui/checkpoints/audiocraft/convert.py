"""audiocraft's checkpoints into transformers' format, as a folder or straight into memory.

The configuration made from a checkpoint's settings says which weights transformers expects; every
one must be there in its shape and no other, else nothing is written. The weights are mapped and
keep the precision they are stored in. The text encoder is not in the checkpoint: it is the one
given, or one in its subfolder `text_encoder`, or the one that its settings name, from the Hub or
its cache. The app reads such a folder as it is: the weights only change their names, and no second
copy of gigabytes fills the disk or goes stale.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgen_ui import files
from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints import hub
from musicgen_ui.checkpoints.audiocraft import config as audiocraft
from musicgen_ui.checkpoints.audiocraft import parts
from musicgen_ui.checkpoints.audiocraft import weights as exported
from musicgen_ui.checkpoints.audiocraft.weights import CODEC, LANGUAGE_MODEL, Exported
from musicgen_ui.checkpoints.unusable import Unusable
from musicgen_ui.errors import RequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TEXT_ENCODER = "text_encoder"  # a subfolder that may hold it
_TEXT_ADVICE = (
    "name a folder with T5 and its tokenizer by --text-encoder, or put "
    f"one called {TEXT_ENCODER} beside {LANGUAGE_MODEL}"
)
_CODEC_ADVICE = f"put that codec's own {CODEC} in place of the one here"
_OTHER_FILES = ("text_encoder.", "audio_encoder.")  # where these weights of the model are from
_TEXT_PROJECTION = "condition_provider.conditioners.description.output_proj.weight"

Config = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Converted:
    """A checkpoint in transformers' terms, checked and in memory, or mapped."""

    config: Config
    generation: Config
    extractor: Config  # of the processor
    weights: dict[str, Tensor]  # by transformers' names
    tokenizer: Any


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command line's `convert`."""
    parser.add_argument("source", metavar="IN", help=f"folder with {LANGUAGE_MODEL} and {CODEC}")
    parser.add_argument("destination", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument(
        "--text-encoder",
        metavar="FOLDER_OR_ID",
        help="T5 in transformers' format (default: what the checkpoint names, from the Hub)",
    )


def run(flags: argparse.Namespace) -> None:
    """Converts as the flags say; raises as `convert`."""
    source, destination = files.expanded(flags.source), files.expanded(flags.destination)
    convert(source, destination, flags.text_encoder, lambda text: print(text, file=sys.stderr))
    print(destination)


def convert(source: Path, destination: Path, text_encoder: str | None, say: Say) -> None:
    """Writes the checkpoint in `source` into `destination` in transformers' format.

    Raises:
        RequestError: `source` is no such checkpoint, damaged or of another architecture; its text
            encoder or codec cannot be had; or `destination` is not empty or cannot be written.
    """
    destination = destination.resolve()
    _hold_empty(destination)
    if not exported.language_model(source).is_file():
        raise RequestError(
            f"There is no {LANGUAGE_MODEL} in {source}: name a folder with a checkpoint as "
            "audiocraft exports it.",
            "checkpoint",
        )
    made = read(source, text_encoder, say)
    say(f"writing {destination}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".convert-") as temporary:
            unfinished = Path(temporary) / "checkpoint"
            unfinished.mkdir()
            _write(made, unfinished)
            if destination.is_dir():
                destination.rmdir()
            unfinished.rename(destination)
    except OSError as error:
        raise RequestError(
            f"{destination} cannot be written: {error.strerror or error}."
        ) from error


def _hold_empty(destination: Path) -> None:
    try:
        taken = destination.exists() and (not destination.is_dir() or any(destination.iterdir()))
    except OSError as error:
        raise RequestError(f"{destination} cannot be read: {error.strerror}.") from error
    if taken:
        raise RequestError(f"{destination} is there already: name a new or an empty folder.")


def _write(made: Converted, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = folder / "model.safetensors"
    try:
        save_file(made.weights, weights, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error
    made.tokenizer.save_pretrained(folder)
    melody = made.config["model_type"] == "musicgen_melody"
    processor = {
        "feature_extractor": made.extractor,
        "processor_class": "MusicgenMelodyProcessor" if melody else "MusicgenProcessor",
    }
    files = {
        "config.json": made.config,
        "generation_config.json": made.generation,
        "processor_config.json": processor,
    }
    for name, values in files.items():
        text = json.dumps(values, indent=2, sort_keys=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors lets the owner alone read


def config_of(folder: Path) -> Config:
    """transformers' configuration of the checkpoint in `folder`; reads no weights.

    Raises:
        RequestError: as `read`.
    """
    model, codec = exported.read_both(folder)
    name = _text_encoder(folder, model, None)
    return _config(model, _codec_config(codec), parts.read_config(name, _TEXT_ADVICE))


@functools.lru_cache(maxsize=16)
def config_on_the_hub(repo_id: str) -> Config:
    """The same of a checkpoint on the Hub that is not downloaded yet.

    Raises:
        RequestError: as `read`; the repository is no such checkpoint, or there is no network.
    """
    with hub.opened(repo_id, LANGUAGE_MODEL) as file:
        model = exported.outline(f"{repo_id}/{LANGUAGE_MODEL}", file)
    codec = exported.named_codec(Path(repo_id), model)
    if codec is None or CODEC in hub.names_on_the_hub(repo_id):
        with hub.opened(repo_id, CODEC) as file:
            codec = exported.outline(f"{repo_id}/{CODEC}", file)
    name = _text_encoder(None, model, None)
    return _config(model, _codec_config(codec), parts.read_config(name, _TEXT_ADVICE))


def generation_of(folder: Path) -> Config:
    """How audiocraft samples from the checkpoint in `folder`, in transformers' words.

    Raises:
        RequestError: as `read`.
    """
    model, codec = exported.read_both(folder)
    return audiocraft.generation(model.settings, _codec_config(codec))


def fetch(folder: Path, say: Say) -> None:
    """Downloads what `load` will need beside the files in `folder` and the Hub's cache lacks.

    Raises:
        RequestError: it cannot be had.
    """
    model, codec = exported.read_both(folder)
    text_encoder = _text_encoder(folder, model, None)
    text = parts.fetched(text_encoder, _TEXT_ADVICE, say)
    _tokenizer_folder(text, text_encoder, parts.read_config(text, _TEXT_ADVICE), say)
    if codec.pointer:
        parts.fetched(codec.pointer, _CODEC_ADVICE, say)


def load(folder: Path, dtype: torch.dtype, streamed: bool) -> tuple[Any, Any, Config]:
    """transformers' model with the weights in `folder` as `dtype`, its tokenizer, and the
    configuration of its feature extractor. `streamed` is as for `weights.model`.

    Raises:
        RequestError: as `read`.
    """
    from transformers import GenerationConfig

    from musicgen_ui.checkpoints import loading

    made = read(folder, None, lambda _: None)
    melody = made.config["model_type"] == "musicgen_melody"
    model = loading.model(melody, made.config, loading.Held(made.weights), dtype, streamed)
    model.generation_config = GenerationConfig(**made.generation)
    return model, made.tokenizer, made.extractor


def read(folder: Path, text_encoder: str | None, say: Say) -> Converted:
    """The checkpoint in `folder` in transformers' terms, every weight accounted for.

    Raises:
        RequestError: it is damaged or of another architecture, or its text encoder or codec cannot
            be had.
    """
    parts.quieten()
    say(f"reading {folder}")
    model, codec = exported.read_both(folder)
    where = _text_encoder(folder, model, text_encoder)
    text = parts.fetched(where, _TEXT_ADVICE, say)
    codec_config = _codec_config(codec)
    config = _config(model, codec_config, parts.read_config(text, _TEXT_ADVICE))
    _check(folder, config, model)
    shapes = _shapes(config)
    mine = {key: s for key, s in shapes.items() if not key.startswith(_OTHER_FILES)}
    melody = audiocraft.melody(model.settings)
    weights = exported.without_window(model.weights, melody.get("n_fft", 0))
    weights = exported.renamed(exported.language_model(folder), weights, mine, codec_config)
    if codec.pointer:
        weights |= parts.codec(parts.fetched(codec.pointer, _CODEC_ADVICE, say))
    else:
        mine = {key: s for key, s in shapes.items() if key.startswith("audio_encoder.")}
        weights |= exported.renamed(folder / CODEC, codec.weights, mine, codec_config)
    tokenizer, text_weights = _tokenizer(text, where, config, say), parts.text_encoder(text)
    generation = audiocraft.generation(model.settings, codec_config)
    extractor = _extractor(config, melody)
    return Converted(config, generation, extractor, weights | text_weights, tokenizer)


def _tokenizer_folder(text: Path, where: Path | str, config: Config, say: Say) -> Path:
    """The folder with the tokenizer of the text encoder in `text`, whose configuration is given."""
    repo_id = parts.hub_id(where) if isinstance(where, str) else None
    vocabulary = config.get("vocab_size", parts.T5_VOCABULARY)
    return parts.with_tokenizer(text, repo_id, vocabulary, say)


def _tokenizer(text: Path, where: Path | str, config: Config, say: Say) -> Any:
    encoder = config["text_encoder"]
    try:
        folder = _tokenizer_folder(text, where, encoder, say)
        return parts.tokenizer(folder, encoder.get("vocab_size", parts.T5_VOCABULARY))
    except Unusable as error:
        raise RequestError(f"{text} cannot be used: {error}.", parts.FIELD) from error


def _config(model: Exported, codec: Config, text_encoder: Config) -> Config:
    melody = audiocraft.melody(model.settings)
    config = {
        "architectures": [f"Musicgen{'Melody' if melody else ''}ForConditionalGeneration"],
        "model_type": "musicgen_melody" if melody else "musicgen",
        "is_encoder_decoder": True,
        "dtype": "float32",  # to compute in; files in half precision say nothing about that
        "text_encoder": text_encoder,
        "audio_encoder": codec,
        "decoder": audiocraft.decoder(model.settings),
    }
    return config | {key: melody[key] for key in ("num_chroma", "chroma_length") if melody}


def _codec_config(codec: Exported) -> Config:
    if codec.pointer:
        return parts.read_config(codec.pointer, _CODEC_ADVICE)
    return audiocraft.codec(codec.settings)


def _extractor(config: Config, melody: Config) -> Config:
    """The feature extractor's configuration; melody's is by hand, its class needs torchaudio."""
    if not melody:
        return {
            "feature_extractor_type": "EncodecFeatureExtractor",
            "feature_size": config["decoder"]["audio_channels"],
            "sampling_rate": config["audio_encoder"]["sampling_rate"],
            "chunk_length_s": None,
            "overlap": None,
            "padding_side": "left",
            "padding_value": 0.0,
            "return_attention_mask": True,
        }
    return {
        "feature_extractor_type": "MusicgenMelodyFeatureExtractor",
        "feature_size": melody["num_chroma"],
        **{key: value for key, value in melody.items() if key != "chroma_length"},
        "padding_side": "left",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "stem_indices": [3, 2],  # of Demucs' four: all but drums and bass
    }


def _check(folder: Path, config: Config, model: Exported) -> None:
    """Holds that the parts fit, before shapes are compared."""
    configuration.check(str(folder), configuration.of(str(folder), config))
    width, hidden = config["text_encoder"].get("d_model"), config["decoder"]["hidden_size"]
    projection = model.weights.get(_TEXT_PROJECTION)
    if projection is not None and projection.dim() == 2 and projection.shape[1] != width:
        raise RequestError(
            f"The text encoder is {width} wide, and {folder} was trained with one of "
            f"{projection.shape[1]}: name the right one with --text-encoder.",
            "checkpoint",
        )
    if width == hidden:
        raise RequestError(
            f"{folder} cannot be converted: its text encoder is as wide as its decoder, and "
            "transformers' format has no place for the projection between them.",
            "checkpoint",
        )


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The weights of transformers' model by name, from a model that holds none."""
    import torch

    kind = _kind(config)
    with torch.device("meta"):
        # A copy: transformers 5.17 takes the parts' kinds out of it.
        model = kind(kind.config_class.from_dict(deepcopy(config)))
    return {key: tuple(weight.shape) for key, weight in model.state_dict().items()}


def _kind(config: Config) -> Any:
    import transformers

    return getattr(transformers, config["architectures"][0])


def _text_encoder(folder: Path | None, model: Exported, given: str | None) -> Path | str:
    """The folder of the text encoder, or its id on the Hub: given, beside the model or named."""
    if given:
        return parts.place(given)
    if folder and (folder / TEXT_ENCODER / "config.json").is_file():
        return folder / TEXT_ENCODER
    name = model.settings.get("conditioners.description.t5.name")
    if not isinstance(name, str) or not hub.ID.fullmatch(parts.hub_id(name)):
        raise model.settings.refusal("conditioners.description.t5.name", name)
    return name
