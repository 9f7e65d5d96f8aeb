"""A checkpoint's configuration: what its `config.json` says and what follows from it.

The number of parameters, the memory a model will need and whether its parts fit each other are all
known from the configuration, before a weight is read and without importing transformers. The
counts equal those of the models that transformers builds; a test compares them.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from musicgen_ui.audio import untrusted
from musicgen_ui.checkpoints.unusable import Unusable, check_files
from musicgen_ui.errors import RequestError
from musicgen_ui.request import WINDOW_S

# "text_encoder", "audio_encoder", "decoder", and "melody", which is empty without melody
Configuration = dict[str, dict[str, Any]]

# Meta's sizes: layers, hidden size, heads, feed-forward size of the decoder. The rest is the same.
META_SIZES = {
    "small": (24, 1024, 16, 4096),
    "medium": (48, 1536, 24, 6144),
    "large": (48, 2048, 32, 8192),
}
# Meta's checkpoints, each mono and stereo, by the word that names them: size, and whether they
# follow melodies.
META_WORDS = {size: (size, False) for size in META_SIZES} | {
    "melody": ("medium", True),
    "melody-large": ("large", True),
}
MELODY = {"num_chroma": 12, "chroma_length": 235}  # pitch classes, and columns of them in 30 s
# What a configuration means where it is silent: Meta's values.
_DEFAULTS: dict[str, dict[str, Any]] = {
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


_MOST_OF_ANYTHING = 2**20
_MOST = {  # of what is counted in a configuration, far beyond any model
    **dict.fromkeys(("num_layers", "num_hidden_layers", "num_heads", "num_attention_heads"), 1024),
    **dict.fromkeys(("num_lstm_layers", "num_residual_layers", "num_codebooks"), 64),
    **dict.fromkeys(("kernel_size", "last_kernel_size", "residual_kernel_size"), 1024),
    **dict.fromkeys(("upsampling_ratios", "compress", "dilation_growth_rate"), 1024),
    **dict.fromkeys(("d_model", "d_kv", "hidden_size", "codebook_dim", "num_filters"), 2**15),
    "target_bandwidths": 10_000,
    "chroma_length": 2**15,
    "num_labels": 1024,
}
_LONGEST_LIST = 32
_MOST_OVERLAP = 16  # windows that a sample of a melody is in; published ones have 4
_MOST_ENTRIES = 2**27  # of a table that is no weight: half a GB


def decoder_defaults(keys: Iterable[str]) -> dict[str, Any]:
    """What a decoder's configuration means where it is silent."""
    return {key: _DEFAULTS["decoder"][key] for key in keys}


def meta(word: str, stereo: bool) -> Configuration:
    """The configuration of one of Meta's checkpoints: "small", "melody" …, see `META_WORDS`."""
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


def read(name: str, file: Path) -> Configuration:
    """`config.json`, every value that this module needs filled in.

    Raises:
        RequestError: it cannot be read, or is not MusicGen's.
    """
    try:
        check_files([file])
        config = untrusted.read_object(file)
    except Unusable as error:
        raise RequestError(f"{name} cannot be used: {error}.", "checkpoint") from error
    except (OSError, ValueError) as error:
        raise _unreadable(name) from error
    return of(name, config)


def of(name: str, config: Any) -> Configuration:
    """What `config.json` holds, every value that this module needs filled in.

    Raises:
        RequestError: it is not MusicGen's.
    """
    try:
        kind = config["model_type"]
        if kind in ("musicgen", "musicgen_melody"):
            return _filled(config, melody=kind == "musicgen_melody")
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
        f"{name} is no checkpoint: it has no readable config.json. Choose a folder with a "
        'checkpoint in transformers\' format, or "bundled".',
        "checkpoint",
    )


def _filled(config: dict[str, Any], melody: bool) -> Configuration:
    filled = {part: {**values, **config.get(part, {})} for part, values in _DEFAULTS.items()}
    filled["melody"] = {key: config.get(key, value) for key, value in MELODY.items() if melody}
    for part, values in (_DEFAULTS | {"melody": MELODY if melody else {}}).items():
        for key, default in values.items():
            _hold_kind(part, key, filled[part][key], default)
    _hold_calm(config, filled)
    return filled


class _ValueOutOfBoundsError(ValueError):
    """A configuration has a value that no model has."""


def _hold_kind(part: str, key: str, value: Any, default: Any) -> None:
    """Raises ValueError unless `value` is of its default's kind; numbers must be positive and
    within `_MOST`, before anything is computed with them."""
    numbers = value if isinstance(default, list) else [value] if type(default) is int else []
    most = _MOST.get(key, _MOST_OF_ANYTHING)
    if (
        not isinstance(value, type(default))
        or isinstance(value, bool) != isinstance(default, bool)
        or (isinstance(value, list) and not 0 < len(value) <= _LONGEST_LIST)
        or not all(0 < number <= most for number in numbers)
    ):
        raise _ValueOutOfBoundsError(
            f"{part}.{key} is {reprlib.repr(value)} instead of a value such as {default!r}"
        )


def _hold_calm(config: dict[str, Any], filled: Configuration) -> None:
    """Raises ValueError for what transformers would make large, or would fetch, beside weights."""
    codec, decoder = filled["audio_encoder"], filled["decoder"]
    if math.prod(codec["upsampling_ratios"]) > _MOST_OF_ANYTHING:
        raise _ValueOutOfBoundsError("audio_encoder.upsampling_ratios are too many samples")
    dilation = codec["dilation_growth_rate"] ** (codec["num_residual_layers"] - 1)
    if dilation > _MOST["kernel_size"]:
        raise _ValueOutOfBoundsError("audio_encoder.dilation_growth_rate is too large")
    width = config.get("audio_encoder", {}).get("codebook_dim") or codec["hidden_size"]
    _hold_kind("audio_encoder", "codebook_dim", width, codec["hidden_size"])
    entries = decoder["num_codebooks"] * codec["codebook_size"] * width
    positions = decoder["max_position_embeddings"] * decoder["hidden_size"]
    if entries > _MOST_ENTRIES or positions > _MOST_ENTRIES:
        raise _ValueOutOfBoundsError("the table of positions or of codes is too large")
    for part in (config, *(config.get(name) or {} for name in _DEFAULTS)):
        if "num_labels" in part:  # of classifiers; transformers makes a name for each
            _hold_kind("config", "num_labels", part["num_labels"], 2)
        for key in ("attn_implementation", "_attn_implementation"):  # may be code on the Hub
            if "/" in str(part.get(key)):
                raise _ValueOutOfBoundsError(f"{key} names code on the Hub")


def check(name: str, config: Configuration, folder: Path | None = None) -> None:
    """Holds that text encoder, decoder and codec fit, and `folder`'s processor with them.

    Raises:
        RequestError: they do not; the sentence names the two values.
        Unusable: the processor's file cannot be read.
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


def extractors(folder: Path) -> Iterator[dict[str, Any]]:
    """The feature extractor's configuration, from each of the files that may hold it.

    Read as it is: the class of a melody checkpoint's cannot be had without torchaudio.
    """
    for file in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if file.is_file():
            try:
                values = untrusted.read_object(file)
                held = values.get("feature_extractor", values)
                if not isinstance(held, dict):
                    raise ValueError("it holds no feature extractor")
            except (OSError, ValueError) as error:
                why = f"{file.name} cannot be read ({error})"
                raise Unusable(why, "copy or save the processor again") from error
            yield held


def _check_processor(name: str, config: Configuration, folder: Path) -> None:
    """The feature extractor's own idea of the sampling rate, where there is one.

    Not that of the channels: clips never go through it, and transformers plays a stereo checkpoint
    with a mono one's processor as well.
    """
    for values in extractors(folder):
        if config["melody"]:
            _check_melody(name, config, values)
            continue
        rate, wanted = values.get("sampling_rate"), config["audio_encoder"]["sampling_rate"]
        if rate not in (None, wanted):
            said = reprlib.repr(rate)
            raise _misfit(name, f"its processor expects {said} Hz and its codec {wanted} Hz")


def _check_melody(name: str, config: Configuration, extractor: dict[str, Any]) -> None:
    """A melody's feature extractor has a rate of its own, and pitch classes for channels."""
    for key in ("sampling_rate", "n_fft", "hop_length", "num_chroma"):
        value = extractor.get(key, 1)
        if type(value) is not int or not 0 < value <= 2**20:
            said = reprlib.repr(value)
            raise _misfit(name, f"its feature extractor has a {key} of {said}")
    window, hop = extractor.get("n_fft", 1), extractor.get("hop_length", 1)
    if window > 2**16 or window > _MOST_OVERLAP * hop:
        raise _misfit(name, f"its feature extractor has windows of {window} samples every {hop}")
    classes, wanted = extractor.get("num_chroma", 12), config["melody"]["num_chroma"]
    if classes != wanted:
        raise _misfit(name, f"its processor hears {classes} pitch classes and its decoder {wanted}")


def _misfit(name: str, why: str) -> RequestError:
    return RequestError(
        f"The parts of {name} do not fit: {why}. Choose another checkpoint.", "checkpoint"
    )


def _codebooks(codec: dict[str, Any]) -> int:
    """Codebooks a channel: how many the codec's largest bandwidth (kbit/s) pays for."""
    frame_rate = math.ceil(codec["sampling_rate"] / math.prod(codec["upsampling_ratios"]))
    bits = math.ceil(math.log2(codec["codebook_size"]))
    return int(1000 * codec["target_bandwidths"][-1] // (frame_rate * bits))


def estimate_bytes(config: Configuration, bytes_a_weight: float = 4) -> int:
    """Memory for the weights and for the keys and values of one take of `WINDOW_S` seconds.

    With guidance a take has two rows; `bytes_a_weight` is 4 in float32, 2 in half precision.
    """
    codec, decoder = config["audio_encoder"], config["decoder"]
    frames = WINDOW_S * codec["sampling_rate"] / math.prod(codec["upsampling_ratios"])
    positions = frames + config["melody"].get("chroma_length", 0)
    cached = 2 * 2 * decoder["num_hidden_layers"] * decoder["hidden_size"] * positions
    return round((count_parameters(config) + cached) * bytes_a_weight)


def count_parameters(config: Configuration) -> int:
    """The number of parameters of text encoder, decoder, codec and the projection between."""
    text, decoder = config["text_encoder"], config["decoder"]
    d, hidden = text["d_model"], decoder["hidden_size"]
    projection = 0 if d == hidden else d * hidden + hidden
    chroma = config["melody"]["num_chroma"] if config["melody"] else hidden
    return (
        projection
        + (0 if chroma == hidden else (chroma + 1) * hidden)
        + _count_text(text)
        + count_decoder(config)
        + _count_codec(config["audio_encoder"])
    )


def _count_text(text: dict[str, Any]) -> int:
    d, inner = text["d_model"], text["num_heads"] * text["d_kv"]
    feed_forward = (3 if text["feed_forward_proj"].startswith("gated") else 2) * d * text["d_ff"]
    layers = text["num_layers"] * (4 * d * inner + feed_forward + 2 * d)
    return (
        text["vocab_size"] * d
        + layers
        + text["relative_attention_num_buckets"] * text["num_heads"]
        + d
    )


def count_decoder(config: Configuration) -> int:
    """The number of the decoder's parameters."""
    decoder, attentions = config["decoder"], 1 if config["melody"] else 2
    hidden, codes = decoder["hidden_size"], decoder["vocab_size"]
    layer = attentions * (4 * hidden**2 + 2 * hidden)  # four matrices and a norm
    layer += 2 * hidden * decoder["ffn_dim"] + 2 * hidden
    heads_and_embeddings = decoder["num_codebooks"] * (2 * codes + 1) * hidden
    return decoder["num_hidden_layers"] * layer + heads_and_embeddings + 2 * hidden


def _count_codec(codec: dict[str, Any]) -> int:
    def conv(inputs: int, outputs: int, kernel: int) -> int:
        return inputs * outputs * kernel + 2 * outputs  # a bias and a norm a channel

    def resnet(n: int) -> int:
        inner = n // codec["compress"]
        block = conv(n, inner, codec["residual_kernel_size"]) + conv(inner, n, 1)
        shortcut = conv(n, n, 1) if codec["use_conv_shortcut"] else 0
        return codec["num_residual_layers"] * (block + shortcut)

    width, total = codec["num_filters"], 0
    for ratio in reversed(codec["upsampling_ratios"]):
        down = conv(width, 2 * width, 2 * ratio)
        # Upwards a layer has its biases on the narrow side and its norms on the wide one.
        up = 2 * width * width * 2 * ratio + width + 2 * width
        total += 2 * resnet(width) + down + up
        width *= 2
    total += 2 * codec["num_lstm_layers"] * (8 * width**2 + 8 * width)
    total += conv(codec["audio_channels"], codec["num_filters"], codec["kernel_size"])
    total += conv(codec["num_filters"], codec["audio_channels"], codec["last_kernel_size"])
    total += conv(width, codec["hidden_size"], codec["last_kernel_size"])
    return total + conv(codec["hidden_size"], width, codec["kernel_size"])


def size_in_words(n_bytes: float) -> str:
    """ "2.4 GB", or "17 MB" below one GB."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
