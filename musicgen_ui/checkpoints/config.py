"""A checkpoint's configuration: `config.json`, checked, with every value filled in.

Whether the parts of a checkpoint fit each other is known from the configuration, before a weight is
read and without importing transformers. The settings that a checkpoint states for its own sampling,
in `generation_config.json`, are read here too.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

from musicgen_ui.checkpoints import file_checks
from musicgen_ui.checkpoints.config_types import AudioEncoder, Configuration
from musicgen_ui.checkpoints.file_checks import JsonObject, UnusableError, check_files
from musicgen_ui.errors import RequestError
from musicgen_ui.request import CHECKPOINT_FIELDS, WINDOW_S, GenerationRequest, coerce

# Meta's sizes: layers, hidden size, heads, feed-forward size of the decoder. The rest is the same.
META_SIZES = {
    "small": (24, 1024, 16, 4096),
    "medium": (48, 1536, 24, 6144),
    "large": (48, 2048, 32, 8192),
}
# Meta's MusicGen checkpoints, each mono and stereo, by short name: size, and whether they follow
# melodies.
META_WORDS = {size: (size, False) for size in META_SIZES} | {
    "melody": ("medium", True),
    "melody-large": ("large", True),
}
MELODY = {"num_chroma": 12, "chroma_length": 235}  # pitch classes, and columns of them in 30 s
# What is between a clip and the decoder of MusicGen-Style: MERT (HuBERT's base size), a transformer
# and a residual quantizer, of which every 15th token is kept.
STYLE: JsonObject = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_quantizers": 6,
    "codebook_size": 1024,
    "downsampling": 15,
}
MERT: JsonObject = {
    "sampling_rate": 24_000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "conv_dim": [512] * 7,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
}
# The checkpoints on the Hub that have a short name: their ids by it.
PUBLISHED = {
    **{s + word: f"facebook/musicgen-{s}{word}" for s in ("", "stereo-") for word in META_WORDS},
    # In audiocraft's format alone:
    "style": "facebook/musicgen-style",
    "audiogen": "facebook/audiogen-medium",  # sound effects
}
AUDIOCRAFT_ALONE = ("style", "audiogen")
GENERATION_FILE = "generation_config.json"
_WINDOWS_S = (1.0, WINDOW_S)  # the shortest and the longest window that a configuration may state
# The values of what a configuration leaves out: Meta's.
_DEFAULTS: dict[str, JsonObject] = {
    "text_encoder": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 12,
        "num_heads": 12,
        "relative_attention_num_buckets": 32,
        "feed_forward_proj": "relu",
    },
    "audio_encoder": {
        "model_type": "encodec",
        "sampling_rate": 32000,
        "audio_channels": 1,
        "num_filters": 64,
        "num_residual_layers": 1,
        "upsampling_ratios": [8, 5, 4, 4],
        "hidden_size": 128,
        "kernel_size": 7,
        "last_kernel_size": 7,
        "residual_kernel_size": 3,
        "compress": 2,
        "num_lstm_layers": 2,
        "use_conv_shortcut": False,
        "dilation_growth_rate": 2,
        "codebook_size": 2048,
        "target_bandwidths": [2.2],
    },
    "decoder": {
        "vocab_size": 2048,
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "ffn_dim": 4096,
        "num_codebooks": 4,
        "audio_channels": 1,
        "max_position_embeddings": 2048,
    },
}


_LARGEST_COUNT = 2**20
_LARGEST = {  # counts in a configuration, far beyond any model
    **dict.fromkeys(("num_layers", "num_hidden_layers", "num_heads", "num_attention_heads"), 1024),
    **dict.fromkeys(("num_lstm_layers", "num_residual_layers", "num_codebooks"), 64),
    **dict.fromkeys(("kernel_size", "last_kernel_size", "residual_kernel_size"), 1024),
    **dict.fromkeys(("upsampling_ratios", "compress", "dilation_growth_rate"), 1024),
    **dict.fromkeys(("d_model", "d_kv", "hidden_size", "codebook_dim", "num_filters"), 2**15),
    **dict.fromkeys(("num_quantizers", "conv_stride", "conv_kernel"), 64),
    **dict.fromkeys(("conv_dim", "intermediate_size"), 2**15),
    **dict.fromkeys(("num_conv_pos_embeddings", "num_conv_pos_embedding_groups"), 1024),
    "target_bandwidths": 10_000,
    "chroma_length": 2**15,
    "num_labels": 1024,
}
_LONGEST_LIST = 32
_MOST_OVERLAP = 16  # analysis windows that a sample of a melody is in; published ones have 4
_LARGEST_TABLE = 2**27  # entries of a table that is computed, not stored: half a GB


def decoder_defaults(keys: Iterable[str]) -> dict[str, object]:
    """The values of what a decoder's configuration leaves out."""
    return {key: _DEFAULTS["decoder"][key] for key in keys}


def meta(word: str, stereo: bool) -> Configuration:
    """The configuration of one of Meta's MusicGen checkpoints by short name, see `META_WORDS`."""
    size, melody = META_WORDS[word]
    layers, hidden, heads, ffn = META_SIZES[size]
    decoder = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_dim": ffn,
        "num_codebooks": 8 if stereo else 4,
        "audio_channels": 2 if stereo else 1,
    }
    return _filled({"decoder": decoder}, melody)


def audiogen() -> Configuration:
    """The configuration of AudioGen (Kreuk et al. 2022, arXiv 2209.15352) as Meta published it."""
    layers, hidden, heads, ffn = META_SIZES["medium"]
    decoder = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_dim": ffn,
    }
    t5_large = {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}
    codec = {"sampling_rate": 16000, "upsampling_ratios": [8, 5, 4, 2]}
    config = {"text_encoder": t5_large, "audio_encoder": codec, "decoder": decoder}
    return _filled({**config, "window_s": 10.0, "sound_effects": True}, melody=False)


def style() -> Configuration:
    """The configuration of MusicGen-Style (Rouard et al. 2024, arXiv 2407.12563) of Meta's."""
    decoder = meta("medium", stereo=False)["decoder"]
    return _filled({"decoder": decoder, "style": {}}, melody=False)


def published(word: str) -> Configuration:
    """The configuration of a checkpoint on the Hub that has this short name, see `PUBLISHED`."""
    if word == "audiogen":
        return audiogen()
    if word == "style":
        return style()
    return meta(word.removeprefix("stereo-"), word.startswith("stereo-"))


def read(name: str, file: Path) -> Configuration:
    """The configuration in a `config.json`, those values that the app needs filled in.

    Raises:
        RequestError: it cannot be read, or is not MusicGen's.
    """
    try:
        check_files([file])
        config = file_checks.read_object(file)
    except UnusableError as error:
        raise RequestError(f"{name} cannot be used: {error}.", "checkpoint") from error
    except (OSError, ValueError) as error:
        raise _unreadable(name) from error
    return parse(name, config)


def parse(name: str, config: JsonObject) -> Configuration:
    """The values of a `config.json`, those that the app needs filled in.

    Raises:
        RequestError: it is not MusicGen's.
    """
    try:
        kind = config["model_type"]
        if kind in ("musicgen", "musicgen_melody"):
            return _filled(config, kind == "musicgen_melody" and "style" not in config)
    except _ValueOutOfBoundsError as error:
        raise RequestError(
            f"{name} cannot be used: in its config.json {error}. Choose another checkpoint.",
            "checkpoint",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(name) from error
    raise RequestError(
        f"{name} holds a {str(kind)[:40]} model, not MusicGen: choose another checkpoint, or "
        '"bundled".',
        "checkpoint",
    )


def _unreadable(name: str) -> RequestError:
    return RequestError(
        f"{name} is not a checkpoint: it has no readable config.json. Choose a folder with a "
        'checkpoint in transformers\' format, or "bundled".',
        "checkpoint",
    )


def _filled(config: JsonObject, melody: bool) -> Configuration:
    filled: dict[str, JsonObject] = {
        part: {**values, **config.get(part, {})} for part, values in _DEFAULTS.items()
    }
    filled["melody"] = {key: config.get(key, value) for key, value in MELODY.items() if melody}
    for part, values in {**_DEFAULTS, "melody": MELODY if melody else {}}.items():
        for key, default in values.items():
            _require_kind(part, key, filled[part][key], default)
    filled["style"] = _style(config["style"]) if "style" in config else {}
    # transformers' word for the width of what is projected to the decoder's.
    if filled["style"] and config.get("num_chroma", 0) not in (0, filled["style"]["hidden_size"]):
        raise _ValueOutOfBoundsError("num_chroma is not style.hidden_size")
    sound_effects = config.get("sound_effects") is True
    filled["training"] = {"window_s": _window_s(config), "sound_effects": sound_effects}
    checked = cast(Configuration, filled)
    _require_bounded(config, checked)
    return checked


def _style(stated: JsonObject) -> JsonObject:
    """The style's own configuration, MERT's within it, with every value filled in."""
    mert: JsonObject = {key: stated.get("mert", {}).get(key, value) for key, value in MERT.items()}
    filled: JsonObject = {key: stated.get(key, value) for key, value in STYLE.items()}
    for part, values, defaults in (("style", filled, STYLE), ("style.mert", mert, MERT)):
        for key, default in defaults.items():
            _require_kind(part, key, values[key], default)
        if values["hidden_size"] % values["num_attention_heads"]:
            raise _ValueOutOfBoundsError(f"{part}.hidden_size is no multiple of its heads")
    groups = mert["num_conv_pos_embedding_groups"]
    lengths = {len(mert[key]) for key in ("conv_dim", "conv_stride", "conv_kernel")}
    if len(lengths) > 1 or mert["hidden_size"] % groups or filled["hidden_size"] % 2:
        raise _ValueOutOfBoundsError("style's values do not fit each other")
    return {**filled, "mert": mert}


def prefixed(config: Configuration) -> bool:
    """Whether states come as a prefix of the decoder's input, as transformers' MusicgenMelody."""
    return bool(config["melody"] or config["style"])


def _window_s(config: JsonObject) -> float:
    """The seconds of a training example, a key that our converter adds to transformers' format."""
    shortest_s, longest_s = _WINDOWS_S
    window_s = config.get("window_s", longest_s)
    if type(window_s) not in (int, float) or not shortest_s <= window_s <= longest_s:
        raise _ValueOutOfBoundsError(
            f"window_s is {reprlib.repr(window_s)} instead of {shortest_s:g} to {longest_s:g}"
        )
    return float(window_s)


class _ValueOutOfBoundsError(ValueError):
    """A configuration has a value that no model has."""


def _require_kind(part: str, key: str, value: object, default: object) -> None:
    """Raises ValueError unless `value` is of its default's kind; numbers must be positive and
    within `_LARGEST`, before anything is computed with them."""
    numbers: list[float] = []
    if isinstance(default, list) and isinstance(value, list):
        numbers = value
    elif type(default) is int and isinstance(value, int):
        numbers = [value]
    most = _LARGEST.get(key, _LARGEST_COUNT)
    if (
        not isinstance(value, type(default))
        or isinstance(value, bool) != isinstance(default, bool)
        or (isinstance(value, list) and not 0 < len(value) <= _LONGEST_LIST)
        or not all(0 < number <= most for number in numbers)
    ):
        raise _ValueOutOfBoundsError(
            f"{part}.{key} is {reprlib.repr(value)} instead of a value such as {default!r}"
        )


def _require_bounded(config: JsonObject, filled: Configuration) -> None:
    """Raises ValueError for what would make transformers allocate or download more than weights."""
    codec, decoder = filled["audio_encoder"], filled["decoder"]
    if math.prod(codec["upsampling_ratios"]) > _LARGEST_COUNT:
        raise _ValueOutOfBoundsError("audio_encoder.upsampling_ratios multiply to too many samples")
    dilation = codec["dilation_growth_rate"] ** (codec["num_residual_layers"] - 1)
    if dilation > _LARGEST["kernel_size"]:
        raise _ValueOutOfBoundsError("audio_encoder.dilation_growth_rate is too large")
    width = config.get("audio_encoder", {}).get("codebook_dim") or codec["hidden_size"]
    _require_kind("audio_encoder", "codebook_dim", width, codec["hidden_size"])
    entries = decoder["num_codebooks"] * codec["codebook_size"] * width
    positions = decoder["max_position_embeddings"] * decoder["hidden_size"]
    if entries > _LARGEST_TABLE or positions > _LARGEST_TABLE:
        raise _ValueOutOfBoundsError("the table of positions or of codes is too large")
    for part in (config, *(config.get(name) or {} for name in _DEFAULTS)):
        if "num_labels" in part:  # of classifiers; transformers makes a name for each
            _require_kind("config", "num_labels", part["num_labels"], 2)
        for key in ("attn_implementation", "_attn_implementation"):  # may be code on the Hub
            if "/" in str(part.get(key)):
                raise _ValueOutOfBoundsError(f"{key} names code on the Hub")


def check(name: str, config: Configuration, folder: Path | None = None) -> None:
    """Requires that text encoder, decoder and codec fit each other, and `folder`'s processor.

    Raises:
        RequestError: they do not; the sentence names the two values.
        UnusableError: the processor's file cannot be read.
    """
    codec, decoder = config["audio_encoder"], config["decoder"]
    if codec["model_type"] != "encodec" or config["text_encoder"]["model_type"] != "t5":
        kinds = f"{config['text_encoder']['model_type']} and {codec['model_type']}"
        raise _misfit(name, f"its text encoder and codec must be t5 and encodec, not {kinds}")
    channels, hop = decoder["audio_channels"], math.prod(codec["upsampling_ratios"])
    if channels not in (1, 2) or codec["audio_channels"] != 1:
        raise _misfit(
            name,
            f"its decoder makes {channels} channels and its codec takes {codec['audio_channels']} "
            "at a time, but it must be 1 or 2 and 1",
        )
    if codec["sampling_rate"] % hop:
        raise _misfit(
            name, f"{codec['sampling_rate']} Hz is no whole number of {hop}-sample frames"
        )
    if decoder["vocab_size"] != codec["codebook_size"]:
        raise _misfit(
            name,
            f"its decoder chooses among {decoder['vocab_size']} codes and its codec has "
            f"{codec['codebook_size']}",
        )
    codebooks = _codebooks(codec) * channels
    if decoder["num_codebooks"] != codebooks:
        raise _misfit(
            name,
            f"its decoder writes {decoder['num_codebooks']} codebooks and its codec reads "
            f"{codebooks}",
        )
    if folder:
        _check_processor(name, config, folder)


def extractors(folder: Path) -> Iterator[dict[str, object]]:
    """The feature extractor's configuration, from each of the files that may hold it.

    Read as it is: the class of a melody checkpoint's cannot be had without torchaudio.
    """
    for file in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if file.is_file():
            try:
                values = file_checks.read_object(file)
                held = values.get("feature_extractor", values)
                if not isinstance(held, dict):
                    raise ValueError("it holds no feature extractor")
            except (OSError, ValueError) as error:
                why = f"{file.name} cannot be read ({error})"
                raise UnusableError(why, "copy or save the processor again") from error
            yield held


def _check_processor(name: str, config: Configuration, folder: Path) -> None:
    """The feature extractor's sampling rate, where it states one.

    Its channels are not checked: clips never go through it, and transformers runs a stereo
    checkpoint with the processor of a mono one too.
    """
    for values in extractors(folder):
        if config["melody"]:
            _check_melody(name, config, values)
            continue
        rate, codec_rate = values.get("sampling_rate"), config["audio_encoder"]["sampling_rate"]
        if rate not in (None, codec_rate):
            stated = reprlib.repr(rate)
            raise _misfit(name, f"its processor expects {stated} Hz and its codec {codec_rate} Hz")


def _check_melody(name: str, config: Configuration, extractor: Mapping[str, object]) -> None:
    """A melody's feature extractor has a rate of its own, and pitch classes for channels."""
    numbers: dict[str, int] = {}
    for key in ("sampling_rate", "n_fft", "hop_length", "num_chroma"):
        value = extractor.get(key, 1)
        if type(value) is not int or not 0 < value <= 2**20:
            stated = reprlib.repr(value)
            raise _misfit(name, f"its feature extractor has a {key} of {stated}")
        numbers[key] = value
    window, hop = numbers["n_fft"], numbers["hop_length"]
    if window > 2**16 or window > _MOST_OVERLAP * hop:
        raise _misfit(name, f"its feature extractor has windows of {window} samples every {hop}")
    classes, needed = extractor.get("num_chroma", 12), config["melody"]["num_chroma"]
    if classes != needed:
        raise _misfit(name, f"its processor has {classes} pitch classes and its decoder {needed}")


def _misfit(name: str, why: str) -> RequestError:
    return RequestError(
        f"The parts of {name} do not fit: {why}. Choose another checkpoint.", "checkpoint"
    )


def _codebooks(codec: AudioEncoder) -> int:
    """Codebooks a channel: how many the codec's largest bandwidth (kbit/s) pays for."""
    frame_rate = math.ceil(codec["sampling_rate"] / math.prod(codec["upsampling_ratios"]))
    bits = math.ceil(math.log2(codec["codebook_size"]))
    return int(1000 * codec["target_bandwidths"][-1] // (frame_rate * bits))


def read_generation(folder: Path) -> dict[str, object]:
    """What `folder`'s `generation_config.json` holds; empty where there is no readable one."""
    try:
        return file_checks.read_object(folder / GENERATION_FILE)
    except (OSError, ValueError):
        return {}


def own_defaults(generation: Mapping[str, object], config: Configuration) -> dict[str, object]:
    """The settings that `generation` states, by the request's names.

    Only what the file states counts: transformers would fill the rest with values of its own (a
    top-k of 50), which nobody chose for this checkpoint. A value that no request may have is left
    out. The stated length is the longest that the checkpoint was made for, so it is a default only
    where it is shorter than the app's own.

    Args:
        generation: what `generation_config.json` holds; it is not trusted.
        config: the checkpoint's configuration, which says how long a step is.
    """
    values: dict[str, object] = {name: generation.get(name) for name in CHECKPOINT_FIELDS}
    values["duration_s"] = _length_s(generation, config)
    top_p = values["top_p"]
    if isinstance(top_p, (int, float)) and top_p >= 1:
        values["top_p"] = 0.0  # transformers' word for off
    return {
        name: valid for name, value in values.items() if (valid := _valid(name, value)) is not None
    }


def _valid(name: str, value: object) -> object:
    """The value as a request has it; None where it is not valid."""
    if value is None:
        return None
    try:
        valid: object = coerce(name, value)
        return valid
    except RequestError:
        return None


def _length_s(generation: Mapping[str, object], config: Configuration) -> float | None:
    codec, decoder = config["audio_encoder"], config["decoder"]
    steps = generation.get("max_new_tokens") or generation.get("max_length")
    if type(steps) is not int:
        return None
    frames = steps - (decoder["num_codebooks"] // decoder["audio_channels"] - 1)
    length_s = frames * math.prod(codec["upsampling_ratios"]) / codec["sampling_rate"]
    return length_s if length_s < GenerationRequest.duration_s else None
