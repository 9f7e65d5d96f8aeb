"""What `config.parse` makes of a `config.json`: the values that the app uses, all filled in."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:  # torch
    from musicgen_ui.engine.style import Style


class TextEncoder(TypedDict):
    """T5."""

    model_type: str
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    feed_forward_proj: str


class AudioEncoder(TypedDict):
    """EnCodec."""

    model_type: str
    sampling_rate: int  # Hz
    audio_channels: int
    num_filters: int
    num_residual_layers: int
    upsampling_ratios: list[int]
    hidden_size: int
    kernel_size: int
    last_kernel_size: int
    residual_kernel_size: int
    compress: int
    num_lstm_layers: int
    use_conv_shortcut: bool
    dilation_growth_rate: int
    codebook_size: int
    target_bandwidths: list[float]  # kbit/s


class DecoderValues(TypedDict):
    """The language model."""

    vocab_size: int
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_dim: int
    num_codebooks: int
    audio_channels: int
    max_position_embeddings: int


class Melody(TypedDict, total=False):
    """Of a checkpoint that follows melodies; else empty."""

    num_chroma: int  # pitch classes
    chroma_length: int  # columns of them in 30 s


class Training(TypedDict):
    """The training examples."""

    window_s: float
    sound_effects: bool


class Configuration(TypedDict):
    """Of a whole checkpoint."""

    text_encoder: TextEncoder
    audio_encoder: AudioEncoder
    decoder: DecoderValues
    melody: Melody
    style: Style
    training: Training
