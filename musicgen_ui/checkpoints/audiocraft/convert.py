"""audiocraft's checkpoints in transformers' format, written to a folder or read into memory.

The configuration made from a checkpoint's settings says which weights transformers expects; exactly
these must be there in their shapes, else nothing is written. They keep the precision that they are
stored in. The text encoder is not in the checkpoint: it is the one given, or one in its subfolder
`text_encoder`, or the one that its settings name, from the Hub or its cache; audiocraft writes T5's
ids without their owner ("t5-base"). So it is with MERT, which a style checkpoint needs: given, in
the subfolder `mert`, or from the Hub. The app also reads such a folder as it is, so converting it
is not necessary.
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
from musicgen_ui.checkpoints import file_checks, hub
from musicgen_ui.checkpoints.audiocraft import config as audiocraft
from musicgen_ui.checkpoints.audiocraft import weights as exported
from musicgen_ui.checkpoints.audiocraft.weights import CODEC, LANGUAGE_MODEL, ExportedFile
from musicgen_ui.checkpoints.file_checks import JsonObject, UnusableError
from musicgen_ui.checkpoints.hub import Report
from musicgen_ui.checkpoints.hub_errors import HubError
from musicgen_ui.errors import RequestError
from musicgen_ui.request import WINDOW_S

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from musicgen_ui.engine.transformer import Model

    Read = tuple[Model, PreTrainedTokenizerBase, JsonObject]

TEXT_ENCODER, MERT = "text_encoder", "mert"  # subfolders that may hold them
MERT_ID = "m-a-p/MERT-v1-95M"  # which audiocraft takes by that name
_TEXT_ADVICE = (
    "name a folder with T5 and its tokenizer by --text-encoder, or put "
    f"one called {TEXT_ENCODER} beside {LANGUAGE_MODEL}"
)
_MERT_ADVICE = (
    f"name a folder with MERT by --mert, or put one called {MERT} beside {LANGUAGE_MODEL}"
)
_CODEC_ADVICE = f"put that codec's own {CODEC} in place of the one here"
_NOT_IN_LANGUAGE_MODEL = ("text_encoder.", "audio_encoder.", "style.mert.")  # in other files
_TEXT_PROJECTION = "condition_provider.conditioners.description.output_proj.weight"
_MERT_PROJECTION = "condition_provider.conditioners.self_wav.embed.weight"

Config = JsonObject
Files = tuple[ExportedFile, ExportedFile]  # the language model and the codec


@dataclass(frozen=True)
class Converted:
    """A checkpoint converted and checked, its weights in memory or memory-mapped."""

    config: Config
    generation: Config
    extractor: Config  # of the processor
    weights: dict[str, Tensor]  # by transformers' names
    tokenizer: PreTrainedTokenizerBase


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command line's `convert`."""
    parser.add_argument("source", metavar="IN", help=f"folder with {LANGUAGE_MODEL} and {CODEC}")
    parser.add_argument("destination", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument(
        "--text-encoder",
        metavar="FOLDER_OR_ID",
        help="T5 in transformers' format (default: what the checkpoint names, from the Hub)",
    )
    parser.add_argument(
        "--mert",
        metavar="FOLDER_OR_ID",
        help=f"MERT in transformers' format, of a style checkpoint (default: {MERT_ID})",
    )


def run(flags: argparse.Namespace) -> None:
    """Converts as the flags say; raises as `convert`."""
    source, destination = files.expanded(flags.source), files.expanded(flags.destination)
    report: Report = lambda text: print(text, file=sys.stderr)  # noqa: E731
    convert(source, destination, flags.text_encoder, report, flags.mert)
    print(destination)


def convert(
    source: Path,
    destination: Path,
    text_encoder: str | None,
    report: Report,
    mert: str | None = None,
) -> None:
    """Writes the checkpoint in `source` into `destination` in transformers' format.

    Raises:
        RequestError: `source` is no such checkpoint, damaged or of another architecture; its text
            encoder or codec cannot be had; or `destination` is not empty or cannot be written.
    """
    destination = destination.resolve()
    _require_empty(destination)
    if not exported.language_model(source).is_file():
        raise RequestError(
            f"There is no {LANGUAGE_MODEL} in {source}: name a folder with a checkpoint as "
            "audiocraft exports it.",
            "checkpoint",
        )
    made = read(source, exported.read_both(source), text_encoder, report, mert)
    report(f"writing {destination}")
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


def _require_empty(destination: Path) -> None:
    try:
        taken = destination.exists() and (not destination.is_dir() or any(destination.iterdir()))
    except OSError as error:
        raise RequestError(f"{destination} cannot be read: {error.strerror}.") from error
    if taken:
        raise RequestError(f"{destination} exists already: name a new or an empty folder.")


def _write(made: Converted, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = folder / "model.safetensors"
    try:
        save_file(made.weights, weights, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error
    made.tokenizer.save_pretrained(folder)
    melody = made.extractor["feature_extractor_type"] == "MusicgenMelodyFeatureExtractor"
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
    weights.chmod(
        (folder / "config.json").stat().st_mode
    )  # safetensors makes it readable to the owner alone


def config_of(folder: Path, files: Files) -> Config:
    """transformers' configuration of the checkpoint in `folder`, from its files' settings.

    Raises:
        RequestError: as `read`.
    """
    return _config(folder, files)


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
    return _config(None, (model, codec))


def generation_of(files: Files) -> Config:
    """How audiocraft samples from the checkpoint, as transformers' generation settings.

    Raises:
        RequestError: as `read`.
    """
    model, codec = files
    return audiocraft.generation(model.settings, _codec_config(codec))


def fetch(folder: Path, files: Files, report: Report) -> None:
    """Downloads what `read` needs beside the files in `folder` and the Hub's cache lacks.

    Raises:
        RequestError: it cannot be had.
    """
    model, codec = files
    text_encoder = _text_encoder(folder, model, None)
    text = _fetched(text_encoder, _TEXT_ADVICE, report)
    _tokenizer_folder(text, text_encoder, _read_config(text, _TEXT_ADVICE), report)
    if codec.pointer:
        _fetched(codec.pointer, _CODEC_ADVICE, report)
    if audiocraft.style(model.settings):
        _fetched(_mert(folder, None), _MERT_ADVICE, report)


def load(folder: Path, files: Files, dtype: torch.dtype, streamed: bool) -> Read:
    """transformers' model with the weights in `folder` as `dtype`, its tokenizer, and the
    configuration of its feature extractor. `streamed` is as for `loading.model`.

    Raises:
        RequestError: as `read`.
    """
    from transformers import GenerationConfig

    from musicgen_ui.checkpoints import loading

    made = read(folder, files, None, lambda _: None)
    prefixed = made.config["model_type"] == "musicgen_melody"
    model = loading.model(prefixed, made.config, loading.InMemory(made.weights), dtype, streamed)
    model.generation_config = GenerationConfig(**made.generation)
    return model, made.tokenizer, made.extractor


def read(
    folder: Path, files: Files, text_encoder: str | None, report: Report, mert: str | None = None
) -> Converted:
    """The checkpoint in `folder` converted, every weight accounted for.

    Raises:
        RequestError: it is damaged or of another architecture, or its text encoder or codec cannot
            be had.
    """
    from musicgen_ui.checkpoints import loading  # torch: seconds

    loading.quieten()
    model, codec = files
    where = _text_encoder(folder, model, text_encoder)
    text = _fetched(where, _TEXT_ADVICE, report)
    codec_config = _codec_config(codec)
    config = _config(folder, files, text, mert)
    _check(folder, config, model)
    shapes = _shapes(config)
    of_model = {k: s for k, s in shapes.items() if not k.startswith(_NOT_IN_LANGUAGE_MODEL)}
    melody = audiocraft.melody(model.settings)
    weights = exported.without_chroma(model.weights, melody)
    weights = exported.renamed(exported.language_model(folder), weights, of_model, codec_config)
    if codec.pointer:
        codec_folder = _fetched(codec.pointer, _CODEC_ADVICE, report)
        weights |= exported.codec_weights(codec_folder)
    else:
        of_codec = {key: s for key, s in shapes.items() if key.startswith("audio_encoder.")}
        weights |= exported.renamed(folder / CODEC, codec.weights, of_codec, codec_config)
    tokenizer = _tokenizer(text, where, config, report)
    weights |= exported.text_encoder_weights(text)
    if style := config.get("style"):
        weights |= exported.mert_weights(_fetched(_mert(folder, mert), _MERT_ADVICE, report), style)
    generation = audiocraft.generation(model.settings, codec_config)
    return Converted(config, generation, _extractor(config, melody), weights, tokenizer)


def _tokenizer_folder(text: Path, where: Path | str, config: Config, report: Report) -> Path:
    """The folder with the tokenizer of the text encoder in `text`, whose configuration is given."""
    from musicgen_ui.checkpoints import loading

    repo_id = _hub_id(where) if isinstance(where, str) else None
    vocabulary = config.get("vocab_size", loading.T5_VOCABULARY)
    return loading.with_tokenizer(text, repo_id, vocabulary, report)


def _tokenizer(
    text: Path, where: Path | str, config: Config, report: Report
) -> PreTrainedTokenizerBase:
    from musicgen_ui.checkpoints import loading

    encoder = config["text_encoder"]
    try:
        folder = _tokenizer_folder(text, where, encoder, report)
        return loading.tokenizer(folder, encoder.get("vocab_size", loading.T5_VOCABULARY))
    except UnusableError as error:
        raise RequestError(f"{text} cannot be used: {error}.", "checkpoint") from error


def _config(
    folder: Path | None, files: Files, text: Path | str | None = None, mert: str | None = None
) -> Config:
    """transformers' configuration of a checkpoint.

    Args:
        folder: where it is; None is on the Hub.
        files: its two files, whose weights are not looked at.
        text: its text encoder; None is what `_text_encoder` finds.
        mert: a user's name for MERT.
    """
    model, codec = files
    text = text or _text_encoder(folder, model, None)
    melody, style = audiocraft.melody(model.settings), audiocraft.style(model.settings)
    prefixed = bool(melody or style)
    config = {
        "architectures": [f"Musicgen{'Melody' if prefixed else ''}ForConditionalGeneration"],
        "model_type": "musicgen_melody" if prefixed else "musicgen",
        "is_encoder_decoder": True,
        "dtype": "float32",  # to compute in; files in half precision say nothing about that
        "text_encoder": _read_config(text, _TEXT_ADVICE),
        "audio_encoder": _codec_config(codec),
        "decoder": audiocraft.decoder(model.settings),
        # Keys of this app, which transformers ignores:
        "window_s": float(min(audiocraft.window_s(model.settings), WINDOW_S)),
        "sound_effects": model.settings.get("solver") == "audiogen",
    }
    if style:
        where = _mert(folder, mert)
        style["mert"] = audiocraft.mert(str(where), _read_config(where, _MERT_ADVICE))
        # transformers' words for the width and number of what comes before the text.
        return config | {"style": style, "num_chroma": style["hidden_size"], "chroma_length": 1}
    return config | {key: melody[key] for key in ("num_chroma", "chroma_length") if melody}


def _mert(folder: Path | None, given: str | None) -> Path | str:
    """The folder of MERT, or its id on the Hub: given, beside the model or the usual one."""
    if given:
        return _named(given)
    if folder and (folder / MERT / "config.json").is_file():
        return folder / MERT
    return MERT_ID


def _codec_config(codec: ExportedFile) -> Config:
    if codec.pointer:
        return _read_config(codec.pointer, _CODEC_ADVICE)
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


def _check(folder: Path, config: Config, model: ExportedFile) -> None:
    """Requires that the parts fit, before shapes are compared."""
    configuration.check(str(folder), configuration.parse(str(folder), config))
    width, hidden = config["text_encoder"].get("d_model"), config["decoder"]["hidden_size"]
    style = config.get("style", {})
    features = style.get("mert", {}).get("hidden_size")
    for part, found, weight, flag in (
        ("The text encoder", width, _TEXT_PROJECTION, "--text-encoder"),
        ("MERT", features, _MERT_PROJECTION, "--mert"),
    ):
        projection = model.weights.get(weight)
        if projection is not None and projection.dim() == 2 and projection.shape[1] != found:
            raise RequestError(
                f"{part} is {found} wide, and {folder} was trained with one of "
                f"{projection.shape[1]}: name the right one with {flag}.",
                "checkpoint",
            )
    if hidden in (width, style.get("hidden_size")):
        part = "text encoder" if width == hidden else "style encoder"
        raise RequestError(
            f"{folder} cannot be converted: its {part} is as wide as its decoder, and "
            "transformers' format has no place for the projection between them.",
            "checkpoint",
        )


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The weights of transformers' model by name, from a model that holds none."""
    import torch

    from musicgen_ui.engine.style import StyleEncoder

    kind = _kind(config)
    with torch.device("meta"):
        # A copy: transformers 5.17 takes the parts' kinds out of it.
        model = kind(kind.config_class.from_dict(deepcopy(config)))
        if style := config.get("style"):
            model.style = StyleEncoder(style)
    return {key: tuple(weight.shape) for key, weight in model.state_dict().items()}


def _kind(config: Config) -> Any:
    import transformers

    return getattr(transformers, config["architectures"][0])


def _text_encoder(folder: Path | None, model: ExportedFile, given: str | None) -> Path | str:
    """The folder of the text encoder, or its id on the Hub: given, beside the model or named."""
    if given:
        return _named(given)
    if folder and (folder / TEXT_ENCODER / "config.json").is_file():
        return folder / TEXT_ENCODER
    name = model.settings.get("conditioners.description.t5.name")
    if not isinstance(name, str) or not hub.ID.fullmatch(_hub_id(name)):
        raise model.settings.refusal("conditioners.description.t5.name", name)
    return name


def _hub_id(name: str) -> str:
    """ "t5-base", as audiocraft writes it, is "google-t5/t5-base" on the Hub."""
    return name if "/" in name else f"google-t5/{name}"


def _named(name: str) -> Path | str:
    """The folder with a `config.json` that a user names, or else an id on the Hub.

    A name inside a checkpoint is always an id: a folder that happens to have that name must not
    replace the Hub's.
    """
    folder = files.expanded(name)
    return folder if (folder / "config.json").is_file() or not _is_id(name) else name


def _read_config(where: Path | str, advice: str) -> Config:
    """The `config.json` of a folder or of an id on the Hub.

    Raises:
        RequestError: it cannot be had, with `advice`, what to do then.
    """
    if isinstance(where, str):
        file = _from_hub(where, advice, hub.config_file)
    else:
        file = _folder(where, advice) / "config.json"
    try:
        config = file_checks.read_object(file)
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{where} has no readable config.json: {advice}.", "checkpoint"
        ) from error
    return config


def _fetched(where: Path | str, advice: str, report: Report) -> Path:
    """The folder of a text encoder or codec: `where` itself, or that of an id on the Hub.

    Raises:
        RequestError: it cannot be had, with `advice`, what to do then.
    """
    if isinstance(where, Path):
        return _folder(where, advice)
    return _from_hub(where, advice, lambda repo_id: hub.download(repo_id, report))


def _folder(folder: Path, advice: str) -> Path:
    if not folder.is_dir():
        raise RequestError(f'There is no folder "{str(folder)[:80]}": {advice}.', "checkpoint")
    return folder


def _is_id(name: str) -> bool:
    return bool(hub.ID.fullmatch(_hub_id(name)))


def _from_hub(name: str, advice: str, ask: Callable[[str], Path]) -> Path:
    """Asks the Hub or its cache for `name`; a failure says what the checkpoint needs it for."""
    try:
        return ask(name if hub.cached(name) else _hub_id(name))
    except HubError as error:
        why = f"The checkpoint needs {name}, and {error.why[:1].lower()}{error.why[1:]}"
        raise HubError(why, f"{error.remedy}; or {advice}", "checkpoint") from error
