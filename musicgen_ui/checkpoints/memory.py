"""The memory that a checkpoint needs, known from its configuration before anything is loaded.

The counts of parameters equal those of the models that transformers builds; a test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from musicgen_ui.checkpoints.config import prefixed
from musicgen_ui.checkpoints.config_types import (
    AudioEncoder,
    Configuration,
    TextEncoder,
)
from musicgen_ui.errors import RequestError

if TYPE_CHECKING:
    from musicgen_ui.engine.device import Place
    from musicgen_ui.engine.style import Mert, Style

# The precisions to suggest for each device, the most exact first.
PRECISIONS = {"cuda": ("float32", "bfloat16"), "mps": ("float32",), "cpu": ("float32", "int8")}


def require_fits(
    name: str,
    config: Configuration,
    place: Place,
    budget_bytes: int,
    others: Mapping[str, Configuration],
) -> None:
    """Requires that a checkpoint's weights fit the memory for models.

    Args:
        name: of the checkpoint, for the sentence.
        config: of the checkpoint.
        place: the device and precision that it would run in.
        budget_bytes: what all models may use together.
        others: checkpoints to suggest instead, by name.

    Raises:
        RequestError: they do not fit; the sentence names a precision, or checkpoints, that would.
    """
    needed = weight_bytes(config, place.precision)
    if needed <= budget_bytes:
        return
    advice = _advice(config, place, budget_bytes, others)
    raise RequestError(
        f"{name} needs {size_in_words(needed)} of memory in {place.precision} and models may use "
        f"{size_in_words(budget_bytes)} here: {advice}.",
        "checkpoint",
    )


def _advice(
    config: Configuration, place: Place, budget_bytes: int, others: Mapping[str, Configuration]
) -> str:
    kind = place.device.partition(":")[0]
    smaller = [
        f"start the app with --precision {precision}, which needs {size_in_words(needed)}"
        for precision in PRECISIONS[kind]
        if (needed := weight_bytes(config, precision)) <= budget_bytes
    ]
    needs = {word: weight_bytes(other, place.precision) for word, other in others.items()}
    fitting = sorted((needed, word) for word, needed in needs.items() if needed <= budget_bytes)
    largest = [f"{word} ({size_in_words(needed)})" for needed, word in fitting[-1:-4:-1]]
    choices = [f"choose one that fits, such as {', '.join(largest)}"] if largest else []
    return ", or ".join([*smaller[:1], *choices]) or "give models more memory by --memory-gb"


def weight_bytes(config: Configuration, precision: str) -> int:
    """Memory for the weights alone."""
    from musicgen_ui.engine.device import BYTES_A_WEIGHT  # torch: seconds

    return round(count_parameters(config) * BYTES_A_WEIGHT[precision])


def estimate_bytes(config: Configuration, bytes_a_weight: float = 4) -> int:
    """Memory for the weights and for the KV cache of one take as long as the window.

    With guidance a take has two rows, with words and a style three; `bytes_a_weight` is 4 in
    float32, 2 in half precision.
    """
    codec, decoder = config["audio_encoder"], config["decoder"]
    frame_rate = codec["sampling_rate"] / math.prod(codec["upsampling_ratios"])
    frames = config["training"]["window_s"] * frame_rate
    positions: float = frames + config["melody"].get("chroma_length", 0)
    rows = 3 if config["style"] else 2
    cached: float = 2 * rows * decoder["num_hidden_layers"] * decoder["hidden_size"] * positions
    return round((count_parameters(config) + cached) * bytes_a_weight)


def count_parameters(config: Configuration) -> int:
    """The number of parameters of text encoder, decoder, codec, style and the projections."""
    text, decoder = config["text_encoder"], config["decoder"]
    d, hidden = text["d_model"], decoder["hidden_size"]
    projection = 0 if d == hidden else d * hidden + hidden
    style = config["style"]
    audio = config["melody"].get("num_chroma", style.get("hidden_size", hidden))
    return (
        projection
        + (0 if audio == hidden else (audio + 1) * hidden)
        + (_count_style(style) + _count_mert(style["mert"]) if style else 0)
        + _count_text(text)
        + count_decoder(config)
        + _count_codec(config["audio_encoder"])
    )


def _count_text(text: TextEncoder) -> int:
    d: int = text["d_model"]
    inner: int = text["num_heads"] * text["d_kv"]
    feed_forward = (3 if text["feed_forward_proj"].startswith("gated") else 2) * d * text["d_ff"]
    layers: int = text["num_layers"] * (4 * d * inner + feed_forward + 2 * d)
    tables: int = text["relative_attention_num_buckets"] * text["num_heads"]
    tables += text["vocab_size"] * d
    return tables + layers + d


def count_decoder(config: Configuration) -> int:
    """The number of the decoder's parameters."""
    decoder, attentions = config["decoder"], 1 if prefixed(config) else 2
    hidden: int = decoder["hidden_size"]
    codes: int = decoder["vocab_size"]
    layer: int = attentions * (4 * hidden**2 + 2 * hidden)  # four matrices and a norm
    layer += 2 * hidden * decoder["ffn_dim"] + 2 * hidden
    heads_and_embeddings: int = decoder["num_codebooks"] * (2 * codes + 1) * hidden
    layers: int = decoder["num_hidden_layers"] * layer
    return layers + heads_and_embeddings + 2 * hidden


def _count_style(style: Style) -> int:
    hidden: int = style["hidden_size"]
    layers: int = style["num_hidden_layers"] * (12 * hidden**2 + 4 * hidden)
    codes: int = style["num_quantizers"] * style["codebook_size"] * hidden
    features: int = style["mert"]["hidden_size"]
    return (features + 1) * hidden + layers + 2 * hidden + codes


def _count_mert(mert: Mert) -> int:
    hidden: int = mert["hidden_size"]
    inner: int = mert["intermediate_size"]
    widths: list[int] = mert["conv_dim"]
    bias = 1 if mert["conv_bias"] else 0
    kernels: list[int] = mert["conv_kernel"]
    convolutions = sum(
        (before * kernel + bias) * width
        for before, width, kernel in zip([1, *widths[:-1]], widths, kernels, strict=True)
    )
    projection = 2 * widths[-1] + (widths[-1] + 1) * hidden
    kernel: int = mert["num_conv_pos_embeddings"]
    groups: int = mert["num_conv_pos_embedding_groups"]
    positions = hidden * (hidden // groups) * kernel + kernel
    attention = 4 * (hidden + 1) * hidden
    layer = attention + 2 * hidden * inner + inner + hidden + 4 * hidden
    layers: int = mert["num_hidden_layers"] * layer
    # The first convolution's norm, that of positions' bias and the encoder's own norm.
    return convolutions + 2 * widths[0] + projection + positions + hidden + 2 * hidden + layers


def _count_codec(codec: AudioEncoder) -> int:
    def conv(inputs: int, outputs: int, kernel: int) -> int:
        return inputs * outputs * kernel + 2 * outputs  # a bias and a norm a channel

    def resnet(n: int) -> int:
        inner: int = n // codec["compress"]
        block = conv(n, inner, codec["residual_kernel_size"]) + conv(inner, n, 1)
        shortcut = conv(n, n, 1) if codec["use_conv_shortcut"] else 0
        layers: int = codec["num_residual_layers"]
        return layers * (block + shortcut)

    width: int = codec["num_filters"]
    total = 0
    ratios: list[int] = codec["upsampling_ratios"]
    for ratio in reversed(ratios):
        down = conv(width, 2 * width, 2 * ratio)
        # Upwards a layer has its biases on the narrow side and its norms on the wide one.
        up = 2 * width * width * 2 * ratio + width + 2 * width
        total += 2 * resnet(width) + down + up
        width *= 2
    lstm_layers: int = codec["num_lstm_layers"]
    total += 2 * lstm_layers * (8 * width**2 + 8 * width)
    total += conv(codec["audio_channels"], codec["num_filters"], codec["kernel_size"])
    total += conv(codec["num_filters"], codec["audio_channels"], codec["last_kernel_size"])
    total += conv(width, codec["hidden_size"], codec["last_kernel_size"])
    return total + conv(codec["hidden_size"], width, codec["kernel_size"])


def size_in_words(n_bytes: float) -> str:
    """ "2.4 GB", or "17 MB" below one GB."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
